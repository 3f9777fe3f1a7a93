from mindiffedit.runtime.native import available, instruction_set

__all__ = ["available", "instruction_set"]

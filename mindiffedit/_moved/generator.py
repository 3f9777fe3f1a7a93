from mindiffedit.noise.generator import Generator

__all__ = ["Generator"]

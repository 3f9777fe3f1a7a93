from mindiffedit.runtime.kernels import missing_kernels, portable_kernels

__all__ = ["missing_kernels", "portable_kernels"]

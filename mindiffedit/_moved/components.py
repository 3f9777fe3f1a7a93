from mindiffedit.checkpoints.components import Observer, Viewer

__all__ = ["Observer", "Viewer"]

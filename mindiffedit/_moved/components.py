from mindiffedit.pipeline import Observer

Viewer = Observer

__all__ = ["Observer", "Viewer"]

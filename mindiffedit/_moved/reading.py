from mindiffedit.images.reading import load_image

__all__ = ["load_image"]

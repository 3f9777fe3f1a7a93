from mindiffedit.images.pictures import make_image_grid

__all__ = ["make_image_grid"]

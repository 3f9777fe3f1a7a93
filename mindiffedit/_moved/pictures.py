from mindiffedit.images.sheets import make_image_grid

__all__ = ["make_image_grid"]

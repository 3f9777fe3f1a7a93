from mindiffedit.images.strips import AnimatedStrip

__all__ = ["AnimatedStrip"]

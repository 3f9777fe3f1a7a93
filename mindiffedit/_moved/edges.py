from mindiffedit.images.edges import follow_edges, guides_of

__all__ = ["follow_edges", "guides_of"]

"""The command ``mindiffedit``."""

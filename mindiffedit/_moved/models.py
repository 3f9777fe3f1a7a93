from mindiffedit.checkpoints.models import load_component, load_components

__all__ = ["load_component", "load_components"]

"""From a name to components with weights, and back."""

from mindiffedit.checkpoints.layout import CheckpointError, WeightsError

__all__ = ["CheckpointError", "WeightsError"]

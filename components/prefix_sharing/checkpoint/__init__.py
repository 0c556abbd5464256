"""What a run starts from and what it takes to continue one, whatever library the model is of."""

from prefix_sharing.checkpoint.state import (
    Checkpoint,
    TrainingState,
    full_weights,
    load_training_state,
    set_full_weights,
    training_state,
)

__all__ = [
    "Checkpoint",
    "TrainingState",
    "full_weights",
    "load_training_state",
    "set_full_weights",
    "training_state",
]

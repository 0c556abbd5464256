"""What a run starts from and what it takes to continue one, whatever library the model is of."""

from prefix_sharing.checkpoint.state import (
    Checkpoint,
    complete_directory,
    complete_file,
    full_weights,
    remove_unfinished,
    set_full_weights,
)
from prefix_sharing.checkpoint.training import (
    TrainingCheckpoint,
    TrainingCheckpoints,
    find_checkpoints,
    is_checkpoint,
    load_checkpoint_into,
    load_optimizer_state_into,
    newest_checkpoint,
    read_checkpoint,
)

__all__ = [
    "Checkpoint",
    "TrainingCheckpoint",
    "TrainingCheckpoints",
    "complete_directory",
    "complete_file",
    "find_checkpoints",
    "full_weights",
    "is_checkpoint",
    "load_checkpoint_into",
    "load_optimizer_state_into",
    "newest_checkpoint",
    "read_checkpoint",
    "remove_unfinished",
    "set_full_weights",
]

"""What the recipes call: config, set-up, steps, metrics, checkpoints, and running on several processes."""

from prefix_sharing.training.adapters import trainable_parameters
from prefix_sharing.training.checkpoint import (
    load_checkpoint,
    load_trained_checkpoint,
    load_training_state,
    load_weights,
    save_checkpoint,
)
from prefix_sharing.training.config import DistributedConfig, TrainingConfig, check_config, parse
from prefix_sharing.training.curves import draw_curves
from prefix_sharing.training.distributed import (
    device_mesh,
    init_process_group,
    is_rank_zero,
    materialize,
    reshard,
    shard_model,
)
from prefix_sharing.training.evaluation import Evaluation, evaluate
from prefix_sharing.training.margins import report_margins
from prefix_sharing.training.memory import memory_by_part, peak_memory
from prefix_sharing.training.metrics import StepMetrics
from prefix_sharing.training.plan import build_loader, build_plan, build_val_plan, log_plan
from prefix_sharing.training.setup import (
    build_dataset,
    build_lr_scheduler,
    build_model,
    build_profiler,
    clip_grad_norm,
    compute_dtype,
    set_up_device,
    set_up_logging,
    summarize_run,
)

__all__ = [
    "DistributedConfig",
    "Evaluation",
    "StepMetrics",
    "TrainingConfig",
    "build_dataset",
    "build_loader",
    "build_lr_scheduler",
    "build_model",
    "build_plan",
    "build_profiler",
    "build_val_plan",
    "check_config",
    "clip_grad_norm",
    "compute_dtype",
    "device_mesh",
    "draw_curves",
    "evaluate",
    "init_process_group",
    "is_rank_zero",
    "load_checkpoint",
    "load_trained_checkpoint",
    "load_training_state",
    "load_weights",
    "log_plan",
    "materialize",
    "memory_by_part",
    "parse",
    "peak_memory",
    "report_margins",
    "reshard",
    "save_checkpoint",
    "set_up_device",
    "set_up_logging",
    "shard_model",
    "summarize_run",
    "trainable_parameters",
]

"""What the recipes call: set-up from the config, data, the parts of a step, metrics, evaluation."""

from prefix_sharing.run.data import build_datasets, build_loader, build_plan, build_val_plan, log_plan
from prefix_sharing.run.evaluation import Evaluation, evaluate
from prefix_sharing.run.metrics import StepMetrics
from prefix_sharing.run.setup import (
    build_loss,
    build_lr_scheduler,
    build_model,
    build_profiler,
    set_up_device,
    set_up_logging,
    summarize_run,
)

__all__ = [
    "Evaluation",
    "StepMetrics",
    "build_datasets",
    "build_loader",
    "build_loss",
    "build_lr_scheduler",
    "build_model",
    "build_plan",
    "build_profiler",
    "build_val_plan",
    "evaluate",
    "log_plan",
    "set_up_device",
    "set_up_logging",
    "summarize_run",
]

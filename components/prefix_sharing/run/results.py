"""What a run has come to, in a file of its ``output_dir`` that is there once the run is finished."""

import json
import logging
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from prefix_sharing.checkpoint import complete_file
from prefix_sharing.config.secrets import without_secrets
from prefix_sharing.errors import ConfigError, UserError

log = logging.getLogger(__name__)

_RESULT = "result.json"

_WITHOUT_EFFECT = (
    "output_dir",
    "metric_logger",
    "profiler",
    "reference",
    "num_workers",
    "self_check",
    "save_every_n_steps",
    "keep_last_n",
    "resume",
    "overwrite_output_dir",
)
"""Keys that may change after a run is finished."""


def read_result(cfg: DictConfig) -> dict[str, Any] | None:
    """The result of a run, if it is finished.

    Args:
        cfg (DictConfig): the run's config.

    Returns:
        dict[str, Any] | None: what ``write_result`` was given: ``metrics``, and others by their names.

    Raises:
        UserError: if the run was made with another config.
    """
    file = Path(cfg.output_dir) / _RESULT
    if not file.is_file():
        return None
    result = json.loads(file.read_text(encoding="utf-8"))
    config, before = _decisive(cfg), result["config"]
    differing = [key for key in {**config, **before} if config.get(key) != before.get(key)]
    if differing:
        raise UserError(
            f"{cfg.output_dir} is finished, but was made with another {', '.join(differing)}: set that back, choose "
            "another output_dir, or remove that directory."
        )
    return result


def write_result(cfg: DictConfig, metrics: Mapping[str, float], **others: Any) -> None:
    """Writes the result of a run, which appears whole or not at all.

    Args:
        cfg (DictConfig): the run's config.
        metrics (Mapping[str, float]): what was measured.
        **others (Any): what else is to be remembered, as JSON can say it.
    """
    result = {"config": _decisive(cfg), "metrics": dict(metrics), **others}
    complete_file(Path(cfg.output_dir) / _RESULT, json.dumps(result, indent=2) + "\n")


def _decisive(cfg: DictConfig) -> dict[str, Any]:
    """What decides a run, wherever it is, as JSON can say it, secrets masked."""
    plain: Any = OmegaConf.to_container(without_secrets(cfg), resolve=True)
    plain["checkpointer"].pop("output_dir", None)
    return {key: value for key, value in plain.items() if key not in _WITHOUT_EFFECT}


def measured(cfg: DictConfig, metrics: Mapping[str, float], measure: str) -> float | None:
    """A measure of a run.

    Args:
        cfg (DictConfig): the run's config.
        metrics (Mapping[str, float]): the metrics of its result.
        measure (str): a metric's name, or ``FILE.json:path/to/number`` with a file in the run's directory; of several
            files that FILE stands for, as ``*`` does for any name, the newest.

    Returns:
        float | None: None if the run lacks it, or it is not finite.

    Raises:
        ConfigError: if a file has no such number.
    """
    pattern, _, path = measure.rpartition(":")
    value: Any = metrics.get(measure)
    if pattern.endswith(".json"):
        files = sorted(Path(cfg.output_dir).glob(pattern), key=lambda file: file.stat().st_mtime)
        if not files:
            log.info("There is no %s in %s yet", pattern, cfg.output_dir)
            return None
        try:
            value = json.loads(files[-1].read_text(encoding="utf-8"))
            for key in path.split("/"):
                value = value[int(key) if isinstance(value, list) else key]
            value = float(value)
        except (ValueError, TypeError, LookupError):
            raise ConfigError("measures", f"{files[-1]} has no number at {path}") from None
    return value if value is not None and math.isfinite(value) else None

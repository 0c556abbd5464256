"""Judging a table of answers, part by part."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from omegaconf import DictConfig, OmegaConf
from tqdm import tqdm

from prefix_sharing.config import component_name
from prefix_sharing.errors import UserError
from prefix_sharing.judging import Judge
from prefix_sharing.online.tables import RoundTable, in_parts, read_made_by, read_rows


def judged_answers(node: DictConfig, judge: Judge, where: Path) -> list[dict[str, Any]]:
    """Judges what is not judged yet of the answers in a directory.

    Args:
        node (DictConfig): the config's ``judge``.
        judge (Judge): what it builds.
        where (Path): has ``answers.parquet``; ``scores.parquet`` goes beside it.

    Returns:
        list[dict[str, Any]]: the rows of ``scores.parquet``.

    Raises:
        UserError: if there are no answers, or the judge has no verdict on any.
    """
    file = where / "answers.parquet"
    if not file.is_file():
        raise UserError(f"{file} not found; prefix_dpo_online and prefix_dpo_sample write it.")
    plain: Any = OmegaConf.to_container(node, resolve=True)
    scored = RoundTable(where / "scores.parquet", read_made_by(file) | {"judge": plain})
    if scored.is_whole:
        return scored.rows()
    rows, done = read_rows(file), {row["key"] for row in scored.rows()}
    left = [row for row in rows if row["key"] not in done]
    for some in tqdm(in_parts(left), desc=f"Judging, {where}", unit="batch"):
        verdicts = judge([json.loads(row["turns"]) for row in some], [row["texts"] for row in some])
        scored.add([row | {"scores": scores.tolist()} for row, scores in zip(some, verdicts, strict=True)])
    found = scored.finish([row["key"] for row in rows])
    if not any(np.isfinite(row["scores"]).any() for row in found):
        raise UserError(f"judge {component_name(node)} gave no verdict on any answer of {where}.")
    return found

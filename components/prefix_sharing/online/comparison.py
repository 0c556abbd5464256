"""Answers of two models to the same prompts, judged side by side."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from prefix_sharing.errors import UserError
from prefix_sharing.judging import Judge
from prefix_sharing.judging.answer_files import read_json_records
from prefix_sharing.online.length_control import control_length
from prefix_sharing.online.tables import in_parts, read_rows


@dataclass
class ModelAnswers:
    """A model's answers.

    Attributes:
        name (str): what it is called in tables.
        texts (dict[str, list[str]]): answers to each prompt, which is its turns as JSON.
        difficulty (dict[str, float]): of prompts of which it is known.
    """

    name: str
    texts: dict[str, list[str]]
    difficulty: dict[str, float]


def read_model_answers(file: Path) -> ModelAnswers:
    """Reads a model's answers.

    Args:
        file (Path): ``answers.parquet`` of a round, or JSON in AlpacaEval's format, with ``instruction`` and ``output``
            in each record and, where it is known, ``instruction_difficulty``.

    Returns:
        ModelAnswers: the answers.

    Raises:
        UserError: if there is no such file, or it has another form.
    """
    if not file.is_file():
        raise UserError(f"{file} not found; prefix_dpo_answers and prefix_dpo_online write answers.")
    if file.suffix == ".parquet":
        try:
            rows = [(json.loads(row["turns"]), row["texts"], None) for row in read_rows(file)]
        except (KeyError, TypeError, ValueError) as error:  # pyarrow's are among them
            raise UserError(f"{file} is no table of answers; give answers.parquet of a round.") from error
        found = ModelAnswers("/".join(file.resolve().parts[-3:-1]), {}, {})
    else:
        records = read_json_records(file)
        for i, record in enumerate(records):
            for key in ("instruction", "output"):
                if not isinstance(record.get(key), str):
                    raise UserError(f"{file}, record {i}: '{key}' is missing or is no text; give AlpacaEval's format.")
            difficulty = record.get("instruction_difficulty", 0.0)
            if isinstance(difficulty, bool) or not isinstance(difficulty, int | float) or not np.isfinite(difficulty):
                raise UserError(f"{file}, record {i}: 'instruction_difficulty' is no finite number.")
        rows = [
            ([{"role": "user", "content": r["instruction"]}], [r["output"]], r.get("instruction_difficulty"))
            for r in records
        ]
        found = ModelAnswers(str(records[0].get("generator") or file.stem), {}, {})
    for turns, texts, difficulty in rows:
        prompt = json.dumps(turns, sort_keys=True)
        found.texts.setdefault(prompt, []).extend(texts)
        if difficulty is not None:
            found.difficulty[prompt] = float(difficulty)
    if 0 < len(found.difficulty) < len(found.texts):
        problem = f"'instruction_difficulty' is known of {len(found.difficulty):,} of {len(found.texts):,} prompts"
        raise UserError(f"{file}: {problem}; give it for all of them or for none.")
    return found


def compare_answers(judge: Judge, model: ModelAnswers, other: ModelAnswers) -> dict[str, Any]:
    """Has a judge score the answers of two models, those to a prompt all at once.

    Args:
        judge (Judge): the judge.
        model (ModelAnswers): the one that is asked about.
        other (ModelAnswers): what it is compared with.

    Returns:
        dict[str, Any]: ``model``, ``other``; ``win_rate``, ties as halves; ``length_controlled_win_rate``, see
        ``control_length``, with lengths in characters; ``score``, ``other_score``, judged means; ``characters``,
        ``other_characters`` of an answer on average; ``num_comparisons``, and ``num_without_verdict`` beside them.

    Raises:
        UserError: if the prompts differ, or the judge has no verdict on any answer.
    """
    if model.texts.keys() != other.texts.keys():
        only = [len(a.texts.keys() - b.texts.keys()) for a, b in ((model, other), (other, model))]
        problem = f"{only[0]:,} are only in the first and {only[1]:,} only in the second"
        raise UserError(f"Answers of {model.name} and {other.name} are not to the same prompts: {problem}.")
    prompts = list(model.texts)
    scores: list[np.ndarray] = []
    for some in tqdm(in_parts(prompts), desc=f"Judging {model.name} and {other.name}", unit="batch"):
        texts = [model.texts[prompt] + other.texts[prompt] for prompt in some]
        scores += judge([json.loads(prompt) for prompt in some], texts)
    parted = [np.split(both, [len(model.texts[prompt])]) for prompt, both in zip(prompts, scores, strict=True)]
    lengths = [
        [np.array([len(text) for text in answers.texts[prompt]]) for answers in (model, other)] for prompt in prompts
    ]
    differences = _each_with_each(lengths)
    preferences = (np.sign(_each_with_each(parted)) + 1) / 2
    judged = ~np.isnan(preferences)
    if not judged.any():
        raise UserError(f"The judge has no verdict on any two answers of {model.name} and {other.name}.")
    known = model.difficulty or other.difficulty
    difficulty = np.repeat([known.get(prompt, 0.0) for prompt in prompts], [a.size * b.size for a, b in parted])
    fit = control_length(preferences[judged], differences[judged], difficulty[judged] if known else None)
    our_scores, other_scores = (np.concatenate(part) for part in zip(*parted, strict=True))
    our_lengths, other_lengths = (np.concatenate(part) for part in zip(*lengths, strict=True))
    return {
        "model": model.name,
        "other": other.name,
        "win_rate": float(preferences[judged].mean()),
        "length_controlled_win_rate": fit.win_rate,
        "score": float(np.nanmean(our_scores)),
        "other_score": float(np.nanmean(other_scores)),
        "characters": float(our_lengths.mean()),
        "other_characters": float(other_lengths.mean()),
        "num_comparisons": int(judged.sum()),
        "num_without_verdict": int((~judged).sum()),
    }


def describe_comparisons(comparisons: Sequence[dict[str, Any]]) -> str:
    """Comparisons with one other model as a table.

    Args:
        comparisons (Sequence[dict[str, Any]]): as ``compare_answers`` returns them.

    Returns:
        str: a line for each.
    """
    columns = {
        "wins": "win_rate",
        "at equal length": "length_controlled_win_rate",
        "score": "score",
        "of the other": "other_score",
        "characters": "characters",
        "of other": "other_characters",
        "comparisons": "num_comparisons",
        "no verdict": "num_without_verdict",
    }
    width = max(len("over " + comparisons[0]["other"]), *(len(found["model"]) for found in comparisons))
    lines = [f"{'over ' + comparisons[0]['other']:{width}}" + "".join(f"{title:>17}" for title in columns)]
    for found in comparisons:
        values = [found[key] for key in columns.values()]
        cells = (f"{value:,}" if isinstance(value, int) else f"{value:.3f}" for value in values)
        lines.append(f"{found['model']:{width}}" + "".join(f"{cell:>17}" for cell in cells))
    return "\n".join(lines)


def _each_with_each(values: Sequence[Sequence[np.ndarray]]) -> np.ndarray:
    """Of each answer to a prompt less that of each answer of the other model to it, over all prompts."""
    return np.concatenate([(ours[:, None] - others[None, :]).ravel() for ours, others in values])

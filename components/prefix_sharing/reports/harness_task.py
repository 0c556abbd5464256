"""Held-out pairs as a task of lm-eval: which of the two answers is more likely, for any model that it loads."""

import json
import logging
from collections import Counter
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from tqdm import tqdm

from prefix_sharing.datasets import PrefixPreferenceDataset
from prefix_sharing.datasets.answers import header_length, split_at_answer
from prefix_sharing.errors import UserError
from prefix_sharing.tokenizers import ChatTokenizer, decode_all

log = logging.getLogger(__name__)


def write_harness_task(dataset: PrefixPreferenceDataset, tokenizer: ChatTokenizer, name: str, directory: Path) -> Path:
    """Writes a multiple-choice task of lm-eval with a question for each pair, whose first choice is the chosen answer.

    Texts are those of the tokens, chat template included, so that a model is asked what it was trained on.

    Args:
        dataset (PrefixPreferenceDataset): the pairs.
        tokenizer (ChatTokenizer): what made their tokens.
        name (str): the task's name.
        directory (Path): ``<name>.yaml`` and ``<name>.jsonl`` go there, the first of which names the second.

    Returns:
        Path: the YAML file.

    Raises:
        UserError: if there is no pair that can be asked about.
    """
    header = header_length(tokenizer)
    questions: list[dict[str, Any]] = []
    left_out: Counter[str] = Counter()
    for i in tqdm(range(len(dataset)), desc=f"Writing {name}", unit=" examples", delay=5):
        responses, pairs = dataset[i], dataset.pairs(i)
        parted = [split_at_answer(response, header) for response in responses]
        for chosen, rejected in pairs:
            contexts = [decode_all(tokenizer, parted[k][0]) for k in (chosen, rejected)]
            # An answer by itself may lose the space that it begins with.
            wholes = [
                decode_all(tokenizer, responses[k].tokens[: sum(map(len, parted[k]))]) for k in (chosen, rejected)
            ]
            choices = [whole.removeprefix(contexts[0]) for whole in wholes]
            if contexts[0] != contexts[1]:
                left_out["prompts differ"] += 1
            elif not contexts[0].strip() or wholes[0] == choices[0] or wholes[1] == choices[1] or not all(choices):
                left_out["prompt and answer cannot be told apart as text"] += 1
            elif choices[0] == choices[1]:
                left_out["answers are alike as text"] += 1
            else:
                gold = len(questions) % 2  # of two that are equal, or NaN, lm-eval takes the first
                question = {"record": int(dataset.record_index[i]), "context": contexts[0]}
                questions.append(question | {"choices": choices[::-1] if gold else choices, "gold": gold})
    why = f" ({', '.join(f'{reason}: {n:,}' for reason, n in sorted(left_out.items()))})" if left_out else ""
    if not questions:
        raise UserError(f"{dataset.name} has no pair that lm-eval could be asked about{why}.")
    directory.mkdir(parents=True, exist_ok=True)
    data = (directory / f"{name}.jsonl").resolve()
    data.write_text("".join(f"{json.dumps(question)}\n" for question in questions), encoding="utf-8")
    task = {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "num_fewshot": 0,
        "doc_to_text": "context",
        "doc_to_choice": "choices",
        "doc_to_target": "gold",
        # Everything between prompt and answer is in the texts already.
        "target_delimiter": "",
        "metric_list": [
            {"metric": metric, "aggregation": "mean", "higher_is_better": True} for metric in ("acc", "acc_norm")
        ],
        "metadata": {"version": 1.0},
    }
    file = directory / f"{name}.yaml"
    OmegaConf.save(OmegaConf.create(task), file)
    log.info("%s: %s questions, %s left out%s", file, f"{len(questions):,}", f"{sum(left_out.values()):,}", why)
    return file

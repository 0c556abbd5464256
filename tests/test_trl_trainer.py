"""TRL's DPOTrainer with shared prefixes against TRL's own: the same script, the same numbers."""

import hashlib
import inspect
import json

import pytest
import torch

pytest.importorskip("trl", reason="TRL is not installed: pip install '.[trl]'")
pytest.importorskip("transformers", minversion="5.24")

import transformers  # noqa: E402
from datasets import Dataset  # noqa: E402
from trl import DPOConfig, DPOTrainer  # noqa: E402
from trl.trainer import utils  # noqa: E402
from trl.trainer.dpo_trainer import DataCollatorForPreference  # noqa: E402

from directories import make_directory  # noqa: E402
from prefix_sharing.errors import UserError  # noqa: E402
from prefix_sharing.quickstart.pairs import generate_pairs  # noqa: E402
from prefix_sharing.trl import PrefixSharingDPOTrainer  # noqa: E402

NOT_NUMBERS = {"train_runtime", "train_samples_per_second", "train_steps_per_second", "total_flos"}
TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return make_directory(tmp_path_factory.mktemp("model"))


def records(num_pairs, conversational=False, seed=0):
    pairs = list(generate_pairs(num_pairs, seed))
    if conversational:
        roles = {"prompt": "user", "chosen": "assistant", "rejected": "assistant"}
        pairs = [{key: [{"role": roles[key], "content": text}] for key, text in pair.items()} for pair in pairs]
    return Dataset.from_list(pairs)


def build(trainer_class, directory, output_dir, *, data=None, model=None, arguments=None, **options):
    defaults = {
        "output_dir": str(output_dir),
        "learning_rate": 1e-3,
        "per_device_train_batch_size": 2,
        "max_steps": 3,
        "logging_steps": 1,
        "bf16": False,
        "use_cpu": True,
        "report_to": [],
        "disable_tqdm": True,
        "save_strategy": "no",
    }
    return trainer_class(
        directory if model is None else model,
        args=DPOConfig(**defaults | options),
        train_dataset=records(40) if data is None else data,
        processing_class=transformers.AutoTokenizer.from_pretrained(directory),
        **arguments or {},
    )


def both(directory, tmp_path, **kwargs):
    """The log of a run of TRL's trainer, and of ours."""
    logs = []
    for trainer_class in (DPOTrainer, PrefixSharingDPOTrainer):
        made = {name: make() for name, make in kwargs.items() if callable(make)}
        trainer = build(trainer_class, directory, tmp_path / trainer_class.__name__, **kwargs | made)
        trainer.train()
        logs.append(trainer.state.log_history)
    return logs


def largest_difference(theirs, ours, key=None):
    assert [set(entry) for entry in ours] == [set(entry) for entry in theirs]
    differences = [
        abs(expected[name] - found[name])
        for expected, found in zip(theirs, ours, strict=True)
        for name in ({key} & set(expected) if key else {n for n in expected if not n.endswith(tuple(SPEED))})
    ]
    return max(differences)


SPEED = ("runtime", "per_second", "total_flos", "grad_norm")


@pytest.mark.parametrize("conversational", [False, True])
def test_twenty_steps_are_trls(directory, tmp_path, conversational):
    data = records(60, conversational)
    theirs, ours = both(directory, tmp_path, data=data, max_steps=20)
    print(f"loss {largest_difference(theirs, ours, 'loss'):.1e}, all {largest_difference(theirs, ours):.1e}")
    assert len(ours) == 21
    assert {"rewards/accuracies", "rewards/margins", "entropy", "logits/chosen", "mean_token_accuracy"} < set(ours[0])
    assert largest_difference(theirs, ours) < TOLERANCE

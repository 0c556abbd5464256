"""Running recipes from tests, and reading what they logged."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import torch
from omegaconf import OmegaConf

from prefix_dpo_single_device import PrefixDPORecipeSingleDevice
from prefix_sharing.config import find_config
from prefix_sharing.training import TrainingConfig, check_config, curves

# A quickstart that takes seconds: as many keys as it takes, and no more.
SHORT = {
    "dataset.num_pairs": 64,
    "dataset_val.num_pairs": 16,
    "run_val_every_n_steps": None,
    "max_steps_per_epoch": 4,
    "batch_size": 4,
    "gradient_accumulation_steps": 2,
}


def make_config(directory, name="quickstart/single_device", config_class=TrainingConfig, **overrides):
    cfg = OmegaConf.load(find_config(name))
    for key, value in (SHORT | {"output_dir": str(directory)} | overrides).items():
        OmegaConf.update(cfg, key, value, merge=False)
    return check_config(cfg, config_class)


def run_in_process(directory, recipe_class=PrefixDPORecipeSingleDevice, **overrides):
    """Runs the single-device recipe and returns it."""
    recipe = recipe_class(make_config(directory, **overrides))
    recipe.setup()
    recipe.train()
    recipe.cleanup()
    return recipe


def hf_checkpointer(directory, output_dir):
    """A config's checkpointer that reads what a run of the quickstart wrote."""
    return {
        "_component_": "torchtune.training.FullModelHFCheckpointer",
        "checkpoint_dir": str(directory),
        "checkpoint_files": ["model-00001-of-00001.safetensors"],
        "model_type": "LLAMA3",
        "output_dir": str(output_dir),
    }


def tune_run(*arguments, cwd, timeout=300):
    """``tune run`` in a process of its own, in a directory of its own."""
    command = [str(Path(sys.executable).parent / "tune"), "run", *arguments]
    environment = {**os.environ, "HF_DATASETS_CACHE": str(Path(cwd) / "datasets_cache"), "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=timeout)


def read_log(output_dir):
    """Every entry of the run's log as ``(step, metrics)``."""
    return curves.read_log(Path(output_dir) / "logs")


def training_log(output_dir):
    return [metrics for _, metrics in read_log(output_dir) if "loss" in metrics]


def eval_log(output_dir):
    return [metrics for _, metrics in read_log(output_dir) if "eval/loss" in metrics]


def evaluated_log_probs(output_dir, when="after"):
    """What the run's evaluation found of each held-out pair, ``[N, 2]``."""
    table = pq.read_table(Path(output_dir) / "margins.parquet")
    return np.stack([table[f"{which}_log_prob_{when}"].to_numpy() for which in ("chosen", "rejected")], axis=1)


def transformers_log_probs(model, dataset):
    """The same by a model of transformers, one plain sequence at a time."""
    found = np.zeros((len(dataset), 2))
    for i in range(len(dataset)):
        for k, response in enumerate(dataset[i]):
            tokens = torch.from_numpy(response.tokens)[None]
            with torch.no_grad():
                log_probs = model(tokens).logits[0, :-1].log_softmax(-1)
            picked = log_probs.gather(1, tokens[0, 1:, None])[:, 0]
            found[i, k] = picked[torch.from_numpy(response.scored[1:])].sum()
    return found


def losses(output_dir):
    return [metrics["loss"] for metrics in training_log(output_dir)]

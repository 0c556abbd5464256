"""Running recipes from tests, and reading what they logged."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import torch
from omegaconf import OmegaConf
from torchtune.models.llama3 import llama3
from torchtune.training import FullModelHFCheckpointer

from prefix_dpo_single_device import PrefixDPORecipeSingleDevice
from prefix_sharing.config import TrainingConfig, check_config, find_config
from prefix_sharing.reports import curves
from prefix_sharing.run import set_up_device
from prefix_sharing.run.signals import StopRequest
from processes import run_forked, run_on_ranks

# A quickstart that takes seconds: as many keys as it takes, and no more.
SHORT = {
    "dataset.num_pairs": 64,
    "dataset_val.num_pairs": 16,
    "run_val_every_n_steps": None,
    "num_workers": 0,
    "max_steps_per_epoch": 4,
    "batch_size": 4,
    "gradient_accumulation_steps": 2,
}

MODEL = OmegaConf.to_container(OmegaConf.load(find_config("quickstart/single_device")).model)
"""The quickstart's."""

ADAPTER = {
    "lora_attn_modules": ["q_proj", "v_proj", "output_proj"],
    "apply_lora_to_mlp": True,
    "lora_rank": 4,
    "lora_alpha": 8,
}


def as_overrides(keys):
    """Keys as they are written on a command line."""
    return [f"{key}={'null' if value is None else value}" for key, value in keys.items()]


def make_config(directory, name="quickstart/single_device", config_class=TrainingConfig, **overrides):
    cfg = OmegaConf.load(find_config(name))
    for key, value in (SHORT | {"output_dir": str(directory)} | overrides).items():
        OmegaConf.update(cfg, key, value, merge=False)
    return check_config(cfg, config_class)


def make_recipe(directory, recipe_class=PrefixDPORecipeSingleDevice, **overrides):
    """The single-device recipe, or another one, before its set-up."""
    cfg = make_config(directory, **overrides)
    return recipe_class(cfg, set_up_device(cfg))


def run_in_process(directory, recipe_class=PrefixDPORecipeSingleDevice, **overrides):
    """Runs the single-device recipe and returns it."""
    recipe = make_recipe(directory, recipe_class, **overrides)
    recipe.setup()
    recipe.train(StopRequest())
    recipe.cleanup()
    return recipe


def went_only_to(step, finished, directory):
    """Makes of a finished run one that ended after a step of which it has a checkpoint."""
    shutil.copytree(finished, directory)
    for checkpoint in (directory / "checkpoints").iterdir():
        if int(checkpoint.name.removeprefix("step_")) > step:
            shutil.rmtree(checkpoint)
    assert (directory / "checkpoints" / f"step_{step}").is_dir()
    return directory


def lora(base=MODEL, **arguments):
    """Overrides for a run with an adapter over the quickstart's model."""
    model = {**base, **ADAPTER, **arguments, "_component_": "torchtune.models.llama3.lora_llama3"}
    return {"model": model, "checkpointer.model": base, "optimizer.lr": 1e-2, "lr_scheduler": None}


def hf_checkpointer(directory, output_dir):
    """A config's checkpointer that reads what a run of the quickstart wrote."""
    return {
        "_component_": "torchtune.training.FullModelHFCheckpointer",
        "checkpoint_dir": str(directory),
        "checkpoint_files": ["model-00001-of-00001.safetensors"],
        "model_type": "LLAMA3",
        "output_dir": str(output_dir),
    }


def load_plain_model(directory, tmp_path, name="model-00001-of-00001.safetensors"):
    """A saved checkpoint by torchtune's own checkpointer, in torchtune's own model."""
    checkpointer = FullModelHFCheckpointer(
        checkpoint_dir=str(directory), checkpoint_files=[name], model_type="LLAMA3", output_dir=str(tmp_path / "again")
    )
    model = llama3(**{key: value for key, value in MODEL.items() if key != "_component_"})
    model.load_state_dict(checkpointer.load_checkpoint()["model"])
    return model


def tune_run(*arguments, cwd, timeout=300):
    """``tune run`` in a process of its own, in a directory of its own."""
    return run_forked("torchtune._cli.tune:main", ["tune", "run", *arguments], cwd, timeout=timeout)


def tune_run_afresh(*arguments, cwd, timeout=300):
    """The same by the installed command: with a fresh interpreter, which takes a while to import everything."""
    command = [str(Path(sys.executable).parent / "tune"), "run", *arguments]
    environment = {**os.environ, "HF_DATASETS_CACHE": str(Path(cwd) / "datasets_cache")}
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=timeout)


def run_distributed(directory, num_processes, config="quickstart/distributed", *, on_nodes_of_their_own=False, **keys):
    """Runs the distributed recipe and returns its ``output_dir``."""
    directory.mkdir(exist_ok=True)
    arguments = ["prefix_dpo_distributed", "--config", config, *as_overrides(keys), "output_dir=out"]
    done = run_on_ranks(
        "prefix_dpo_distributed:recipe_main",
        arguments,
        directory,
        num_processes,
        on_nodes_of_their_own=on_nodes_of_their_own,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return directory / "out"


def torchrun(num_processes, file, *arguments, timeout=200, **environment):
    """A script in several processes, or in one; returns what it printed."""
    launcher = [sys.executable]
    if num_processes > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(num_processes)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    command = [*launcher, str(file), *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=timeout)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def read_log(output_dir):
    """Every entry of the run's log as ``(step, metrics)``."""
    return [entry for file in sorted(Path(output_dir).glob("logs/log_*.txt")) for entry in curves.read_log(file)]


def training_log(output_dir):
    return [metrics for _, metrics in read_log(output_dir) if "loss" in metrics]


def eval_log(output_dir):
    return [metrics for _, metrics in read_log(output_dir) if "eval/loss" in metrics]


def losses(output_dir):
    return [metrics["loss"] for metrics in training_log(output_dir)]


def evaluated_log_probs(output_dir, when="after"):
    """The log-probs of each held-out pair by the run's evaluation, ``[N, 2]``."""
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

"""What prefix_dpo_plan predicts against what a training step really takes of a process's memory."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from omegaconf import OmegaConf
from runs import make_config

from prefix_sharing.training import DistributedConfig
from prefix_sharing.training.prediction import full_row, predict_peak_memory

EXAMPLE = [256, 128, 128]
NUM_TOKENS = 1024
MODEL = {
    "_component_": "torchtune.models.llama3.llama3",
    "vocab_size": 16000,
    "num_layers": 4,
    "num_heads": 8,
    "num_kv_heads": 4,
    "embed_dim": 384,
    "intermediate_dim": 1024,
    "max_seq_len": 2048,
}


def real_peak(cfg, directory, num_processes):
    file = directory / "config.yaml"
    OmegaConf.save(cfg, file)
    arguments = [str(Path(__file__).parent / "real_step.py"), str(file), str(NUM_TOKENS), ",".join(map(str, EXAMPLE))]
    launcher = [sys.executable]
    if num_processes > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(num_processes)]
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        # Tensors go back to the system when they are freed, instead of into the allocator's own store.
        "MALLOC_MMAP_THRESHOLD_": "65536",
        "MALLOC_TRIM_THRESHOLD_": "65536",
    }
    run = subprocess.run([*launcher, *arguments], env=environment, capture_output=True, text=True, timeout=200)
    assert run.returncode == 0, run.stderr
    return int(re.search(r"peak (\d+)", run.stdout)[1])


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads memory from /proc")
@pytest.mark.parametrize(
    ("num_processes", "keys"),
    [
        (1, {"enable_activation_checkpointing": True}),
        (2, {}),
    ],
)
def test_predicted_peak_is_within_a_tenth_of_the_real_one(tmp_path, num_processes, keys):
    cfg = make_config(tmp_path, config_class=DistributedConfig, model=MODEL, **keys)
    predicted = predict_peak_memory(cfg, num_processes, [full_row(NUM_TOKENS, EXAMPLE)])[0]
    real = real_peak(cfg, tmp_path, num_processes)
    print(f"{num_processes} processes, {keys}: predicted {predicted.total:,}, real {real:,}")
    assert predicted.total == pytest.approx(real, rel=0.1)

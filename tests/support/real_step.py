"""Prints the bytes of memory that training steps really take on each rank, for tests/memory/test_estimate.py.

python real_step.py SMALL.yaml CONFIG.yaml TOKENS_PER_ROW PREFIX,CHOSEN,REJECTED
torchrun --nproc_per_node 2 real_step.py SMALL.yaml CONFIG.yaml TOKENS_PER_ROW PREFIX,CHOSEN,REJECTED

Steps of a small model of the same kind go before, for what is loaded once.
"""

import contextlib
import re
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from omegaconf import OmegaConf

from prefix_sharing.config import DistributedConfig, check_config, instantiate
from prefix_sharing.distributed import device_mesh, is_rank_zero, process_group, shard, sync_gradients
from prefix_sharing.memory.estimate import full_row
from prefix_sharing.run import build_loss, build_model
from prefix_sharing.run.setup import compute_dtype

CPU = torch.device("cpu")


def memory(name):
    kilobytes = re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]
    return int(kilobytes) * 1024


def take_steps(cfg, row):
    """Two optimizer steps of two Rows each, as the recipes take them."""
    model = build_model(cfg, CPU, sharded=dist.is_initialized())
    if dist.is_initialized():
        shard(model, list(model.layers), mesh=device_mesh(CPU), compute_dtype=compute_dtype(cfg))
    model.materialize(CPU)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    optimizer = instantiate("optimizer", cfg.optimizer, model.trainable_parameters())
    loss = build_loss(cfg)
    for _ in range(2):
        for i in range(2):
            if dist.is_initialized():
                sync_gradients(model, cfg.fsdp_sync_every_row or i == 1)
            output = model(row)
            loss(output, torch.zeros_like(output.log_probs), row.pairs).losses.sum().backward()
            del output
        optimizer.step()
        optimizer.zero_grad()


def main(small_file, file, num_tokens, example):
    torch.set_num_threads(1)
    small, cfg = (check_config(OmegaConf.load(each), DistributedConfig) for each in (small_file, file))
    take_steps(small, full_row(64, [32, 16, 16]))
    before = memory("VmRSS")
    take_steps(cfg, full_row(num_tokens, example))
    peak = torch.tensor(memory("VmHWM") - before)
    if dist.is_initialized():
        dist.all_reduce(peak, dist.ReduceOp.MAX)
    if is_rank_zero():
        print(f"peak {peak.item()}")


if __name__ == "__main__":
    with process_group(CPU) if dist.is_torchelastic_launched() else contextlib.nullcontext():
        main(sys.argv[1], sys.argv[2], int(sys.argv[3]), [int(length) for length in sys.argv[4].split(",")])

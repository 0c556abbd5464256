"""Reads a model's directory into shards and writes them again, and prints what each rank's memory was at most.

torchrun --nproc_per_node 4 tests/support/weights_on_ranks.py MODEL_DIRECTORY OUTPUT_DIRECTORY
"""

import contextlib
import json
import sys
import threading
import time
from pathlib import Path

import torch
from omegaconf import OmegaConf

from prefix_sharing.distributed import device_mesh, process_group, shard, wait_for_all_ranks
from prefix_sharing.hosts import load_checkpoint, to_tree_model
from prefix_sharing.hosts.transformers import causal_lm
from prefix_sharing.hosts.transformers.weights import save_model

CPU = torch.device("cpu")


def anonymous_bytes():
    """What this process has in memory, pages of files left out."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status["RssAnon"].split()[0]) * 1024


@contextlib.contextmanager
def watched(peaks, name, before):
    done = threading.Event()

    def watch():
        while not done.is_set():
            peaks[name] = max(peaks.get(name, 0), anonymous_bytes() - before)
            time.sleep(0.002)

    thread = threading.Thread(target=watch)
    thread.start()
    yield
    done.set()
    thread.join()


def main(path, output_dir):
    torch.set_num_threads(1)
    with process_group(CPU):
        with torch.device("meta"):
            built = causal_lm(path)
        model = to_tree_model(built, "chains")
        shard(model, list(model.layers), mesh=device_mesh(CPU), compute_dtype=torch.float32)
        component = "prefix_sharing.hosts.transformers.checkpointer"
        node = OmegaConf.create({"_component_": component, "path": path, "output_dir": output_dir})
        peaks = {}
        before = anonymous_bytes()
        with watched(peaks, "read", before):
            model.materialize(CPU)
            checkpointer, checkpoint = load_checkpoint("checkpointer", node)
            model.load_weights(checkpoint, seed=0)
        with watched(peaks, "write", before):
            save_model(model, checkpointer, Path(output_dir))
        rank = torch.distributed.get_rank()
        (Path(output_dir) / f"peaks_{rank}.json").write_text(json.dumps(peaks))
        wait_for_all_ranks()


if __name__ == "__main__":
    main(*sys.argv[1:])

"""Times full training steps of the same preference pairs in several formats, torchtune's own among them.

    tune run prefix_dpo_benchmark --config benchmark/cpu
    tune run prefix_dpo_benchmark --config benchmark/cuda

A step is what a recipe does in one: build the micro-batches, forward, backward, clip, AdamW. All formats work on the
same parameters and the same pairs. Before any is timed, the log-probs of every response are compared, which the losses
follow from; if they differ, nothing is timed. Formats take turns, round by round, so that drift of the machine hits all
alike. Writes ``benchmark.json`` and ``benchmark.png`` to ``output_dir``.
"""

import json
import logging
import platform
import subprocess
import sys
import time
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from omegaconf import MISSING, DictConfig, OmegaConf
from torch import nn
from torchtune import training
from tqdm import tqdm

from prefix_sharing.attention import choose_attention_backend
from prefix_sharing.benchmark.formats import Format, MicroBatch, Pairs, build_formats
from prefix_sharing.benchmark.results import as_table, save_results, summarize
from prefix_sharing.benchmark.workloads import draw_lengths, make_pairs
from prefix_sharing.config import instantiate
from prefix_sharing.errors import UserError
from prefix_sharing.losses import DPOLoss
from prefix_sharing.model import to_tree_model
from prefix_sharing.training import clip_grad_norm, parse, peak_memory, set_up_logging

log = logging.getLogger("prefix_sharing.recipe")


@dataclass
class BenchmarkConfig:
    """Every key of ``prefix_dpo_benchmark``.

    Attributes:
        output_dir (str): where the results go.
        model (Any): builds the model: one of torchtune's builders; its weights are random.
        workloads (list[str]): names in ``prefix_sharing.benchmark.workloads.DATASETS``, or ``PREFIX,CHOSEN,REJECTED``.
        formats (list[str]): of ``prefix_sharing.benchmark.formats``; the first is what the others are compared with.
        num_pairs (int): pairs a step.
        batch_size (int): pairs a micro-batch, where there is a fixed number.
        pack_len (int): most tokens in a packed row.
        longest (int): most tokens in a sequence.
        rounds (int): steps of each format that count, after one that does not.
        measure_memory (bool): whether to run a step of each format in a process of its own for its peak memory.
        device (str): ``cuda`` or ``cpu``.
        dtype (str): ``fp32`` or ``bf16``, what the forward pass computes in.
        attention_backend (str | None): as for training.
        compile (bool): whether to compile the layers of every format.
        seed (int): decides weights, lengths and tokens.
    """

    output_dir: str = MISSING
    model: Any = MISSING
    workloads: list[str] = MISSING
    formats: list[str] = field(default_factory=lambda: ["torchtune", "paired_packed", "prefix", "prefix_packed"])
    num_pairs: int = 16
    batch_size: int = 2
    pack_len: int = 4096
    longest: int = 4096
    rounds: int = 5
    measure_memory: bool = True
    device: str = "cpu"
    dtype: str = "fp32"
    attention_backend: str | None = None
    compile: bool = False
    seed: int = 0


class PrefixDPOBenchmark:
    """Compares formats.

    Args:
        cfg (DictConfig): the keys of ``BenchmarkConfig``.
    """

    def __init__(self, cfg: DictConfig) -> None:
        self.cfg = cfg
        self.device = torch.device(cfg.device)
        torch.manual_seed(cfg.seed)
        plain, tree = self.new_model(), self.new_model()
        tree.load_state_dict(plain.state_dict(keep_vars=True), assign=True)  # the same parameters, not equal ones
        tree = to_tree_model(tree, choose_attention_backend(cfg.attention_backend, self.device))
        if cfg.compile:
            for model in (plain, tree):
                training.compile_model(model, verbose=False)
        there_are = build_formats(plain, tree, self.device, batch_size=cfg.batch_size, pack_len=cfg.pack_len)
        for name in cfg.formats:
            if name not in there_are:
                raise UserError(f"Config: formats: there is no '{name}'; choose of {', '.join(there_are)}.")
        self.formats = [there_are[name] for name in cfg.formats]
        self.model = plain
        self.optimizer = torch.optim.AdamW(plain.parameters(), lr=1e-6, fused=True)
        self.autocast = torch.autocast(self.device.type, torch.bfloat16, enabled=cfg.dtype == "bf16")

    def new_model(self) -> nn.Module:
        """A model with random weights."""
        with self.device:
            return instantiate("model", self.cfg.model)

    def losses(self, form: Format, batch: MicroBatch, reference: torch.Tensor) -> torch.Tensor:
        """The DPO loss of each pair of a micro-batch."""
        with self.autocast:
            log_probs = form.log_probs(batch)
        return DPOLoss()(log_probs, None, reference[batch.pairs]).losses

    def step(self, form: Format, pairs: Pairs, reference: torch.Tensor) -> None:
        """A full training step."""
        for batch in form.micro_batches(pairs):
            (self.losses(form, batch, reference).sum() / len(pairs)).backward()
        clip_grad_norm(self.model, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    @torch.no_grad()
    def reference_log_probs(self, pairs: Pairs) -> torch.Tensor:
        """Log-probs under the weights as they are, after checking that the formats agree on every response's."""
        log_probs = []
        for form in self.formats:
            found = torch.zeros(len(pairs), 2, device=self.device)
            with self.autocast:
                for batch in form.micro_batches(pairs):
                    found[batch.pairs] = form.log_probs(batch).float()
            log_probs.append(found)
        expected, *others = log_probs
        tolerance = 1e-5 if self.cfg.dtype == "fp32" else 1e-2
        for form, found in zip(self.formats[1:], others, strict=True):
            difference = ((found - expected) / expected).abs().max().item()
            if not difference <= tolerance:
                raise UserError(
                    f"{form.name} and {self.formats[0].name} differ by {difference:.1e} in a response's log-prob; "
                    "nothing was timed."
                )
        return expected

    def time_workload(self, name: str, progress: tqdm) -> dict[str, Any]:
        """Times every format on a workload."""
        cfg = self.cfg
        pairs = self.pairs_of(name)
        reference = self.reference_log_probs(pairs)
        seconds: dict[str, list[float]] = {form.name: [] for form in self.formats}
        for round_number in range(cfg.rounds + 1):
            for form in self.formats:
                self.synchronize()
                start = time.perf_counter()
                self.step(form, pairs, reference)
                self.synchronize()
                if round_number > 0:
                    seconds[form.name].append(time.perf_counter() - start)
                progress.update()
        summary = summarize(seconds, len(pairs), self.formats[0].name)
        weights = sum(p.numel() for p in self.model.layers.parameters() if p.dim() > 1)
        for form in self.formats:
            batches = form.micro_batches(pairs)
            num_computed = sum(batch.num_computed for batch in batches)
            summary[form.name] |= {
                "micro_batches": len(batches),
                "num_tokens": sum(batch.num_tokens for batch in batches),
                "num_computed": num_computed,
                # forward and backward through the layers, padding included, without attention and output projection
                "flops": 6.0 * weights * num_computed,
            }
            if cfg.measure_memory:
                summary[form.name]["peak_memory"] = self.memory_of(name, form.name)
        return {"name": name, "pairs": len(pairs), "formats": summary}

    def pairs_of(self, workload: str) -> Pairs:
        """The pairs of a step."""
        lengths = draw_lengths(workload, self.cfg.num_pairs, self.cfg.seed, self.cfg.longest)
        return make_pairs(lengths, self.model.tok_embeddings.num_embeddings, self.cfg.seed)

    def memory_of(self, workload: str, form: str) -> float:
        """Peak memory in GiB of a process that takes two steps in one format."""
        cfg = OmegaConf.merge(self.cfg, {"workloads": [workload], "formats": [form]})
        command = [sys.executable, "-m", __name__ if __name__ != "__main__" else Path(__file__).stem, "--memory"]
        done = subprocess.run(command, input=OmegaConf.to_yaml(cfg), capture_output=True, text=True, check=True)
        return json.loads(done.stdout.splitlines()[-1])

    def synchronize(self) -> None:
        """Waits for the device."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def run(self) -> None:
        """Times all workloads, prints the table and writes the results."""
        cfg = self.cfg
        Path(cfg.output_dir).mkdir(parents=True, exist_ok=True)
        total = len(cfg.workloads) * len(self.formats) * (cfg.rounds + 1)
        with tqdm(total=total, desc="Benchmark", unit="step") as progress:
            workloads = [self.time_workload(name, progress) for name in cfg.workloads]
        on_cuda = self.device.type == "cuda"
        millions = sum(p.numel() for p in self.model.parameters()) / 1e6
        about = {
            "model": f"{millions:.1f} M parameters, {cfg.dtype}",
            "device": torch.cuda.get_device_name() if on_cuda else f"{torch.get_num_threads()} CPU threads",
            "platform": platform.platform(),
            "versions": {name: version(name) for name in ("torch", "torchtune", "torchtune-prefix-sharing")},
            "config": OmegaConf.to_container(cfg),
        }
        print(as_table(workloads))
        log.info("Results are in %s", save_results(cfg.output_dir, about, workloads))


def measure_memory() -> None:
    """Takes two steps of the config on standard input, and prints the peak memory in GiB."""
    benchmark = PrefixDPOBenchmark(OmegaConf.create(sys.stdin.read()))
    pairs = benchmark.pairs_of(benchmark.cfg.workloads[0])
    reference = benchmark.reference_log_probs(pairs)
    for _ in range(2):
        benchmark.step(benchmark.formats[0], pairs, reference)
    print(json.dumps(max(peak_memory(benchmark.device).values())))


@parse(BenchmarkConfig)
def recipe_main(cfg: DictConfig) -> None:
    """Runs the benchmark with a config and ``key=value`` overrides."""
    set_up_logging()
    PrefixDPOBenchmark(cfg).run()


if __name__ == "__main__":
    measure_memory() if sys.argv[1:] == ["--memory"] else recipe_main()

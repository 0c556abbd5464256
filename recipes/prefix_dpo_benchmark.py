"""Times training on preference pairs: whole steps in several formats, parts of a layer, and how time grows with size.

    tune run prefix_dpo_benchmark --config benchmark/cpu
    tune run prefix_dpo_benchmark --config benchmark/cuda_short
    tune run prefix_dpo_benchmark --config benchmark/cuda
    tune run prefix_dpo_benchmark --config benchmark/transformers path=/tmp/Qwen3-0.6B

``measure`` chooses what:

``steps``
    Full training steps of the same pairs in several formats, that of the model's library and TRL's among them. A step
    is what a recipe does in one: build the micro-batches, forward, backward, clip, AdamW. All formats work on the same
    weights: AdamW's learning rate is 0, so that every step of every format has to give the same loss. Before any is
    timed, the log-probs of every response are compared, and with each step its loss; if they differ, the benchmark
    stops.
``layers``
    MLP, attention and attention layer of torchtune's on one pair, its prompt shared against its prompt repeated.
``scaling``
    Masks, attention and steps of torchtune's models for longer and longer Rows; planning and loading for larger and
    larger data sets.

Whatever is compared takes turns, so that drift of the machine hits all alike. Writes ``benchmark.json``, which has
what was measured so far at any moment, and a picture of each part to ``output_dir``.
"""

import functools
import json
import logging
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import torch
from omegaconf import MISSING, DictConfig, OmegaConf
from tqdm import tqdm

from prefix_sharing.attention import AttentionBackend, choose_attention_backend
from prefix_sharing.benchmark.bare import seconds_of_matrix_products
from prefix_sharing.benchmark.formats import Format, Pairs, paired_format, row_formats, trl_format
from prefix_sharing.benchmark.layers import PARTS, first_layer, synchronize, time_layers
from prefix_sharing.benchmark.scaling import time_examples, time_rows
from prefix_sharing.benchmark.workloads import draw_lengths, make_pairs, pairs_in, read_pairs
from prefix_sharing.config import at_least, instantiate, parse
from prefix_sharing.errors import ConfigError, UserError
from prefix_sharing.hosts import TreeModel, checkpoint_activations, compile_layers, paired_model, to_tree_model
from prefix_sharing.memory import memory_by_part, peak_memory
from prefix_sharing.reports import benchmark_plots as plots
from prefix_sharing.reports.benchmark_tables import as_table, describe_growth, describe_layers, summarize
from prefix_sharing.run import set_up_logging
from prefix_sharing.run.optimization import clip_grad_norm, weights_cast_once
from prefix_sharing.run.setup import compute_dtype
from prefix_sharing.trees import Row

log = logging.getLogger("prefix_sharing.recipe")


MEASURES = ("steps", "layers", "scaling")
LIBRARIES = ("torchtune", "transformers")
SOMETIMES = ("paired_packed_varlen", "trl")
"""Formats that need more than this package and a CPU."""


@dataclass
class BenchmarkConfig:
    """Every key of ``prefix_dpo_benchmark``."""

    output_dir: str = MISSING
    """Directory for the results."""
    path: str | None = None
    """Directory of a model of transformers, for ``model`` to refer to as ``${path}``; its ``config.json`` is enough."""
    model: Any = MISSING
    """Builds the model: one of torchtune's builders, or ``prefix_sharing.hosts.transformers.causal_lm``; its weights
    are random."""
    measure: list[str] = field(default_factory=lambda: list(MEASURES))
    """What is measured: ``steps`` and, for models of torchtune, ``layers`` and ``scaling``."""
    workloads: list[str] = MISSING
    """Names in ``prefix_sharing.benchmark.workloads.DATASETS``, or ``PREFIX,CHOSEN,REJECTED``, or files of pairs."""
    formats: list[str] = field(default_factory=lambda: ["torchtune", "trl", "paired_packed", "prefix", "prefix_packed"])
    """Formats of ``prefix_sharing.benchmark.formats``; the first is what the others are compared with. ``torchtune``
    and ``transformers`` are both that of the model's library."""
    tokens_per_step: int = at_least(1, default=8192)
    """Tokens of a step if no prompt is shared; decides how many pairs a step takes."""
    num_pairs: int | None = at_least(1, default=None)
    """Pairs per step, whatever their tokens."""
    batch_size: int = at_least(1, default=4)
    """Pairs per micro-batch, where there is a fixed number."""
    pack_len: int = at_least(1, default=4096)
    """Maximum number of tokens in a packed Row."""
    longest: int = at_least(1, default=2048)
    """Maximum number of tokens in a sequence."""
    beta: float = 0.1
    """``beta`` of the DPO loss."""
    rounds: int = at_least(1, default=3)
    """Measurements that count, after one that does not."""
    measure_memory: bool = True
    """Whether to take one more step of each format for its peak memory; on a CPU in a process of its own."""
    prefix_lengths: list[int] = field(default_factory=lambda: [128, 512, 2048])
    """Prompts of ``layers``."""
    completion_lengths: list[int] = field(default_factory=lambda: [128, 512])
    """Responses of ``layers``."""
    layer_backends: list[str] = field(default_factory=lambda: ["chains"])
    """Attention backends of ``layers``."""
    tokens_per_row: list[int] = field(default_factory=lambda: [1024, 4096, 16384, 65536])
    """Rows of ``scaling``, multiples of 512."""
    num_examples: list[int] = field(default_factory=lambda: [1000, 10_000, 100_000, 1_000_000])
    """Data sets of ``scaling``, multiples of 1,000."""
    device: str = "cpu"
    """``cuda`` or ``cpu``."""
    dtype: Literal["fp32", "bf16"] = "fp32"
    """What the forward pass computes in."""
    attention_backend: Literal["flex", "chains", "varlen"] | None = None
    """As for training."""
    compile: bool = False
    """Whether to compile the layers of every format."""
    seed: int = at_least(0, default=0)
    """Decides weights, lengths and tokens."""


class PrefixDPOBenchmark:
    """Compares formats, and times what they are made of.

    Args:
        cfg (DictConfig): the keys of ``BenchmarkConfig``.
    """

    def __init__(self, cfg: DictConfig) -> None:
        self.cfg = cfg
        self.device = torch.device(cfg.device)
        self.dtype = compute_dtype(cfg)
        self.autocast = torch.autocast(self.device.type, self.dtype, enabled=cfg.dtype == "bf16")
        self.tolerance = 1e-5 if cfg.dtype == "fp32" else 1e-2
        self.backend = choose_attention_backend(cfg.attention_backend, self.device, self.dtype)
        for part in cfg.measure:
            if part not in MEASURES:
                raise ConfigError("measure", f"unknown measurement '{part}'; choose from {', '.join(MEASURES)}")
        torch.manual_seed(cfg.seed)
        self.model = self.new_model()
        self.tree = self.new_tree(self.backend)
        self.paired = paired_model(self.model, cfg.beta)
        if cfg.compile:
            compiled: Any = self.paired
            compile_layers(compiled)
        self.measure = list(cfg.measure)
        if self.paired.name != "torchtune":
            self.measure = [part for part in self.measure if part == "steps"]
            if self.measure != cfg.measure:
                log.warning("measure: layers and scaling are left out: they take apart layers of torchtune's models")
        self.layer_backends = self.choose_layer_backends() if "layers" in self.measure else []
        self.formats = self.choose_formats()
        self.results: dict[str, Any] = {}
        # Formats over one model share its optimizer, too.
        self.optimizers = {
            form.model: torch.optim.AdamW(form.model.parameters(), lr=0.0, fused=True) for form in self.formats
        }

    def new_model(self) -> Any:
        """A model with random weights, the same each time."""
        torch.manual_seed(self.cfg.seed)
        with self.device:
            return instantiate("model", self.cfg.model)

    def new_tree(self, backend: AttentionBackend) -> TreeModel:
        """A model over trees that has the same parameters as ``model``, not equal ones."""
        tree = self.new_model()
        tree.load_state_dict(self.model.state_dict(keep_vars=True), assign=True)
        found = to_tree_model(tree, backend)
        if self.cfg.compile:
            compile_layers(found)
        return found

    def choose_layer_backends(self) -> list[AttentionBackend]:
        """The backends of ``layers`` that can train here; others are left out, with a note."""
        found = []
        for name in self.cfg.layer_backends:
            try:
                found.append(choose_attention_backend(name, self.device, self.dtype))
            except ConfigError as error:
                log.warning("layer_backends: %s is left out: %s", name, error)
        return found

    def choose_formats(self) -> list[Format]:
        """The formats that the config names; what cannot run here is left out, with a note."""
        cfg, own = self.cfg, self.paired.name
        found = {own: paired_format(self.paired, self.device, batch_size=cfg.batch_size)}
        options = {"batch_size": cfg.batch_size, "beta": cfg.beta}
        found |= row_formats(self.model, self.tree, self.device, pack_len=cfg.pack_len, **options)
        for name in cfg.formats:
            if name not in (*LIBRARIES, *found, *SOMETIMES):
                known = ", ".join((*found, *SOMETIMES))
                raise ConfigError("formats", f"unknown format '{name}'; choose from {known}")
        if "paired_packed_varlen" in cfg.formats:
            try:
                tree = self.new_tree(choose_attention_backend("varlen", self.device, self.dtype))
                on_varlen = row_formats(self.model, tree, self.device, pack_len=cfg.pack_len, **options)
                found["paired_packed_varlen"] = replace(on_varlen["paired_packed"], name="paired_packed_varlen")
            except ConfigError as error:
                log.warning("formats: paired_packed_varlen is left out: %s", error)
        if "trl" in cfg.formats:
            try:
                found["trl"] = trl_format(self.paired, self.device, **options)
            except ImportError as error:
                log.warning("formats: trl is left out (%s): pip install 'torchtune-prefix-sharing[bench]'", error)
        names = [own if name in LIBRARIES else name for name in cfg.formats]
        return [found[name] for name in dict.fromkeys(names) if name in found]

    def step(self, form: Format, pairs: Pairs, reference: torch.Tensor) -> torch.Tensor:
        """A full training step; returns its loss, a scalar."""
        total = torch.zeros((), device=self.device)
        with weights_cast_once(self.device):
            for batch in form.micro_batches(pairs):
                with self.autocast:
                    loss = form.loss(batch, reference) / len(pairs)
                loss.backward()
                total += loss.detach()
        clip_grad_norm(form.model, 1.0)
        self.optimizers[form.model].step()
        self.optimizers[form.model].zero_grad(set_to_none=True)
        return total

    @torch.no_grad()
    def check_log_probs(self, pairs: Pairs) -> torch.Tensor:
        """Log-probs of the responses, ``[N, 2]``, after checking that the formats agree on every one."""
        log_probs = []
        for form in self.formats:
            found = torch.zeros(len(pairs), 2, device=self.device)
            with self.autocast:
                for batch in form.micro_batches(pairs):
                    found[batch.pairs] = form.log_probs(batch).float()
            log_probs.append(found)
        expected, *others = log_probs
        for form, found in zip(self.formats[1:], others, strict=True):
            difference = ((found - expected) / expected).abs().max().item()
            if not difference <= self.tolerance:
                raise UserError(
                    f"{form.name} and {self.formats[0].name} differ by {difference:.1e} in a response's log-prob; "
                    "nothing was timed."
                )
        return expected

    def time_workload(self, name: str, progress: tqdm) -> dict[str, Any]:
        """Times every format on a workload."""
        cfg = self.cfg
        pairs = self.pairs_of(name)
        log_probs = self.check_log_probs(pairs)
        reference = reference_like(log_probs)
        # A pair's loss changes by beta at most where a log-prob changes by 1.
        most = cfg.beta * self.tolerance * log_probs.abs().sum().item() / len(pairs)
        expected: float | None = None
        seconds: dict[str, list[float]] = {form.name: [] for form in self.formats}
        for round_number in range(cfg.rounds + 1):
            for form in self.formats:
                synchronize(self.device)
                start = time.perf_counter()
                loss = self.step(form, pairs, reference)
                synchronize(self.device)
                if round_number > 0:
                    seconds[form.name].append(time.perf_counter() - start)
                expected = loss.item() if expected is None else expected
                if not abs(loss.item() - expected) <= most:
                    raise UserError(f"{name}: the loss of {form.name} is {loss.item():.6f}, not {expected:.6f}.")
                progress.update()
        summary = summarize(seconds, len(pairs), self.formats[0].name)
        for form in self.formats:
            building = []
            for _ in range(cfg.rounds):
                start = time.perf_counter()
                batches = form.micro_batches(pairs)
                building.append(time.perf_counter() - start)
            found = summary[form.name]
            found |= {
                "micro_batches": len(batches),
                "num_tokens": sum(batch.num_tokens for batch in batches),
                "num_computed": sum(batch.num_computed for batch in batches),
                "flops": sum(batch.flops for batch in batches),
                "building_share": statistics.median(building) / found["seconds"],
            }
            if self.device.type == "cpu" and isinstance(batches[0].inputs, Row):
                step = functools.partial(self.step, form, pairs, reference)
                found["matrix_share"] = seconds_of_matrix_products(step, cfg.rounds) / found["seconds"]
            if cfg.measure_memory and self.device.type == "cuda":
                found |= self.memory_here(form, pairs, reference)
            elif cfg.measure_memory:
                found |= self.memory_of(name, form.name)
        return {"name": Path(name).name, "pairs": len(pairs), "formats": summary}

    def pairs_of(self, workload: str) -> Pairs:
        """The pairs of a step."""
        cfg = self.cfg
        if Path(workload).is_file():
            return read_pairs(workload, cfg.tokens_per_step, cfg.longest)
        num_pairs = cfg.num_pairs or max(cfg.batch_size, pairs_in(workload, cfg.tokens_per_step, cfg.seed, cfg.longest))
        lengths = draw_lengths(workload, num_pairs, cfg.seed, cfg.longest)
        return make_pairs(lengths, self.tree.vocab_size, cfg.seed)

    def memory_here(self, form: Format, pairs: Pairs, reference: torch.Tensor) -> dict[str, float]:
        """Peak memory in GiB of one more step, whole and by part, as if there were no other format's model."""
        parts = memory_by_part(form.model, self.optimizers[form.model])
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        self.step(form, pairs, reference)
        of_step = (torch.cuda.max_memory_allocated() - before) / 2**30
        return {"peak_memory": of_step + parts["memory_parameters"] + parts["memory_optimizer_state"], **parts}

    def memory_of(self, workload: str, form: str) -> dict[str, float]:
        """Peak memory in GiB of a process that takes a step in one format, whole and by part."""
        cfg = OmegaConf.merge(self.cfg, {"workloads": [workload], "formats": [form]})
        command = [sys.executable, "-m", __name__ if __name__ != "__main__" else Path(__file__).stem, "--memory"]
        done = subprocess.run(command, input=OmegaConf.to_yaml(cfg), capture_output=True, text=True, check=True)
        return json.loads(done.stdout.splitlines()[-1])

    def time_steps(self) -> Iterator[dict[str, Any]]:
        """Times every format on every workload."""
        cfg = self.cfg
        total = len(cfg.workloads) * len(self.formats) * (cfg.rounds + 1)
        with tqdm(total=total, desc="Steps", unit="step") as progress:
            for name in cfg.workloads:
                yield self.time_workload(name, progress)

    def time_layers(self) -> Iterator[dict[str, Any]]:
        """Times the parts of the first layer."""
        cfg, backends = self.cfg, self.layer_backends
        attention_parts = len(PARTS) - 1
        total = len(cfg.prefix_lengths) * len(cfg.completion_lengths) * (1 + attention_parts * len(backends))
        with tqdm(total=total, desc="Layers", unit="part") as progress:
            yield from time_layers(
                first_layer(self.tree),
                self.device,
                backends=backends,
                prefix_lengths=cfg.prefix_lengths,
                completion_lengths=cfg.completion_lengths,
                rounds=cfg.rounds,
                autocast=self.autocast,
                progress=progress.update,
            )

    def time_rows(self) -> Iterator[dict[str, Any]]:
        """Times longer and longer Rows."""
        cfg = self.cfg
        model = to_tree_model(self.new_model(), self.backend)
        checkpoint_activations(model, "full")
        with tqdm(total=len(cfg.tokens_per_row), desc="Rows", unit="length") as progress:
            yield from time_rows(model, self.device, cfg.tokens_per_row, self.autocast, progress.update)

    def time_examples(self) -> Iterator[dict[str, Any]]:
        """Times larger and larger data sets."""
        with tqdm(total=len(self.cfg.num_examples), desc="Data sets", unit="size") as progress:
            yield from time_examples(self.cfg.num_examples, self.cfg.pack_len, progress.update)

    def collect(self, into: list[dict[str, Any]], found: Iterable[dict[str, Any]]) -> None:
        """Adds measurements to the results, and writes them down after each."""
        for each in found:
            into.append(each)
            (Path(self.cfg.output_dir) / "benchmark.json").write_text(json.dumps(self.results, indent=2) + "\n")

    def run(self) -> None:
        """Measures what the config names, prints it, and writes it down."""
        cfg = self.cfg
        output_dir = Path(cfg.output_dir)
        output_dir.mkdir(parents=True, exist_ok=True)
        on_cuda = self.device.type == "cuda"
        millions = sum(p.numel() for p in self.model.parameters()) / 1e6
        self.results = {
            "model": f"{millions:.1f} M parameters, {cfg.dtype}",
            "device": torch.cuda.get_device_name() if on_cuda else f"{torch.get_num_threads()} CPU threads",
            "platform": platform.platform(),
            "versions": {name: version(name) for name in ("torch", self.paired.name, "torchtune-prefix-sharing")},
            "config": OmegaConf.to_container(cfg),
        }
        title = f"{self.results['model']}, {self.results['device']}"
        if "steps" in self.measure:
            workloads = self.results["workloads"] = []
            self.collect(workloads, self.time_steps())
            print(as_table(workloads))
            plots.plot_steps(workloads, title, output_dir / "steps.png")
        if "layers" in self.measure:
            layers = self.results["layers"] = []
            self.collect(layers, self.time_layers())
            print(describe_layers(layers))
            plots.plot_layers(layers, title, output_dir / "layers.png")
        if "scaling" in self.measure:
            scaling = self.results["scaling"] = {"rows": [], "examples": []}
            self.collect(scaling["rows"], self.time_rows())
            self.collect(scaling["examples"], self.time_examples())
            print(describe_growth(scaling))
            plots.plot_scaling(scaling, title, output_dir / "scaling.png")
        log.info("Results saved to %s", output_dir)


def reference_like(log_probs: torch.Tensor) -> torch.Tensor:
    """Reference log-probs a little away from ``log_probs``, so that losses are not all ln 2."""
    generator = torch.Generator().manual_seed(0)
    return log_probs + torch.randn(log_probs.shape, generator=generator).to(log_probs.device)


def measure_memory() -> None:
    """Takes a step of the config on standard input, and prints its peak memory, whole and by part, in GiB."""
    cfg = OmegaConf.create(sys.stdin.read())
    assert isinstance(cfg, DictConfig)
    benchmark = PrefixDPOBenchmark(cfg)
    pairs = benchmark.pairs_of(benchmark.cfg.workloads[0])
    (form,) = benchmark.formats
    # As after an earlier step: AdamW has its state.
    for parameter in form.model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    benchmark.optimizers[form.model].step()
    benchmark.optimizers[form.model].zero_grad(set_to_none=True)
    benchmark.step(form, pairs, torch.zeros(len(pairs), 2, device=benchmark.device))
    parts = memory_by_part(form.model, benchmark.optimizers[form.model])
    print(json.dumps({"peak_memory": max(peak_memory(benchmark.device).values()), **parts}))


@parse(BenchmarkConfig)
def recipe_main(cfg: DictConfig) -> None:
    """Runs the benchmark with a config and ``key=value`` overrides."""
    set_up_logging()
    PrefixDPOBenchmark(cfg).run()


if __name__ == "__main__":
    measure_memory() if sys.argv[1:] == ["--memory"] else recipe_main()

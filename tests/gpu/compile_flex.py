"""Registers and spills of FlexAttention's kernels on an H100, found out on a machine without a GPU.

    pip install triton==3.7.1  # torch's CPU build comes without
    python tests/gpu/compile_flex.py [head sizes, such as 64 128]

For the attention of every shipped config and of some more models, in bf16, inductor writes the kernels of forward and
backward that it would write on an H100 (sm_90), with the package's own masks and soft cap, and triton compiles them.
Nothing runs. Lengths are constants or symbols, with the kernel option ``IS_DIVISIBLE`` and without, so that one can
choose between them. Columns of the table:

=============== =======================================================================================================
column          what
=============== =======================================================================================================
model           the first that has these heads: a config, or one of ``MORE_MODELS``
head            their size; that of keys / of values where they differ
group           query heads per KV head
queries         all tokens, only predictors as in the last layer, or all tokens of a layer with a window
lengths         ``const`` (``dynamic=False``) or ``symbol`` (``dynamic=True``)
div             ``IS_DIVISIBLE``, that lengths are multiples of 128: no bounds are checked
kernel          ``none`` where dynamo gives up, so that the uncompiled operator would run and build all scores
blocks          queries x keys in a tile; of the backward pass for dK and dV, and for dQ
w, st           warps of a block, and stages of its pipeline
regs            registers of a thread, of which there are 255
stores, loads   bytes that a thread spills, by where they are in the code, not by how often they run
wgmma           ``serial`` where ptxas does not overlap matrix products for want of registers
shared          KiB of shared memory; where a block takes more than 227, inductor compiles it again with one stage
seconds         to compile, by triton and ptxas
=============== =======================================================================================================
"""

import contextlib
import ctypes
import functools
import importlib.util
import io
import itertools
import re
import sys
import time
import types
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import torch
from omegaconf import OmegaConf
from torchtune import config

from prefix_sharing.attention.flex import FlexMask
from prefix_sharing.trees import Response, Row, RowOptions, bucket_length

CONFIGS = Path(__file__).parents[2] / "configs"
MADE_UP = ["benchmark", "quickstart", "tiny"]  # folders of configs whose models have no name


@dataclass(frozen=True)
class Heads:
    """The attention of a model."""

    model: str
    head_dim: int
    num_heads: int
    num_kv_heads: int
    value_dim: int | None = None  # where values are of another size than keys
    softcap: float | None = None
    window: int | None = None  # of some of its layers

    @property
    def group(self) -> int:
        return self.num_heads // self.num_kv_heads


MORE_MODELS = [
    Heads("SmolLM2 1.7B", 64, 32, 32),
    Heads("TinyLlama 1.1B", 64, 32, 4),
    Heads("Phi-2", 80, 32, 32),
    Heads("Phi-3 mini", 96, 32, 32),
    Heads("OLMo 2 1B", 128, 16, 16),
    Heads("Qwen3 0.6B", 128, 16, 8),
    Heads("Qwen3 14B", 128, 40, 8),
    Heads("DeepSeek V2 Lite", 192, 16, 16, value_dim=128),
    Heads("Gemma 7B", 256, 16, 16),
    Heads("Gemma 3 1B", 256, 4, 1, window=512),
]
"""Models that the configs for transformers take, with other heads than those of the shipped configs."""


def heads_of_configs() -> Iterator[Heads]:
    """The attention of every shipped config whose model is torchtune's; published models come first."""
    for path in sorted(CONFIGS.glob("**/*.yaml"), key=lambda path: (path.parent.name in MADE_UP, path)):
        model_config = OmegaConf.load(path).get("model", {})
        if not model_config.get("_component_", "").startswith("torchtune."):
            continue
        with torch.device("meta"):
            model = config.instantiate(model_config)
        attn = next(module for module in model.modules() if hasattr(module, "num_kv_heads"))
        yield Heads(
            f"{path.parent.name} {path.stem.split('_')[0]}",
            attn.head_dim,
            attn.num_heads,
            attn.num_kv_heads,
            softcap=getattr(attn, "softcapping", None),
            window=getattr(attn, "sliding_window_size", None),
        )


def all_heads() -> list[Heads]:
    """One model of each head size, group and way to compute scores."""
    found: dict[tuple, Heads] = {}
    for heads in [*heads_of_configs(), *MORE_MODELS]:
        found.setdefault((heads.head_dim, heads.group, heads.softcap is None, heads.value_dim), heads)
    return sorted(found.values(), key=lambda heads: (heads.head_dim, heads.group))


def make_row() -> Row:
    """29 blocks of tokens, 19 of predictors: no other size is the same, so each has a symbol of its own."""
    prompt, chosen, rejected = 1280, 1300, 1120
    responses = [
        Response(np.repeat([0, token], [prompt, length]), np.repeat([False, True], [prompt, length]))
        for token, length in [(1, chosen), (2, rejected)]
    ]
    row = Row.from_examples([responses], options=RowOptions(round_length=bucket_length))
    assert (row.tokens.shape[1], len(row.predictor_index)) == (29 * 128, 19 * 128)
    return row


def kernels_of(heads: Heads, row: Row, dynamic: bool, **mask_options: Any) -> dict[str, str]:
    """Sources by name of the kernels that inductor makes for forward and backward of one layer's attention.

    None where dynamo cannot trace it: then the uncompiled operator would run, which builds all scores.
    """
    mask = FlexMask(row, **mask_options)
    mask._on_cuda = dynamic  # whether lengths are symbols
    q_len, kv_len = mask.block_mask.seq_lengths

    def heads_first(length: int, num_heads: int, head_dim: int) -> torch.Tensor:
        """Strides as of a projection."""
        values = torch.empty(1, length, num_heads, head_dim, dtype=torch.bfloat16, requires_grad=True)
        return values.transpose(1, 2)

    torch._dynamo.reset()
    with h100_on_paper() as kernels, contextlib.suppress(_CompiledOnlyError):
        mask.attend(
            heads_first(q_len, heads.num_heads, heads.head_dim),
            heads_first(kv_len, heads.num_kv_heads, heads.head_dim),
            heads_first(kv_len, heads.num_kv_heads, heads.value_dim or heads.head_dim),
            softcap=heads.softcap,
        )
    assert len(kernels) in (0, 2), list(kernels)
    return kernels


class _CompiledOnlyError(Exception):
    """Raised in place of running what has been compiled."""


@contextlib.contextmanager
def h100_on_paper() -> Iterator[dict[str, str]]:
    """Has inductor lower for an H100 what torch traces on the CPU; collects the kernels that are made of templates.

    Everything here is private to torch (2.13) or triton (3.7). Tensors are traced on the CPU, as autograd of torch's
    CPU build takes none on CUDA, not even such without values. Only the finished graphs of forward and backward move
    to CUDA, just before inductor lowers them.
    """
    from torch._dynamo.device_interface import CudaInterface
    from torch._inductor import async_compile, compile_fx
    from torch._subclasses.fake_tensor import FakeTensor
    from triton.backends.compiler import GPUTarget
    from triton.runtime.driver import driver

    cuda = torch.device("cuda", 0)
    h100 = types.SimpleNamespace(
        name="NVIDIA H100 80GB HBM3",
        gcnArchName="NVIDIA H100 80GB HBM3",
        major=9,
        minor=0,
        multi_processor_count=132,
        regs_per_multiprocessor=65536,
        max_threads_per_multi_processor=2048,
        max_threads_per_block=1024,
        warp_size=32,
    )
    of_device: dict[str, Any] = {
        "device_count": lambda: 1,
        "current_device": lambda: cuda.index,
        "get_device_properties": lambda device=None: h100,
        "get_device_capability": lambda device=None: (h100.major, h100.minor),
    }
    kernels: dict[str, str] = {}

    def to_cuda(value: Any) -> None:
        if isinstance(value, FakeTensor):
            value.fake_device = cuda

    def graph_to_cuda(graph: torch.fx.Graph) -> None:
        for node in graph.nodes:
            torch.utils._pytree.tree_map_(to_cuda, node.meta.get("val"))
            if "device" in node.kwargs:
                node.kwargs = node.kwargs | {"device": cuda}
            if node.target is torch.ops.higher_order.flex_attention:
                # Off on the CPU, where attention has no backward.
                on = {"OUTPUT_LOGSUMEXP": True}
                node.args = tuple(arg | on if isinstance(arg, dict) else arg for arg in node.args)

    def lower(module: torch.fx.GraphModule, inputs: Sequence[Any], **options: Any) -> Callable[..., None]:
        torch.utils._pytree.tree_map_(to_cuda, list(inputs))
        for part in module.modules():
            if isinstance(part, torch.fx.GraphModule):
                graph_to_cuda(part.graph)
                part.recompile()
        with cpu_guard_for_cuda():
            compile_fx.compile_fx_inner(module, inputs, **options)
        return run

    def keep(self: Any, name: str, source: str, device_str: str = "cuda") -> Callable[..., None]:
        if "@triton_heuristics.template" in source:  # the backward pass has a sum before it
            kernels[name] = source
        return run

    def run(*args: Any) -> None:
        raise _CompiledOnlyError

    def nothing(*args: Any) -> None:
        pass

    @contextlib.contextmanager
    def cpu_guard_for_cuda() -> Iterator[None]:
        """Operators on CUDA look for a guard of the current device, of which a CPU build has none."""
        libc10 = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libc10.so"))
        of_types = (ctypes.c_void_p * 2).in_dll(libc10, "_ZN3c104impl26device_guard_impl_registryE")
        of_types[1] = of_types[0]  # CUDA, CPU
        try:
            yield
        finally:
            of_types[1] = None

    driver.set_active(
        types.SimpleNamespace(get_current_target=lambda: GPUTarget("cuda", 90, 32), get_current_device=lambda: 0)
    )
    torch.utils._triton.has_triton.cache_clear()
    with (
        mock.patch.multiple(torch.cuda, **of_device),
        mock.patch.multiple(CudaInterface, **of_device, create=True),
        mock.patch.multiple(CudaInterface, is_available=lambda: True, is_bf16_supported=lambda **options: True),
        mock.patch.object(torch._C, "_cuda_getCurrentRawStream", nothing, create=True),
        mock.patch.object(async_compile.AsyncCompile, "triton", keep),
        mock.patch.object(compile_fx, "compile_fx", functools.partial(compile_fx.compile_fx, inner_compile=lower)),
        mock.patch("torch.nn.attention.flex_attention._validate_device", nothing),  # refuses gradients
        mock.patch("torch._inductor.runtime.triton_helpers.set_driver_to_gpu", nothing),
        torch._functorch.config.patch(force_non_lazy_backward_lowering=True, enable_autograd_cache=False),
        torch._inductor.config.patch(compile_threads=1, fx_graph_cache=False, use_static_triton_launcher=False),
    ):
        yield kernels


class Compiled(NamedTuple):
    """What triton and ptxas make of a kernel, in the order of ``COLUMNS``."""

    blocks: str
    warps: int
    stages: int
    registers: int
    spill_stores: int
    spill_loads: int
    wgmma: str
    shared: int
    seconds: float


def compile_kernel(name: str, source: str) -> Compiled:
    """Compiles a kernel of inductor with the one configuration that it chooses."""
    import triton
    from torch._inductor.async_compile import _load_triton_kernel_from_source

    log, start = io.StringIO(), time.perf_counter()
    with (
        h100_on_paper(),
        triton.knobs.nvidia.scope(),
        triton.knobs.compilation.scope(),
        contextlib.redirect_stdout(log),
    ):
        triton.knobs.nvidia.dump_ptxas_log = True
        triton.knobs.compilation.always_compile = True  # a cached kernel has no log
        tuner = _load_triton_kernel_from_source(name, source)
        (chosen,) = tuner.configs
        kernel = tuner._precompile_config(chosen).kernel
    options = tuner.inductor_meta["config_args"]
    tiles = [("BLOCK_M", "BLOCK_N"), ("BLOCK_M1", "BLOCK_N1"), ("BLOCK_M2", "BLOCK_N2")]

    def logged(pattern: str) -> int:
        found = re.search(pattern, log.getvalue())
        assert found, log.getvalue()
        return int(found[1])

    return Compiled(
        " ".join(f"{options[m]}x{options[n]}" for m, n in tiles if m in options),
        chosen.num_warps,
        chosen.num_stages,
        logged(r"Used (\d+) registers"),
        logged(r"(\d+) bytes spill stores"),
        logged(r"(\d+) bytes spill loads"),
        "serial" if "wgmma.mma_async instructions are serialized" in log.getvalue() else "",
        round(kernel.metadata.shared / 1024),
        round(time.perf_counter() - start, 1),
    )


COLUMNS = {
    "model": "<22",
    "head": ">7",
    "group": ">5",
    "queries": "<10",
    "lengths": "<7",
    "div": "<3",
    "kernel": "<8",
    "blocks": "<13",
    "w": ">2",
    "st": ">2",
    "regs": ">4",
    "stores": ">6",
    "loads": ">6",
    "wgmma": "<6",
    "shared": ">6",
    "seconds": ">7",
}
"""Headings of the table, with alignment and width."""


def print_line(*values: Any) -> None:
    print("  ".join(f"{value!s:{form}}" for value, form in zip(values, COLUMNS.values(), strict=True)), flush=True)


def main() -> None:
    if torch.version.cuda is not None:
        sys.exit("This takes torch's CPU build: with a GPU, look at the compiled kernels themselves.")
    if importlib.util.find_spec("triton") is None:
        sys.exit("This compiles with triton, which torch's CPU build comes without: pip install triton")
    import triton
    from torch._inductor.utils import fresh_cache

    head_dims = [int(arg) for arg in sys.argv[1:]]
    row = make_row()
    print(f"torch {torch.__version__}, triton {triton.__version__}, sm_90, bf16")
    print_line(*COLUMNS)
    for heads in all_heads():
        if head_dims and heads.head_dim not in head_dims:
            continue
        queries: dict[str, dict[str, Any]] = {"all": {}, "predictors": {"at_predictors": True}}
        if heads.window is not None:
            queries["window"] = {"window": heads.window}
        for (kind, options), dynamic, divisible in itertools.product(queries.items(), [False, True], [True, False]):
            case = [
                heads.model,
                heads.head_dim if heads.value_dim is None else f"{heads.head_dim}/{heads.value_dim}",
                heads.group,
                kind,
                "symbol" if dynamic else "const",
                "yes" if divisible else "no",
            ]
            with fresh_cache():
                kernels = kernels_of(heads, row, dynamic, kernel_options={"IS_DIVISIBLE": divisible}, **options)
                if not kernels:
                    print_line(*case, "none, is not compiled", *[""] * len(Compiled._fields))
                for name, source in kernels.items():
                    print_line(*case, "backward" if "backward" in name else "forward", *compile_kernel(name, source))


if __name__ == "__main__":
    main()

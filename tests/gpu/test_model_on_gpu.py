"""The whole model against plain sequences in every mode a GPU has, and what the device is asked to do.

    pytest -n 0 tests/gpu

The expected values are torchtune's own forward of each full sequence in fp64 on the CPU. What a CPU can compute runs
there, too. Figures worth keeping are printed at the end of the run, as ``MEASURE name value``.
"""

import functools
import inspect
import time
import warnings

import numpy as np
import pytest
import torch
from torchtune import training
from torchtune.models.gemma2 import gemma2
from torchtune.models.llama3 import llama3

from plain import in_double, plain_log_probs
from prefix_sharing.attention import rounding_of, varlen
from prefix_sharing.hosts import checkpoint_activations, compile_layers, to_tree_model
from prefix_sharing.losses import DPOLoss
from prefix_sharing.run import StepMetrics
from prefix_sharing.trees import Response, Row, RowOptions

GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if GPU else "cpu")
BF16, FP32 = torch.bfloat16, torch.float32

VOCAB = 512
DIMS = {"vocab_size": VOCAB, "num_layers": 3, "embed_dim": 256, "intermediate_dim": 512, "max_seq_len": 1024}
MODELS = {
    "llama": lambda: llama3(**DIMS, num_heads=4, num_kv_heads=2),  # head_dim 64
    "mqa": lambda: llama3(**DIMS | {"embed_dim": 512}, num_heads=4, num_kv_heads=1),  # head_dim 128
    "odd_groups": lambda: llama3(**DIMS | {"embed_dim": 288}, num_heads=9, num_kv_heads=3),  # head_dim 32, groups of 3
    "gemma2": lambda: gemma2(
        **DIMS,
        num_heads=2,
        num_kv_heads=1,
        head_dim=256,
        sliding_window_size=64,
        hidden_capping_value=50.0,
        final_capping_value=30.0,
        query_pre_attn_scalar=256,
    ),
}
LENGTHS = [(200, 60, 40), (90, 150, 30, 70), (31, 17, 5)]


def make_examples(lengths=LENGTHS, seed=0):
    """Random trees; every token of a branch is scored, and a few of each prefix."""
    rng = np.random.default_rng(seed)
    examples = []
    for prefix, *branches in lengths:
        prompt, in_prompt = rng.integers(0, VOCAB, prefix), np.arange(prefix) % 16 == 5
        examples.append(
            [
                Response(
                    np.concatenate([prompt, rng.integers(0, VOCAB, n)]), np.concatenate([in_prompt, np.ones(n, bool)])
                )
                for n in branches
            ]
        )
    return examples


def make_row(backend, *lengths_and_seed):
    """Those examples as a Row for a backend, on the CPU."""
    return Row.from_examples(make_examples(*lengths_and_seed), options=RowOptions(round_length=rounding_of(backend)))


def new_model(kind):
    torch.manual_seed(1)
    model = MODELS[kind]()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return model


@functools.cache
def expected(kind):
    """Log-probs [E, K] and gradients of a weighting of them, by plain sequences in fp64 on the CPU."""
    model, examples = in_double(new_model(kind)), make_examples()
    log_probs = [plain_log_probs(model, example) for example in examples]
    sum((w[: len(x)] * x).sum() for w, x in zip(weights(), log_probs, strict=True)).backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    padded = torch.stack([torch.nn.functional.pad(x.detach(), (0, 3 - len(x))) for x in log_probs])
    return padded, gradients


def weights():
    return torch.randn(len(LENGTHS), 3, dtype=torch.float64, generator=torch.Generator().manual_seed(2))


def plain_name(name):
    return name.replace("_checkpoint_wrapped_module.", "").replace("_orig_mod.", "")


def relative(actual, wanted):
    return ((actual - wanted).norm() / wanted.norm()).item()


def _compute(measure, kind, backend, dtype, *, compile=False, ac=None, offload=False):
    """The same by the tree model in the given mode; errors relative to the whole, of log-probs and of gradients."""
    model = to_tree_model(new_model(kind), backend).to(DEVICE)
    if compile:
        compile_layers(model)
    if ac:
        checkpoint_activations(model, ac)
    activations = training.get_act_offloading_ctx_manager(model, offload)
    row = make_row(backend).to(DEVICE)
    start = time.perf_counter()
    with activations, torch.autocast(DEVICE.type, BF16, enabled=dtype == BF16):
        output = model(row)
    (output.log_probs.double() * weights().to(DEVICE)).sum().backward()
    if GPU:
        torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    log_probs, gradients = expected(kind)
    found = {plain_name(name): p.grad.double().cpu() for name, p in model.named_parameters()}
    assert found.keys() == gradients.keys()
    of_log_probs = relative(output.log_probs.detach().double().cpu(), log_probs)
    of_gradients = relative(
        torch.cat([found[name].flatten() for name in gradients]), torch.cat([g.flatten() for g in gradients.values()])
    )
    modes = ["compile"] * compile + ([f"ac_{ac}"] if ac else []) + ["offload"] * offload
    what = "/".join([kind, backend, str(dtype).removeprefix("torch."), *modes])
    measure(f"error_log_probs {what}", of_log_probs)
    measure(f"error_gradients {what}", of_gradients)
    measure(f"first_call_s {what}", seconds)
    return of_log_probs, of_gradients


@pytest.fixture
def compute(measure):
    return functools.partial(_compute, measure)


def check(errors, log_probs, gradients):
    assert errors[0] <= log_probs
    assert errors[1] <= gradients


BACKENDS = ["chains", pytest.param("flex", marks=pytest.mark.gpu)]


@pytest.mark.parametrize("backend", BACKENDS)
def test_fp32_equals_plain_sequences(compute, backend):
    assert torch.get_float32_matmul_precision() == "highest"  # no TF32: torch's default
    check(compute("llama", backend, FP32), 1e-5, 1e-4)


@pytest.mark.parametrize("backend", BACKENDS)
def test_bf16_is_near_plain_sequences(compute, backend):
    check(compute("llama", backend, BF16), 1e-2, 5e-2)


@pytest.mark.gpu
@pytest.mark.parametrize(
    "mode", [{"ac": "full"}, {"ac": "selective"}, {"ac": "full", "offload": True}, {"compile": True}], ids=str
)
def test_modes_change_nothing(compute, mode):
    check(compute("llama", "flex", BF16, **mode), 1e-2, 5e-2)


@pytest.mark.gpu
def test_varlen(compute, monkeypatch):
    """Also says whether torch before 2.12, whose varlen_attn has no enable_gqa, takes grouped heads all the same."""
    if not varlen.has_grouped_queries():
        original = varlen.varlen_attn
        assert "window_size" in inspect.signature(original).parameters

        def without_flag(*args, enable_gqa, **kwargs):
            return original(*args, **kwargs)

        monkeypatch.setattr(varlen, "varlen_attn", without_flag)
    check(compute("llama", "varlen", BF16), 1e-2, 5e-2)


def train_row(model, row, loss_fn, metrics, dtype):
    with torch.autocast(DEVICE.type, dtype, enabled=dtype == BF16):
        output = model(row)
    loss = loss_fn(output, torch.zeros_like(output.log_probs), row.pairs)
    (loss.losses.sum() / len(row.pairs)).backward()
    metrics.add(row, output, loss)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_host_never_waits_for_the_device(measure, backend):
    model, loss_fn = to_tree_model(new_model("llama"), backend).to(DEVICE), DPOLoss()
    on_host = make_row(backend)
    on_host = on_host.pin_memory() if GPU else on_host
    metrics = StepMetrics(DEVICE, "pairs")
    train_row(model, on_host.to(DEVICE), loss_fn, metrics, BF16)  # compiles
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if GPU:
            torch.cuda.synchronize()
            torch.cuda.set_sync_debug_mode("warn")
        try:
            train_row(model, on_host.to(DEVICE), loss_fn, metrics, BF16)
        finally:
            if GPU:
                torch.cuda.set_sync_debug_mode("default")
    waits = [f"{w.filename.rsplit('/site-packages/')[-1]}:{w.lineno}" for w in caught if "synchroniz" in str(w.message)]
    measure(f"waits_per_row/{backend}", len(waits))
    for where in sorted(set(waits)):
        measure(f"waits_at/{backend}", where)
    assert not waits


@pytest.mark.gpu
def test_what_a_new_shape_costs(measure):
    """Rows of other lengths: how many graphs are compiled, and how long each new pair of lengths takes."""
    torch._dynamo.reset()
    from torch._dynamo.utils import counters

    counters.clear()
    model, loss_fn, metrics = (
        to_tree_model(new_model("llama"), "flex").to(DEVICE),
        DPOLoss(),
        StepMetrics(DEVICE, "pairs"),
    )
    seen = []
    for i, lengths in enumerate([(100, 20, 20), (100, 20, 20), (400, 20, 20), (100, 150, 150)]):
        row = make_row("flex", [lengths], i).to(DEVICE)
        torch.cuda.synchronize()
        start = time.perf_counter()
        train_row(model, row, loss_fn, metrics, BF16)
        torch.cuda.synchronize()
        shape = (len(row.predictor_index), row.tokens.shape[1])
        seconds, new = time.perf_counter() - start, shape not in seen
        measure(f"seconds_of_row predictors={shape[0]} length={shape[1]} new={new}", seconds)
        seen.append(shape)
    measure("graphs_compiled", counters["stats"]["unique_graphs"])
    measure("distinct_shapes", len(set(seen)))


@pytest.mark.gpu
@pytest.mark.parametrize("ac", [None, "full", "selective"])
def test_attention_is_computed_as_often_as_ac_mode_says(measure, ac):
    """Forward kernels of FlexAttention in forward and backward: selective must keep what attention gave."""
    model = to_tree_model(new_model("llama"), "flex").to(DEVICE)
    if ac:
        checkpoint_activations(model, ac)
    loss_fn, metrics = DPOLoss(), StepMetrics(DEVICE, "pairs")
    row = make_row("flex").to(DEVICE)
    train_row(model, row, loss_fn, metrics, BF16)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as prof:
        train_row(model, row, loss_fn, metrics, BF16)
        torch.cuda.synchronize()
    kernels = [event for event in prof.key_averages() if event.device_type == torch.autograd.DeviceType.CUDA]
    names = [event.key for event in kernels for _ in range(event.count)]
    forward = [n for n in names if "flex_attention" in n and "backward" not in n]
    measure(f"flex_forward_kernels/ac_{ac}", len(forward))
    measure(f"kernels_a_row/ac_{ac}", len(names))
    layers = DIMS["num_layers"]
    assert len(forward) == {None: layers, "full": 2 * layers, "selective": layers}[ac]


@pytest.mark.gpu
def test_two_runs_give_the_same_gradients(measure):
    """Not promised: says whether attention's backward and sums by index vary from run to run."""
    found = []
    for _ in range(2):
        model = to_tree_model(new_model("llama"), "flex").to(DEVICE)
        row = make_row("flex").to(DEVICE)
        with torch.autocast("cuda", BF16):
            output = model(row)
        output.log_probs.sum().backward()
        found.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    measure("largest_difference_between_two_runs", (found[0] - found[1]).abs().max().item())


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["mqa", "odd_groups"])
def test_groups_of_heads(compute, kind):
    check(compute(kind, "flex", BF16), 1e-2, 5e-2)


@pytest.mark.parametrize("backend", BACKENDS)
def test_gemma2_with_window_and_soft_cap(compute, backend):
    check(compute("gemma2", backend, BF16), 2e-2, 8e-2)

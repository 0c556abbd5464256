"""Reference log-probs: those of plain sequences, by example, and the same from the cache whatever happened to it."""

import contextlib
import json
import logging
import shutil
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pytest
import torch
from omegaconf import OmegaConf
from torch import nn
from torchtune.models.llama3 import llama3

from plain import plain_log_probs
from prefix_sharing import quickstart
from prefix_sharing.checkpoint import Checkpoint
from prefix_sharing.datasets import PreferenceOptions, StepLoader, preference_dataset_from_records
from prefix_sharing.errors import UserError
from prefix_sharing.hosts import to_tree_model
from prefix_sharing.planning import ByLength, ExampleSizes, Fixed, Plan
from prefix_sharing.quickstart import preference_pairs, tokenizer
from prefix_sharing.reference import ReferenceCache, describe_cache, reference_log_probs
from prefix_sharing.reference import cache as cache_command
from prefix_sharing.reference import log_probs as module
from prefix_sharing.tokenizers import hf_chat_tokenizer
from prefix_sharing.trees import RowOptions, bucket_length

CPU = torch.device("cpu")
DIMS = {"vocab_size": 2048, "num_layers": 1, "num_heads": 2, "num_kv_heads": 1, "embed_dim": 16, "max_seq_len": 256}


@pytest.fixture
def dataset():
    return preference_pairs(tokenizer(), num_pairs=10)


@pytest.fixture
def models():
    plain, tree = llama3(**DIMS, intermediate_dim=24), llama3(**DIMS, intermediate_dim=24)
    tree.load_state_dict(plain.state_dict())
    return plain, to_tree_model(tree, "chains")


@pytest.fixture
def cache(tmp_path):
    return ReferenceCache(str(tmp_path / "cache"), "a" * 32, {"model": "small"})


def plan_of(dataset, examples=None, packing=Fixed(1)):  # noqa: B008, it is frozen
    num_tokens = dataset.sizes().num_tokens
    sizes = ExampleSizes(num_tokens, num_tokens * 1.0, dataset.num_pairs)
    return Plan(sizes=sizes, packing=packing).of_pass(examples)


def compute(tree, dataset, cache=None, examples=None):
    return reference_log_probs(tree, dataset, plan_of(dataset, examples), StepLoader(CPU), cache).log_probs


class Counts:
    """A forward pass that counts the examples it sees, and may be interrupted."""

    def __init__(self, model, stop_after=None):
        self.model, self.stop_after, self.examples = model, stop_after, []

    def __call__(self, row):
        if self.stop_after is not None and len(self.examples) >= self.stop_after:
            raise KeyboardInterrupt
        self.examples += row.example_index.tolist()
        return self.model(row)


@pytest.mark.parametrize("share_prefix", [True, False])
@pytest.mark.parametrize("packing", [Fixed(1), Fixed(3), ByLength(700)])
def test_values_are_those_of_plain_sequences_by_example(dataset, models, share_prefix, packing):
    plain, tree = models
    examples = np.array([7, 2, 9, 0])
    load = StepLoader(CPU, RowOptions(share_prefix=share_prefix, round_length=bucket_length))
    log_probs = reference_log_probs(tree, dataset, plan_of(dataset, examples, packing), load).log_probs
    assert log_probs.shape == (10, 2)
    assert not log_probs.requires_grad
    with torch.no_grad():
        expected = torch.stack([plain_log_probs(plain, dataset[i]) for i in examples])
    torch.testing.assert_close(log_probs[examples], expected, rtol=1e-5, atol=1e-5)
    others = [i for i in range(10) if i not in examples]
    assert log_probs[others].isnan().all()


def test_what_is_in_the_cache_is_not_computed_again(dataset, models, cache):
    forward = Counts(models[1])
    first = compute(forward, dataset, cache, np.array([1, 4]))
    assert sorted(forward.examples) == [1, 4]
    everything = compute(forward, dataset, cache)
    assert sorted(forward.examples[2:]) == [0, 2, 3, 5, 6, 7, 8, 9]
    assert torch.equal(everything[[1, 4]], first[[1, 4]])
    again = Counts(models[1])
    assert torch.equal(compute(again, dataset, cache), everything)
    assert again.examples == []


def test_another_order_or_selection_of_the_same_examples_finds_them(dataset, models, cache):
    everything = compute(models[1], dataset, cache)
    longer = preference_pairs(tokenizer(), num_pairs=12)
    forward = Counts(models[1])
    log_probs = compute(forward, longer, cache)
    assert sorted(forward.examples) == [10, 11]
    assert torch.equal(log_probs[:10], everything)


def test_another_template_or_mask_is_another_key(tmp_path):
    original = Path(quickstart.__file__).parent / "bpe_2048"
    shutil.copytree(original, tmp_path / "other")
    template = tmp_path / "other" / "chat_template.jinja"
    template.write_text(template.read_text().replace("\n' + m", ": ' + m").replace("\\n", ": "))
    shutil.copytree(original, tmp_path / "same")

    def key(path, **options):
        records = datasets.Dataset.from_list([{"prompt": "q", "chosen": "good", "rejected": "bad"}])
        options = PreferenceOptions(**options)
        return (
            preference_dataset_from_records(records, hf_chat_tokenizer(str(path)), options, name="pairs").ids[0].as_py()
        )

    assert key(tmp_path / "same") == key(original)
    keys = [
        key(original),
        key(tmp_path / "other"),
        key(original, masking_strategy="train_on_all"),
        key(original, new_system_prompt="Be brief."),
        key(original, max_seq_len=10),
    ]
    assert len(set(keys)) == 5


def test_the_reference_is_known_by_content(models, tmp_path):
    plain, tree = models
    model = {"_component_": "torchtune.models.llama3.llama3", **DIMS}

    def name(weights, model=model, dtype="fp32"):
        reference = {"cache_dir": str(tmp_path)}
        cfg = OmegaConf.create(
            {"model": model, "dtype": dtype, "compile": False, "attention_backend": None, "reference": reference}
        )
        return module.open_reference_cache(cfg, Checkpoint(weights)).directory.name

    weights = plain.state_dict()
    reordered = name(weights, dict(reversed(model.items())))
    assert name(weights) == name(dict(reversed(weights.items()))) == name(tree.state_dict()) == reordered
    changed = {k: v.clone() for k, v in weights.items()}
    changed["norm.scale"].view(-1)[3] += 1e-6
    names = [name(weights), name(changed), name(weights, dtype="bf16"), name(weights, {**model, "rope_base": 1})]
    names.append(name({k: v.bfloat16() for k, v in weights.items()}))
    assert len(set(names)) == 5


def test_an_interrupted_pass_goes_on_where_it_stopped(dataset, models, cache, monkeypatch):
    expected = compute(models[1], dataset)
    monkeypatch.setattr(module, "SECONDS_BETWEEN_FILES", 0)
    stopped = Counts(models[1], stop_after=8)
    with pytest.raises(KeyboardInterrupt):
        compute(stopped, dataset, cache)
    forward = Counts(models[1])
    assert torch.equal(compute(forward, dataset, cache), expected)
    # a step of a pass is eight rows: the first was written
    assert sorted(forward.examples) == [8, 9]


def test_a_flipped_byte_is_named_and_computed_again(dataset, models, cache, caplog):
    expected = compute(models[1], dataset, cache)
    (file,) = cache.directory.glob("*.parquet")
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    forward = Counts(models[1])
    logging.getLogger("prefix_sharing").propagate = True
    assert torch.equal(compute(forward, dataset, cache), expected)
    assert sorted(forward.examples) == list(range(10))
    assert f"{file} is damaged" in caplog.text
    # set aside, so the next run neither uses nor names it
    assert file.with_suffix(".damaged").exists()
    caplog.clear()
    assert torch.equal(compute(Counts(models[1], stop_after=0), dataset, cache), expected)
    assert "damaged" not in caplog.text


def test_two_runs_may_fill_the_same_cache(dataset, models, cache):
    theirs = ReferenceCache(str(cache.directory.parent), cache.directory.name, {})
    first = compute(models[1], dataset, cache, np.arange(6))
    assert compute(models[1], dataset, None, np.arange(3, 10)).isnan().any()
    theirs.add(dataset.ids.take(np.arange(3, 10)), np.full((7, 2), -1.0, np.float32), np.full(7, 2))
    assert not any(path.name.startswith(".") for path in cache.directory.iterdir())
    found = cache.read(dataset.ids, 2)
    assert not np.isnan(found).any()
    np.testing.assert_array_equal(found[:3], first[:3].numpy())


def test_examples_with_fewer_responses_keep_their_own_number(cache):
    ids = pa.array(["a", "b", "c"])
    cache.add(ids.take([0, 1]), np.array([[-1, -2, -3], [-4, 0, 0]], np.float32), np.array([3, 1]))
    np.testing.assert_array_equal(cache.read(ids, 3), [[-1, -2, -3], [-4, 0, 0], [np.nan] * 3])
    np.testing.assert_array_equal(cache.read(ids.take([1]), 1), [[-4]])


def test_the_command_lists_and_clears(dataset, models, cache, capsys, monkeypatch):
    compute(models[1], dataset, cache)
    cache_dir = str(cache.directory.parent)
    (line,) = describe_cache(cache_dir)
    assert line.startswith(f"{'a' * 32}  10 examples")
    assert "model small" in line

    def run(*arguments):
        monkeypatch.setattr("sys.argv", ["cache", "--cache_dir", cache_dir, *arguments])
        cache_command.main()
        return capsys.readouterr().out

    assert run() == f"{line}\n"
    assert run("--clear", "a" * 32) == f"Removed {'a' * 32}.\n"
    assert run() == f"{cache_dir} is empty.\n"


def test_a_damaged_file_keeps_nobody_from_clearing_the_cache(dataset, models, cache, capsys, monkeypatch):
    compute(models[1], dataset, cache)
    (file,) = cache.directory.glob("*.parquet")
    file.write_bytes(file.read_bytes()[:40])
    cache_dir = str(cache.directory.parent)
    assert [line.split()[1] for line in describe_cache(cache_dir)] == ["0"]
    monkeypatch.setattr("sys.argv", ["cache", "--cache_dir", cache_dir, "--clear"])
    cache_command.main()
    assert not cache.directory.exists()


def test_a_pass_goes_on_when_the_cache_is_full(dataset, models, cache, monkeypatch, caplog):
    def full(*args):
        raise OSError(28, "No space left on device")

    logging.getLogger("prefix_sharing").propagate = True
    monkeypatch.setattr(cache, "add", full)
    assert not compute(models[1], dataset, cache).isnan().any()
    assert "cannot be written (No space left on device); continuing without it" in caplog.text


def test_what_is_in_no_tensor_is_another_reference(models, tmp_path):
    weights, file = models[0].state_dict(), tmp_path / "config.json"
    names = set()
    for base in (10_000, 500_000):
        file.write_text(json.dumps({"rope_theta": base}))
        names.add(Checkpoint(weights, config_file=file).fingerprint)
    assert len(names) == 2


def test_the_base_of_an_adapter_is_asked_without_dropout():
    class Model(nn.Dropout):
        without_adapter = contextlib.nullcontext

    model = Model(0.5).train()
    found = module._without_adapter(lambda model, row: model(row), model, torch.ones(64))
    assert torch.equal(found, torch.ones(64))
    assert model.training


def test_a_cache_that_cannot_be_written_is_an_error_that_names_the_key(tmp_path):
    (tmp_path / "file").write_text("")
    model = {"_component_": "torchtune.models.llama3.llama3"}
    cfg = OmegaConf.create(
        {
            "model": model,
            "dtype": "fp32",
            "compile": False,
            "attention_backend": None,
            "reference": {"cache_dir": str(tmp_path / "file")},
        }
    )
    with pytest.raises(UserError, match="'reference.cache_dir': .*file cannot be written: Not a directory"):
        module.open_reference_cache(cfg, Checkpoint())


def test_code_that_computes_something_else_is_another_key(tmp_path, monkeypatch):
    cfg = OmegaConf.create(
        {
            "model": {"_component_": "torchtune.models.llama3.llama3"},
            "dtype": "fp32",
            "compile": False,
            "attention_backend": None,
            "reference": {"cache_dir": str(tmp_path)},
        }
    )

    def directory():
        return module.open_reference_cache(cfg, Checkpoint()).directory

    before = directory()
    assert directory() == before
    monkeypatch.setattr(module, "code_fingerprint", lambda *parts: "another")
    assert directory() != before

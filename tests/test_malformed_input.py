"""Malformed input of every kind ends in a sentence or a counted drop: no library's traceback, no silent success.

Three hundred inputs; raise ``EXAMPLES`` to try more.
"""

import json
import math

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from prefix_sharing.checkpoint.tensor_files import describe_file
from prefix_sharing.checkpoint.training import _with_checksum, newest_checkpoint, read_checkpoint
from prefix_sharing.config import TrainingConfig, check_config, find_config
from prefix_sharing.datasets import prefix_preference_dataset
from prefix_sharing.datasets.source import MAX_TEXT
from prefix_sharing.errors import UserError
from prefix_sharing.quickstart import tokenizer

EXAMPLES = 100
CHECKS = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]

QUICKSTART = OmegaConf.load(find_config("quickstart/single_device"))

COUNTS = ["epochs", "batch_size", "log_every_n_steps", "keep_last_n", "max_nonfinite_in_a_row", "num_workers", "seed"]
SIZES = ["model.num_layers", "model.num_heads", "model.embed_dim", "model.vocab_size", "tokenizer.max_seq_len"]
FLOATS = ["optimizer.lr", "optimizer.weight_decay", "loss.beta", "lr_scheduler.num_cycles", "clip_grad_norm"]
CHOICES = ["dtype", "packing", "attention_backend", "on_nonfinite", "ac_mode", "shuffle", "drop_last", "self_check"]
COMPONENTS = ["model", "tokenizer", "checkpointer", "dataset", "loss", "optimizer", "metric_logger"]

names = st.text("abcdefghij_", min_size=1, max_size=12)
words = names.map(lambda name: f"x{name}")
not_counts = st.one_of(
    st.integers(max_value=-1), st.integers(min_value=2**63), words, st.floats(0.1, 0.9), st.just([1])
)
not_numbers = st.one_of(
    words, st.sampled_from([math.nan, math.inf, -math.inf, {"a": 1}, 10**30, [], [1], [1, [2]], [{"a": 1}]])
)
overrides = st.one_of(
    st.tuples(st.sampled_from(COUNTS + SIZES), not_counts),
    st.tuples(st.sampled_from(FLOATS), not_numbers),
    st.tuples(st.sampled_from(CHOICES), st.one_of(words, st.integers(2), st.just([1]))),
    st.tuples(st.sampled_from(COMPONENTS), st.one_of(st.none(), words, st.integers(), st.booleans(), st.just([1]))),
    st.tuples(st.sampled_from(COMPONENTS).map(lambda key: f"{key}._component_"), st.one_of(words, st.integers())),
    st.tuples(names.map(lambda name: f"unknown_{name}"), st.one_of(words, st.integers())),
)


@settings(max_examples=EXAMPLES)
@given(override=overrides)
def test_configs(override):
    key, value = override
    cfg = QUICKSTART.copy()
    OmegaConf.update(cfg, key, value, merge=False)
    with pytest.raises(UserError, match="^Config key '") as caught:
        check_config(cfg, TrainingConfig)
    assert "\n" not in str(caught.value)


DEEP = "[" * 5_000
GOOD = {"prompt": "q", "chosen": "a", "rejected": "b"}
odd_values = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(-9, 9), st.just(1e308), st.just(" ")),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(names, inner, max_size=2)),
    max_leaves=6,
)
odd_records = st.tuples(st.sampled_from(sorted(GOOD)), odd_values).map(
    lambda change: json.dumps({**GOOD, change[0]: change[1]})
)
DEEP_PROMPT = json.dumps({**GOOD, "prompt": "?"}).replace('"?"', "[" * 50_000 + "]" * 50_000)
LONG_PROMPT = json.dumps({**GOOD, "prompt": "q" * (MAX_TEXT + 1)})
not_records = ['{"prompt": "q"', "[1, 2]", '"text"', DEEP, "{}", "NaN", DEEP_PROMPT]
odd_lines = st.one_of(odd_records, st.sampled_from(not_records))


@settings(max_examples=EXAMPLES // 10, suppress_health_check=CHECKS)
@given(lines=st.lists(odd_lines, min_size=10, max_size=10))
def test_rows(tmp_path, lines):
    file = tmp_path / "pairs.jsonl"
    file.write_text("\n".join([json.dumps(GOOD), *lines]) + "\n")
    said, found = "", None
    try:
        found = prefix_preference_dataset(
            tokenizer(), source="json", data_files=str(file), on_malformed="drop", max_malformed=1.0
        )
    except UserError as error:
        said = str(error)
    assert "\n" not in said
    assert len(said) < 1000
    if found is not None:
        assert len(found) + sum(found.dropped.values()) == 11


@pytest.mark.parametrize(
    ("line", "problem"),
    [(DEEP_PROMPT, "it is nested too deeply"), (LONG_PROMPT, "it has more than 16,000,000 characters")],
    ids=["deep", "long"],
)
def test_a_record_that_no_tokenizer_should_get_is_a_counted_drop(tmp_path, caplog, line, problem):
    file = tmp_path / "pairs.json"
    file.write_text(f"{json.dumps(GOOD)}\n{line}\n")
    found = prefix_preference_dataset(tokenizer(), data_files=str(file), on_malformed="drop", max_malformed=0.5)
    assert found.dropped == {"malformed": 1}
    assert f"pairs.json, record 1 (line 2): {problem}" in caplog.text


damages = st.one_of(
    st.tuples(st.just("cut"), st.integers(0, 10**6)),
    st.tuples(st.just("change"), st.tuples(st.integers(0, 10**6), st.integers(1, 255))),
    st.tuples(
        st.just("replace"),
        st.sampled_from([b"", b"{}", b"[]", b"null", DEEP.encode(), b"\x80\x00", b'{"files": {}}', b'{"files": 3}']),
    ),
    st.tuples(st.just("remove"), st.none()),
)


def small_checkpoint(directory, **changes):
    """A training checkpoint of a few bytes; a change to None leaves a key out."""
    directory.mkdir(exist_ok=True)
    shard = directory / "shard-00001-model.safetensors"
    shard.write_bytes(bytes(range(256)) * 4)
    content = {
        "step": 3,
        "values": {"x": 0.1},
        "run": {"id": "x"},
        "files": {shard.name: describe_file(shard)},
        **changes,
    }
    given = {key: value for key, value in content.items() if value is not None}
    (directory / "checkpoint.json").write_bytes(_with_checksum(given))
    return directory


@settings(max_examples=EXAMPLES, suppress_health_check=CHECKS)
@given(damage=damages)
@pytest.mark.parametrize("name", ["checkpoint.json", "shard-00001-model.safetensors"])
def test_checkpoints(tmp_path, name, damage):
    file = small_checkpoint(tmp_path) / name
    assert read_checkpoint(tmp_path).step == 3
    how, argument = damage
    before = file.read_bytes()
    if how == "remove":
        file.unlink()
    elif how == "replace":
        file.write_bytes(argument)
    elif how == "cut":
        file.write_bytes(before[: argument % len(before)])
    else:
        at = argument[0] % len(before)
        file.write_bytes(before[:at] + bytes([before[at] ^ argument[1]]) + before[at + 1 :])
    with pytest.raises(UserError, match="is damaged: "):
        read_checkpoint(tmp_path)


def test_every_bit_of_a_checkpoints_description_counts(tmp_path):
    file = small_checkpoint(tmp_path) / "checkpoint.json"
    written = file.read_bytes()
    for bit in range(8 * len(written)):
        changed = bytearray(written)
        changed[bit // 8] ^= 1 << bit % 8
        file.write_bytes(changed)
        with pytest.raises(UserError, match="is damaged: "):
            read_checkpoint(tmp_path)


@pytest.mark.parametrize(
    "changes", [{"run": None}, {"run": {}}, {"run": ["id"]}, {"values": None}, {"step": None}], ids=str
)
def test_a_checkpoint_whose_description_lacks_a_key_is_damaged(tmp_path, caplog, changes):
    small_checkpoint(tmp_path / "step_3")
    small_checkpoint(tmp_path / "step_4", **changes)
    found = newest_checkpoint(tmp_path, "x")
    assert found.directory == tmp_path / "step_3"
    assert "step_4 is damaged: checkpoint.json cannot be read" in caplog.text

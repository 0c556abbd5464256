"""What is put right in a directory that torchtune's checkpointer has written."""

import json
import os
import shutil

import pytest
import torch
from safetensors.torch import save_file

from prefix_sharing.hosts.torchtune.exports import complete_export, remove_unknown_copies

INDEX = "model.safetensors.index.json"


@pytest.fixture
def base(tmp_path):
    directory = tmp_path / "base"
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps({"model_type": "llama", "torch_dtype": "bfloat16"}))
    return directory


@pytest.fixture
def epoch(tmp_path, base):
    """As torchtune leaves it, with what it copies linked: nothing may be written through a link."""
    directory = tmp_path / "epoch_0"
    directory.mkdir()
    os.link(base / "config.json", directory / "config.json")
    return directory


def write_weights(directory, *shards):
    weight_map = {}
    for i, tensors in enumerate(shards, start=1):
        name = f"model-{i:05}-of-{len(shards):05}.safetensors"
        save_file(tensors, directory / name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, name)
    (directory / INDEX).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}))


def write_adapter(directory, **config):
    directory.mkdir(exist_ok=True)
    (directory / "adapter_config.json").write_text(json.dumps({"r": 4, "target_modules": ["q_proj"], **config}))
    for name in ("adapter_model.safetensors", "adapter_model.pt"):
        (directory / name).write_bytes(b"")


def read(file):
    return json.loads(file.read_text())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_config_states_the_dtype_of_the_weights_and_the_source_stays(base, epoch, dtype):
    write_weights(epoch, {"a": torch.zeros(3, dtype=dtype)})
    complete_export(epoch, base / "config.json", adapter_only=False)
    name = str(dtype).removeprefix("torch.")
    assert read(epoch / "config.json") == {"model_type": "llama", "torch_dtype": name, "dtype": name}
    assert read(base / "config.json") == {"model_type": "llama", "torch_dtype": "bfloat16"}


def test_a_link_to_the_source_is_replaced(base, epoch):
    (epoch / "config.json").unlink()
    (epoch / "config.json").symlink_to(base / "config.json")
    write_weights(epoch, {"a": torch.zeros(3)})
    complete_export(epoch, base / "config.json", adapter_only=False)
    assert read(epoch / "config.json")["dtype"] == "float32"
    assert read(base / "config.json")["torch_dtype"] == "bfloat16"


def test_of_several_dtypes_the_one_of_most_elements_counts(base, epoch):
    few, many = torch.zeros(2, 3), torch.zeros(7, dtype=torch.bfloat16)
    write_weights(epoch, {"a": few, "b": torch.zeros(1, dtype=torch.bfloat16)}, {"c": many})
    complete_export(epoch, base / "config.json", adapter_only=False)
    assert read(epoch / "config.json")["dtype"] == "bfloat16"


def test_the_dtype_is_read_from_pickled_weights_as_well(base, epoch):
    torch.save({"a": torch.zeros(3)}, epoch / "model-00001-of-00001.bin")
    index = {"metadata": {}, "weight_map": {"a": "model-00001-of-00001.bin"}}
    (epoch / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    complete_export(epoch, base / "config.json", adapter_only=False)
    assert read(epoch / "config.json")["dtype"] == "float32"


def test_the_index_lists_nothing_that_is_not_there(base, epoch):
    # torchtune lists what it read, such as the frequencies of rotation that old checkpoints have.
    write_weights(epoch, {"a": torch.zeros(3)})
    index = read(epoch / INDEX)
    index["weight_map"] |= {"inv_freq": "model-00001-of-00001.safetensors", "b": "model-00002-of-00002.safetensors"}
    (epoch / INDEX).write_text(json.dumps(index))
    complete_export(epoch, base / "config.json", adapter_only=False)
    assert read(epoch / INDEX) == {
        "metadata": {"total_size": 1},
        "weight_map": {"a": "model-00001-of-00001.safetensors"},
    }


def test_an_adapter_alone_names_its_base_and_lies_beside_no_config_of_a_model(base, epoch):
    # Whatever hub the base once came from: torchtune writes that, if it knows.
    write_adapter(epoch, base_model_name_or_path="hub/name")
    (epoch / INDEX).write_text("{}")
    (epoch / "tokenizer.json").write_text("{}")
    complete_export(epoch, base / "config.json", adapter_only=True)
    assert read(epoch / "adapter_config.json")["base_model_name_or_path"] == str(base.resolve())
    assert {file.name for file in epoch.iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
        "adapter_model.pt",
        "tokenizer.json",
    }


def test_an_adapter_beside_a_merged_model_lies_apart(base, epoch):
    write_weights(epoch, {"a": torch.zeros(3)})
    write_adapter(epoch)
    complete_export(epoch, base / "config.json", adapter_only=False)
    assert {file.name for file in (epoch / "adapter").iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
    }
    assert (epoch / "adapter_model.pt").exists()
    assert not (epoch / "adapter_config.json").exists()


def test_the_config_of_an_adapter_of_the_base_is_not_taken_over(base, epoch):
    # torchtune copies it, but not the adapter: transformers would look for it.
    write_weights(epoch, {"a": torch.zeros(3)})
    for directory in (epoch, epoch / "adapter"):
        directory.mkdir(exist_ok=True)
        (directory / "adapter_config.json").write_text("{}")
    complete_export(epoch, base / "config.json", adapter_only=False)
    assert not list(epoch.rglob("adapter_config.json"))


def test_a_base_in_the_directory_itself_keeps_its_config(base):
    write_adapter(base)
    complete_export(base, base / "config.json", adapter_only=True)
    assert (base / "config.json").exists()


def test_what_is_not_hugging_faces_is_left_alone(epoch):
    before = {file: file.read_bytes() for file in epoch.iterdir()}
    complete_export(epoch, None, adapter_only=True)
    assert {file: file.read_bytes() for file in epoch.iterdir()} == before


def test_of_what_torchtune_copies_only_what_belongs_to_a_model_stays(tmp_path, base):
    known = ["config.json", "tokenizer.json", "tokenizer.model", "generation_config.json", "chat_template.jinja"]
    known += ["LICENSE", "original/tokenizer.model", "original/params.json"]
    unknown = ["secret.env", "notes.txt", "original/id_rsa", "runs/log/events.json", "data.jsonl"]
    for name in known + unknown:
        (base / name).parent.mkdir(parents=True, exist_ok=True)
        (base / name).write_text("{}")
    (base / "model.safetensors").write_bytes(b"")
    epoch_dir = tmp_path / "epoch_0"
    shutil.copytree(base, epoch_dir)
    write_weights(epoch_dir, {"a": torch.zeros(3)})
    remove_unknown_copies(epoch_dir, base)
    left = {str(file.relative_to(epoch_dir)) for file in epoch_dir.rglob("*")}
    assert left == {*known, INDEX, "model.safetensors", "model-00001-of-00001.safetensors", "original"}
    assert all((base / name).exists() for name in known + unknown)

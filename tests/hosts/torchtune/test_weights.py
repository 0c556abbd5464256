import pytest
import torch
from omegaconf import OmegaConf
from torchtune.models.llama3_2 import llama3_2

from prefix_sharing.checkpoint import Checkpoint
from prefix_sharing.errors import UserError
from prefix_sharing.hosts import load_checkpoint, to_tree_model

DIMS = {"vocab_size": 11, "num_layers": 1, "num_heads": 2, "num_kv_heads": 1, "embed_dim": 8, "max_seq_len": 16}


def model_without_weights(**kwargs):
    with torch.device("meta"):
        model = to_tree_model(llama3_2(**DIMS | kwargs), "chains")
    model.materialize(torch.device("cpu"))
    return model


def test_weights_of_any_precision_are_loaded_as_fp32():
    source = llama3_2(**DIMS)
    weights = {name: tensor.bfloat16() for name, tensor in source.state_dict().items()}
    model = model_without_weights()
    model.load_weights(Checkpoint(weights), seed=0)
    for name, tensor in model.state_dict().items():
        assert tensor.dtype == torch.float32
        assert tensor.equal(weights[name].float())
    assert model.layers[0].attn.pos_embeddings.cache.equal(source.layers[0].attn.pos_embeddings.cache)


def test_weights_can_be_loaded_again():
    first, second = llama3_2(**DIMS).state_dict(), llama3_2(**DIMS).state_dict()
    model = model_without_weights()
    for weights in (first, second, first):
        model.load_weights(Checkpoint(weights), seed=0)
        assert all(tensor.equal(weights[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize(
    ("kwargs", "problem"),
    [
        ({"vocab_size": 12}, "tok_embeddings.weight is 12x8 in the checkpoint, but 11x8 in the model"),
        ({"num_layers": 2}, r"layers.1.attn.q_proj.weight is 8x8 in the checkpoint, but missing in the model"),
        ({"tie_word_embeddings": False}, "output.weight is 11x8 in the checkpoint, but missing in the model"),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_refused(kwargs, problem):
    weights = llama3_2(**DIMS | kwargs).state_dict()
    with pytest.raises(UserError, match=problem):
        model_without_weights().load_weights(Checkpoint(weights), seed=0)


def test_a_checkpoint_with_something_missing_is_refused():
    weights = llama3_2(**DIMS).state_dict()
    del weights["norm.scale"]
    with pytest.raises(UserError, match="norm.scale is missing in the checkpoint, but 8 in the model"):
        model_without_weights().load_weights(Checkpoint(weights), seed=0)


@pytest.mark.parametrize("file", ["../other/model.safetensors", "/etc/model.bin", "a/../../model.bin"])
def test_files_outside_of_the_checkpoints_directory_are_refused(tmp_path, file):
    component = "torchtune.training.FullModelHFCheckpointer"
    node = {"_component_": component, "checkpoint_dir": str(tmp_path / "model"), "checkpoint_files": [file]}
    with pytest.raises(UserError, match=r"'checkpointer.checkpoint_files': .* is not in checkpoint_dir; set that to"):
        load_checkpoint("checkpointer", OmegaConf.create(node))
    node["checkpoint_files"] = {"filename_format": file, "max_filename": "00002"}
    with pytest.raises(UserError, match="is not in checkpoint_dir"):
        load_checkpoint("checkpointer", OmegaConf.create(node))


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda name, tensor: tensor.to(torch.int8), "tok_embeddings.weight of the checkpoint holds int8 numbers"),
        (lambda name, tensor: tensor.index_fill(0, torch.tensor(0), torch.nan), "holds numbers that are not finite"),
        (lambda name, tensor: tensor.index_fill(0, torch.tensor(0), torch.inf), "holds numbers that are not finite"),
        (lambda name, tensor: torch.zeros_like(tensor), "every weight of the checkpoint is 0; its files were not"),
    ],
)
def test_weights_that_no_model_was_trained_to_have_are_refused(change, problem):
    weights = {name: change(name, tensor) for name, tensor in llama3_2(**DIMS).state_dict().items()}
    with pytest.raises(UserError, match=problem):
        model_without_weights().load_weights(Checkpoint(weights), seed=0)

"""Weights of transformers' models: what is read and written, and how much of it a rank ever holds."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

transformers = pytest.importorskip("transformers", minversion="5.24")

from directories import EXPERTS, make_directory  # noqa: E402
from prefix_sharing.checkpoint import Checkpoint  # noqa: E402
from prefix_sharing.errors import ConfigError, UserError  # noqa: E402
from prefix_sharing.hosts.transformers import causal_lm, to_tree_model  # noqa: E402
from prefix_sharing.hosts.transformers.files import WeightFiles, read_into, write_from  # noqa: E402
from prefix_sharing.trees import Response, Row  # noqa: E402
from runs import torchrun  # noqa: E402


def model_of(path):
    return transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)


def tensors_of(model):
    tied = model.all_tied_weights_keys
    return {name: tensor for name, tensor in model.state_dict().items() if name not in tied}


@pytest.mark.parametrize(("name", "kwargs"), [("qwen3", {}), ("qwen3_moe", EXPERTS), ("phi3", {"pad_token_id": 0})])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_what_is_written_is_read_by_transformers_and_by_us(tmp_path, name, kwargs, tied, monkeypatch):
    monkeypatch.setattr("prefix_sharing.hosts.transformers.files._MOST_BYTES", 200_000)  # several files
    path = make_directory(tmp_path / "model", name, tie_word_embeddings=tied, **kwargs)
    model = model_of(path)
    written = tmp_path / "written"
    written.mkdir()
    write_from(tensors_of(model), written, model.config, dtype=torch.float32)
    model.config.save_pretrained(written)
    assert len(list(written.glob("*.safetensors"))) > 2
    # The names are those of the checkpoint that transformers writes, not those in its model.
    assert set(WeightFiles(written)) == set(WeightFiles(Path(path)))
    again = model_of(written)
    for tensors in (again.state_dict(), read_again(written, model)):
        for key, tensor in tensors_of(model).items():
            torch.testing.assert_close(tensors[key], tensor, rtol=0, atol=0)


def read_again(directory, model):
    tensors = {name: torch.full_like(tensor, torch.nan) for name, tensor in tensors_of(model).items()}
    read_into(tensors, WeightFiles(directory), model.config)
    return tensors


def test_of_a_model_of_images_the_decoder_of_text_is_read(tmp_path):
    text = {"vocab_size": 97, "hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 2, "head_dim": 16}
    text |= {"num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": 1}
    vision = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision |= {"image_size": 28, "patch_size": 14}
    kwargs = {"text_config": text, "vision_config": vision, "mm_tokens_per_image": 4, "image_token_index": 92}
    config = transformers.AutoConfig.for_model("gemma3", **kwargs, boi_token_index=90, eoi_token_index=91)
    torch.manual_seed(0)
    whole = transformers.AutoModelForImageTextToText.from_config(config).eval()
    whole.save_pretrained(tmp_path)
    with torch.device("meta"):
        built = causal_lm(str(tmp_path))
    model = to_tree_model(built, "chains")
    model.materialize(torch.device("cpu"))
    files = WeightFiles(tmp_path)
    assert files.num_left_out > 0
    model.load_weights(Checkpoint(files), seed=0)
    tokens = torch.arange(3, 40)
    row = Row.from_examples([[Response(tokens.numpy(), np.arange(37) >= 20)]])
    with torch.no_grad():
        log_probs = whole(input_ids=tokens[None]).logits[0, :-1].log_softmax(-1)
        expected = log_probs.gather(1, tokens[1:, None])[19:].sum()
        assert model(row).log_probs.item() == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize("kind", ["t5", "vit"])
def test_what_is_no_decoder_of_text_is_refused(tmp_path, kind):
    transformers.AutoConfig.for_model(kind).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=f"is no decoder of text: transformers has no {kind} ...ForCausalLM"):
        causal_lm(str(tmp_path))


def test_quantized_weights_are_refused(tmp_path):
    path = make_directory(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="has quantized weights, which cannot be trained; give the model they were"):
        causal_lm(path)


def test_files_that_do_not_fit_are_refused_by_the_first_tensor(tmp_path):
    model = model_of(make_directory(tmp_path / "model"))
    for kwargs, message in (
        ({"num_hidden_layers": 2}, r"layers\.2\..* is missing in the checkpoint"),
        ({"num_hidden_layers": 4}, r"layers\.3\..* but missing in the model"),
        ({"intermediate_size": 97}, r"is \d+x\d+ in the checkpoint, but \d+x\d+ in the model; check path"),
    ):
        other = make_directory(tmp_path / str(kwargs), **kwargs)
        with pytest.raises(ConfigError, match=message):
            read_again(Path(other), model)


def test_the_index_decides_which_files_are_read(tmp_path, monkeypatch):
    monkeypatch.setattr("prefix_sharing.hosts.transformers.files._MOST_BYTES", 200_000)
    model = model_of(make_directory(tmp_path / "model"))
    write_from(tensors_of(model), tmp_path, model.config, dtype=torch.bfloat16)
    with safe_open(sorted(tmp_path.glob("*.safetensors"))[0], framework="pt") as file:
        names = list(file.keys())
        assert file.get_tensor(names[0]).dtype is torch.bfloat16
        assert file.metadata() == {"format": "pt"}
    stale = {name: torch.zeros(3) for name in names}
    from safetensors.torch import save_file

    save_file(stale, tmp_path / "model-00001-of-00099.safetensors")
    read_again(tmp_path, model)
    sorted(tmp_path.glob("model-00001*"))[0].unlink()
    with pytest.raises(UserError, match=r"model-00001-of-\d+.safetensors not found, which .*index.json names"):
        WeightFiles(tmp_path)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (
            lambda name, tensor: tensor.to(torch.int8),
            r"weight of the checkpoint holds I8 numbers; quantized weights can",
        ),
        (lambda name, tensor: torch.full_like(tensor, torch.nan), "holds numbers that are not finite"),
        (lambda name, tensor: torch.zeros_like(tensor), "every weight of the checkpoint is 0"),
    ],
)
def test_weights_that_no_model_was_trained_to_have_are_refused(tmp_path, change, problem):
    model = model_of(make_directory(tmp_path / "model"))
    changed = {name: change(name, tensor) for name, tensor in load_file(tmp_path / "model/model.safetensors").items()}
    save_file(changed, tmp_path / "model" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ConfigError, match=problem):
        read_into(tensors_of(model), WeightFiles(tmp_path / "model"), model.config)


def test_damaged_files_are_one_sentence(tmp_path):
    path = Path(make_directory(tmp_path / "model"))
    file = path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(UserError, match=r"model.safetensors is damaged, or no safetensors file .*; download it again"):
        WeightFiles(path)
    (path / "model.safetensors.index.json").write_text('{"weight_map"')
    with pytest.raises(UserError, match=r"index.json is not the index of safetensors files; download it again"):
        WeightFiles(path)


def test_other_weights_than_safetensors_are_refused(tmp_path):
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(UserError, match=r"has no model.safetensors and no model.safetensors.index.json"):
        WeightFiles(tmp_path)


@pytest.mark.slow
def test_no_rank_of_four_ever_holds_the_model(tmp_path):
    dims = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 12, "vocab_size": 8192, "head_dim": 64}
    path = make_directory(tmp_path / "model", **dims)
    size = sum(file.stat().st_size for file in Path(path).glob("*.safetensors"))
    assert size > 200e6
    out = tmp_path / "out"
    out.mkdir()
    script = Path(__file__).parents[2] / "support" / "weights_on_ranks.py"
    torchrun(4, script, path, str(out))
    for file in out.glob("peaks_*.json"):
        # Its own quarter, and one layer or one file of sixteen.
        peaks = json.loads(file.read_text())
        assert {name: peak / size for name, peak in peaks.items() if peak > 0.6 * size} == {}
    assert len(list(out.glob("peaks_*.json"))) == 4
    before, after = model_of(path).state_dict(), model_of(out).state_dict()
    for name, tensor in before.items():
        torch.testing.assert_close(after[name], tensor, rtol=0, atol=0)

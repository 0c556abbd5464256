"""Bad input: one sentence, a status other than 0, no traceback, and nothing that was there is touched."""

import importlib
import json
import sys

import pytest
import torch

import prefix_dpo_single_device
from prefix_sharing import cli
from runs import SHORT, run_in_process

PAIR = {"prompt": "q", "chosen": "a", "rejected": "b"}
BUILDER = ["dataset=prefix_sharing.datasets.prefix_preference_dataset", "~dataset.num_pairs", "~dataset.seed"]


@pytest.fixture
def refused(tmp_path, monkeypatch, capsys):
    """Runs the recipe with overrides over an earlier run's output, and returns the one line it says."""

    def run(*overrides):
        earlier = {}
        for name in ("torchtune_config.yaml", "epoch_0/model-00001-of-00001.safetensors", "logs/log_1.txt"):
            file = tmp_path / "out" / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(f"earlier {name}")
            earlier[file] = file.read_text()
        settings = [
            f"{key}={'null' if value is None else value}" for key, value in SHORT.items() if f"~{key}" not in overrides
        ]
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(
            sys,
            "argv",
            ["recipe", "--config", "quickstart/single_device", *settings, "output_dir=out", *overrides],
        )
        capsys.readouterr()
        with pytest.raises(SystemExit) as caught:
            prefix_dpo_single_device.recipe_main()
        assert caught.value.code == 1
        stderr = capsys.readouterr().err
        assert "Traceback" not in stderr
        assert {file: file.read_text() for file in earlier} == earlier
        assert not list(tmp_path.glob("out/logs/log_[2-9]*"))
        return stderr.strip().splitlines()[-1]

    return run


@pytest.fixture
def write(tmp_path):
    def write_records(*records):
        file = tmp_path / "pairs.jsonl"
        file.write_text("".join(json.dumps(record) + "\n" for record in records))
        return [*BUILDER, "dataset.source=json", f"dataset.data_files={file}"]

    return write_records


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("bach_size=2", "Config key 'bach_size': unknown key. Did you mean 'batch_size'?"),
        ("attention_backend=flex", "'attention_backend': flex cannot train on cpu"),
        (
            "flex_kernel_options.BLOCK_M=64",
            "not used by the attention backend chains; remove it.",
        ),
        ("model.vocab_size=300", "the model's vocabulary has 300; use the tokenizer that comes with the model."),
        ("model.max_seq_len=64", "but the model takes at most 64; set it to that or less."),
        ("output_dir=/proc/nothing", "'output_dir': /proc/nothing cannot be written"),
        ("device=cuda", "'device': cuda is not available"),
        ("model.num_heads=3", "'model': torchtune.models.llama3.llama3: "),
        ("tokenizer.max_seq_len=3", "has no usable example (dropped by reason: nothing scored up to max_seq_len: 64)."),
        ("device=meta", "'device': must be cuda or cpu, but is meta."),
        (
            "dataset.num_pairs=1000000000000",
            "'dataset.num_pairs': must be from 1 to 1,000,000, but is 1,000,000,000,000.",
        ),
        ("optimizer.lr=-1", "'optimizer': torch.optim.AdamW: Invalid learning rate: -1"),
        ("optimizer.lr=fast", "'optimizer.lr': must be a number, but is 'fast'."),
        ("optimizer.lr=[1,[2]]", "'optimizer.lr': must be a number, but is [1, [2]]."),
        ("loss.beta=[0.1,0.2]", "'loss.beta': must be a number, but is [0.1, 0.2]."),
        ("tokenizer=null", "'tokenizer': required, but not set."),
        ("checkpointer.model_type=LLAMA9", "'checkpointer': prefix_sharing.quickstart.random_checkpointer: "),
    ],
)
def test_a_wrong_value(refused, override, message):
    if override == "device=cuda" and torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    assert message in refused(override)


def test_a_model_that_is_not_covered(refused):
    assert "layers.0.attn has attn_dropout above 0, which prefix sharing does not support" in refused(
        "model.attn_dropout=0.1"
    )


def test_a_model_that_computes_something_else_over_a_tree(refused):
    model = "model._component_=stubs.alibi_llama3"
    said = refused(model, *BUILDER, "dataset.source=json", "dataset.data_files=nowhere.jsonl")
    assert "Error: Config key 'model': alibi_llama3 models compute something else over a tree than over sep" in said


def test_activation_offloading_without_cuda(refused):
    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    said = refused("enable_activation_checkpointing=True", "enable_activation_offloading=True")
    assert "'enable_activation_offloading': needs a CUDA device" in said


@pytest.mark.parametrize("recipe", [recipe for recipe, several in cli.RECIPES.items() if not several])
def test_a_recipe_for_one_process_refuses_to_be_one_of_several(monkeypatch, capsys, tmp_path, recipe):
    online = dict.fromkeys(("prefix_dpo_online", "prefix_dpo_sample", "prefix_dpo_judge"), "quickstart/online")
    config = ({"prefix_dpo_benchmark": "benchmark/cpu"} | online).get(recipe, "quickstart/single_device")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(sys, "argv", ["recipe", "--config", config])
    with pytest.raises(SystemExit) as caught:
        importlib.import_module(recipe).recipe_main()
    assert caught.value.code == 1
    assert capsys.readouterr().err == (
        "Error: This recipe runs on one process, but 2 were started; leave out --nproc_per_node, or train on several "
        "with prefix_dpo_distributed.\n"
    )
    assert not list(tmp_path.iterdir())


def test_a_missing_data_file(refused):
    assert "nowhere.jsonl cannot be loaded" in refused(
        *BUILDER, "dataset.source=json", "dataset.data_files=nowhere.jsonl"
    )


def test_a_malformed_record(refused, write):
    said = refused(*write(PAIR, PAIR, {**PAIR, "chosen": 3}))
    assert (
        "pairs.jsonl, record 2 (line 3): chosen must be a string, a message or a list of messages, but is a number."
        in said
    )


def test_a_data_set_of_which_nothing_is_left(refused, write):
    said = refused(*write({**PAIR, "rejected": "a"}, {**PAIR, "chosen": " "}))
    assert "no usable example (dropped by reason: empty response: 1, identical responses: 1)." in said


def test_examples_that_are_no_pairs(refused, write):
    said = refused(*write({"prompt": "q", "responses": ["a", "b", "c"]}, {"prompt": "q", "responses": ["a"]}))
    assert "DPOLoss compares pairs, but 1 of 2 examples have one response only" in said


def test_an_unknown_key_under_reference(refused):
    assert "Config key 'reference.cache_dri': unknown key. Did you mean 'cache_dir'?" in refused(
        "reference.cache_dri=x"
    )


def test_a_checkpoint_that_does_not_fit_the_model(refused, tmp_path):
    run_in_process(tmp_path / "first", dataset_val=None, max_steps_per_epoch=1)
    said = refused(
        "checkpointer=torchtune.training.FullModelHFCheckpointer",
        "~checkpointer.model",
        f"checkpointer.checkpoint_dir={tmp_path / 'first' / 'epoch_0'}",
        "checkpointer.checkpoint_files=[model-00001-of-00001.safetensors]",
        "checkpointer.model_type=LLAMA3",
        "model.num_layers=4",
    )
    assert "'model': num_layers is 4, but num_hidden_layers in" in said
    assert "config.json is 3; set model.num_layers: 3" in said


def test_a_checkpoint_that_is_not_there(refused, tmp_path):
    said = refused(
        "checkpointer=torchtune.training.FullModelHFCheckpointer",
        "~checkpointer.model",
        "checkpointer.checkpoint_dir=nowhere",
        "checkpointer.checkpoint_files=[model.safetensors]",
        "checkpointer.model_type=LLAMA3",
    )
    assert "Config key 'checkpointer': torchtune.training.FullModelHFCheckpointer: " in said
    assert "nowhere/config.json" in said


def test_a_mistake_in_the_held_out_data_set_names_its_key(refused):
    assert "Error: Config key 'dataset_val.num_pairs': must be a whole number, but is 'many'." in refused(
        "dataset_val.num_pairs=many"
    )
    assert "Error: Config key 'dataset_val.num_pairs': must be from 1 to 1,000,000, but is -1." in refused(
        "dataset_val.num_pairs=-1"
    )


def test_a_loss_of_another_kind(refused):
    assert "stubs.LossOfAnotherKind is not a prefix_sharing.losses.Loss" in refused("loss=stubs.LossOfAnotherKind")
    assert "; use prefix_sharing.losses.DPOLoss or subclass Loss" in refused("loss=torchtune.rlhf.loss.DPOLoss")


def test_a_reference_for_a_loss_that_needs_none(refused):
    said = refused(
        "loss=prefix_sharing.losses.SimPOLoss",
        "ref_checkpointer._component_=torchtune.training.FullModelHFCheckpointer",
        "ref_checkpointer.checkpoint_dir=nowhere",
    )
    assert "'ref_checkpointer': not used: SimPOLoss needs no reference; remove it." in said


def test_a_mistake_in_an_argument_of_a_builder_names_the_whole_key(refused, write):
    assert "Config key 'dataset.truncation': must be one of" in refused(*write(PAIR), "dataset.truncation=middle")

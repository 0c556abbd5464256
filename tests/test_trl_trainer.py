"""TRL's DPOTrainer with shared prefixes against TRL's own: the same script, the same numbers."""

import dataclasses
import hashlib
import importlib.util
import inspect
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

trl = pytest.importorskip("trl", reason="TRL is not installed: pip install '.[trl]'")
transformers = pytest.importorskip("transformers", minversion="5.24")

from accelerate.parallelism_config import ParallelismConfig  # noqa: E402
from datasets import Dataset, load_from_disk  # noqa: E402
from trl import DPOConfig, DPOTrainer  # noqa: E402
from trl.trainer.dpo_trainer import DataCollatorForPreference  # noqa: E402
from trl.trainer.utils import FusedCausalLMOutput, add_fused_lm_head  # noqa: E402

from directories import make_directory  # noqa: E402
from documents import ROOT  # noqa: E402
from prefix_sharing import trl as ours  # noqa: E402
from prefix_sharing.errors import UserError  # noqa: E402
from prefix_sharing.quickstart.pairs import generate_pairs  # noqa: E402
from prefix_sharing.trl import PrefixSharingDPOTrainer  # noqa: E402

TOLERANCE = 1e-4
SPEED = ("runtime", "per_second", "total_flos")
BOTH = (DPOTrainer, PrefixSharingDPOTrainer)


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return make_directory(tmp_path_factory.mktemp("model"))


def records(num_pairs, conversational=False, seed=0):
    pairs = list(generate_pairs(num_pairs, seed))
    if conversational:
        roles = {"prompt": "user", "chosen": "assistant", "rejected": "assistant"}
        pairs = [{key: [{"role": roles[key], "content": text}] for key, text in pair.items()} for pair in pairs]
    return Dataset.from_list(pairs)


def build(trainer_class, directory, output_dir, *, data=None, model=None, arguments=None, **options):
    defaults = {
        "output_dir": str(output_dir),
        "learning_rate": 1e-3,
        "per_device_train_batch_size": 2,
        "max_steps": 3,
        "logging_steps": 1,
        "bf16": False,
        "use_cpu": True,
        "report_to": [],
        "disable_tqdm": True,
        "save_strategy": "no",
    }
    return trainer_class(
        directory if model is None else model,
        args=DPOConfig(**defaults | options),
        train_dataset=records(40) if data is None else data,
        **{"processing_class": transformers.AutoTokenizer.from_pretrained(directory), **(arguments or {})},
    )


def trained(trainer_class, directory, tmp_path, **kwargs):
    trainer = build(trainer_class, directory, tmp_path / trainer_class.__name__, **kwargs)
    trainer.train()
    return trainer


def largest_difference(theirs, ours, names=None):
    """Of everything that two runs logged, but for how long they took."""
    assert [set(entry) for entry in ours] == [set(entry) for entry in theirs]
    return max(
        abs(expected[name] - found[name])
        for expected, found in zip(theirs, ours, strict=True)
        for name in expected
        if not name.endswith(SPEED) and (names is None or name in names) and not is_chance(name, expected)
    )


def is_chance(name, entry):
    """Whether it is an accuracy of rewards that are equal but for rounding, as those of the first step are."""
    return name.endswith("accuracies") and abs(entry[name.replace("accuracies", "margins")]) < TOLERANCE


def check_same_run(directory, tmp_path, **kwargs):
    theirs, ours = (trained(each, directory, tmp_path, **kwargs).state.log_history for each in BOTH)
    assert largest_difference(theirs, ours) < TOLERANCE
    return theirs, ours


@pytest.mark.parametrize("conversational", [False, True])
def test_twenty_steps_are_trls(directory, tmp_path, conversational):
    theirs, ours = check_same_run(directory, tmp_path, data=records(60, conversational), max_steps=20)
    print(f"losses differ by {largest_difference(theirs, ours, ['loss']):.1e}")
    assert len(ours) == 21
    assert {"rewards/accuracies", "rewards/margins", "entropy", "logits/chosen", "mean_token_accuracy"} < set(ours[0])


@pytest.mark.parametrize(
    "options",
    [
        {"precompute_ref_log_probs": True},
        {"precompute_ref_log_probs": True, "loss_type": ["apo_zero"], "ld_alpha": 0.5},
        {"gradient_checkpointing": False, "gradient_accumulation_steps": 2},
        {"gradient_checkpointing_kwargs": {"use_reentrant": True}},
        {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.5]},
        {"loss_type": ["ipo"], "ld_alpha": 0.5},
        {"loss_type": ["aot"], "f_divergence_type": "reverse_kl"},
        {"loss_type": ["sigmoid_norm"], "use_weighting": True},
        {"max_length": 100, "truncation_mode": "keep_end"},  # so that the two of a pair begin with different tokens
        {"max_length": 100, "pad_to_multiple_of": 64},
        {"sync_ref_model": True, "ref_model_sync_steps": 1},
        {"dataloader_num_workers": 1},
    ],
    ids=lambda options: "-".join(options),
)
def test_options_do_what_they_do_in_trl(directory, tmp_path, options):
    check_same_run(directory, tmp_path, **options)


@pytest.mark.parametrize("name", ["qwen3_moe", "mixtral"])
def test_experts_and_their_auxiliary_loss_are_trls(tmp_path, name):
    sizes = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
    # Counting shared tokens once, or leaving out last tokens, changes what is logged by 0.01 with such weights.
    directory = make_directory(tmp_path / "experts", name, initializer_range=0.06, **sizes)
    _, ours = check_same_run(directory, tmp_path, router_aux_loss_coef=0.5, precompute_ref_log_probs=True)
    assert "aux_loss" in ours[0]


def test_evaluation_is_trls(directory, tmp_path):
    data = {"eval_dataset": records(7, seed=1)}
    _, ours = check_same_run(directory, tmp_path, arguments=data, eval_strategy="steps", eval_steps=2)
    assert any("eval_rewards/margins" in entry for entry in ours)


def test_logits_for_compute_metrics_are_the_plain_models(directory, tmp_path):
    seen = []
    arguments = {"eval_dataset": records(5, seed=1), "compute_metrics": lambda e: seen.append(e.predictions) or {}}
    for each in BOTH:
        build(each, directory, tmp_path, arguments=arguments).evaluate()
    assert abs(seen[0] - seen[1]).max() < TOLERANCE


def test_bf16_stays_close(directory, tmp_path):
    theirs, ours = (trained(each, directory, tmp_path, bf16=True).state.log_history for each in BOTH)
    assert largest_difference(theirs, ours, ["loss"]) < 2e-2


@pytest.mark.parametrize("precompute", [False, True])
def test_an_adapter_is_trained_as_in_trl(directory, tmp_path, precompute):
    peft = pytest.importorskip("peft")
    arguments = {"peft_config": peft.LoraConfig(target_modules="all-linear", init_lora_weights=False)}
    runs = [
        trained(each, directory, tmp_path, arguments=arguments, precompute_ref_log_probs=precompute, max_steps=8)
        for each in BOTH
    ]
    assert largest_difference(*(run.state.log_history for run in runs)) < TOLERANCE
    for run, each in zip(runs, BOTH, strict=True):
        run.save_model(str(tmp_path / f"saved_{each.__name__}"))
    saved = [
        peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / f"saved_{each.__name__}").state_dict() for each in BOTH
    ]
    torch.testing.assert_close(*saved, rtol=1e-3, atol=TOLERANCE)


def test_training_of_an_adapter_goes_on_as_in_trl(directory, tmp_path):
    peft = pytest.importorskip("peft")
    logs = []
    for each in BOTH:
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_pretrained(directory)
        model = peft.get_peft_model(model, peft.LoraConfig(target_modules="all-linear", init_lora_weights=False))
        logs.append(trained(each, directory, tmp_path, model=model).state.log_history)
    assert largest_difference(*logs) < TOLERANCE


class Generating(transformers.TrainerCallback):
    """Has the model answer after every step."""

    def __init__(self):
        self.answers = []

    def on_step_end(self, args, state, control, model, **kwargs):
        prompt = torch.arange(20, 40)[None]
        self.answers.append(model.generate(prompt, max_new_tokens=8, do_sample=False)[0].tolist())


def test_the_model_generates_during_training_and_is_saved_as_it_was(directory, tmp_path):
    callbacks = [Generating(), Generating()]
    saved = []
    for each, callback in zip(BOTH, callbacks, strict=True):
        trainer = trained(each, directory, tmp_path, arguments={"callbacks": [callback]})
        assert type(trainer.model) is transformers.Qwen3ForCausalLM
        path = tmp_path / f"saved_{each.__name__}"
        trainer.save_model(str(path))
        saved.append(transformers.AutoModelForCausalLM.from_pretrained(path))
        for key, value in trainer.model.state_dict().items():
            torch.testing.assert_close(saved[-1].state_dict()[key], value, rtol=0, atol=0)
    assert callbacks[0].answers == callbacks[1].answers
    assert saved[0].config.to_dict() | {"_name_or_path": ""} == saved[1].config.to_dict() | {"_name_or_path": ""}
    torch.testing.assert_close(*(each.state_dict() for each in saved), rtol=1e-3, atol=TOLERANCE)


def test_every_prompt_is_read_once(directory, tmp_path):
    trainer = build(PrefixSharingDPOTrainer, directory, tmp_path)
    read, first, last = [], [], []
    decoder = trainer.model.model
    decoder.embed_tokens.register_forward_hook(lambda module, args, output: read.append(output.shape[:2].numel()))
    for seen, layer in ((first, decoder.layers[0]), (last, decoder.layers[-1])):
        layer.mlp.up_proj.register_forward_pre_hook(lambda module, args, seen=seen: seen.append(args[0].shape[1]))
    trainer.train()
    batch = next(iter(trainer.get_train_dataloader()))
    assert max(read) < 0.7 * batch["input_ids"].numel()
    assert set(first) == set(read)
    assert max(last) < 0.5 * min(read)  # only what predicts answers


def test_a_second_trainer_goes_on_with_the_model_of_the_first(directory, tmp_path):
    logs = []
    for each in BOTH:
        model = transformers.AutoModelForCausalLM.from_pretrained(directory)
        trained(each, directory, tmp_path, model=model)
        logs.append(trained(each, directory, tmp_path, model=model).state.log_history)
    assert largest_difference(*logs) < TOLERANCE


ON_TWO_DEVICES = {
    **dict.fromkeys(["model.embed_tokens", "model.rotary_emb", "model.layers.0", "model.norm", "lm_head"], "cpu"),
    **dict.fromkeys(["model.layers.1", "model.layers.2"], "disk"),
}


def refused(what):
    problem = f"PrefixSharingDPOTrainer does not support {what}; leave it out, or use TRL's own DPOTrainer."
    return pytest.raises(UserError, match=f"^{re.escape(problem)}$")


@pytest.mark.parametrize(
    ("options", "what"),
    [
        ({"use_liger_kernel": True}, "use_liger_kernel"),
        ({"torch_compile": True}, "torch_compile"),
        ({"neftune_noise_alpha": 5.0}, "neftune_noise_alpha"),
        ({"accelerator_config": {"dispatch_batches": True}}, "dispatch_batches"),
        ({"model_init_kwargs": {"device_map": ON_TWO_DEVICES}}, "a model spread over devices (device_map)"),
    ],
    ids=lambda value: value.split()[0] if isinstance(value, str) else "",
)
def test_what_is_not_supported_is_refused_by_name(directory, tmp_path, options, what, monkeypatch):
    monkeypatch.setattr("os.environ", os.environ.copy())  # which torch_compile changes
    if "model_init_kwargs" in options:
        options["model_init_kwargs"]["offload_folder"] = str(tmp_path)
    with refused(what):
        build(PrefixSharingDPOTrainer, directory, tmp_path, **options)


@pytest.mark.parametrize("size", ["cp_size", "sp_size"])
def test_parallelism_within_a_sequence_is_refused(directory, tmp_path, size):
    trainer = build(PrefixSharingDPOTrainer, directory, tmp_path)
    trainer.args.parallelism_config = ParallelismConfig(**{size: 2})  # set here, for accelerate wants two GPUs
    with refused("context or sequence parallelism"):
        trainer._refuse_unsupported()


def test_adapters_of_virtual_tokens_are_refused(directory, tmp_path):
    peft = pytest.importorskip("peft")
    arguments = {"peft_config": peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)}
    with refused("prompt learning (an adapter of virtual tokens)"):
        build(PrefixSharingDPOTrainer, directory, tmp_path, arguments=arguments)


def test_models_of_images_are_refused(directory, tmp_path):
    config = transformers.LlavaConfig(
        text_config=transformers.AutoConfig.from_pretrained(directory),
        vision_config=transformers.CLIPVisionConfig(
            hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=8, patch_size=4
        ),
        image_token_index=5,
    )
    path = tmp_path / "llava"
    transformers.LlavaForConditionalGeneration(config).save_pretrained(path)
    with pytest.raises(UserError, match="LlavaForConditionalGeneration is not a decoder of text"):
        build(PrefixSharingDPOTrainer, directory, tmp_path, model=str(path))
    processor = transformers.LlavaProcessor(
        tokenizer=transformers.AutoTokenizer.from_pretrained(directory),
        image_processor=transformers.CLIPImageProcessor(),
        patch_size=4,
    )
    arguments = {"processing_class": processor}
    with refused("images (a processor in place of a tokenizer)"):
        build(PrefixSharingDPOTrainer, directory, tmp_path, model=str(path), arguments=arguments)


def test_models_that_trees_do_not_cover_are_refused(directory, tmp_path):
    path = make_directory(tmp_path / "other", "bloom", n_layer=2, n_head=4, vocab_size=2048)
    with pytest.raises(UserError, match="cannot train this model: bloom models have ALiBi"):
        build(PrefixSharingDPOTrainer, path, tmp_path)


def test_padding_on_the_left_is_refused():
    batch = {"attention_mask": torch.tensor([[0, 1], [1, 1]])}
    with pytest.raises(UserError, match="pad sequences on the right"):
        ours._RowCollator(lambda examples: batch, ours.RowOptions(), to_the_end=False)([])


SEAM = {
    DPOTrainer.__init__: "632f447c71dcb043",
    DPOTrainer._precompute_ref_logps: "f2c098c7da6ca701",
    DPOTrainer.compute_ref_log_probs: "90611af9cbadb8ec",
    DPOTrainer._compute_loss: "5e58a1699e0d76cd",
    DPOTrainer.evaluate: "c4ef502ba33a335a",
    DPOTrainer.prediction_step: "1b6b7f23f5e02094",
    add_fused_lm_head: "422d009f04b66659",
    FusedCausalLMOutput: "5ccdd6e41dcb9f2c",
    DataCollatorForPreference.torch_call: "0b8bb4c294bf8420",
}


@pytest.mark.parametrize("part", SEAM, ids=lambda part: part.__qualname__)
def test_trls_code_around_the_seam_is_the_one_that_was_read(part):
    found = hashlib.sha256(inspect.getsource(part).encode()).hexdigest()[:16]
    problem = f"{part.__qualname__} of TRL {trl.__version__} is not the one that was read: read what changed"
    assert found == SEAM[part], problem


def test_trl_has_the_names_that_the_trainer_uses(directory, tmp_path):
    this = f"in TRL {trl.__version__}"
    fields = {field.name for field in dataclasses.fields(FusedCausalLMOutput)}
    assert fields == {*ours._PER_TOKEN, "loss", "aux_loss"}, f"{this} the fused LM head returns something else"
    trainer = build(DPOTrainer, directory, tmp_path, use_weighting=True)
    for name in ("model", "ref_model", "accelerator", "data_collator", "args", "aux_loss_enabled", "_is_vlm"):
        assert hasattr(trainer, name), f"{this} a trainer has no {name}"
    for name in ("parallelism_config", "accelerator_config", "use_liger_kernel", "torch_compile"):
        assert hasattr(trainer.args, name), f"{this} the arguments have no {name}"
    batch = next(iter(trainer.get_train_dataloader()))
    assert set(batch) == {"input_ids", "attention_mask", "completion_mask"}, f"{this} a batch has other columns"
    calls = []
    trainer.model.forward = lambda *args, plain=trainer.model.forward, **kwargs: calls.append(kwargs) or plain(**kwargs)
    trainer.compute_loss(trainer.model, batch)
    taken = {"input_ids", "attention_mask", "labels", "fused_lm_head", "use_cache"}
    assert set(calls[0]) == taken, f"{this} the model is called with other arguments"
    output = trainer.model(**calls[0])
    for name in ours._PER_TOKEN:
        shape = batch["input_ids"][:, 1:].shape
        assert getattr(output, name).shape == shape, f"{this} the fused LM head returns no {name} of every token"


def test_another_version_of_trl_is_refused():
    code = "import trl; trl.__version__ = '1.17.0'; import prefix_sharing.trl"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode != 0
    assert "is made for TRL 1.16, not 1.17.0" in done.stderr


OF_EACH_PROCESS = """
import json, sys
import torch
torch.set_num_threads(1)
sys.path[:0] = {paths!r}
import test_trl_trainer as tests
tests.train_in_two_processes({directory!r}, tests.Path({output!r}))
"""


def train_in_two_processes(directory, output):
    """What each of two processes runs; the first writes down what was logged."""
    runs = {"full": {"gradient_accumulation_steps": 2, "arguments": {"eval_dataset": records(7, seed=1)}}}
    if importlib.util.find_spec("peft"):
        from peft import LoraConfig

        lora = LoraConfig(target_modules="all-linear", init_lora_weights=False)
        runs["adapter"] = {"precompute_ref_log_probs": True, "arguments": {"peft_config": lora}}
    logs = {name: [] for name in runs}
    for name, options in runs.items():
        for each in BOTH:
            trainer = build(each, directory, output, data=load_from_disk(output / each.__name__), **options)
            trainer.train()
            if trainer.eval_dataset is not None:
                trainer.evaluate()
            batch = next(iter(trainer.get_train_dataloader()))
            first, second = trainer.accelerator.gather(batch["attention_mask"].sum()).tolist()
            assert first != second
            logs[name].append(trainer.state.log_history)
    if trainer.is_world_process_zero():
        (output / "logs.json").write_text(json.dumps(logs))


@pytest.mark.slow
def test_two_processes_are_trls(directory, tmp_path):
    pairs = list(generate_pairs(40, seed=0))
    uneven = [pair | {"prompt": pair["prompt"][: 37 * (i + 1) % 400]} for i, pair in enumerate(pairs)]
    for each in BOTH:  # in a directory of its own, where TRL caches reference log-probs
        Dataset.from_list(uneven).save_to_disk(tmp_path / each.__name__)
    script = tmp_path / "script.py"
    paths = [str(Path(__file__).parent), str(Path(__file__).parent / "support")]
    script.write_text(OF_EACH_PROCESS.format(paths=paths, directory=directory, output=str(tmp_path)))
    launch = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--main_process_port", "0"]
    done = subprocess.run([sys.executable, *launch, script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    for name, logs in json.loads((tmp_path / "logs.json").read_text()).items():
        of_rewards = [key for key in logs[0][0] if key.startswith("rewards/")]
        apart, of_losses = largest_difference(*logs), largest_difference(*logs, ["loss", *of_rewards])
        print(f"{name}: apart by {apart:.1e}, losses and rewards by {of_losses:.1e}")
        assert apart < TOLERANCE
        assert of_losses < 0.1 * TOLERANCE  # log-probs of about 100, in fp32, times beta


def test_speeds_are_compared(directory, monkeypatch, capsys):
    spec = importlib.util.spec_from_file_location("trl_speed", ROOT / "examples" / "trl_speed.py")
    speed = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(speed)
    monkeypatch.setattr(speed, "ROUNDS", 2)
    monkeypatch.setattr(speed, "STEPS", 1)
    monkeypatch.setattr(sys, "argv", ["trl_speed.py", directory])
    speed.main()
    printed = capsys.readouterr().out
    for lengths in ("512,128,128", "hh"):
        assert re.search(rf"^{lengths}: steps per second [\d.]+ / [\d.]+ = [\d.]+$", printed, re.MULTILINE)
        assert (
            float(re.search(rf"^{lengths}: log-probs and gradients agree to (.*)$", printed, re.MULTILINE)[1])
            < TOLERANCE
        )

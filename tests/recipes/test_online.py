"""Rounds of sampling, judging and training: they improve a policy, and go on wherever they were stopped."""

import itertools
import json
import re
import shutil
import signal

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import load_file

import prefix_dpo_online
from prefix_dpo_online import OnlineConfig, PrefixDPOOnline
from prefix_sharing.checkpoint import TrainingCheckpoints
from prefix_sharing.config import check_config, find_config, instantiate
from prefix_sharing.errors import UserError
from prefix_sharing.online import RoundTable, answering, read_rows, row_of, tables
from prefix_sharing.online.average import write_average
from prefix_sharing.reports.online import warn_of_length
from prefix_sharing.run import set_up_device
from processes import run_on_ranks
from runs import losses, tune_run
from servers import serve

SMALL = {
    "prompts.num_prompts": 24,
    "prompts_val.num_prompts": 8,
    "prompts_per_round": 12,
    "num_answers": 3,
    "num_answers_val": 2,
    "max_new_tokens": 6,
    "rounds": 2,
    "batch_size": 4,
    "num_workers": 0,
    "self_check": False,
    "save_every_n_steps": 1,
    "sampler.tokens_at_once": 2000,
}


@pytest.fixture(autouse=True, scope="module")
def _small_parts():
    with pytest.MonkeyPatch.context() as context:
        context.setattr(tables, "_ROWS_OF_A_PART", 3)
        yield


def make_run(directory, **overrides):
    cfg = OmegaConf.load(find_config("quickstart/online"))
    for key, value in (SMALL | {"output_dir": str(directory)} | overrides).items():
        OmegaConf.update(cfg, key, value, merge=False)
    cfg = check_config(cfg, OnlineConfig)
    return PrefixDPOOnline(cfg, set_up_device(cfg))


def results(directory):
    """Weights and tables of all rounds."""
    weights = {
        file.parent.parent.name: load_file(file) for file in sorted(directory.glob("round_*/epoch_0/*.safetensors"))
    }
    files = [file for part in ("first_policy", "round_*") for file in directory.glob(f"{part}/**/*.parquet")]
    tables = {str(file.relative_to(directory)): read_rows(file) for file in files if "reference" not in str(file)}
    return weights, tables


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    directory = tmp_path_factory.mktemp("whole")
    make_run(directory).run()
    return (*results(directory), [losses(directory / f"round_{k}") for k in range(2)], directory)


def assert_same(found, expected):
    (weights, tables), (expected_weights, expected_tables) = found, expected
    assert weights.keys() == expected_weights.keys() == {"round_0", "round_1"}
    assert tables.keys() == expected_tables.keys()
    for file, rows in expected_tables.items():
        for row, expected in zip(tables[file], rows, strict=True):
            assert row == expected, file
    for name, tensors in expected_weights.items():
        for tensor_name, tensor in tensors.items():
            torch.testing.assert_close(weights[name][tensor_name], tensor, rtol=1e-6, atol=1e-7)


def test_every_round_leaves_its_answers_scores_and_policy(tmp_path, pictures):
    make_run(tmp_path).run()
    names = {"answers.parquet", "scores.parquet", "answers.md", "epoch_0", "held_out", "logs", "checkpoints"}
    for k in range(2):
        assert names <= {file.name for file in (tmp_path / f"round_{k}").iterdir()}
    rows = read_rows(tmp_path / "round_0" / "scores.parquet")
    assert [len(row["answers"]) for row in rows] == [3] * 12
    assert all(0 <= score <= 1 for row in rows for score in row["scores"])
    assert (tmp_path / "rounds.png").read_bytes().startswith(b"\x89PNG")
    shown = (tmp_path / "round_1" / "answers.md").read_text()
    assert "**first policy**, score 0." in shown
    assert "**after round 1**" in shown


@pytest.mark.parametrize(
    ("target", "name", "calls"),
    [
        (RoundTable, "add", 2),  # in sampling
        (RoundTable, "finish", 6),  # between sampling and judging
        (prefix_dpo_online.SingleDeviceRound, "save_state", 2),  # in training
        (prefix_dpo_online.SingleDeviceRound, "save_state", 5),
        (prefix_dpo_online.SingleDeviceRound, "cleanup", 1),  # behind it
        (prefix_dpo_online, "write_answers", 1),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_a_run_that_was_stopped_anywhere_comes_to_the_same(tmp_path, monkeypatch, whole, target, name, calls):
    count, original = itertools.count(1), getattr(target, name)

    def stopped_at_last(*args, **kwargs):
        if next(count) == calls:
            raise KeyboardInterrupt
        return original(*args, **kwargs)

    with monkeypatch.context() as context:
        context.setattr(target, name, stopped_at_last)
        with pytest.raises(KeyboardInterrupt):
            make_run(tmp_path).run()
    make_run(tmp_path).run()
    assert_same(results(tmp_path), whole[:2])


def test_stages_by_hand_are_those_of_a_run(tmp_path, whole):
    small = [f"{key}={value}" for key, value in SMALL.items()] + ["output_dir=out"]
    for stage in ("prefix_dpo_sample", "prefix_dpo_judge"):
        done = tune_run(stage, "--config", "quickstart/online", *small, "round=0", cwd=tmp_path)
        assert done.returncode == 0, done.stderr[-3000:]
    found = read_rows(tmp_path / "out" / "round_0" / "scores.parquet")
    for row, expected in zip(found, whole[1]["round_0/scores.parquet"], strict=True):
        assert (row["answers"], row["scores"]) == (expected["answers"], expected["scores"])
    files = [file.name for file in (tmp_path / "out" / "round_0").iterdir()]
    assert sorted(files) == ["answers.parquet", "scores.parquet"]
    done = tune_run("prefix_dpo_judge", "--config", "quickstart/online", *small, "round=1", cwd=tmp_path)
    assert "round_1/answers.parquet not found; prefix_dpo_online and prefix_dpo_sample write it" in done.stderr
    done = tune_run("prefix_dpo_sample", "--config", "quickstart/online", *small, "round=2", cwd=tmp_path)
    assert "'round': is 2, but rounds are 2, counted from 0" in done.stderr


def a_server_that_fails_after(num_requests):
    """One that speaks as vLLM does; its answers are a function of prompt and seed."""

    def answer(path, body, number):
        if path.endswith("/load"):
            return {"success": True}
        if path.endswith("/models"):
            return {"data": []}
        if number >= num_requests:
            return 500, "{}", {}
        rng = np.random.default_rng([sum(body["prompt"]), body["seed"]])
        choices = []
        for _ in range(body["n"]):
            tokens = rng.integers(300, 2000, 4).tolist()
            choices.append({"finish_reason": "length", "token_ids": tokens, "logprobs": {"token_logprobs": [-1.0] * 4}})
        return {"choices": choices}

    return answer


def test_a_server_samples_every_prompt_once_and_gets_each_rounds_policy(tmp_path):
    sampler = {"_component_": "prefix_sharing.sampling.served_sampler", "model": "policy", "retries": 0}
    asked = []
    with serve(a_server_that_fails_after(14)) as stub:
        reload = stub.base_url.replace("/v1", "/load")
        sampler |= {"base_url": stub.base_url, "reload": reload, "concurrency": 1}
        with pytest.raises(UserError, match="/v1/completions") as caught:
            make_run(tmp_path, sampler=sampler).run()
        assert "\n" not in str(caught.value)
        asked += [body["prompt"] for path, _, body in stub.requests[:14] if "completions" in path]
    with serve(a_server_that_fails_after(10_000)) as stub:
        sampler |= {"base_url": stub.base_url, "reload": stub.base_url.replace("/v1", "/load")}
        make_run(tmp_path, sampler=sampler).run()
        asked += [body["prompt"] for path, _, body in stub.requests if "completions" in path]
        loaded = [body["model_path"] for path, _, body in stub.requests if "load" in path]
    tables = [
        read_rows(file) for part in ("first_policy", "round_*") for file in tmp_path.glob(f"{part}/**/answers.parquet")
    ]
    assert sorted(asked) == sorted(row["prompt_tokens"] for rows in tables for row in rows)
    assert [path.split("/")[-2:] for path in loaded[-2:]] == [["round_0", "epoch_0"], ["round_1", "epoch_0"]]


def test_sampler_and_trainer_are_compared(tmp_path, monkeypatch, caplog):
    caplog.set_level("INFO", logger="prefix_sharing")
    run = make_run(tmp_path / "same", rounds=1)
    run.run()
    (said,) = [record.getMessage() for record in caplog.records if "sampler and trainer" in record.getMessage()]
    mean, largest = (float(number) for number in re.findall(r"\d\.\d+e-\d+", said))
    assert 0 < mean <= largest < 1e-5
    assert "another precision" not in caplog.text

    def with_other_weights(prompt, answers, tokenizer):
        return row_of(prompt, [answer._replace(log_prob=answer.log_prob - 1) for answer in answers], tokenizer)

    monkeypatch.setattr(answering, "row_of", with_other_weights)
    make_run(tmp_path / "other", rounds=1).run()
    assert "That is more than 0.02: the sampler has other weights, or another precision." in caplog.text


def test_nothing_that_is_whole_is_done_again(tmp_path, monkeypatch):
    make_run(tmp_path).run()
    before = {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*.parquet")}
    for name in ("setup", "train"):
        monkeypatch.setattr(prefix_dpo_online.SingleDeviceRound, name, lambda *_: pytest.fail("trained again"))
    make_run(tmp_path).run()
    assert {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*.parquet")} == before


@pytest.mark.parametrize("last", ["save_state", "wait"])
def test_a_round_killed_while_its_last_state_is_written_keeps_its_optimizer(tmp_path, monkeypatch, last):
    """Its weights are there already."""
    make_run(tmp_path / "whole", carry_optimizer=True).run()
    target = {"save_state": prefix_dpo_online.SingleDeviceRound, "wait": TrainingCheckpoints}[last]
    original = getattr(target, last)

    def stopped(self, *args):
        if (tmp_path / "parts" / "round_0" / "epoch_0").exists():
            raise KeyboardInterrupt
        return original(self, *args)

    with monkeypatch.context() as context:
        context.setattr(target, last, stopped)
        with pytest.raises(KeyboardInterrupt):
            make_run(tmp_path / "parts", carry_optimizer=True).run()
    make_run(tmp_path / "parts", carry_optimizer=True).run()
    assert losses(tmp_path / "parts" / "round_1") == pytest.approx(losses(tmp_path / "whole" / "round_1"), rel=1e-6)


def test_a_signal_in_a_rounds_last_step_ends_the_run_behind_it(tmp_path, monkeypatch):
    original = prefix_dpo_online.SingleDeviceRound.save_state

    def interrupted(self, metrics):
        if (tmp_path / "round_0" / "epoch_0").exists():
            signal.raise_signal(signal.SIGTERM)
        original(self, metrics)

    monkeypatch.setattr(prefix_dpo_online.SingleDeviceRound, "save_state", interrupted)
    with pytest.raises(SystemExit) as ended:
        make_run(tmp_path).run()
    assert ended.value.code == 128 + signal.SIGTERM
    assert (tmp_path / "round_0" / "trained").exists()
    assert not (tmp_path / "round_1").exists()


def test_a_loss_of_single_answers_trains_on_a_round(tmp_path):
    kto = {"_component_": "prefix_sharing.losses.KTOLoss"}  # which compares with answers to other prompts
    make_run(tmp_path, rounds=1, loss=kto).run()
    assert losses(tmp_path / "round_0")


def test_answers_of_another_policy_are_refused(tmp_path):
    make_run(tmp_path, rounds=1).run()
    with pytest.raises(UserError, match=r"first_policy/held_out/.*parquet was made by another policy"):
        make_run(tmp_path, rounds=1, temperature=0.5).run()


@pytest.mark.slow
def test_two_ranks_are_one(tmp_path, whole):
    small = [f"{key}={value}" for key, value in SMALL.items() if key != "batch_size"]
    small += ["batch_size=2", "gradient_accumulation_steps=1", "output_dir=out"]
    done = run_on_ranks(
        "prefix_dpo_online_distributed:recipe_main", ["prefix", "--config", "quickstart/online", *small], tmp_path, 2
    )
    assert done.returncode == 0, done.stderr[-3000:]
    _, tables = results(tmp_path / "out")
    assert tables.keys() == whole[1].keys()
    for file, rows in whole[1].items():
        for row, expected in zip(tables[file], rows, strict=True):
            assert (row["answers"], row["scores"]) == (expected["answers"], expected["scores"]), file
    for k in range(2):
        assert losses(tmp_path / "out" / f"round_{k}") == pytest.approx(whole[2][k], rel=1e-5)


def test_rounds_take_the_prompts_by_turns(tmp_path):
    run = make_run(tmp_path, rounds=3, prompts_per_round=16)
    first, second, third = ([prompt.key for prompt in prompts] for prompts in run.prompts_of)
    assert len({*first, *second}) == 24
    assert first[8:] + third[:8] != second
    assert len({*first}) == len({*second}) == len({*third}) == 16


def after_round_0(tmp_path, whole, **overrides):
    """A run whose first round is done, as that of ``whole`` is: there, every reference is the policy itself."""
    for part in ("first_policy", "round_0"):
        shutil.copytree(whole[3] / part, tmp_path / part)
    return make_run(tmp_path, **overrides)


def first_rewards(directory):
    log = next((directory / "round_1" / "logs").glob("*.txt")).read_text()
    return [float(number) for number in re.findall(r"rewards/(?:chosen|rejected):(\S+)", log)[:2]]


def test_an_average_reference_is_between_the_first_policy_and_the_last_one(tmp_path, whole):
    """By its weights, which are compared with the files; by its rewards, which at either end are those of that end."""
    found = {}
    for share in (0.0, 0.6, 1.0):
        run = after_round_0(
            tmp_path / str(share), whole, online_reference="average", ref_model_mixup_alpha=share, prompts_per_round=12
        )
        run.train(1)
        found[share] = first_rewards(tmp_path / str(share))
        average = load_file(tmp_path / str(share) / "round_0" / f"reference_{share:g}" / "model.safetensors")
        first, last = (run.policies.after(k)[0].weights for k in (-1, 0))
        for name, tensor in average.items():
            torch.testing.assert_close(tensor, (1 - share) * first[name] + share * last[name], rtol=1e-6, atol=1e-7)
    after_round_0(tmp_path / "first", whole, online_reference="first").train(1)
    assert found[0.0] == first_rewards(tmp_path / "first") != [0.0, 0.0]
    assert found[1.0] == [0.0, 0.0]
    assert all(0 < abs(between) < abs(end) for between, end in zip(found[0.6], found[0.0], strict=True))


def test_a_round_is_not_continued_with_another_reference(tmp_path, whole):
    shutil.copytree(whole[3], tmp_path, dirs_exist_ok=True)
    (tmp_path / "round_1" / "trained").unlink()
    with pytest.raises(UserError, match="cannot be continued with this config: content of the reference's weights was"):
        make_run(tmp_path, online_reference="first").run()
    make_run(tmp_path).run()


ADAPTER = {"lora_attn_modules": ["q_proj", "v_proj"], "apply_lora_to_mlp": True, "lora_rank": 4, "lora_alpha": 8}


@pytest.mark.parametrize(
    "reference",
    [
        {"online_reference": "average", "ref_model_mixup_alpha": 1.0},
        {"online_reference": "previous", "reference.precompute": False},
    ],
    ids=["average", "previous"],
)
def test_a_reference_that_is_the_policy_includes_its_adapter(tmp_path, reference):
    base = OmegaConf.to_container(OmegaConf.load(find_config("quickstart/online")).model)
    keys = {"model": base | ADAPTER | {"_component_": "torchtune.models.llama3.lora_llama3"}}
    run = make_run(tmp_path, **keys, **reference, **{"checkpointer.model": base})
    run.run()
    assert losses(tmp_path / "round_0")[-1] != pytest.approx(0.693147, abs=1e-3)  # the adapter has changed something
    # A reward is beta times a sum of tens of log-probs of -8, each rounded by 1e-6.
    assert first_rewards(tmp_path) == pytest.approx([0.0, 0.0], abs=1e-5)


def test_an_average_is_refused_where_the_base_would_round_it(tmp_path):
    base = OmegaConf.to_container(OmegaConf.load(find_config("quickstart/online")).model)
    keys = {"model": base | ADAPTER | {"_component_": "torchtune.models.llama3.lora_llama3"}, "dtype": "bf16"}
    with pytest.raises(UserError, match="average with an adapter needs dtype: fp32"):
        make_run(tmp_path, **keys, online_reference="average", **{"checkpointer.model": base}).run()


def test_an_average_of_averages_goes_on(tmp_path):
    weights = [{"w": torch.tensor([float(k)])} for k in range(3)]
    write_average(weights[0], weights[1], 0.25, tmp_path / "a")
    write_average(load_file(tmp_path / "a" / "model.safetensors"), weights[2], 0.25, tmp_path / "b")
    assert load_file(tmp_path / "b" / "model.safetensors")["w"].item() == 0.75 * 0.25 + 0.25 * 2
    write_average(weights[0] | {"tied to w": torch.ones(1)}, weights[1], 0.5, tmp_path / "c")
    assert load_file(tmp_path / "c" / "model.safetensors").keys() == {"w"}
    with pytest.raises(UserError, match="the policy has v, and the reference has not"):
        write_average(weights[0], weights[0] | {"v": torch.ones(1)}, 0.5, tmp_path / "d")


def test_an_optimizer_goes_on_and_its_schedule_begins_anew(tmp_path, whole, monkeypatch):
    seen = {}

    def stop(recipe, _):
        names = {parameter: name for name, parameter in recipe.model.named_parameters()}
        seen.update({names[parameter]: state for parameter, state in recipe.optimizer.state.items()})
        seen["lr"] = [group["lr"] for group in recipe.optimizer.param_groups]

    monkeypatch.setattr(prefix_dpo_online.SingleDeviceRound, "train", stop)
    after_round_0(tmp_path / "new", whole).train(1)
    assert seen == {"lr": [3e-3]}
    after_round_0(tmp_path / "old", whole, carry_optimizer=True, **{"optimizer.lr": 1e-4}).train(1)
    assert seen.pop("lr") == [1e-4]
    (file,) = (tmp_path / "old" / "round_0" / "checkpoints" / "step_3").glob("*.safetensors")
    saved = load_file(file)
    for name, state in seen.items():
        for key, tensor in state.items():
            assert torch.equal(tensor, saved[f"optimizer.state.{name}.{key}"]), name
    assert seen["norm.scale"]["step"] == 3


def test_offline_pairs_are_their_share_of_a_round(tmp_path, whole):
    offline = [{"prompt": f"Q {i}", "chosen": f"an apple {i}", "rejected": "no"} for i in range(40)]
    (tmp_path / "pairs.jsonl").write_text("".join(f"{json.dumps(pair)}\n" for pair in offline))
    given = {"source": "json", "data_files": str(tmp_path / "pairs.jsonl"), "split": "train", "weight": 0.25}
    run = after_round_0(tmp_path / "out", whole, dataset_offline=given)
    run.train(1)
    dataset = instantiate("dataset", run.training_config(1).dataset, run.tokenizer)
    sampled = int((dataset.record_index < 12).sum())
    assert 9 <= sampled <= 12
    assert len(dataset) - sampled == round(sampled / 3)
    assert first_rewards(tmp_path / "out") == [0.0, 0.0]
    for weight in (None, 1.0, 0, "half"):
        with pytest.raises(UserError, match=f"'dataset_offline.weight': is {weight}; give the offline data's share"):
            make_run(tmp_path / "no", dataset_offline=given | {"weight": weight})


@torch.no_grad()
def test_divergence_is_that_of_plain_models(whole):
    """By torchtune's model on each answer by itself."""
    directory = whole[3]
    run = make_run(directory)
    for k in range(2):
        rows, total, tokens = read_rows(directory / f"round_{k}" / "held_out" / "scores.parquet"), 0.0, 0
        for after, sign in ((k, 1), (-1, -1)):
            model = instantiate("model", run.cfg.model)
            model.load_state_dict(run.policies.after(after)[0].weights)
            for row in rows:
                for answer in row["answers"]:
                    ids = torch.tensor([row["prompt_tokens"] + answer])
                    log_probs = model(ids)[0].double().log_softmax(-1)[:-1].gather(1, ids[0, 1:, None])[:, 0]
                    total += sign * log_probs[-len(answer) :].sum().item()
                    tokens += len(answer) * (sign > 0)
        assert json.loads((directory / f"round_{k}" / "kl.json").read_text())["kl"] == pytest.approx(
            total / tokens, abs=1e-6
        )


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"num_answers": 1}, "'num_answers': must be at least 2"),
        ({"seed": None}, "'seed': required: what is sampled already is known again by it"),
        ({"prompts_per_round": 99}, "'prompts_per_round': is 99, but there are 24 prompts"),
        (
            {"dataset": {"_component_": "prefix_sharing.quickstart.preference_pairs", "num_pairs": 3}},
            "'dataset': not used",
        ),
        (
            {"ref_checkpointer": {"_component_": "torch.optim.AdamW"}, "online_reference": "average"},
            "'ref_checkpointer': not used with online_reference: average",
        ),
        ({"dataset_offline": "pairs.jsonl"}, "'dataset_offline': must be a mapping"),
        ({"ref_model_mixup_alpha": 1.5}, "'ref_model_mixup_alpha': must be at most 1"),
        ({"max_new_tokens": 600}, "but the model takes 512; lower max_new_tokens"),
        ({"judge": {"_component_": "prefix_sharing.judging.function_judge", "function": "math.nan"}}, "is no function"),
        ({"stop": ["several words here"]}, "'stop': 'several words here' is .* tokens"),
    ],
)
def test_what_cannot_be_is_said_in_one_sentence(tmp_path, overrides, message):
    with pytest.raises(UserError, match=message) as caught:
        make_run(tmp_path, **overrides).run()
    assert "\n" not in str(caught.value)


def no_verdict(turns, answer):
    return float("nan")


def test_a_judge_without_a_verdict_stops_the_run(tmp_path):
    judge = {"_component_": "prefix_sharing.judging.function_judge", "function": f"{__name__}.no_verdict"}
    with pytest.raises(UserError, match="gave no verdict on any answer"):
        make_run(tmp_path, judge=judge).run()


def test_a_gain_by_length_is_a_warning(caplog):
    warn_of_length({"score_gain": 0.5, "length_controlled_gain": 0.4, "answer_length": 9.0})
    assert not caplog.records
    with caplog.at_level("WARNING", logger="prefix_sharing"):
        warn_of_length({"score_gain": 0.5, "length_controlled_gain": 0.1, "answer_length": 90.0})
    assert "0.500 more than the first policy's, but 0.400 of it is by their length (90 tokens" in caplog.text


@pytest.mark.slow
def test_the_quickstart_improves_its_policy(tmp_path):
    done = tune_run("prefix_dpo_online", "--config", "quickstart/online", cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    last = done.stdout.strip().splitlines()[-1].split()
    assert last[0] == "3"
    assert float(last[2]) >= 0.3  # of a range of 1
    assert (tmp_path / "quickstart_online_output" / "rounds.png").exists()

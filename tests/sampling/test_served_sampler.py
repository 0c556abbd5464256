"""A server samples from the tokens that are trained on, and what it gives back is those it sampled."""

import contextlib
import json
import os
import socket
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

from prefix_sharing import served
from prefix_sharing.checkpoint import Checkpoint
from prefix_sharing.errors import ConfigError, UserError
from prefix_sharing.quickstart.checkpointer import TOKENIZER_DIR
from prefix_sharing.sampling import Policy, Prompt, SamplingOptions, served_sampler, server
from prefix_sharing.tokenizers import hf_chat_tokenizer
from servers import serve

TURNS = [[{"role": "user", "content": content}] for content in ("How many?", "Why?", "Go on, a bit longer.")]


def sampler_for(tokenizer, *args, directory=None, **kwargs):
    policy = Policy(None, Checkpoint(), directory, tokenizer, torch.device("cpu"), torch.float32, 0)
    return served_sampler(policy, *args, **kwargs)


@pytest.fixture(autouse=True)
def _no_waits(request, monkeypatch):
    if "slow" not in request.keywords:
        monkeypatch.setattr(served, "_pause", lambda stop, seconds: None)
        monkeypatch.setattr(server, "_pause", lambda seconds: None)


@pytest.fixture(scope="module")
def tokenizer():
    return hf_chat_tokenizer(str(TOKENIZER_DIR))


@pytest.fixture(scope="module")
def end(tokenizer):
    return tokenizer.special_tokens["<|end|>"]


@pytest.fixture(scope="module")
def prompts(tokenizer):
    prompts = []
    for i, turns in enumerate(TURNS):
        chat = tokenizer({"messages": [_message(turn) for turn in turns]}, inference=True)
        prompts.append(Prompt(f"{i:032x}", tuple(turns), np.array(chat["tokens"])))
    return prompts


def _message(turn):
    from torchtune.data import Message

    return Message(role=turn["role"], content=turn["content"], masked=True)


def answer_tokens(prompt, seed, k, length=4):
    """What a stub samples: a function of the prompt's ids, the seed and which answer it is."""
    return np.random.default_rng([sum(prompt), seed, k]).integers(300, 2000, length).tolist()


def as_vllm(end, *, with_ids=True):
    def answer(path, body, number):
        assert path == "/v1/completions"
        choices = []
        for k in range(body["n"]):
            tokens = answer_tokens(body["prompt"], body["seed"], k)
            tokens = [*tokens, end] if k % 2 == 0 else tokens
            log_probs = [-0.5 - 0.25 * i for i in range(len(tokens))]
            choice = {"index": k, "text": "not used", "finish_reason": "stop" if k % 2 == 0 else "length"}
            choice["logprobs"] = {"tokens": [f"token_id:{t}" for t in tokens], "token_logprobs": log_probs}
            choices.append(choice | ({"token_ids": tokens} if with_ids else {}))
        return {"choices": choices, "usage": {"prompt_tokens": len(body["prompt"])}}

    return answer


@pytest.mark.parametrize("with_ids", [True, False])
def test_tokens_and_log_probs_are_the_servers(tokenizer, prompts, end, with_ids):
    options = SamplingOptions(num_answers=3, max_new_tokens=7, temperature=0.7, top_k=20, top_p=0.9, stop_tokens=(end,))
    with serve(as_vllm(end, with_ids=with_ids)) as stub:
        sampler = sampler_for(tokenizer, stub.base_url, "policy", concurrency=2)
        found = dict(sampler(prompts, options))
    assert sorted(found) == [0, 1, 2]
    by_prompt = {tuple(body["prompt"]): body for body in stub.bodies}
    assert len(stub.bodies) == 3
    for i, prompt in enumerate(prompts):
        body = by_prompt[tuple(prompt.tokens.tolist())]
        for k, answer in enumerate(found[i]):
            expected = answer_tokens(body["prompt"], body["seed"], k) + ([end] if k % 2 == 0 else [])
            assert answer.tokens.tolist() == expected
            assert answer.tokens.dtype == np.int64
            assert answer.log_prob == pytest.approx(-sum(0.5 + 0.25 * j for j in range(len(expected))))
            assert answer.is_complete == (k % 2 == 0)
    body = stub.bodies[0]
    expected = {"model": "policy", "n": 3, "max_tokens": 7, "temperature": 0.7, "top_p": 0.9, "top_k": 20}
    expected |= {"stop_token_ids": [end], "min_p": 0.0, "repetition_penalty": 1.0}
    assert {key: body[key] for key in expected} == expected
    assert len({body["seed"] for body in stub.bodies}) == 3


def test_seeds_depend_on_the_pass_and_the_prompt_alone(tokenizer, prompts, end):
    with serve(as_vllm(end)) as stub:
        sampler = sampler_for(tokenizer, stub.base_url, "policy", concurrency=1)
        options = SamplingOptions(num_answers=2, seed=5, stop_tokens=(end,))
        together, alone = dict(sampler(prompts, options)), dict(sampler(prompts[2:], options))
        assert [a.tokens.tolist() for a in together[2]] == [a.tokens.tolist() for a in alone[0]]
        dict(sampler(prompts[2:], SamplingOptions(num_answers=2, seed=6)))
        assert stub.bodies[2]["seed"] == stub.bodies[3]["seed"] != stub.bodies[4]["seed"]
        assert stub.bodies[0]["top_k"] == -1


def test_the_most_likely_answer_is_asked_for_once(tokenizer, prompts, end):
    with serve(as_vllm(end)) as stub:
        options = SamplingOptions(num_answers=3, temperature=0.0, stop_tokens=(end,))
        ((_, answers),) = sampler_for(tokenizer, stub.base_url, "policy")(prompts[:1], options)
        assert [body["n"] for body in stub.bodies] == [1]
        assert len({tuple(answer.tokens) for answer in answers}) == 1
        assert len(answers) == 3


def test_text_is_tokenized_here_and_keeps_its_end(tokenizer, prompts, end):
    texts = [
        ("three of them", "stop", {"matched_stop": end}),
        ("three of them<|end|>", "stop", {}),
        ("three of", "length", {}),
        ("", "stop", {}),
    ]

    def as_sglang(path, body, number):
        assert body["prompt"] == prompts[0].tokens.tolist()
        assert body["n"] == 1
        text, reason, more = texts[number]
        return {"choices": [{"text": text, "finish_reason": reason, **more}]}

    with serve(as_sglang) as stub:
        options = SamplingOptions(num_answers=4, stop_tokens=(0, end))
        sampler = sampler_for(tokenizer, stub.base_url, "policy", server="sglang", concurrency=1)
        ((_, answers),) = sampler(prompts[:1], options)
        assert stub.bodies[0]["no_stop_trim"]
        assert len({body["seed"] for body in stub.bodies}) == 4
        assert "logprobs" not in stub.bodies[0]
    whole, part = (tokenizer.encode(text, add_bos=False, add_eos=False) for text in ("three of them", "three of"))
    assert [answer.tokens.tolist() for answer in answers] == [[*whole, end], [*whole, end], part, [end]]
    assert [answer.is_complete for answer in answers] == [True, True, False, True]
    assert all(np.isnan(answer.log_prob) for answer in answers)


def test_transformers_gets_text_and_one_request_for_each_answer(tokenizer, prompts, end):
    def answer(path, body, number):
        known = {"model", "prompt", "seed", "max_tokens", "generation_config"}
        assert set(body) == known  # it refuses others
        text = f"{body['seed']}"
        num_tokens = len(tokenizer.encode(body["prompt"], add_bos=False, add_eos=False))
        return {"choices": [{"text": text, "finish_reason": "stop"}], "usage": {"prompt_tokens": num_tokens}}

    with serve(answer) as stub:
        sampler = sampler_for(tokenizer, stub.base_url, "policy", server="transformers")
        options = SamplingOptions(num_answers=3, top_p=0.5, stop_tokens=(end,))
        found = dict(sampler(prompts, options))
        assert len(stub.bodies) == 9
        assert len({tuple(a.tokens) for answers in found.values() for a in answers}) == 9
        generation = json.loads(stub.bodies[0]["generation_config"])
        assert generation == {
            **{"do_sample": True, "max_new_tokens": 128, "temperature": 1.0, "top_p": 0.5, "top_k": 0},
            **{"eos_token_id": [end], "pad_token_id": end},
        }
        again = dict(sampler(prompts, options))
        for i in range(3):
            assert [a.tokens.tolist() for a in again[i]] == [a.tokens.tolist() for a in found[i]]


def test_a_server_that_reads_or_gives_something_else_is_named(tokenizer, prompts):
    one = {"choices": [{"text": "a", "finish_reason": "stop"}], "usage": {"prompt_tokens": 3}}
    with serve(lambda path, body, number: one) as stub:
        sampler = sampler_for(tokenizer, stub.base_url, "policy", server="transformers")
        with pytest.raises(UserError, match=r"/v1/completions makes 3 tokens of a prompt of \d+; serve a directory"):
            list(sampler(prompts, SamplingOptions()))
        sampler = sampler_for(tokenizer, stub.base_url, "policy")
        with pytest.raises(UserError, match="gives 1 answers where 2 are asked for; set server to what runs there"):
            list(sampler(prompts, SamplingOptions(num_answers=2)))


def test_a_url_is_told_the_checkpoint(tokenizer, tmp_path, caplog):
    def answer(path, body, number):
        if path == "/update_weights_from_disk":
            good = body["model_path"].endswith("good")
            return {"success": good, "message": "no such directory"}
        return (503, "loading", {}) if number < 3 else {"data": []}

    with serve(answer) as stub:
        url = stub.base_url.removesuffix("/v1") + "/update_weights_from_disk"
        sampler = sampler_for(tokenizer, stub.base_url, "policy", reload=url)
        sampler.reload(tmp_path / "good")
        assert stub.bodies[0] == {"model_path": str(tmp_path / "good")}
        assert [path for path, _, _ in stub.requests[1:]] == ["/v1/models"] * 3
        with pytest.raises(UserError, match="update_weights_from_disk cannot load .*bad: no such directory"):
            sampler.reload(tmp_path / "bad")
        sampler_for(tokenizer, stub.base_url, "policy").reload(tmp_path)  # keeps what it has
        assert len(stub.requests) == 5


def test_a_server_is_not_told_the_base_of_a_policy_with_an_adapter(tokenizer, tmp_path):
    policy = Policy(
        None, Checkpoint(adapter={"w": torch.zeros(1)}), tmp_path, tokenizer, torch.device("cpu"), torch.float32, 0
    )
    with serve(lambda path, body, number: {"data": []}) as stub:
        with pytest.raises(UserError, match="needs the whole model.*; set save_adapter_weights_only: False"):
            served_sampler(policy, stub.base_url, "policy", reload="true {checkpoint}")
        (tmp_path / "adapter").mkdir()  # beside a whole model
        served_sampler(policy, stub.base_url, "policy", reload="true {checkpoint}")


def test_a_command_is_run_with_the_checkpoint(tokenizer, tmp_path):
    write = "import sys; open(sys.argv[2], 'w').write(sys.argv[1])"
    with serve(lambda path, body, number: {"data": []}) as stub:
        command = f'{sys.executable} -c "{write}" {{checkpoint}} {tmp_path}/seen'
        sampler_for(tokenizer, stub.base_url, "policy", reload=command).reload(tmp_path / "a b; c")
        assert (tmp_path / "seen").read_text() == str(tmp_path / "a b; c")
        sampler = sampler_for(tokenizer, stub.base_url, "policy", reload="sh -c 'exit 3' {checkpoint}")
        with pytest.raises(UserError, match="reload: sh -c 'exit 3' .* ends with status 3"):
            sampler.reload(tmp_path)
        sampler = sampler_for(tokenizer, stub.base_url, "policy", reload="no_such_command {checkpoint}")
        with pytest.raises(UserError, match="reload: no_such_command .* cannot be run"):
            sampler.reload(tmp_path)
    sampler = sampler_for(tokenizer, stub.base_url, "policy", reload="true {checkpoint}", timeout=0.0)
    with pytest.raises(UserError, match="reload: the server is not back after 0 s: .*/v1/models cannot be reached"):
        sampler.reload(tmp_path)


def test_configs_that_cannot_work_are_refused(tokenizer):
    with pytest.raises(ConfigError, match="'server': must be one of vllm, sglang, transformers, not tgi"):
        sampler_for(tokenizer, "http://127.0.0.1:1/v1", "policy", server="tgi")
    with pytest.raises(ConfigError, match="'reload': 'bash serve.sh' is no URL"):
        sampler_for(tokenizer, "http://127.0.0.1:1/v1", "policy", reload="bash serve.sh")
    with pytest.raises(ConfigError, match="'base_url'"):
        sampler_for(tokenizer, "127.0.0.1", "policy")


@contextlib.contextmanager
def transformers_server(path):
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port = one.getsockname()[1]
    command = [sys.executable, "-c", "from transformers.cli.transformers import main; main()", "serve", path]
    command += ["--host", "127.0.0.1", "--port", str(port), "--device", "cpu", "--dtype", "float32"]
    with open(os.path.join(path, "server.log"), "w") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
        try:
            yield f"http://127.0.0.1:{port}/v1", process
        finally:
            process.terminate()
            process.wait(30)


@pytest.mark.slow
def test_transformers_serve_answers_as_generate_does(tmp_path, end):
    transformers = pytest.importorskip("transformers", minversion="5.24")
    for needed in ("fastapi", "uvicorn", "openai", "pydantic"):  # pip install 'transformers[serving]'
        pytest.importorskip(needed)
    from directories import make_directory

    path = make_directory(tmp_path / "model")
    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(path)
    tokenizer = hf_chat_tokenizer(path)
    prompts = []
    for i, turns in enumerate(TURNS):
        chat = tokenizer({"messages": [_message(turn) for turn in turns]}, inference=True)
        prompts.append(Prompt(f"{i:032x}", tuple(turns), np.array(chat["tokens"])))
    stop = (end, *range(300, 500))  # so that some answers end
    options = SamplingOptions(num_answers=2, max_new_tokens=12, temperature=0.0, stop_tokens=stop)
    with transformers_server(path) as (url, process):
        sampler = sampler_for(tokenizer, url, path, server="transformers", reload="true {checkpoint}", timeout=120.0)
        until = time.monotonic() + 120
        while time.monotonic() < until and process.poll() is None:
            with contextlib.suppress(UserError):
                served.Server(url, retries=0).get("/models")
                break
            time.sleep(0.5)
        assert process.poll() is None, (tmp_path / "model" / "server.log").read_text()[-3000:]
        sampler.reload(tmp_path)
        greedy = dict(sampler(prompts, options))
        sampled = dict(sampler(prompts, SamplingOptions(num_answers=3, max_new_tokens=12, temperature=1.5)))
    complete = []
    for i, prompt in enumerate(prompts):
        tokens = torch.from_numpy(prompt.tokens)[None]
        generated = model.generate(
            tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=12, do_sample=False,
            eos_token_id=list(stop), pad_token_id=end,
        )[0, len(prompt.tokens) :].tolist()  # fmt: skip
        expected = tokenizer.encode(tokenizer.decode(generated), add_bos=False, add_eos=False)
        complete.append(len(generated) < 12)
        for answer in greedy[i]:
            assert answer.is_complete == complete[-1]
            own = answer.tokens.tolist()
            assert own == expected or own == [*expected, stop[-1]]
        assert len({tuple(answer.tokens) for answer in sampled[i]}) == 3
    assert any(complete)

"""One round with a real server, ``transformers serve``, that samples and judges, and is killed on the way."""

import contextlib
import json
import math
import os
import signal
import socket
import sys
import threading
import time

import pytest
import torch
from omegaconf import OmegaConf

from directories import make_directory
from prefix_dpo_online import OnlineConfig, PrefixDPOOnline
from prefix_sharing.config import check_config, find_config
from prefix_sharing.errors import UserError
from prefix_sharing.online import read_rows, tables
from prefix_sharing.run import set_up_device
from prefix_sharing.tokenizers import hf_chat_tokenizer

transformers = pytest.importorskip("transformers", minversion="5.24")
for _needed in ("fastapi", "uvicorn", "openai", "pydantic"):  # pip install 'transformers[serving]'
    pytest.importorskip(_needed)

RELOAD = """
if [ -e pid ] && [ "$(readlink policy)" = "$1" ]; then exit; fi
if [ -e pid ]; then kill -9 $(cat pid) 2>/dev/null; fi
ln -sfn "$1" policy
{python} -c 'from transformers.cli.transformers import main; main()' serve --host 127.0.0.1 --port {port} \
    --device cpu --dtype float32 >> server.log 2>&1 &
echo $! > pid
"""
"""Serves a policy under a name of its own; models are loaded when they are asked for."""


def make_judge(path):
    """A model that has learned to say a score, any of them."""
    model = transformers.AutoModelForCausalLM.from_pretrained(make_directory(path), dtype=torch.float32)
    tokenizer = hf_chat_tokenizer(str(path))
    opening, *scores = (
        tokenizer.encode(text, add_bos=False, add_eos=False)
        for text in ("<|end|><|start|>assistant\n", *(f"[[{score}]]<|end|>" for score in range(1, 10)))
    )
    said = torch.tensor([opening + score for score in scores])
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for step in range(60):
        asked = torch.randint(3, 2048, (len(said), 20 + step))  # whatever the conversation
        logits = model(torch.cat([asked, said], dim=1)).logits[:, asked.shape[1] + len(opening) - 1 : -1]
        torch.nn.functional.cross_entropy(logits.flatten(0, 1), said[:, len(opening) :].flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(path)
    return str(path)


def make_run(directory, port):
    policy = str(directory / "first")
    served = {"base_url": f"http://127.0.0.1:{port}/v1", "concurrency": 1, "retries": 1}
    cfg = OmegaConf.load(find_config("transformers/prefix_dpo_online"))
    quickstart = "prefix_sharing.quickstart.online.prompts"
    overrides = {
        "path": policy,
        "output_dir": str(directory / "out"),
        "prompts": {"_component_": quickstart, "num_prompts": 12},
        "prompts_val": {"_component_": quickstart, "num_prompts": 3, "seed": 1},
        "sampler": {
            "_component_": "prefix_sharing.sampling.served_sampler",
            "model": str(directory / "policy"),
            "server": "transformers",
            "reload": f"sh {directory}/reload.sh {{checkpoint}}",
            **served,
        },
        "judge": {
            "_component_": "prefix_sharing.judging.served_judge",
            "model": str(directory / "judge"),
            "template": str(directory / "judge.txt"),
            "request": {"temperature": 1.0, "max_tokens": 8, "generation_config": json.dumps({"do_sample": True})},
            **served,
        },
        "rounds": 1,
        "num_answers": 2,
        "num_answers_val": 2,
        "max_new_tokens": 6,
        "self_check": False,
        "pack_len": 1024,
        "global_batch_size": 4,
        "lr_scheduler": None,
    }
    for key, value in overrides.items():
        OmegaConf.update(cfg, key, value, merge=False)
    cfg = check_config(cfg, OnlineConfig)
    return PrefixDPOOnline(cfg, set_up_device(cfg))


@pytest.fixture
def port(tmp_path, monkeypatch):
    """Where the server is going to be, whenever there is one; nothing runs there afterwards."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port = one.getsockname()[1]
    (tmp_path / "reload.sh").write_text("cd " + str(tmp_path) + RELOAD.format(python=sys.executable, port=port))
    monkeypatch.setattr(tables, "_ROWS_OF_A_PART", 3)
    yield port
    kill_server(tmp_path)


def kill_server(directory):
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        os.kill(int((directory / "pid").read_text()), signal.SIGKILL)
        (directory / "pid").unlink()


def kill_server_when(condition, directory):
    """Kills it from beside the run."""

    def wait_and_kill():
        until = time.monotonic() + 120
        while not condition() and time.monotonic() < until:
            time.sleep(0.005)
        kill_server(directory)

    thread = threading.Thread(target=wait_and_kill, daemon=True)
    thread.start()
    return thread


@pytest.mark.slow
def test_a_round_goes_on_after_its_server_was_killed(tmp_path, port):
    make_directory(tmp_path / "first")
    make_judge(tmp_path / "judge")
    (tmp_path / "judge.txt").write_text("{prompt}: {answer}")
    parts = tmp_path / "out" / "round_0" / "answers.parts"
    killing = kill_server_when(lambda: any(parts.glob("*.parquet")), tmp_path)
    with pytest.raises(UserError, match="cannot be reached") as caught:
        make_run(tmp_path, port).run()
    killing.join()
    assert "\n" not in str(caught.value)
    sampled = {row["key"]: row["answers"] for file in parts.glob("*.parquet") for row in read_rows(file)}
    assert 3 <= len(sampled) < 12
    make_run(tmp_path, port).run()
    rows = read_rows(tmp_path / "out" / "round_0" / "scores.parquet")
    assert len(rows) == 12
    assert all(row["answers"] == sampled.get(row["key"], row["answers"]) for row in rows)
    scores = [score for row in rows for score in row["scores"] if not math.isnan(score)]  # what could be read
    assert len(scores) > 12
    assert 1 < len(set(scores)) <= len(set(scores) & {float(score) for score in range(1, 10)})
    assert (tmp_path / "out" / "round_0" / "held_out" / "scores.parquet").exists()
    asked = (tmp_path / "server.log").read_text().count("POST /v1/completions")
    # 2 answers each to 12 prompts, and to 3 held-out ones twice; those of the prompt under way are asked for again.
    assert 36 <= asked <= 36 + 2

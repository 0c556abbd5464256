"""Sampling by a server of its own, with what training tokenizes and not with what a server would make of the text."""

import json
import logging
import math
import shlex
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from prefix_sharing.distributed import is_rank_zero, wait_for_all_ranks
from prefix_sharing.errors import ConfigError, UserError
from prefix_sharing.sampling.choose import SamplingOptions
from prefix_sharing.sampling.sampler import Answer, Policy, Prompt, answer_seed
from prefix_sharing.served import Server, is_url
from prefix_sharing.tokenizers import ChatTokenizer, decode_all

log = logging.getLogger(__name__)

_SECONDS_BETWEEN_LOOKS = 2.0

_PATH = "/completions"


def served_sampler(
    policy: Policy,
    base_url: str,
    model: str,
    *,
    server: Literal["vllm", "sglang", "transformers"] = "vllm",
    reload: str | None = None,
    api_key_env: str | None = None,
    concurrency: int = 32,
    retries: int = 5,
    timeout: float = 600.0,
) -> "ServedSampler":
    """A sampler that asks a server with OpenAI's ``/completions``, for a config.

    What differs between servers:

    ============ ================== ========================= =========== ====================
    server       the prompt is sent answers come back as      log_prob    answers to a request
    ============ ================== ========================= =========== ====================
    vllm         as token ids       token ids                 its own     all n
    sglang       as token ids       text, tokenized here      NaN         1
    transformers as text            text, tokenized here      NaN         1
    ============ ================== ========================= =========== ====================

    ``transformers serve`` takes text alone and answers with text without special tokens; that it makes as many tokens
    of a prompt as there are is checked. What is tokenized here may be other tokens than those sampled, of the same
    text; if the answer ended by itself, the token that ends an answer is put behind it.

    Each request has a seed made of the pass's and the prompt's key. Whether it decides the answer is up to the server:
    most compute something else in a batch of another size, and ``transformers serve`` mixes up the seeds of requests
    that are under way together.

    ``reload`` has the server take the policy's weights before a pass. It is a URL, to which
    ``{"model_path": checkpoint}`` is posted, or a command, in which ``{checkpoint}`` is replaced; afterwards the
    sampler waits until ``/models`` answers. SGLang, started by ``python -m sglang.launch_server --model-path ...``, has
    such a URL::

        reload: http://127.0.0.1:30000/update_weights_from_disk

    vLLM is started anew, here by a script of yours that ends what it started before and waits for its end::

        reload: bash serve.sh {checkpoint}

        # serve.sh
        if [ -e vllm.pid ]; then kill $(cat vllm.pid); tail --pid $(cat vllm.pid) -f /dev/null; fi
        nohup vllm serve $1 --served-model-name policy --port 8000 > vllm.log 2>&1 & echo $! > vllm.pid

    Tried with a stub that speaks as vLLM and SGLang are documented to, and with ``transformers serve`` 5.24 itself.
    vLLM and SGLang themselves, and the lines above, have not been run.

    Args:
        policy (Policy): whose answers; the server is to have its weights, by ``reload`` or else by itself.
        base_url (str): such as ``http://127.0.0.1:8000/v1``.
        model (str): the model's name on that server.
        server (Literal["vllm", "sglang", "transformers"]): which one it is. Default: "vllm".
        reload (str | None): see above. Default: None, the server keeps the weights that it has.
        api_key_env (str | None): environment variable with the server's key. Default: None, no key.
        concurrency (int): requests under way at the same time. Default: 32.
        retries (int): how often a request is made again after status 429, 5xx, or no answer. Default: 5.
        timeout (float): seconds to wait for an answer, and for a server to be back. Default: 600.0.

    Returns:
        ServedSampler: the sampler.

    Raises:
        ConfigError: if a value is out of range.
        UserError: if the server cannot take the policy's weights.

    Example:
        .. code-block:: yaml

            sampler:
              _component_: prefix_sharing.sampling.served_sampler
              base_url: http://127.0.0.1:8000/v1
              model: policy
              reload: bash serve.sh {checkpoint}
    """
    if server not in _BODIES:
        raise ConfigError("server", f"must be one of {', '.join(_BODIES)}, not {server}")
    if reload is not None and not is_url(reload) and "{checkpoint}" not in reload:
        raise ConfigError("reload", f"'{reload}' is no URL, and as a command it lacks {{checkpoint}}; put it there")
    server_at = Server(base_url, api_key_env, concurrency, retries, timeout)
    sampler = ServedSampler(policy.tokenizer, server_at, model, server, reload)
    if policy.directory is not None and is_rank_zero():
        if reload is not None and policy.checkpoint.adapter and not (policy.directory / "adapter").is_dir():
            problem = "served_sampler with reload needs the whole model, beside which an adapter is in adapter"
            raise ConfigError("sampler", f"{problem}; set save_adapter_weights_only: False")
        sampler.reload(policy.directory)
    wait_for_all_ranks()
    return sampler


@dataclass(frozen=True)
class ServedSampler:
    """See ``served_sampler``, and ``Sampler``."""

    tokenizer: ChatTokenizer
    server: Server
    model: str
    kind: str
    reload_by: str | None

    def __call__(self, prompts: Sequence[Prompt], options: SamplingOptions) -> Iterator[tuple[int, list[Answer]]]:
        """See ``Sampler``."""
        # Servers refuse several answers where they would all be the same.
        num_distinct = options.num_answers if options.temperature > 0 else 1
        # vLLM gives each of n answers a seed of its own; others may not, and then all are the same.
        at_once = num_distinct if self.kind == "vllm" else 1
        bodies, owners = [], []
        for i, prompt in enumerate(prompts):
            for k in range(0, num_distinct, at_once):
                own = _BODIES[self.kind](self.tokenizer, prompt, options, at_once)
                seed = answer_seed(options.seed, prompt.key, k)
                bodies.append({"model": self.model, "seed": seed, "max_tokens": options.max_new_tokens, **own})
                owners.append(i)
        found: dict[int, dict[int, list[Answer]]] = {}
        for number, response in self.server.post_all(_PATH, bodies):
            i = owners[number]
            of_prompt = found.setdefault(i, {})
            of_prompt[number] = self._answers(response, prompts[i], options, at_once)
            if sum(map(len, of_prompt.values())) == num_distinct:
                answers = [answer for _, some in sorted(found.pop(i).items()) for answer in some]
                yield i, answers * (options.num_answers // num_distinct)

    def reload(self, checkpoint: Path) -> None:
        """Has the server take a checkpoint's weights, if the config says how.

        Args:
            checkpoint (Path): directory of the policy.

        Raises:
            UserError: if that fails, or the server does not come back.
        """
        if self.reload_by is None:
            return
        if is_url(self.reload_by):
            response = Server(self.reload_by, self.server.api_key_env, timeout=self.server.timeout).post(
                "", {"model_path": str(checkpoint)}
            )
            if response.get("success") is False:
                raise UserError(f"{self.reload_by} cannot load {checkpoint}: {response.get('message')}.")
        else:
            command = [part.replace("{checkpoint}", str(checkpoint)) for part in shlex.split(self.reload_by)]
            try:
                # Output is not captured: a server that the command leaves behind would hold it open.
                status = subprocess.run(command, stdin=subprocess.DEVNULL).returncode
            except OSError as error:
                raise UserError(f"reload: {shlex.join(command)} cannot be run: {error}.") from error
            if status != 0:
                raise UserError(f"reload: {shlex.join(command)} ends with status {status}.")
        self._wait_for_server()

    def _wait_for_server(self) -> None:
        server = self.server
        once = Server(server.base_url, server.api_key_env, retries=0, timeout=server.timeout)
        until = time.monotonic() + server.timeout
        while True:
            try:
                once.get("/models")
                return
            except UserError as error:
                if time.monotonic() > until:
                    raise UserError(f"reload: the server is not back after {server.timeout:.0f} s: {error}") from error
                log.info("Waiting for the server: %s", error)
                _pause(_SECONDS_BETWEEN_LOOKS)

    def _answers(
        self, response: Mapping[str, Any], prompt: Prompt, options: SamplingOptions, expected: int
    ) -> list[Answer]:
        url = self.server.base_url.rstrip("/") + _PATH
        choices = response.get("choices")
        if not isinstance(choices, list) or len(choices) != expected:
            num = len(choices) if isinstance(choices, list) else 0
            raise UserError(f"{url} gives {num} answers where {expected} are asked for; set server to what runs there.")
        if self.kind == "transformers":
            read = (response.get("usage") or {}).get("prompt_tokens")
            if read is not None and read != len(prompt.tokens):
                problem = f"{url} makes {read} tokens of a prompt of {len(prompt.tokens)}"
                raise UserError(f"{problem}; serve a directory with the tokenizer that the config has.")
        return [self._answer(choice, options) for choice in choices]

    def _answer(self, choice: Mapping[str, Any], options: SamplingOptions) -> Answer:
        is_complete = choice.get("finish_reason") == "stop"
        log_probs = choice.get("logprobs") or {}
        tokens = choice.get("token_ids")
        if tokens is None:
            tokens = _ids(log_probs.get("tokens"))
        if tokens is not None:
            of_tokens = log_probs.get("token_logprobs") or []
            is_known = len(of_tokens) == len(tokens) and None not in of_tokens
            return Answer(np.array(tokens, dtype=np.int64), math.fsum(of_tokens) if is_known else math.nan, is_complete)
        tokens = _encode(self.tokenizer, choice.get("text") or "")
        if is_complete and options.stop_tokens and (not tokens or tokens[-1] not in options.stop_tokens):
            stopped_by = choice.get("matched_stop", choice.get("stop_reason"))
            # The last: tokenizers put the end of a turn behind the end of a text.
            tokens.append(stopped_by if stopped_by in options.stop_tokens else options.stop_tokens[-1])
        return Answer(np.array(tokens, dtype=np.int64), math.nan, is_complete)


def _encode(tokenizer: Any, text: str) -> list[int]:
    """Token ids of text within a conversation, as torchtune's tokenizers and ours make them."""
    return list(tokenizer.encode(text, add_bos=False, add_eos=False))


def _pause(seconds: float) -> None:
    time.sleep(seconds)


def _ids(tokens: Sequence[str] | None) -> list[int] | None:
    """Token ids in place of texts, as vLLM gives them if asked to."""
    if not tokens or not all(token.startswith("token_id:") for token in tokens):
        return None
    return [int(token.removeprefix("token_id:")) for token in tokens]


def _sglang(tokenizer: ChatTokenizer, prompt: Prompt, options: SamplingOptions, n: int) -> dict[str, Any]:
    return {
        "prompt": prompt.tokens.tolist(),
        "n": n,
        "temperature": options.temperature,
        "top_p": options.top_p,
        # What is not given is taken from the model's generation_config.json.
        "top_k": -1 if options.top_k is None else options.top_k,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
        "stop_token_ids": list(options.stop_tokens),
        "skip_special_tokens": False,
        "no_stop_trim": True,
    }


def _vllm(tokenizer: ChatTokenizer, prompt: Prompt, options: SamplingOptions, n: int) -> dict[str, Any]:
    body = _sglang(tokenizer, prompt, options, n)
    del body["no_stop_trim"]
    # Versions before 0.10.2 know the second way to give token ids alone.
    return body | {"return_token_ids": True, "return_tokens_as_token_ids": True, "logprobs": 1}


def _transformers(tokenizer: ChatTokenizer, prompt: Prompt, options: SamplingOptions, n: int) -> dict[str, Any]:
    generation: dict[str, Any] = {"do_sample": options.temperature > 0, "max_new_tokens": options.max_new_tokens}
    if options.temperature > 0:
        generation |= {"temperature": options.temperature, "top_p": options.top_p, "top_k": options.top_k or 0}
    if options.stop_tokens:
        generation |= {"eos_token_id": list(options.stop_tokens), "pad_token_id": options.stop_tokens[-1]}
    return {"prompt": decode_all(tokenizer, prompt.tokens), "generation_config": json.dumps(generation)}


_BODIES = {"vllm": _vllm, "sglang": _sglang, "transformers": _transformers}

"""Answers to a few held-out prompts before and after training, side by side.

    tune run prefix_dpo_answers --config quickstart/single_device

Takes the config of a training run that is done, its overrides included. Answers are drawn by torchtune's ``generate``,
on one device, whatever the run had, and go to ``answers.md`` in ``output_dir``.
"""

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import DictConfig
from torchtune import training
from torchtune.data import Message
from torchtune.generation import generate
from torchtune.modules import TransformerDecoder
from tqdm import tqdm

from prefix_sharing.config import instantiate
from prefix_sharing.datasets.stats import decode_all
from prefix_sharing.errors import UserError
from prefix_sharing.rows import Response, common_prefix_length
from prefix_sharing.training import (
    DistributedConfig,
    build_dataset,
    compute_dtype,
    load_checkpoint,
    load_trained_checkpoint,
    load_weights,
    materialize,
    parse,
    set_up_device,
    set_up_logging,
)

log = logging.getLogger("prefix_sharing.recipe")


@dataclass
class AnswersConfig(DistributedConfig):
    """Every key of ``prefix_dpo_answers``: those of a training config, and a few more.

    Attributes:
        num_prompts (int): how many, the first ones of ``dataset_val``.
        max_new_tokens (int): most tokens in an answer.
        temperature (float): of sampling; 0 takes the likeliest token each time.
    """

    num_prompts: int = 4
    max_new_tokens: int = 128
    temperature: float = 0.0


class PrefixDPOAnswers:
    """Draws answers from the model that a run began with and from the one it made.

    Args:
        cfg (DictConfig): the keys of ``AnswersConfig``.

    Raises:
        UserError: if there are no held-out prompts.
    """

    def __init__(self, cfg: DictConfig) -> None:
        self.cfg = cfg
        if cfg.dataset_val is None:
            raise UserError("Config: answers are to the prompts of dataset_val, and there is none.")
        self.device = set_up_device(cfg)
        cfg.seed = training.set_seed(cfg.seed)
        self.tokenizer = instantiate("tokenizer", cfg.tokenizer)
        self.model = self.new_model()
        self.dataset = build_dataset("dataset_val", cfg, self.tokenizer, self.model, instantiate("loss", cfg.loss))

    def new_model(self) -> TransformerDecoder:
        """A model as torchtune builds it, without weights."""
        with torch.device("meta"), training.set_default_dtype(compute_dtype(self.cfg)):
            model = instantiate("model", self.cfg.model)
        materialize(model, self.device)
        return model.eval()

    def answer(self, prompt: np.ndarray) -> str:
        """The model's answer to a prompt, shape ``[n]``."""
        self.model.reset_caches()
        tokens, _ = generate(
            self.model,
            torch.from_numpy(prompt).to(self.device),
            max_generated_tokens=self.cfg.max_new_tokens,
            pad_id=-1,  # there is no padding to be left out
            temperature=self.cfg.temperature,
            top_k=1 if self.cfg.temperature == 0 else None,
            stop_tokens=self.tokenizer.stop_tokens,
        )
        return self.tokenizer.decode(tokens[0, len(prompt) :].tolist())

    def run(self) -> None:
        """Draws the answers and writes them down."""
        cfg = self.cfg
        indices = range(min(cfg.num_prompts, len(self.dataset)))
        header = header_length(self.tokenizer)
        prompts = [split_at_answer(self.dataset[i][0], header)[0] for i in indices]
        if min(map(len, prompts)) <= 1:
            raise UserError(
                "dataset_val: a prompt has no tokens, because all are scored; set dataset_val.masking_strategy: "
                "train_on_last."
            )
        longest = max(map(len, prompts)) + cfg.max_new_tokens
        if longest > self.model.max_seq_len:
            raise UserError(
                f"Config: max_new_tokens: {cfg.max_new_tokens} behind the longest prompt make {longest:,} tokens, but "
                f"the model takes {self.model.max_seq_len:,}."
            )
        with self.device:
            self.model.setup_caches(1, compute_dtype(cfg), decoder_max_seq_len=longest)
        answers = {}
        for when, checkpoint in (
            ("before training", load_checkpoint("checkpointer", cfg.checkpointer, adapter=cfg.adapter_checkpoint)[1]),
            ("after training", load_trained_checkpoint("checkpointer", cfg.checkpointer, epoch=cfg.epochs - 1)),
        ):
            load_weights(self.model, checkpoint, cfg.seed)
            answers[when] = [self.answer(prompt) for prompt in tqdm(prompts, desc=f"Answers {when}", unit="answer")]

        how = "the likeliest token each time" if cfg.temperature == 0 else f"temperature {cfg.temperature}"
        lines = [f"# Answers before and after training\n\nOf {cfg.output_dir}, {how}."]
        for i, prompt in zip(indices, prompts, strict=True):
            texts = {"prompt": decode_all(self.tokenizer, prompt)} | {when: given[i] for when, given in answers.items()}
            for k, response in enumerate(self.dataset[i], start=1):
                texts[f"response {k} of the data"] = decode_all(self.tokenizer, split_at_answer(response, header)[1])
            lines.append(f"## Row {self.dataset.source_rows[i]}")
            lines += [f"**{name}**\n\n````text\n{text.strip()}\n````" for name, text in texts.items()]
        file = Path(cfg.output_dir) / "answers.md"
        file.write_text("\n\n".join(lines) + "\n")
        log.info("Written to %s", file)


def header_length(tokenizer: Any) -> int:
    """How many tokens that open an answer are scored with it: torchtune's own tokenizers score the turn's header.

    Args:
        tokenizer (Any): torchtune's or ours.

    Returns:
        int: the number.
    """
    scored = []
    for answer in ("a", "b"):
        turns = [
            Message(role="user", content="q", masked=True),
            Message(role="assistant", content=answer, masked=False),
        ]
        tokens, masked = tokenizer.tokenize_messages(turns)
        scored.append(np.array(tokens)[~np.array(masked)])
    return common_prefix_length(scored)


def split_at_answer(response: Response, header: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Parts a response sequence into prompt and answer.

    Args:
        response (Response): the sequence; its answer is the last run of tokens that are scored.
        header (int): scored tokens that belong to the prompt. Default: 0.

    Returns:
        tuple[np.ndarray, np.ndarray]: token ids of each.
    """
    scored = np.flatnonzero(response.scored)
    breaks = np.flatnonzero(np.diff(scored) > 1)
    start, end = scored[breaks[-1] + 1 if len(breaks) else 0] + header, scored[-1] + 1
    return response.tokens[:start], response.tokens[start:end]


@parse(AnswersConfig)
def recipe_main(cfg: DictConfig) -> None:
    """Draws answers from before and after a run, with ``key=value`` overrides."""
    set_up_logging()
    PrefixDPOAnswers(cfg).run()


if __name__ == "__main__":
    recipe_main()

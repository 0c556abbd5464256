"""Answers to a few held-out prompts before and after training, side by side.

    tune run prefix_dpo_answers --config quickstart/single_device

Takes the config of a training run that is done, its overrides included. Answers are sampled on one device, whatever the
run had, and are written to ``answers.md`` in ``output_dir``.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from omegaconf import DictConfig
from tqdm import tqdm

from prefix_sharing.config import DistributedConfig, at_least, instantiate, parse
from prefix_sharing.datasets.answers import header_length, split_at_answer
from prefix_sharing.errors import ConfigError
from prefix_sharing.fingerprint import fingerprint
from prefix_sharing.hosts import build_answer_model, load_checkpoint, load_trained_checkpoint
from prefix_sharing.run import build_loss, build_model, set_up_device, set_up_logging
from prefix_sharing.run.data import build_dataset
from prefix_sharing.run.optimization import choose_seed
from prefix_sharing.run.setup import compute_dtype
from prefix_sharing.sampling import SamplingOptions, sample_answers
from prefix_sharing.tokenizers import decode_all

log = logging.getLogger("prefix_sharing.recipe")


@dataclass
class AnswersConfig(DistributedConfig):
    """Every key of ``prefix_dpo_answers``: those of a training config, and a few more."""

    num_prompts: int = at_least(1, default=4)
    """How many prompts to answer: the first ones of ``dataset_val``."""
    max_new_tokens: int = at_least(1, default=128)
    """Maximum number of tokens in an answer."""
    temperature: float = at_least(0, default=0.0)
    """Temperature of sampling; 0 takes the most likely token each time."""


class PrefixDPOAnswers:
    """Answers prompts with the model that a run began with and with the one it made.

    Args:
        cfg (DictConfig): the keys of ``AnswersConfig``.
        device (torch.device): where the model runs.

    Raises:
        ConfigError: if there are no held-out prompts.
    """

    def __init__(self, cfg: DictConfig, device: torch.device) -> None:
        if cfg.dataset_val is None:
            raise ConfigError("dataset_val", "required: its prompts are the ones that are answered")
        self.cfg = cfg
        self.tokenizer = instantiate("tokenizer", cfg.tokenizer)
        self.model = build_answer_model(cfg.model, device, compute_dtype(cfg))
        self.seed = choose_seed(cfg.seed)
        self.dataset = build_dataset("dataset_val", cfg, self.tokenizer, build_model(cfg, device), build_loss(cfg))

    def run(self) -> None:
        """Generates the answers and writes them down."""
        cfg = self.cfg
        indices = range(min(cfg.num_prompts, len(self.dataset)))
        header = header_length(self.tokenizer)
        prompts = [split_at_answer(self.dataset[i][0], header)[0] for i in indices]
        self.check_lengths(prompts)
        options = SamplingOptions(
            max_new_tokens=cfg.max_new_tokens,
            temperature=cfg.temperature,
            stop_tokens=tuple(self.tokenizer.stop_tokens),
            seed=self.seed,
        )
        answers = {}
        for when, checkpoint in (
            ("before training", load_checkpoint("checkpointer", cfg.checkpointer, adapter=cfg.adapter_checkpoint)[1]),
            ("after training", load_trained_checkpoint("checkpointer", cfg.checkpointer, epoch=cfg.epochs - 1)),
        ):
            self.model.load_weights(checkpoint, self.seed)
            generated = [
                sample_answers(self.model, [prompt], [fingerprint(prompt.tolist())], options)[0][0]
                for prompt in tqdm(prompts, desc=f"Answers {when}", unit="answer")
            ]
            answers[when] = [self.tokenizer.decode(answer.tokens.tolist()) for answer in generated]

        how = "the most likely token each time" if cfg.temperature == 0 else f"temperature {cfg.temperature}"
        lines = [f"# Answers before and after training\n\n{cfg.output_dir}, {how}."]
        for i, prompt in zip(indices, prompts, strict=True):
            texts = {"prompt": decode_all(self.tokenizer, prompt)} | {when: given[i] for when, given in answers.items()}
            for k, response in enumerate(self.dataset[i], start=1):
                texts[f"response {k} of the data"] = decode_all(self.tokenizer, split_at_answer(response, header)[1])
            lines.append(f"## Record {self.dataset.record_index[i]}")
            lines += [f"**{name}**\n\n````text\n{text.strip()}\n````" for name, text in texts.items()]
        file = Path(cfg.output_dir) / "answers.md"
        file.write_text("\n\n".join(lines) + "\n")
        log.info("Answers saved to %s", file)

    def check_lengths(self, prompts: Sequence[np.ndarray]) -> None:
        """Refuses prompts without tokens, and more tokens than the model takes."""
        cfg = self.cfg
        if min(map(len, prompts)) <= 1:
            problem = "leaves a prompt without tokens, because all are scored; set it to train_on_last"
            raise ConfigError("dataset_val.masking_strategy", problem)
        longest = max(map(len, prompts)) + cfg.max_new_tokens
        if longest > self.model.max_seq_len:
            problem = (
                f"{cfg.max_new_tokens} after the longest prompt make {longest:,} tokens, but the model takes "
                f"{self.model.max_seq_len:,}"
            )
            raise ConfigError("max_new_tokens", problem)


@parse(AnswersConfig)
def recipe_main(cfg: DictConfig) -> None:
    """Generates answers from before and after a run, with ``key=value`` overrides."""
    set_up_logging()
    PrefixDPOAnswers(cfg, set_up_device(cfg)).run()


if __name__ == "__main__":
    recipe_main()

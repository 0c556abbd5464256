"""Answers before and after training: to a few held-out prompts, side by side, or to a benchmark's for its own judge.

    tune run prefix_dpo_answers --config quickstart/single_device
    tune run prefix_dpo_answers --config quickstart/single_device format=mt_bench prompts=question.jsonl

Takes the config of a training run that is done, its overrides included. Answers are sampled on one device, whatever the
run had, and are written to ``answers.md``, or to ``answers``, in ``output_dir``.
"""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from omegaconf import DictConfig
from tqdm import tqdm

from prefix_sharing.config import DistributedConfig, at_least, instantiate, parse
from prefix_sharing.datasets.answers import header_length, split_at_answer
from prefix_sharing.errors import ConfigError
from prefix_sharing.fingerprint import fingerprint
from prefix_sharing.hosts import build_answer_model, load_checkpoint, load_trained_checkpoint
from prefix_sharing.judging.answer_files import AnswerText, Question, read_questions, write_answers
from prefix_sharing.online.prompts import tokens_before_answer
from prefix_sharing.run import build_loss, build_model, set_up_device, set_up_logging
from prefix_sharing.run.data import build_dataset
from prefix_sharing.run.optimization import choose_seed
from prefix_sharing.run.setup import compute_dtype
from prefix_sharing.sampling import Answer, Prompt, SamplingOptions
from prefix_sharing.sampling.in_process import sample_in_batches
from prefix_sharing.tokenizers import Turn, decode_all

log = logging.getLogger("prefix_sharing.recipe")

_SHOWN = 4
"""Held-out prompts that are answered where ``num_prompts`` is not set."""


@dataclass
class AnswersConfig(DistributedConfig):
    """Every key of ``prefix_dpo_answers``: those of a training config, and a few more."""

    format: Literal["markdown", "alpaca_eval", "arena_hard", "mt_bench"] = "markdown"
    """Answers to prompts of ``dataset_val`` to be read, or answers to ``prompts`` in the files of AlpacaEval,
    Arena-Hard-Auto or MT-bench."""
    prompts: str | None = None
    """File of prompts as the benchmark of ``format`` publishes it; not used with ``markdown``."""
    model_name: str | None = None
    """What the trained model is called in a benchmark's files, the name of ``output_dir`` if not set; the one before
    training has ``_before`` behind it."""
    num_prompts: int | None = at_least(1, default=None)
    """How many prompts to answer, the first ones; if not set, 4 of ``dataset_val`` or all of ``prompts``."""
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
        ConfigError: if there are no prompts, or a key is not used.
    """

    def __init__(self, cfg: DictConfig, device: torch.device) -> None:
        self.cfg = cfg
        self.tokenizer = instantiate("tokenizer", cfg.tokenizer)
        if cfg.format == "markdown":
            if cfg.dataset_val is None:
                raise ConfigError("dataset_val", "required: its prompts are the ones that are answered")
            for key in ("prompts", "model_name"):
                if cfg[key] is not None:
                    raise ConfigError(key, "not used with format: markdown; set format to a benchmark's, or remove it")
            loss, model = build_loss(cfg), build_model(cfg, device)
            self.dataset = build_dataset("dataset_val", cfg, self.tokenizer, model, loss)
        elif cfg.prompts is None:
            raise ConfigError("prompts", f"required with format: {cfg.format}; give the benchmark's file of prompts")
        else:
            self.questions = read_questions(Path(cfg.prompts), cfg.format)[: cfg.num_prompts]
        self.model = build_answer_model(cfg.model, device, compute_dtype(cfg))
        self.seed = choose_seed(cfg.seed)
        self.options = SamplingOptions(
            max_new_tokens=cfg.max_new_tokens,
            temperature=cfg.temperature,
            stop_tokens=tuple(self.tokenizer.stop_tokens),
            seed=self.seed,
        )

    def run(self) -> None:
        """Generates the answers and writes them down."""
        if self.cfg.format == "markdown":
            self.show_answers()
        else:
            self.answer_questions()

    def models(self) -> Iterator[str]:
        """Gives the model its weights before training, then those after it; says which."""
        cfg = self.cfg
        after = load_trained_checkpoint("checkpointer", cfg.checkpointer, epoch=cfg.epochs - 1)
        for when, checkpoint in (
            ("before training", load_checkpoint("checkpointer", cfg.checkpointer, adapter=cfg.adapter_checkpoint)[1]),
            ("after training", after),
        ):
            self.model.load_weights(checkpoint, self.seed)
            yield when

    def answer(self, prompts: Sequence[np.ndarray], what: str) -> list[Answer]:
        """An answer to each prompt, given as token ids, by the model as it is."""
        keyed = [Prompt(fingerprint(tokens.tolist()), (), tokens) for tokens in prompts]
        found = {}
        for i, (answer,) in tqdm(
            sample_in_batches(self.model, keyed, self.options), desc=f"Answers {what}", unit="answer", total=len(keyed)
        ):
            found[i] = answer
        return [found[i] for i in range(len(keyed))]

    def show_answers(self) -> None:
        """Answers held-out prompts, to be read beside the data's own answers."""
        cfg = self.cfg
        indices = range(min(cfg.num_prompts or _SHOWN, len(self.dataset)))
        header = header_length(self.tokenizer)
        prompts = [split_at_answer(self.dataset[i][0], header)[0] for i in indices]
        if min(map(len, prompts)) <= 1:
            problem = "leaves a prompt without tokens, because all are scored; set it to train_on_last"
            raise ConfigError("dataset_val.masking_strategy", problem)
        self.check_length(max(map(len, prompts)), "the longest prompt")
        answers = {
            when: [self.tokenizer.decode(answer.tokens.tolist()) for answer in self.answer(prompts, when)]
            for when in self.models()
        }
        how = "Greedy decoding (temperature 0)" if cfg.temperature == 0 else f"Temperature {cfg.temperature}"
        lines = [f"# Answers before and after training\n\n{how}; run: {cfg.output_dir}"]
        for i, prompt in zip(indices, prompts, strict=True):
            texts = {"prompt": decode_all(self.tokenizer, prompt)} | {when: given[i] for when, given in answers.items()}
            responses, pairs, labels = self.dataset[i], self.dataset.pairs(i), self.dataset.labels(i)
            names = [f"response {k + 1} of the data" for k in range(len(responses))]
            if len(responses) == 2 and len(pairs) == 1:
                names[pairs[0, 0]], names[pairs[0, 1]] = "chosen", "rejected"
            for k, response in enumerate(responses):
                if len(labels) == 0 or labels[k] != 0:  # else an answer to another prompt, which KTO compares with
                    texts[names[k]] = decode_all(self.tokenizer, split_at_answer(response, header)[1])
            lines.append(f"## Record {self.dataset.record_index[i]}")
            lines += [f"**{name}**\n\n````text\n{text.strip()}\n````" for name, text in texts.items()]
        file = Path(cfg.output_dir) / "answers.md"
        file.write_text("\n\n".join(lines) + "\n")
        log.info("Answers saved to %s", file)

    def answer_questions(self) -> None:
        """Answers a benchmark's questions, turn by turn, and writes files that its own judge reads."""
        cfg = self.cfg
        # With as long an answer to each turn as there may be.
        longest = max(
            len(self.prompt_of(question, ["a"] * turn)) + turn * cfg.max_new_tokens
            for question in self.questions
            for turn in range(len(question.turns))
        )
        self.check_length(longest, "the longest conversation")
        name = cfg.model_name or Path(cfg.output_dir).resolve().name
        for when in self.models():
            model_name = f"{name}_before" if when == "before training" else name
            given: list[list[Answer]] = [[] for _ in self.questions]
            texts: list[list[str]] = [[] for _ in self.questions]
            for turn in range(max(len(question.turns) for question in self.questions)):
                asked = [i for i, question in enumerate(self.questions) if turn < len(question.turns)]
                prompts = [self.prompt_of(self.questions[i], texts[i]) for i in asked]
                for i, answer in zip(asked, self.answer(prompts, f"{when}, turn {turn + 1}"), strict=True):
                    given[i].append(answer)
                    texts[i].append(self.tokenizer.decode(answer.tokens.tolist()).strip())
            suffix = "json" if cfg.format == "alpaca_eval" else "jsonl"
            file = Path(cfg.output_dir) / "answers" / cfg.format / f"{model_name.replace('/', '_')}.{suffix}"
            answers = [
                [AnswerText(text, len(answer.tokens)) for text, answer in zip(*of_one, strict=True)]
                for of_one in zip(texts, given, strict=True)
            ]
            write_answers(file, cfg.format, model_name, self.questions, answers)
            flat = [answer for of_one in given for answer in of_one]
            cut = sum(not answer.is_complete for answer in flat)
            log.info("%s: %s answers, %s cut by max_new_tokens", file, f"{len(flat):,}", f"{cut:,}")

    def prompt_of(self, question: Question, answers: Sequence[str]) -> np.ndarray:
        """The tokens of a question's conversation up to the turn that comes after some answers."""
        turns: list[Turn] = []
        for asked, answer in zip(question.turns, answers, strict=False):
            turns += [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]
        turns.append({"role": "user", "content": question.turns[len(answers)]})
        return tokens_before_answer(turns, self.tokenizer)

    def check_length(self, longest: int, what: str) -> None:
        """Refuses more tokens than the model takes."""
        cfg = self.cfg
        longest += cfg.max_new_tokens
        if longest > self.model.max_seq_len:
            problem = (
                f"{cfg.max_new_tokens} after {what} make {longest:,} tokens, but the model takes "
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

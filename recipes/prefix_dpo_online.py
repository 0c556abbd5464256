"""Online preference tuning: sample answers, have them judged, train on the judged answers, again.

    tune run prefix_dpo_online --config quickstart/online

A round takes ``prompts_per_round`` prompts. The policy gives each ``num_answers`` answers, the judge scores them, and
the policy is trained on them with every prompt computed once, by ``prefix_dpo_single_device``'s own loop. After it the
held-out prompts are answered and judged. Everything of round k is in ``round_k`` below ``output_dir``; what is whole
there is not done again, so that a run that was stopped at any moment goes on when it is started again.
"""

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from omegaconf import MISSING, DictConfig, OmegaConf

from prefix_dpo_single_device import PrefixDPORecipeSingleDevice
from prefix_sharing.attention import rounding_of
from prefix_sharing.checkpoint import Checkpoint, complete_file, load_optimizer_state_into, newest_checkpoint
from prefix_sharing.config import TrainingConfig, at_least, component_name, instantiate, parse
from prefix_sharing.datasets import PrefixPreferenceDataset, StepLoader
from prefix_sharing.distributed import broadcast_object, is_rank_zero, sum_over_ranks, this_rank, wait_for_all_ranks
from prefix_sharing.errors import ConfigError, UserError
from prefix_sharing.online import (
    answer_prompts,
    dataset_of_answers,
    describe_pairs,
    judged_answers,
    read_rows,
    sampler_differences,
)
from prefix_sharing.online.held_out import HeldOut, compare
from prefix_sharing.reference import KnownReference
from prefix_sharing.reports.online import describe_rounds, plot_rounds, warn_of_length, write_answers
from prefix_sharing.run import set_up_device, set_up_logging
from prefix_sharing.run.data import plan_of_pass
from prefix_sharing.run.directory import CHECKPOINTS, full_disk_explained, locked_output_dir
from prefix_sharing.run.policies import Policies
from prefix_sharing.run.setup import compute_dtype
from prefix_sharing.run.signals import run_to_end
from prefix_sharing.sampling import Policy, Prompt, SamplingOptions
from prefix_sharing.trees import RowOptions

log = logging.getLogger("prefix_sharing.recipe")

_MOST_APART = 0.02
"""Mean difference in nats a token between sampler and trainer above which a warning is due."""


@dataclass
class OnlineConfig(TrainingConfig):
    """Every key of ``prefix_dpo_online``: those of a training config but ``dataset``, and a few more."""

    dataset: Any = None
    """Not used: each round makes its own."""
    prompts: Any = MISSING
    """Builds the prompts, ``prefix_sharing.online.prompt_dataset``; gets the tokenizer as its first argument."""
    prompts_val: Any = MISSING
    """Builds the held-out prompts, likewise."""
    sampler: Any = MISSING
    """Samples answers: ``prefix_sharing.sampling.in_process_sampler``, ``served_sampler`` or ``vllm_sampler``."""
    judge: Any = MISSING
    """Scores answers: one of ``prefix_sharing.judging``."""
    rounds: int = at_least(1, default=1)
    """How often to sample, judge and train."""
    prompts_per_round: int | None = at_least(1, default=None)
    """Prompts of a round; all of them if not set. Rounds take them by turns, in a seeded order."""
    num_answers: int = at_least(2, default=5)
    """Answers to each prompt."""
    num_answers_val: int = at_least(1, default=1)
    """Answers to each held-out prompt."""
    max_new_tokens: int = at_least(1, default=256)
    """Maximum number of tokens in an answer."""
    temperature: float = at_least(0, default=1.0)
    """Of sampling; 0 takes the most likely token each time."""
    top_k: int | None = at_least(1, default=None)
    """Samples from the k most likely tokens only."""
    top_p: float = at_least(0, default=1.0)
    """Samples from the most likely tokens only that together have this probability."""
    stop: list[str] | None = None
    """Texts of tokens that end an answer, beside the tokenizer's own."""
    pairs: Literal["best_vs_worst", "best_vs_rest", "adjacent", "all"] = "best_vs_worst"
    """Which of a prompt's answers are compared."""
    dataset_offline: Any = None
    """Preference data mixed into each round: keys of ``prefix_sharing.datasets.prefix_preference_dataset`` and
    ``weight``, its share of the round's examples."""
    online_reference: Literal["first", "previous", "average"] = "first"
    """The reference model: the policy that the run began with, the one that the round begins with, or a moving average
    that begins with the first and takes in the policy after every round, as TR-DPO."""
    ref_model_mixup_alpha: float = at_least(0, default=0.6)
    """The policy's share in the average, at most 1."""
    carry_optimizer: bool = False
    """Whether the optimizer goes on with the moments that it had at the end of the round before; its schedule begins
    anew in any case."""
    stop_when_worse: bool = False
    """Whether to stop after a round that lowers the judged mean on held-out prompts."""
    num_shown: int = at_least(0, default=8)
    """Held-out prompts whose answers are written to each round's ``answers.md``."""


@dataclass
class RoundConfig(OnlineConfig):
    """Every key of ``prefix_dpo_sample`` and ``prefix_dpo_judge``: those of ``prefix_dpo_online``, and one more."""

    round: int = at_least(0, default=0)
    """The round, from 0; the policy is the one after the round before."""


class RoundOfTraining:
    """What a round adds to a training recipe: it begins with what the round before has trained.

    Attributes:
        begins_with (Checkpoint | None): the weights to begin with. None for the checkpointer's.
        measured_from (Checkpoint | None): the reference's. None for the weights to begin with, or what the config says.
        averages (bool): whether the reference is, or is going to be, an average of policies.
        optimizer_of (Path | None): training checkpoints of the round whose optimizer goes on. None for a new one.
        answers (Path): the round's judged answers.
    """

    begins_with: Checkpoint | None = None
    measured_from: Checkpoint | None = None
    averages: bool = False
    optimizer_of: Path | None = None
    answers: Path

    def setup(self: Any) -> None:
        """As for any training; then compares the sampler's log-probs with the trainer's, where they should be equal."""
        super().setup()  # type: ignore[misc]
        if self.averages and self.model.has_adapter and (self.model.is_quantized or self.cfg.dtype == "bf16"):
            problem = "average with an adapter needs dtype: fp32 and a base that is not quantized, which would round it"
            raise ConfigError("online_reference", problem)
        if self.optimizer_of is not None and self.resumed is None:
            self.carry_optimizer(self.optimizer_of)
        is_policy = self.measured_from is None and self.cfg.ref_checkpointer is None
        self.begins_with = self.measured_from = None  # the model has the weights now
        if not is_policy or not isinstance(self.reference, KnownReference):
            return  # the reference is not the policy that has sampled, or its log-probs come later
        rows = read_rows(self.answers)
        apart = sampler_differences(self.dataset, rows, self.reference.log_probs.double().cpu().numpy())
        if len(apart):
            mean, largest = apart.mean(), apart.max()
            log.info("Log-probs by sampler and trainer differ by %.1e a token on average, %.1e at most", mean, largest)
            if mean > _MOST_APART:
                log.warning("That is more than %.2f: the sampler has other weights, or another precision.", _MOST_APART)

    def load_checkpoints(self: Any) -> tuple[Any, Checkpoint, Checkpoint | None]:
        """What writes checkpoints, the weights to begin with, and those of the reference where they are others."""
        checkpointer, *weights = super().load_checkpoints()  # type: ignore[misc]
        ours = (self.begins_with, self.measured_from)
        begin, reference = (other if own is None else own for own, other in zip(ours, weights, strict=True))
        return checkpointer, begin, reference

    def carry_optimizer(self: Any, checkpoints: Path) -> None:
        """Gives the optimizer the moments that it had at the end of another round."""
        found = newest_checkpoint(checkpoints, None)
        if found is None:
            raise UserError(f"{checkpoints} has no whole checkpoint; set carry_optimizer=False to begin anew.")
        load_optimizer_state_into(found, self.model, self.optimizer)

    @torch.no_grad()
    def log_probs(self: Any, dataset: PrefixPreferenceDataset, checkpoints: Sequence[Checkpoint]) -> list[np.ndarray]:
        """Log-probs of a data set's responses by several checkpoints, shape ``[N, K]`` each; in place of training."""
        model = self.new_model().eval()
        options = RowOptions(round_length=rounding_of(model.attention_backend))
        loader = StepLoader(self.device, options, num_workers=0)
        found = []
        for checkpoint in checkpoints:
            model.load_weights(checkpoint, self.cfg.seed)
            log_probs = torch.zeros(len(dataset), dataset.num_responses, dtype=torch.float64, device=self.device)
            for step in loader(dataset, plan_of_pass(self.cfg, dataset, model, ranks=this_rank()).epoch()):
                for row in step.rows:
                    row = row.to(self.device)
                    log_probs[row.example_index] = self.forward(model, row).log_probs.double()
            found.append(sum_over_ranks(log_probs).cpu().numpy())
        return found


class SingleDeviceRound(RoundOfTraining, PrefixDPORecipeSingleDevice):
    """A round's training on one device."""


class PrefixDPOOnline:
    """Improves a policy by its own judged answers.

    On several ranks, each samples its share of the prompts, rank 0 judges, and all of them train.

    Args:
        cfg (DictConfig): the keys of ``OnlineConfig``.
        device (torch.device): where models run.
        round_class (type): the recipe of a round. Default: ``SingleDeviceRound``.
        training_keys (type): the config class of that recipe. Default: ``TrainingConfig``.

    Raises:
        ConfigError: if a key asks for something that is not available.
    """

    def __init__(
        self,
        cfg: DictConfig,
        device: torch.device,
        round_class: type[Any] = SingleDeviceRound,
        training_keys: type[TrainingConfig] = TrainingConfig,
    ) -> None:
        if cfg.dataset is not None or cfg.dataset_val is not None:
            raise ConfigError("dataset", "not used: prompts and prompts_val are what a round is made of; remove it")
        if cfg.seed is None:
            raise ConfigError("seed", "required: what is sampled already is known again by it")
        if cfg.ref_checkpointer is not None and cfg.online_reference != "first":
            raise ConfigError("ref_checkpointer", f"not used with online_reference: {cfg.online_reference}; remove it")
        if cfg.ref_model_mixup_alpha > 1:
            raise ConfigError("ref_model_mixup_alpha", f"must be at most 1, but is {cfg.ref_model_mixup_alpha}")
        if cfg.dataset_offline is not None and not OmegaConf.is_dict(cfg.dataset_offline):
            raise ConfigError("dataset_offline", "must be a mapping, such as {data_files: pairs.jsonl, weight: 0.25}")
        weight = 0.5 if cfg.dataset_offline is None else cfg.dataset_offline.get("weight")
        if not isinstance(weight, float) or not 0 < weight < 1:
            problem = f"is {weight}; give the offline data's share of a round's examples, more than 0 and less than 1"
            raise ConfigError("dataset_offline.weight", problem)
        self.cfg, self.device, self.round_class = cfg, device, round_class
        self.training_keys = [field.name for field in fields(training_keys)]
        self.output_dir = Path(cfg.output_dir)
        self.seed = cfg.seed
        self.policies = Policies(cfg, self.directory, self.seed)
        self.tokenizer = instantiate("tokenizer", cfg.tokenizer)
        self.judge = instantiate("judge", cfg.judge)
        self.prompts: list[Prompt] = instantiate("prompts", cfg.prompts, self.tokenizer)
        self.prompts_val: list[Prompt] = instantiate("prompts_val", cfg.prompts_val, self.tokenizer)
        per_round = cfg.prompts_per_round or len(self.prompts)
        if per_round > len(self.prompts):
            raise ConfigError("prompts_per_round", f"is {per_round:,}, but there are {len(self.prompts):,} prompts")
        order = np.random.default_rng([self.seed, 0]).permutation(len(self.prompts))
        # Rounds go through the prompts in one order, and through it again when it is at its end.
        places = [np.arange(k * per_round, (k + 1) * per_round) % len(order) for k in range(cfg.rounds)]
        self.prompts_of = [[self.prompts[i] for i in order[place]] for place in places]

    def run(self) -> None:
        """Every round that is not done yet."""
        cfg = self.cfg
        answered = self.answer_held_out(-1)
        first = before = HeldOut.of_rows(answered)
        metrics = [compare(first, first, first)]
        shown = {"first policy": answered}
        for number in range(cfg.rounds):
            self.train(number)
            answered = self.answer_held_out(number)
            new = HeldOut.of_rows(answered)
            metrics.append(compare(new, before, first) | {"kl": self.kl_to_first(number, answered)})
            if is_rank_zero():
                file = self.directory(number) / "scores.parquet"
                metrics[-1] |= describe_pairs(self.tokenizer, file, cfg.pairs, share_prefix=cfg.share_prefix)
                self.report(number, metrics, {**shown, f"after round {number}": answered})
            if cfg.stop_when_worse and metrics[-1]["score"] < metrics[-2]["score"]:
                log.warning("The judged mean has fallen; round %d was the last (stop_when_worse)", number)
                break
            before = new
        if is_rank_zero():
            print(describe_rounds(metrics))
        log.info("Rounds are in %s, their picture in %s", self.output_dir, self.picture)

    def report(self, number: int, metrics: list[dict[str, float]], policies: dict[str, list[dict[str, Any]]]) -> None:
        """Says what a round has come to: table, picture, answers to be read."""
        cfg = self.cfg
        log.info("Round %d:\n%s", number, describe_rounds(metrics))
        plot_rounds(metrics, f"{component_name(cfg.model)}, judged by {component_name(cfg.judge)}", self.picture)
        write_answers(self.directory(number) / "answers.md", f"Answers after round {number}", policies, cfg.num_shown)
        warn_of_length(metrics[-1])

    @property
    def picture(self) -> Path:
        """Where the picture goes."""
        return self.output_dir / "rounds.png"

    def directory(self, number: int) -> Path:
        """Where a round is; the first policy's held-out answers are in ``first_policy``."""
        directory = self.output_dir / ("first_policy" if number < 0 else f"round_{number}")
        directory.mkdir(parents=True, exist_ok=True)
        return directory

    def training_config(self, number: int) -> DictConfig:
        """The config of a round's training, which any recipe of this package's takes."""
        directory = str(self.directory(number))
        cfg = OmegaConf.masked_copy(self.cfg, self.training_keys)
        cfg.output_dir = cfg.checkpointer.output_dir = directory
        if "log_dir" in cfg.metric_logger:
            cfg.metric_logger.log_dir = f"{directory}/logs"
        sampled = {
            "_component_": "prefix_sharing.online.sampled_preference_dataset",
            "data_files": f"{directory}/scores.parquet",
            "pairs": self.cfg.pairs,
        }
        cfg.seed, cfg.resume = self.seed + number, "auto"
        offline = self.cfg.dataset_offline
        if offline is None:
            cfg.dataset = sampled
        else:
            cfg.dataset = {
                "_component_": "prefix_sharing.datasets.preference_mixture",
                "datasets": [sampled | {"weight": 1 - offline.weight}, offline],
                "seed": cfg.seed,
            }
        return cfg

    def train(self, number: int) -> None:
        """Trains on the judged answers of a round, unless that is done."""
        cfg = self.training_config(number)
        trained = Path(cfg.output_dir) / "trained"  # weights are there before the optimizer's state is
        if broadcast_object(trained.exists()):
            return
        self.sample(number)
        self.judge_answers(self.directory(number))
        recipe = self.round_class(cfg, self.device)
        recipe.answers = self.directory(number) / "scores.parquet"
        recipe.averages = self.cfg.online_reference == "average"
        if number > 0:
            recipe.begins_with, _ = self.policies.after(number - 1)
            recipe.measured_from = self.policies.reference_before(number)
            if self.cfg.carry_optimizer:
                recipe.optimizer_of = self.directory(number - 1) / CHECKPOINTS
        self.policies.forget()  # the recipe has the weights now
        with locked_output_dir(cfg):
            exit_code = run_to_end(recipe)
        if is_rank_zero():
            trained.touch()
        wait_for_all_ranks()
        if exit_code:  # in the last step, or later
            raise SystemExit(exit_code)

    def kl_to_first(self, number: int, answered: list[dict[str, Any]]) -> float:
        """The mean log-ratio of a policy to the first one in nats a token, on its own held-out answers.

        It estimates their KL divergence if answers are sampled at temperature 1 from all tokens.
        """
        file = self.directory(number) / "kl.json"
        if not broadcast_object(file.exists()):
            dataset = dataset_of_answers(answered, f"answers in {self.directory(number)}/held_out")
            cfg = OmegaConf.merge(self.training_config(number), {"compile": False})  # not for a few Rows
            policies = [self.policies.after(number)[0], self.policies.first()]
            by_policy, by_first = self.round_class(cfg, self.device).log_probs(dataset, policies)
            tokens = HeldOut.of_rows(answered).lengths.sum()
            if is_rank_zero():
                complete_file(file, json.dumps({"kl": float((by_policy - by_first).sum() / tokens)}))
            wait_for_all_ranks()
        return json.loads(file.read_text(encoding="utf-8"))["kl"]

    def sample(self, number: int) -> None:
        """Leaves the answers of a round in its ``answers.parquet``."""
        if number >= self.cfg.rounds:
            raise ConfigError("round", f"is {number}, but rounds are {self.cfg.rounds}, counted from 0")
        seed = int(np.random.SeedSequence([self.seed, 1, number]).generate_state(1)[0])
        options = self.sampling_options(self.cfg.num_answers, seed)
        self.answer(self.prompts_of[number], options, number - 1, self.directory(number))

    def answer_held_out(self, number: int) -> list[dict[str, Any]]:
        """The judged answers of a policy to the held-out prompts, with the same random numbers for every policy."""
        options = self.sampling_options(self.cfg.num_answers_val, self.seed)
        where = self.directory(number) / "held_out"
        self.answer(self.prompts_val, options, number, where)
        self.judge_answers(where)
        return read_rows(where / "scores.parquet")

    def judge_answers(self, where: Path) -> None:
        """Leaves the judged answers of a directory in its ``scores.parquet``; on rank 0, for which the others wait."""
        if is_rank_zero():
            judged_answers(self.cfg.judge, self.judge, where)
        wait_for_all_ranks()

    def sampling_options(self, num_answers: int, seed: int) -> SamplingOptions:
        """How a pass samples."""
        cfg = self.cfg
        stop = [*self.tokenizer.stop_tokens]
        for text in cfg.stop or ():
            tokens = self.tokenizer.encode(text, add_bos=False, add_eos=False)
            if len(tokens) != 1:
                raise ConfigError("stop", f"'{text}' is {len(tokens)} tokens; a text that ends an answer must be one")
            stop += tokens
        return SamplingOptions(
            num_answers, cfg.max_new_tokens, cfg.temperature, cfg.top_k, cfg.top_p, tuple(dict.fromkeys(stop)), seed
        )

    def answer(self, prompts: Sequence[Prompt], options: SamplingOptions, after: int, where: Path) -> None:
        """Leaves the answers of the policy after a round in the ``answers.parquet`` of a directory."""
        checkpoint, name = self.policies.after(after)
        directory, dtype = self.policies.directory(after), compute_dtype(self.cfg)
        policy = Policy(self.cfg.model, checkpoint, directory, self.tokenizer, self.device, dtype, self.seed)
        answer_prompts(self.cfg.sampler, policy, name, prompts, options, where)


@parse(OnlineConfig)
def recipe_main(cfg: DictConfig) -> None:
    """Runs the recipe with a config and ``key=value`` overrides."""
    set_up_logging()
    device = set_up_device(cfg)
    with locked_output_dir(cfg), full_disk_explained(cfg):
        PrefixDPOOnline(cfg, device).run()


if __name__ == "__main__":
    recipe_main()

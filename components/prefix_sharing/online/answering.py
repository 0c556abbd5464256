"""Answering prompts into a table, part by part, each rank its share."""

from collections.abc import Sequence
from pathlib import Path

from omegaconf import DictConfig
from tqdm import tqdm

from prefix_sharing.config import instantiate
from prefix_sharing.distributed import broadcast_object, is_rank_zero, this_rank, wait_for_all_ranks
from prefix_sharing.fingerprint import fingerprint
from prefix_sharing.online.tables import RoundTable, in_parts, row_of
from prefix_sharing.sampling import Policy, Prompt, SamplingOptions


def answer_prompts(
    node: DictConfig, policy: Policy, name: str | None, prompts: Sequence[Prompt], options: SamplingOptions, where: Path
) -> None:
    """Samples what is not sampled yet of a directory's ``answers.parquet``; a collective.

    Args:
        node (DictConfig): the config's ``sampler``.
        policy (Policy): whose answers they are.
        name (str | None): a name for the policy's weights, on rank 0.
        prompts (Sequence[Prompt]): the prompts.
        options (SamplingOptions): how to sample.
        where (Path): the directory.

    Raises:
        UserError: if what is there is another policy's, or sampled in another way.
    """
    wait_for_all_ranks()  # the name took rank 0 reading all weights
    keys = [prompt.key for prompt in prompts]
    made_by = {"policy": broadcast_object(name), "prompts": fingerprint(keys), "options": repr(options)}
    answers = RoundTable(where / "answers.parquet", made_by)
    is_whole, done = broadcast_object((answers.is_whole, {row["key"] for row in answers.rows()}))
    if is_whole:
        return
    sampler, ranks = instantiate("sampler", node, policy), this_rank()
    # In parts that depend neither on what is done already nor on the number of ranks: what is computed beside an
    # answer rounds its log-probs.
    longest_first = sorted(prompts, key=lambda prompt: -len(prompt.tokens))
    mine = in_parts(longest_first)[ranks.rank :: ranks.world_size]
    progress = tqdm(total=sum(map(len, mine)), desc=f"Sampling, {where}", unit="prompt", disable=not is_rank_zero())
    for part in mine:
        left = [prompt for prompt in part if prompt.key not in done]
        progress.update(len(part) - len(left))
        rows = []
        try:
            for i, found in sampler(left, options):
                rows.append(row_of(left[i], found, policy.tokenizer))
                progress.update()
        finally:  # what a server gave before it failed is not asked for again
            if rows:
                answers.add(rows)
    progress.close()
    wait_for_all_ranks()
    if is_rank_zero():
        answers.finish(keys)
    wait_for_all_ranks()

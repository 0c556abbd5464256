"""Preference pairs made up on the spot: long prompts, and a task in which the prompt decides which answer is right.

A prompt is a rambling note of about a hundred words in which one word names a place. Both answers are lists of things;
the chosen one lists what is found at that place, the rejected one what is found at another. Which words an answer uses
is no sign of its being right: every place is as often the right one as the wrong one.
"""

import random
from collections.abc import Iterator

import datasets

from prefix_sharing.datasets import PreferenceOptions, PrefixPreferenceDataset, preference_dataset_from_records
from prefix_sharing.datasets.ranking import PairStrategy
from prefix_sharing.errors import ConfigError
from prefix_sharing.tokenizers import ChatTokenizer

PLACES = {
    "kitchen": "bread butter oven salt spoon kettle flour plate onion sugar pepper stove",
    "garden": "rose soil hedge seed spade lawn apple weed fence tulip worm bench",
    "harbour": "boat anchor sail rope wave gull net crane dock lamp tide crab",
    "library": "book shelf page desk novel poem card index chair map scroll ink",
    "workshop": "hammer nail saw plank drill glue file vice wire bolt screw paint",
    "stable": "horse saddle hay bridle hoof stall brush mane straw bucket whip foal",
    "theatre": "stage curtain actor mask script seat drum costume light dance song crowd",
    "railway": "train track signal ticket engine platform guard tunnel coal wheel whistle bridge",
}

FILLER = (
    "the a and of to it was then we they had for long time some other still again there one when after before more "
    "little day morning evening people said came went down over about never always between while almost nothing "
    "under first last old new small great near far"
).split()

PROMPT_WORDS = (80, 120)
ANSWER_WORDS = (8, 16)

_MAX_PAIRS = 1_000_000


def generate_pairs(num_pairs: int, seed: int) -> Iterator[dict[str, str]]:
    """Generates records with ``prompt``, ``chosen`` and ``rejected``.

    Args:
        num_pairs (int): how many.
        seed (int): the same seed gives the same pairs.

    Yields:
        dict[str, str]: one preference pair.
    """
    rng = random.Random(seed)
    for _ in range(num_pairs):
        place, other = rng.sample(sorted(PLACES), 2)
        words = rng.choices(FILLER, k=rng.randint(*PROMPT_WORDS))
        words.insert(rng.randrange(len(words) + 1), place)
        num_things = rng.randint(*ANSWER_WORDS)
        yield {
            "prompt": " ".join(words) + ". What did we find?",
            "chosen": " ".join(rng.choices(PLACES[place].split(), k=num_things)),
            "rejected": " ".join(rng.choices(PLACES[other].split(), k=num_things)),
        }


def preference_pairs(
    tokenizer: ChatTokenizer, *, num_pairs: int, seed: int = 0, pairs: PairStrategy = "best_vs_rest"
) -> PrefixPreferenceDataset:
    """Builds a data set of generated pairs, for a config.

    Args:
        tokenizer (ChatTokenizer): one of torchtune's, or ``prefix_sharing.tokenizers.hf_chat_tokenizer``.
        num_pairs (int): how many pairs.
        seed (int): another seed gives other pairs, so a second one gives a held-out split. Default: 0.
        pairs (PairStrategy): ``best_only`` leaves the chosen answers, for ``NLLLoss``. Default: "best_vs_rest".

    Returns:
        PrefixPreferenceDataset: the tokenized pairs.

    Raises:
        ConfigError: if ``num_pairs`` is not a number of pairs that fits into memory.
    """
    if not 1 <= num_pairs <= _MAX_PAIRS:
        raise ConfigError("num_pairs", f"must be from 1 to {_MAX_PAIRS:,}, but is {num_pairs:,}")
    # By way of a generator, so that datasets writes them to its cache, under a fingerprint of the pairs themselves.
    made = list(generate_pairs(num_pairs, seed))
    records = datasets.Dataset.from_generator(_each, gen_kwargs={"pairs": made})
    options = PreferenceOptions(pairs=pairs)
    return preference_dataset_from_records(records, tokenizer, options, name=f"generated pairs (seed {seed})")


def _each(pairs: list[dict[str, str]]) -> Iterator[dict[str, str]]:
    yield from pairs

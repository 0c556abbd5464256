"""What the online quickstart needs instead of downloads: made-up prompts, and a rule as judge."""

from collections.abc import Sequence

from prefix_sharing.online import make_prompts
from prefix_sharing.quickstart.pairs import generate_pairs
from prefix_sharing.sampling import Prompt
from prefix_sharing.tokenizers import ChatTokenizer, Turn


def prompts(tokenizer: ChatTokenizer, *, num_prompts: int, seed: int = 0) -> list[Prompt]:
    """The prompts of the quickstart's generated pairs, for a config.

    Args:
        tokenizer (ChatTokenizer): the tokenizer.
        num_prompts (int): how many.
        seed (int): another seed gives other prompts. Default: 0.

    Returns:
        list[Prompt]: the prompts.
    """
    conversations: list[list[Turn]] = [
        [{"role": "user", "content": pair["prompt"]}] for pair in generate_pairs(num_prompts, seed)
    ]
    return make_prompts(conversations, tokenizer, f"generated prompts (seed {seed})")


def vowel_rule(turns: Sequence[Turn], answer: str) -> float:
    """The share of an answer's words that begin with a vowel, whatever their number: from 0 to 1.

    Args:
        turns (Sequence[Turn]): the prompt.
        answer (str): the answer.

    Returns:
        float: the score; 0 for an answer without words.
    """
    words = answer.lower().split()
    return sum(word[0] in "aeiou" for word in words) / len(words) if words else 0.0

"""Where the answer begins in a tokenized response."""

import numpy as np

from prefix_sharing.tokenizers import ChatTokenizer, tokenize_turns
from prefix_sharing.trees import Response, common_prefix_length


def header_length(tokenizer: ChatTokenizer) -> int:
    """How many tokens that open an answer are scored with it: torchtune's own tokenizers score the turn's header.

    Args:
        tokenizer (ChatTokenizer): torchtune's or ours.

    Returns:
        int: the number.
    """
    found = []
    for answer in ("a", "b"):
        turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": answer}]
        chat = tokenize_turns(tokenizer, turns, [False, True])
        found.append(np.array(chat.tokens)[np.array(chat.scored)])
    return common_prefix_length(found)


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

"""Prefix sharing without any framework: three responses to one prompt through a plain attention layer.

    python examples/plain_attention.py

The tree of the three is one Row; its log-probs and gradients equal those of three separate sequences.
"""

from collections.abc import Callable

import numpy as np
import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention

from prefix_sharing.attention import mask_builder
from prefix_sharing.scoring import response_log_probs
from prefix_sharing.trees import Response, Row

Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
NUM_HEADS, DIM, VOCAB_SIZE, LONGEST = 4, 32, 50, 16
PROMPT = [7, 3, 9, 4]
ANSWERS = ([11, 5, 2], [11, 6, 8, 2], [20, 2])  # the first two share a token more


class Layer(nn.Module):
    """Embeddings, one layer of attention, and a projection to the vocabulary."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(VOCAB_SIZE, DIM), nn.Embedding(LONGEST, DIM)
        self.qkv, self.out, self.to_logits = nn.Linear(DIM, 3 * DIM), nn.Linear(DIM, DIM), nn.Linear(DIM, VOCAB_SIZE)

    def forward(self, tokens: torch.Tensor, input_pos: torch.Tensor, attend: Attend) -> torch.Tensor:
        """Hidden states ``[s, dim]`` of tokens and positions ``[1, s]``, given a function of q, k and v."""
        x = self.tokens(tokens) + self.positions(input_pos)
        q, k, v = self.qkv(x).unflatten(-1, (3, NUM_HEADS, -1)).permute(2, 0, 3, 1, 4)  # [1, heads, s, head_dim] each
        return (x + self.out(attend(q, k, v).transpose(1, 2).flatten(2)))[0]


def log_probs_of_tree(layer: Layer, responses: list[Response]) -> torch.Tensor:
    """Summed log-probs of all responses, from one Row in which the prompt is computed once."""
    row = Row.from_examples([responses])
    hidden = layer(row.tokens, row.input_pos, mask_builder("chains")(row).attend)  # "flex" on a GPU
    return response_log_probs(layer.to_logits, hidden[row.predictor_index], row, VOCAB_SIZE).log_probs[0]


def causal(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Plain attention."""
    return scaled_dot_product_attention(q, k, v, is_causal=True)


def log_probs_of_sequences(layer: Layer, responses: list[Response]) -> torch.Tensor:
    """The same, one plain sequence at a time."""
    found = []
    for response in responses:
        tokens = torch.from_numpy(response.tokens)
        hidden = layer(tokens[None], torch.arange(len(tokens))[None], causal)
        log_probs = layer.to_logits(hidden[:-1]).log_softmax(-1).gather(1, tokens[1:, None])[:, 0]
        found.append(log_probs[torch.from_numpy(response.scored[1:])].sum())
    return torch.stack(found)


def main() -> None:
    """Compares the two, gradients included."""
    torch.manual_seed(0)
    layer = Layer().double()
    responses = [
        Response(np.array(PROMPT + answer), np.repeat([False, True], [len(PROMPT), len(answer)])) for answer in ANSWERS
    ]
    results = []
    for log_probs_of in (log_probs_of_tree, log_probs_of_sequences):
        log_probs = log_probs_of(layer, responses)
        results.append([log_probs, *torch.autograd.grad(log_probs.sum(), list(layer.parameters()))])
    torch.testing.assert_close(*results, rtol=1e-10, atol=1e-12)
    row = Row.from_examples([responses])
    print(f"{row.num_tokens} tokens instead of {row.paired_tokens}, the same log-probs: {results[0][0].tolist()}")


if __name__ == "__main__":
    main()

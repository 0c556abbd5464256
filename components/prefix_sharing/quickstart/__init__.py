"""What the quickstart needs instead of downloads: made-up pairs, a small tokenizer, and random weights."""

from prefix_sharing.quickstart.checkpointer import random_checkpointer, tokenizer
from prefix_sharing.quickstart.pairs import preference_pairs

__all__ = ["preference_pairs", "random_checkpointer", "tokenizer"]

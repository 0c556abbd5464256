"""A base model's directory, and which of its files belong to what is trained of it, too: no other file is copied."""

from pathlib import Path

from omegaconf import DictConfig

_TOKENIZER = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab*",
    "merges.txt",
    "*.model",
    "*.jinja",
    "chat_template.json",
)
_COMPANIONS = (*_TOKENIZER, "generation_config.json", "LICENSE*", "NOTICE*")


def base_directory(node: DictConfig) -> Path | None:
    """Where a base model is.

    Args:
        node (DictConfig): the config's ``checkpointer``.

    Returns:
        Path | None: its directory, or its name on the hub; None if its weights are in no file.
    """
    where = node.get("path") or node.get("checkpoint_dir")
    return None if where is None else Path(where)


def is_companion(file: Path) -> bool:
    """Whether a file says how text becomes tokens, how to generate, or under which licence, going by its name."""
    return any(file.match(pattern) for pattern in _COMPANIONS)


def is_of_tokenizer(file: Path) -> bool:
    """Whether a file says how text becomes tokens, chat templates included, going by its name."""
    return any(file.match(pattern) for pattern in _TOKENIZER)

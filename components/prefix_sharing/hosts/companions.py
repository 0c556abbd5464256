"""Which files of a base model's directory belong to what is trained of it, too: no other file is copied."""

from pathlib import Path

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


def is_companion(file: Path) -> bool:
    """Whether a file says how text becomes tokens, how to generate, or under which licence, going by its name."""
    return any(file.match(pattern) for pattern in _COMPANIONS)


def is_of_tokenizer(file: Path) -> bool:
    """Whether a file says how text becomes tokens, chat templates included, going by its name."""
    return any(file.match(pattern) for pattern in _TOKENIZER)

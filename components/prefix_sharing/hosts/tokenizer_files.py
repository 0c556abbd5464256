"""The tokenizer of a model on disk: that of the base, and the one that is saved with what is trained of it."""

import shutil
from pathlib import Path
from typing import Any

from omegaconf import DictConfig
from tokenizers import Tokenizer

from prefix_sharing.errors import ConfigError
from prefix_sharing.hosts.companions import base_directory, is_of_tokenizer
from prefix_sharing.tokenizers import HFChatTokenizer

_LEAST_IN_COMMON = 0.9
"""Share of a base model's tokens that mean the same to its tokenizer; a few may have been renamed for a template."""


def check_tokenizer(cfg: DictConfig, tokenizer: Any) -> None:
    """Refuses a tokenizer whose ids mean other tokens than those that the base model has learned.

    Args:
        cfg (DictConfig): the run's config.
        tokenizer (Any): what its ``tokenizer`` builds; only Hugging Face's can be compared.

    Raises:
        ConfigError: if so.
    """
    base = base_directory(cfg.checkpointer)
    if base is None or not isinstance(tokenizer, HFChatTokenizer) or not (base / "tokenizer.json").is_file():
        return
    if base.resolve() == Path(tokenizer.path).resolve():
        return
    learned = Tokenizer.from_file(str(base / "tokenizer.json")).get_vocab()
    used = tokenizer.vocab
    same = sum(used.get(token) == i for token, i in learned.items()) / max(1, len(learned))
    if same < _LEAST_IN_COMMON:
        problem = (
            f"{tokenizer.path} is not the tokenizer that the model in {base} was trained with: {same:.0%} of its "
            "tokens have the same id; set it to the model's directory"
        )
        raise ConfigError("tokenizer.path", problem)


def replace_tokenizer(cfg: DictConfig, epoch_dir: Path) -> None:
    """Puts the tokenizer that a model was trained with, and its chat template, in the place of the base's.

    Args:
        cfg (DictConfig): the run's config; where its ``tokenizer`` has no directory of its own, the base's stays.
        epoch_dir (Path): what was saved after an epoch.
    """
    base, path = base_directory(cfg.checkpointer), cfg.tokenizer.get("path")
    if base is None or not isinstance(path, str) or not Path(path).is_dir() or base.resolve() == Path(path).resolve():
        return
    for file in _files_of(epoch_dir):
        file.unlink()
    for file in _files_of(Path(path)):
        shutil.copyfile(file, epoch_dir / file.name)


def _files_of(directory: Path) -> list[Path]:
    return [file for file in directory.iterdir() if file.is_file() and is_of_tokenizer(file)]

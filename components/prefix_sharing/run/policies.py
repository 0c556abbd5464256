"""The policies of an online run: the one that each round begins with, and what its rewards are measured from."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from prefix_sharing.checkpoint import Checkpoint
from prefix_sharing.distributed import broadcast_object, is_rank_zero
from prefix_sharing.fingerprint import fingerprint
from prefix_sharing.hosts import load_checkpoint, load_trained_checkpoint, merged_weights, read_weight_file
from prefix_sharing.hosts.companions import base_directory
from prefix_sharing.online.average import WEIGHTS, write_average


class Policies:
    """Reads the policies of a run, which are in its rounds' directories.

    Args:
        cfg (DictConfig): the run's config.
        directory_of (Callable[[int], Path]): a round's directory.
        seed (int): the run's, which decides a fresh adapter.
    """

    def __init__(self, cfg: DictConfig, directory_of: Callable[[int], Path], seed: int) -> None:
        self.cfg, self.directory_of, self.seed = cfg, directory_of, seed
        self._read: tuple[int, Checkpoint, str | None] | None = None

    def directory(self, number: int) -> Path | None:
        """Where the policy after a round is; None if the run begins with one that is in no file."""
        if number >= 0:
            return self.directory_of(number) / f"epoch_{self.cfg.epochs - 1}"
        return base_directory(self.cfg.checkpointer)

    def first(self) -> Checkpoint:
        """Reads the policy that the run begins with."""
        return load_checkpoint("checkpointer", self.cfg.checkpointer, adapter=self.cfg.adapter_checkpoint)[1]

    def after(self, number: int) -> tuple[Checkpoint, str | None]:
        """The policy after a round, -1 for the first one, and its name on rank 0; read once while it is the same."""
        if self._read is None or self._read[0] != number:
            self.forget()  # two of them need not fit into memory
            if number < 0:
                checkpoint = self.first()
            else:
                plain: Any = OmegaConf.to_container(self.cfg.checkpointer, resolve=True)
                node = OmegaConf.create(plain | {"output_dir": str(self.directory_of(number))})
                checkpoint = load_trained_checkpoint("checkpointer", node, epoch=self.cfg.epochs - 1)
            # rank 0 may have the weights alone
            name = fingerprint([checkpoint.fingerprint, self.seed]) if is_rank_zero() else None
            self._read = number, checkpoint, name
        return self._read[1:]

    def forget(self) -> None:
        """Makes room for whoever has the weights now."""
        self._read = None

    def reference_before(self, number: int) -> Checkpoint | None:
        """What a later round's rewards are measured from; a collective.

        Args:
            number (int): the round, from 1.

        Returns:
            Checkpoint | None: None for the policy that the round begins with, or what the config says.
        """
        cfg = self.cfg
        if cfg.online_reference == "previous" or cfg.ref_checkpointer is not None:
            return None
        if cfg.online_reference == "first":
            return self.first()
        averages = [self.directory_of(k) / f"reference_{cfg.ref_model_mixup_alpha:g}" for k in range(number)]
        last = broadcast_object(max((k for k in range(number) if averages[k].is_dir()), default=-1))
        reference = self.first() if last < 0 else read_weight_file(cfg.checkpointer, averages[last] / WEIGHTS)
        for k in range(last + 1, number):
            both = (reference, self.after(k)[0])
            weights = [merged_weights(cfg.model, checkpoint) if is_rank_zero() else {} for checkpoint in both]
            write_average(weights[0], weights[1], cfg.ref_model_mixup_alpha, averages[k])
            reference = read_weight_file(cfg.checkpointer, averages[k] / WEIGHTS)
        return reference

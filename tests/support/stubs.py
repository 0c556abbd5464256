"""Components for configs in tests."""

from omegaconf import OmegaConf
from torchtune import config, training


class StubCheckpointer:
    """The weights of a small model, and nothing written."""

    def __init__(self, model, **kwargs):
        self._weights = config.instantiate(OmegaConf.create(model)).state_dict()

    def load_checkpoint(self):
        return {training.MODEL_KEY: dict(self._weights)}

    def save_checkpoint(self, *args, **kwargs):
        pass


class LossOfAnotherKind:
    """Not a ``prefix_sharing.losses.Loss``."""


def annotated_for_type_checkers(size: "OnlyForTypeCheckers"):  # noqa: F821
    pass

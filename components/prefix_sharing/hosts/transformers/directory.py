"""A model by its directory alone: what transformers saves, for the keys ``model`` and ``checkpointer`` of a config."""

import shutil
from pathlib import Path
from typing import Any

import torch
from torchtune import training
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from prefix_sharing.errors import ConfigError, UserError

_DTYPES = {None: torch.float32, "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

_STATE_FILE = Path("recipe_state") / "recipe_state.pt"

_NOT_COPIED = ("config.json", "*.index.json", "*.safetensors", "*.bin")
"""What an epoch's directory has of its own."""


def causal_lm(path: str) -> PreTrainedModel:
    """Builds a decoder of transformers from its directory, without weights, for a config.

    Args:
        path (str): directory with ``config.json``, or a name on the hub.

    Returns:
        PreTrainedModel: with fp32 weights, on the device that is torch's default just now.

    Raises:
        UserError: if there is no such model.

    Example:
        .. code-block:: yaml

            model:
              _component_: prefix_sharing.hosts.transformers.causal_lm
              path: /tmp/Qwen3-0.6B
    """
    return AutoModelForCausalLM.from_config(_read_config(path), dtype=torch.float32)


def _read_config(path: str) -> Any:
    if not Path(path).is_dir() and path.startswith(("/", ".", "~")):
        raise UserError(f"{path} not found; it must be a directory of a model, or a name on the hub.")
    if Path(path).is_dir() and not (Path(path) / "config.json").is_file():
        raise UserError(f"{path} has no config.json; it must be a directory of a model as transformers saves it.")
    try:
        config = AutoConfig.from_pretrained(path)
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is no model of transformers: {' '.join(str(error).split())[:300]}") from error
    return config


def checkpointer(
    path: str,
    output_dir: str,
    *,
    save_dtype: str | None = None,
    checkpoint_files: list[str] | None = None,
    should_load_recipe_state: bool = False,
) -> "DirectoryCheckpointer":
    """Reads and writes directories of models as transformers has them, for a config.

    Args:
        path (str): directory of the model to start from, or its name on the hub.
        output_dir (str): each epoch's model goes to ``epoch_<n>`` below it.
        save_dtype (str | None): dtype of the weights that are written, ``fp32``, ``bf16`` or ``fp16``. Default: None,
            fp32, in which they are trained.
        checkpoint_files (list[str] | None): weights of an epoch to read instead, when a run resumes.
        should_load_recipe_state (bool): whether to read the training state as well. Default: False.

    Returns:
        DirectoryCheckpointer: with torchtune's interface.

    Example:
        .. code-block:: yaml

            checkpointer:
              _component_: prefix_sharing.hosts.transformers.checkpointer
              path: /tmp/Qwen3-0.6B
              output_dir: /tmp/prefix_dpo_qwen3
    """
    return DirectoryCheckpointer(path, Path(output_dir), save_dtype, checkpoint_files, should_load_recipe_state)


class DirectoryCheckpointer:
    """See ``checkpointer``; what it returns and takes has torchtune's keys."""

    def __init__(
        self,
        path: str,
        output_dir: Path,
        save_dtype: str | None,
        checkpoint_files: list[str] | None,
        should_load_recipe_state: bool,
    ) -> None:
        self._base = path
        self._output_dir = output_dir
        if save_dtype not in _DTYPES:
            raise ConfigError("save_dtype", f"must be one of {', '.join(filter(None, _DTYPES))}, not {save_dtype}")
        self._dtype = _DTYPES[save_dtype]
        self._source = path
        if checkpoint_files:
            self._source = str((output_dir / checkpoint_files[0]).parent)
        self._loads_state = should_load_recipe_state

    def load_checkpoint(self) -> dict[str, Any]:
        """The weights as transformers loads them, by the model's own names, and training state if asked for."""
        _read_config(self._source)
        model = AutoModelForCausalLM.from_pretrained(self._source, dtype="auto")
        content: dict[str, Any] = {training.MODEL_KEY: model.state_dict()}
        if self._loads_state:
            content |= torch.load(self._output_dir / _STATE_FILE, map_location="cpu", weights_only=True)
        return content

    def save_checkpoint(
        self, state_dict: dict[str, Any], epoch: int, intermediate_checkpoint: bool = False, adapter_only: bool = False
    ) -> None:
        """Writes a complete directory, by transformers' own ``save_pretrained``, and what it takes to continue.

        Args:
            state_dict (dict[str, Any]): weights and training state.
            epoch (int): the epoch that is finished, from 0.
            intermediate_checkpoint (bool): whether training goes on. Default: False.
            adapter_only (bool): not supported. Default: False.
        """
        epoch_dir = self._output_dir / f"epoch_{epoch}"
        config = _read_config(self._base)
        config.dtype = self._dtype
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, dtype=self._dtype)
        weights = {name: tensor.to(self._dtype) for name, tensor in state_dict[training.MODEL_KEY].items()}
        model.save_pretrained(epoch_dir, state_dict=weights)
        if Path(self._base).is_dir():
            # Tokenizer, chat template, settings of generation and whatever else belongs to the model.
            for file in Path(self._base).iterdir():
                if file.is_file() and not any(file.match(pattern) for pattern in _NOT_COPIED):
                    shutil.copy2(file, epoch_dir)
        if intermediate_checkpoint:
            state = {name: value for name, value in state_dict.items() if name != training.MODEL_KEY}
            state_file = self._output_dir / _STATE_FILE
            state_file.parent.mkdir(parents=True, exist_ok=True)
            torch.save(state, state_file)

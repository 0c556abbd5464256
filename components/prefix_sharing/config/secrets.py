"""Configs without their passwords, keys and tokens, for whatever is logged or saved."""

import re
from typing import Any

from omegaconf import DictConfig, OmegaConf

MASK = "***"
"""What stands in a logged config for a secret."""

_SECRET = re.compile(r"(.*_)?(api)?(token|key|password|passwd|passphrase|secret|secrets|credentials|authorization)")
_SPECIAL_TOKEN = re.compile(r"(bos|eos|pad|unk|cls|sep|mask|sot|eot|eom|image)_token")

_REFERENCE = re.compile(r"\$\{[^{},]*\}")
"""A reference to an environment variable or another key, without a default, which might be a secret itself."""

_ENVIRONMENT = re.compile(r"\$\{oc\.env:\s*(\w+)")


def without_secrets(cfg: DictConfig, *, keep_references: bool = False) -> DictConfig:
    """A config in which ``***`` stands for the values of keys such as ``api_key``, ``token`` or ``password``.

    Args:
        cfg (DictConfig): the config, which stays as it is.
        keep_references (bool): whether to leave what names a secret but is none, such as ``${oc.env:HF_TOKEN}``: for a
            file, which is not resolved. Default: False.

    Returns:
        DictConfig: its other values are those of the config, references unresolved.
    """

    def masked(value: Any, secret: bool) -> Any:
        if isinstance(value, dict):
            return {key: masked(part, secret or _is_secret(str(key))) for key, part in value.items()}
        if isinstance(value, list):
            return [masked(part, secret) for part in value]
        if value is None or isinstance(value, bool):
            return value
        if keep_references and isinstance(value, str) and _REFERENCE.fullmatch(value):
            return value
        named = _ENVIRONMENT.findall(value) if isinstance(value, str) else []
        return MASK if secret or any(map(_is_secret, named)) else value

    plain: Any = OmegaConf.to_container(cfg, resolve=False)
    return OmegaConf.create(masked(plain, False))


def _is_secret(key: str) -> bool:
    words = re.sub(r"(?<=[a-z])(?=[A-Z])|-", "_", key).lower()
    return _SECRET.fullmatch(words) is not None and _SPECIAL_TOKEN.fullmatch(words) is None

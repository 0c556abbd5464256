"""Defaults that depend on the machine."""

from pathlib import Path


def default_cache_dir() -> str:
    """Where reference log-probs are kept unless the config says otherwise: next to the cache of ``datasets``."""
    import datasets  # takes a second to import

    return str(Path(datasets.config.HF_DATASETS_CACHE).parent / "prefix_sharing_reference")

"""Log-probs under the reference: from the cache, from a pass before the first update, or from a frozen model."""

from prefix_sharing.reference.cache import ReferenceCache, describe_cache
from prefix_sharing.reference.log_probs import (
    FrozenReference,
    KnownReference,
    Reference,
    load_reference,
    open_reference_cache,
    reference_log_probs,
    set_up_reference,
)

__all__ = [
    "FrozenReference",
    "KnownReference",
    "Reference",
    "ReferenceCache",
    "describe_cache",
    "load_reference",
    "open_reference_cache",
    "reference_log_probs",
    "set_up_reference",
]

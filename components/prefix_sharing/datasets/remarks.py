"""What is said of a data set once it is tokenized: what was malformed, not used, lost or cut."""

import logging
from collections import Counter
from collections.abc import Collection

import datasets
import numpy as np

from prefix_sharing.datasets.dataset import PrefixPreferenceDataset
from prefix_sharing.datasets.source import Records
from prefix_sharing.datasets.table import MALFORMED
from prefix_sharing.errors import UserError

log = logging.getLogger(__name__)

_SHOWN = 3
"""How many records a message names."""


def check_malformed(tokenized: datasets.Dataset, records: Records, max_malformed: float) -> None:
    """Names the first malformed records, and stops where there are too many.

    Args:
        tokenized (datasets.Dataset): a table with the columns of ``FEATURES``.
        records (Records): what it was made of.
        max_malformed (float): share that may be.

    Raises:
        UserError: if more are.
    """
    malformed = np.flatnonzero(np.asarray(tokenized.data.column("dropped").to_pylist(), dtype=object) == MALFORMED)
    if len(malformed) == 0:
        return
    shown = [f"{records.describe(int(i))}: {tokenized[int(i)]['problem']}" for i in malformed[:_SHOWN]]
    count = f"{len(malformed):,} of {len(tokenized):,} records of {records.name} are malformed"
    if len(malformed) > max_malformed * len(tokenized):
        raise UserError(f"{count}, more than max_malformed: {max_malformed:g} allows; the first is {shown[0]}.")
    log.warning("%s and dropped. The first: %s", count, "; ".join(shown))


def log_remarks(dataset: PrefixPreferenceDataset, records: Records, chosen_by: Collection[str] = ()) -> None:
    """Logs what was not used as it is, each in a line.

    Args:
        dataset (PrefixPreferenceDataset): the data set.
        records (Records): what it was made of.
        chosen_by (Collection[str]): columns that were read to choose among the records. Default: (), none.
    """
    tokenized = dataset.tokenized
    unused = Counter(name for names in tokenized.data.column("unused").to_pylist() for name in names)
    for column in chosen_by:
        unused.pop(f"column {column}", None)
    if unused:
        log.info("%s: not used: %s", dataset.name, ", ".join(f"{name} ({n:,} records)" for name, n in unused.items()))
    prompts, dropped = (
        np.asarray(tokenized.data.column(name).to_pylist(), dtype=object) for name in ("prompt", "dropped")
    )
    several = np.flatnonzero((prompts == "") & (dropped == ""))
    if len(several):
        log.info(
            "%s: in %s records the answers are to different prompts, such as %s; only what these have in common is "
            "shared",
            dataset.name,
            f"{len(several):,}",
            "; ".join(records.describe(int(i)) for i in several[:_SHOWN]),
        )
    lost = np.flatnonzero(tokenized.data.column("lost_text").to_numpy())
    if len(lost):
        log.warning(
            "%s: the chat template leaves out text of the answers of %s records, such as %s; if that is reasoning, see "
            "whether chat_template_kwargs or another template keeps it",
            dataset.name,
            f"{len(lost):,}",
            "; ".join(records.describe(int(i)) for i in lost[:_SHOWN]),
        )
    if dataset.num_without_end:
        log.warning(
            "%s: %s of %s responses have no token behind the answer that ends it, so a model trained on them does not "
            "learn to stop; the chat template should end an assistant's turn with a special token",
            dataset.name,
            f"{dataset.num_without_end:,}",
            f"{int(dataset.num_responses_of.sum()):,}",
        )

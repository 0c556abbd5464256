"""The preference data set: tokenized examples, memory-mapped by ``datasets``, with what is known of each."""

import copy
from collections import Counter

import datasets
import numpy as np
import pyarrow.compute as pc
from torch.utils.data import Dataset

from prefix_sharing.datasets.choosing import RecordReader
from prefix_sharing.datasets.table import FEATURES, MERGED, NOT_DRAWN
from prefix_sharing.errors import UserError
from prefix_sharing.trees import Response, TreeSize, TreeSizes

_NOT_IN_MEMORY = ("tokens", "scored", "pairs", "labels", "scores", "unused", "problem")


class PrefixPreferenceDataset(Dataset):
    """Tokenized examples, each with its K response sequences and the pairs they are compared by.

    Args:
        tokenized (datasets.Dataset): what tokenizing made of every record, dropped ones included; its columns are
            ``prefix_sharing.datasets.table.FEATURES``.
        name (str): where the records come from, for messages.
        left_out (np.ndarray | None): why a record is left out that is not dropped already, "" where it is not, shape
            ``[records]``. Default: None, none is.
        reader (RecordReader | None): reads the records again, for a mixture that chooses among them. Default: None.

    Attributes:
        tokenized (datasets.Dataset): as given.
        name (str): where the records come from.
        reader (RecordReader | None): as given.
        num_records (int): records read.
        reasons (np.ndarray): why each record is not used, "" where it is, shape ``[records]``.
        dropped (dict[str, int]): records not used, by reason.
        num_merged (int): records used as part of another example.
        num_responses (int): K, the most that an example has.
        num_responses_of (np.ndarray): responses of each example, shape ``[N]``.
        longest (int): tokens in the longest response sequence.
        largest_id (int): largest token id.
        num_pairs (np.ndarray): pairs of each example, shape ``[N]``.
        num_cut (int): responses that lost their end to ``max_seq_len``.
        num_prompts_cut (int): examples whose prompt lost its beginning to ``max_prompt_length``.
        num_without_end (int): responses without a scored token that ends the answer.
        num_labels (np.ndarray): responses of each example with a label, desirable or undesirable, shape ``[N]``.
        num_scored (np.ndarray): scored tokens of each example, over its responses, shape ``[N]``.
        record_index (np.ndarray): index of the record that each example is made of, shape ``[N]``.
        ids (pyarrow.Array): fingerprint of each example's tokens and of which are scored, shape ``[N]``.

    Raises:
        UserError: if there is no example.
    """

    def __init__(
        self,
        tokenized: datasets.Dataset,
        name: str,
        *,
        left_out: np.ndarray | None = None,
        reader: RecordReader | None = None,
    ) -> None:
        self.name = name
        self.reader = reader
        self._left_out = left_out
        self._set_table(tokenized)

    def with_table(self, tokenized: datasets.Dataset) -> "PrefixPreferenceDataset":
        """The same records, made into other examples.

        Args:
            tokenized (datasets.Dataset): a line for each of them.

        Returns:
            PrefixPreferenceDataset: another data set.
        """
        changed = copy.copy(self)
        changed._set_table(tokenized)
        return changed

    def subset(self, examples: np.ndarray) -> "PrefixPreferenceDataset":
        """Some of the examples.

        Args:
            examples (np.ndarray): indices of those to take.

        Returns:
            PrefixPreferenceDataset: another data set; the others count as dropped.
        """
        left_out = np.full(len(self), NOT_DRAWN, dtype=object)
        left_out[examples] = ""
        changed = copy.copy(self)
        changed._left_out = self.leaving_out(left_out)
        changed._set_table(self.tokenized)
        return changed

    def leaving_out(self, left_out: np.ndarray) -> np.ndarray:
        """Why each record is not used if some of the examples are left out, and with them what was merged into them.

        Args:
            left_out (np.ndarray): why each example is left out, "" where it is not, shape ``[N]``.

        Returns:
            np.ndarray: as ``reasons``, shape ``[records]``.
        """
        reasons = self.reasons.copy()
        reasons[self.record_index] = left_out
        if self.num_merged:
            prompts = self.tokenized.data.column("prompt").to_pylist()
            of_prompt: dict[str, str] = {}
            # An example comes before what was merged into it; in a mixture, another one of its prompt may follow.
            for i in np.flatnonzero((self.reasons == "") | (self.reasons == MERGED)):
                if self.reasons[i] == "":
                    of_prompt[prompts[i]] = reasons[i]
                else:
                    reasons[i] = of_prompt[prompts[i]] or MERGED
        return reasons

    def _set_table(self, tokenized: datasets.Dataset) -> None:
        name = self.name
        self.tokenized = tokenized
        self.num_records = len(tokenized)
        reasons = np.asarray(tokenized.data.column("dropped").to_pylist(), dtype=object)
        if self._left_out is not None:
            is_free = (self._left_out != "") & ((reasons == "") | (reasons == MERGED))
            reasons = np.where(is_free, self._left_out, reasons)
        counts = Counter(reasons.tolist())
        self.num_merged = counts.pop(MERGED, 0)
        self.dropped = {reason: n for reason, n in sorted(counts.items()) if reason}
        self.reasons = reasons
        used = np.flatnonzero(reasons == "")
        if len(used) == 0:
            why = f" (dropped by reason: {self._describe_drops()})" if self.dropped else ""
            raise UserError(f"{name} has no usable example{why}.")
        # Everything but the tokens, which stay on disk.
        columns = tokenized.data.table.select([c for c in FEATURES if c not in _NOT_IN_MEMORY])
        if len(used) < len(tokenized):
            columns, tokenized = columns.take(used), tokenized.select(used)
        self.record_index = used
        self.num_responses_of = columns.column("num_responses").to_numpy()
        self.num_responses = int(self.num_responses_of.max())
        self.longest = pc.max(columns.column("longest")).as_py()
        self.largest_id = pc.max(columns.column("largest_id")).as_py()
        self.num_pairs = columns.column("num_pairs").to_numpy()
        self.num_labels = columns.column("num_labels").to_numpy()
        self.num_scored = columns.column("num_scored").to_numpy()
        self.num_cut = pc.sum(columns.column("num_cut")).as_py()
        self.num_prompts_cut = pc.sum(columns.column("prompt_cut")).as_py()
        self.num_without_end = pc.sum(columns.column("num_without_end")).as_py()
        self.ids = columns.column("id").combine_chunks()
        self._sizes = {
            share_prefix: TreeSizes(*(columns.column(f"{layout}_{field}").to_numpy() for field in TreeSize._fields))
            for share_prefix, layout in ((True, "tree"), (False, "paired"))
        }
        self._examples = tokenized.select_columns(["tokens", "scored"]).with_format("numpy")
        self._pairs = tokenized.select_columns(["pairs"]).with_format("numpy")
        self._labels = tokenized.select_columns(["labels"]).with_format("numpy")

    def __len__(self) -> int:
        return len(self._examples)

    def __getitem__(self, index: int) -> list[Response]:
        """The K response sequences of an example, best first unless it was merged of several."""
        example = self._examples[index]
        return [
            Response(np.asarray(tokens, dtype=np.int64), np.asarray(scored, dtype=bool))
            for tokens, scored in zip(example["tokens"], example["scored"], strict=True)
        ]

    def pairs(self, index: int) -> np.ndarray:
        """Chosen and rejected response of each pair of an example, shape ``[pairs, 2]``."""
        return np.asarray(self._pairs[index]["pairs"], dtype=np.int64).reshape(-1, 2)

    def labels(self, index: int) -> np.ndarray:
        """The label of each response of an example, see ``Row.labels``; of none if none has one."""
        return np.asarray(self._labels[index]["labels"], dtype=np.int64)

    def num_terms(self, mean_over: str) -> np.ndarray:
        """How many terms each example has of what a loss is the mean over, see ``Loss.mean_over``, shape ``[N]``."""
        counts = {
            "pairs": self.num_pairs,
            "examples": np.ones_like(self.num_pairs),
            "tokens": self.num_scored,
            "responses": self.num_labels,
        }
        return counts[mean_over]

    def describe(self, index: int) -> str:
        """Where an example comes from, for messages."""
        if self.reader is not None and self.reader.records.origin is not None:
            return self.reader.records.describe(int(self.record_index[index]))
        return f"record {self.record_index[index]} of the split of {self.name}"

    def sizes(self, share_prefix: bool = True) -> TreeSizes:
        """The size of each example's tree.

        Args:
            share_prefix (bool): False lays every response out on its own. Default: True.

        Returns:
            TreeSizes: arrays of shape ``[N]``.
        """
        return self._sizes[share_prefix]

    def _describe_drops(self) -> str:
        return ", ".join(f"{reason}: {n:,}" for reason, n in self.dropped.items())

    def __repr__(self) -> str:
        drops = f" ({self._describe_drops()})" if self.dropped else ""
        used = f"{len(self) + self.num_merged:,} used"
        if self.num_merged:
            used += f" (merged into {len(self):,} examples)"
        cut = ""
        if self.num_cut:
            cut = f"; {self.num_cut:,} of {int(self.num_responses_of.sum()):,} responses lost their end to max_seq_len"
        if self.num_prompts_cut:
            cut += f"; {self.num_prompts_cut:,} prompts lost their beginning to max_prompt_length"
        return (
            f"{self.name}: {self.num_records:,} records = {used} + {sum(self.dropped.values()):,} dropped{drops}{cut}"
        )

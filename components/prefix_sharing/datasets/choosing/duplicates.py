"""Records that say what an earlier one says: exactly, or nearly by the Jaccard similarity of their n-grams of words.

Near duplicates are found with MinHash and banding (Broder 1997; Leskovec, Rajaraman and Ullman, Mining of Massive
Datasets, chapter 3): records whose signatures agree in one band are candidates, and the similarity of every candidate
is then computed exactly. So nothing below the threshold is dropped, and little above it is missed.
"""

import functools
import itertools
import json
import logging
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

import datasets
import numpy as np
import xxhash
from tqdm import tqdm

from prefix_sharing.datasets.choosing.candidates import Candidates, cached, column_of, turns_of
from prefix_sharing.datasets.tokenizing import belong_to_map, processes_for
from prefix_sharing.errors import ConfigError
from prefix_sharing.fingerprint import code_fingerprint

log = logging.getLogger(__name__)

DUPLICATE = "duplicate"
"""In ``dropped`` where a record says what an earlier one says."""

Over = Literal["prompt", "prompt_and_answers"]

_MISSED = 0.01
"""Share of the pairs that are just as similar as the threshold which may share no band."""

_CJK = "\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af"
_WORD = re.compile(f"[{_CJK}]|[^\\W{_CJK}]+")
"""A word, or a character of a language that is written without spaces."""


@dataclass(frozen=True)
class Exact:
    """``deduplicate: {method: exact}``: the same text, and the same roles of the turns.

    Attributes:
        over (Over): what has to be the same: ``prompt``, or ``prompt_and_answers``. Default: "prompt".
    """

    over: Over = "prompt"

    def __post_init__(self) -> None:
        _check_over(self.over)

    def find(self, read: datasets.Dataset) -> np.ndarray:
        """The first line that says what a line says, which may be itself, shape ``[n]``."""
        names = ["prompt_key"] if self.over == "prompt" else ["prompt_key", "answers_key"]
        first: dict[bytes, int] = {}
        found = np.empty(len(read), dtype=np.int64)
        line = 0
        for batch in read.select_columns(names).with_format("arrow").iter(10_000):
            for values in zip(*(batch.column(name).to_pylist() for name in names), strict=True):
                found[line] = first.setdefault(xxhash.xxh3_128_digest(repr(values).encode()), line)
                line += 1
        return found


@dataclass(frozen=True)
class MinHash:
    """``deduplicate: {method: minhash}``: similar words in a similar order.

    Attributes:
        over (Over): what has to be similar: ``prompt``, or ``prompt_and_answers``. Default: "prompt".
        threshold (float): the Jaccard similarity of two records' n-grams from which they are duplicates. Default: 0.8.
        num_perm (int): numbers in a signature. Default: 128.
        ngram_size (int): words in an n-gram. Default: 3.
    """

    over: Over = "prompt"
    threshold: float = 0.8
    num_perm: int = 128
    ngram_size: int = 3

    def __post_init__(self) -> None:
        _check_over(self.over)
        if not 0 < self.threshold <= 1:
            raise ConfigError("threshold", f"must be above 0 and at most 1, but is {self.threshold}")
        if self.num_perm < 2:
            raise ConfigError("num_perm", f"must be at least 2, but is {self.num_perm}")
        if (1 - self.threshold) ** self.num_perm > _MISSED:
            problem = f"is too low for a threshold of {self.threshold}: more than 1 % of such pairs would be missed"
            raise ConfigError("num_perm", problem)
        if self.ngram_size < 1:
            raise ConfigError("ngram_size", f"must be at least 1, but is {self.ngram_size}")
        try:
            import datasketch  # noqa: F401
        except ImportError as error:
            problem = "minhash needs datasketch: pip install 'torchtune-prefix-sharing[data]'"
            raise ConfigError("method", problem) from error

    def bands(self) -> tuple[int, int]:
        """How many bands a signature has, and numbers in each: as many as miss few pairs at the threshold."""
        for rows in range(self.num_perm, 1, -1):
            bands = self.num_perm // rows
            if (1 - self.threshold**rows) ** bands <= _MISSED:
                return bands, rows
        return self.num_perm, 1

    def ngrams(self, text: str) -> frozenset[str]:
        """The n-grams of a text without case and punctuation; all of it as one where it has fewer words."""
        words = _WORD.findall(text.lower())
        n = self.ngram_size
        if not words:
            return frozenset([text])
        return frozenset(" ".join(words[i : i + n]) for i in range(max(1, len(words) - n + 1)))

    def find(self, read: datasets.Dataset) -> np.ndarray:
        """The first line that is kept and similar to a line, which may be itself, shape ``[n]``."""
        bands, _ = self.bands()
        names = ["prompt", "answers"]
        banded = read.select_columns(names).map(
            _Bands(self, code_fingerprint("datasets")),
            batched=True,
            remove_columns=names,
            features=datasets.Features({"bands": datasets.Sequence(datasets.Value("uint64"), length=bands)}),
            num_proc=processes_for(len(read)),
            desc="Hashing n-grams",
        )
        keys = column_of(banded, "bands").combine_chunks().flatten().to_numpy().reshape(len(read), bands)
        lines, buckets = _shared(keys)
        texts = column_of(read, "prompt"), column_of(read, "answers")

        @functools.lru_cache(maxsize=20_000)
        def ngrams(line: int) -> frozenset[str]:
            return self.ngrams(_text(self.over, texts[0][line].as_py(), texts[1][line].as_py()))

        kept: dict[int, list[int]] = {}
        found = np.arange(len(read))
        starts = np.flatnonzero(np.diff(lines, prepend=-1))
        ranges = itertools.pairwise([*starts, len(lines)])
        for start, end in tqdm(ranges, total=len(starts), desc="Comparing n-grams"):
            line, mine = int(lines[start]), buckets[start:end].tolist()
            for other in sorted({other for bucket in mine for other in kept.get(bucket, ())}):
                a, b = ngrams(line), ngrams(other)
                shared = len(a & b)
                if shared / (len(a) + len(b) - shared) >= self.threshold:
                    found[line] = other
                    break
            else:
                for bucket in mine:
                    kept.setdefault(bucket, []).append(line)
        return found


@dataclass(frozen=True)
class _Bands:
    options: MinHash
    code: str

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        belong_to_map()

    def __call__(self, batch: dict[str, list[Any]]) -> dict[str, np.ndarray]:
        from datasketch import MinHash as Signature

        bands, rows = self.options.bands()
        texts = (_text(self.options.over, *line) for line in zip(batch["prompt"], batch["answers"], strict=True))
        grams = ([gram.encode(errors="replace") for gram in self.options.ngrams(text)] for text in texts)
        made = Signature.generator(grams, num_perm=self.options.num_perm, hashfunc=xxhash.xxh32_intdigest)
        signatures = np.array([signature.hashvalues[: bands * rows] for signature in made], dtype=np.uint64)
        # A band's numbers as one; two bands that differ and get the same cost a comparison.
        factors = np.random.default_rng(0).integers(2**63, size=rows, dtype=np.uint64) * np.uint64(2) + np.uint64(1)
        mixed = (signatures.reshape(-1, bands, rows) * factors).sum(axis=2, dtype=np.uint64)
        return {"bands": mixed}


def _text(over: Over, prompt: str, answers: Sequence[str]) -> str:
    texts = [_content(turn) for turn in turns_of(prompt)]
    return "\n".join([*texts, *answers] if over == "prompt_and_answers" else texts)


def _content(turn: dict[str, Any]) -> str:
    return str(turn.get("content") or json.dumps(turn, ensure_ascii=False))


def _shared(keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The lines that are in a bucket with others, ascending, and those buckets.

    Args:
        keys (np.ndarray): of each band of each line, shape ``[n, bands]``.

    Returns:
        tuple[np.ndarray, np.ndarray]: line and bucket of each membership.
    """
    lines, buckets, num_buckets = [], [], 0
    for band in keys.T:
        order = np.argsort(band, kind="stable")
        is_first = np.diff(band[order], prepend=band[order[:1]] + np.uint64(1)) != 0
        number = np.cumsum(is_first) - 1
        several = np.bincount(number, minlength=1)[number] > 1
        lines.append(order[several].astype(np.int32))
        buckets.append(number[several].astype(np.int32) + np.int32(num_buckets))
        num_buckets += int(number[-1]) + 1
    all_lines, all_buckets = np.concatenate(lines), np.concatenate(buckets)
    order = np.argsort(all_lines, kind="stable")
    return all_lines[order], all_buckets[order]


def deduplicate(candidates: Candidates, options: Exact | MinHash) -> np.ndarray:
    """Which candidates say what an earlier one says that is kept; the first in the order of sources and records is.

    How many there are is logged for each source, and how many of them repeat a record of another source.

    Args:
        candidates (Candidates): the records.
        options (Exact | MinHash): what a duplicate is.

    Returns:
        np.ndarray: mask of the duplicates, shape ``[n]``.
    """
    read = candidates.read({})
    name = type(options).__name__.lower()
    found = cached(read, "duplicates", [name, asdict(options)], lambda: options.find(read))
    is_duplicate = found != np.arange(len(found))
    sources = candidates.sources
    for i, source in enumerate(candidates.names):
        mine = is_duplicate & (sources == i)
        of_others = mine & (sources[found] != i)
        log.info(
            "%s: %s of %s records are duplicates (%s, %s)%s; the first of each is kept",
            source,
            f"{int(mine.sum()):,}",
            f"{int((sources == i).sum()):,}",
            name,
            options.over.replace("_", " "),
            f", {int(of_others.sum()):,} of them of records of earlier sources" if len(candidates.names) > 1 else "",
        )
    return is_duplicate


def _check_over(over: str) -> None:
    if over not in get_args(Over):
        raise ConfigError("over", f"must be one of {', '.join(get_args(Over))}, not {over}")

r"""Reference log-probs on disk, so that they are computed once for every run that needs the same ones.

    python -m prefix_sharing.reference.cache          # what the cache holds
    python -m prefix_sharing.reference.cache --clear  # empties it

Each reference has a directory, whose name is a fingerprint of the weights (their content, not their path), the model's
arguments, the precision, and the code that computes log-probs. It holds Parquet files of example ids and log-probs. An
example's id is a fingerprint of its tokens and of which are scored, so whatever makes other tokens (the tokenizer, its
template, masks, truncation) makes other ids. What does not change a log-prob (beta, the loss, batch, packing, ranks,
learning rate, order, split) changes neither.

Files are written whole under a name of their own and appear by one rename, so runs may fill a directory at the same
time, and an interrupted one loses only what it had not written yet. A file's name tells the fingerprint of its content:
one that is damaged is reported, set aside, and computed again.
"""

import argparse
import contextlib
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import xxhash

from prefix_sharing.config import default_cache_dir

log = logging.getLogger(__name__)

_ABOUT = "about.json"
_SCHEMA = pa.schema([("id", pa.string()), ("log_probs", pa.list_(pa.float32()))])


class ReferenceCache:
    """The log-probs of one reference, by example id.

    Args:
        cache_dir (str): the directory of all references.
        reference (str): a fingerprint of everything about this one that decides its log-probs of given tokens.
        about (Mapping[str, Any]): what to tell people about it.

    Raises:
        OSError: if it has no directory yet and none can be made.
    """

    def __init__(self, cache_dir: str, reference: str, about: Mapping[str, Any]) -> None:
        self.directory = Path(cache_dir) / reference
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=self.directory).close()  # better now than at the end of a long pass
            if not (self.directory / _ABOUT).exists():
                _write(self.directory / _ABOUT, json.dumps(dict(about), indent=2, default=str).encode())
        except OSError as error:
            if not self.directory.is_dir():
                raise
            log.warning("%s cannot be written (%s); what is there is used.", self.directory, error.strerror)

    def read(self, ids: pa.Array, num_responses: int) -> np.ndarray:
        """The log-probs that are known of a data set's examples.

        Args:
            ids (pa.Array): their ids, shape ``[N]``.
            num_responses (int): K.

        Returns:
            np.ndarray: shape ``[N, K]``, fp32; NaN where an example is not known, 0 beyond its responses.
        """
        log_probs = np.full((len(ids), num_responses), np.nan, dtype=np.float32)
        tables = [_read(file) for file in sorted(self.directory.glob("*.parquet"))]
        table = pa.concat_tables([_SCHEMA.empty_table(), *(table for table in tables if table is not None)])
        places = pc.index_in(ids, table.column("id").combine_chunks())
        known = np.flatnonzero(places.is_valid().to_numpy(zero_copy_only=False))
        values = table.column("log_probs").combine_chunks().take(places.drop_null())
        lengths = values.value_lengths().to_numpy()
        log_probs[known] = 0.0
        responses = np.arange(lengths.sum()) - np.repeat(np.cumsum(lengths) - lengths, lengths)
        log_probs[np.repeat(known, lengths), responses] = values.flatten().to_numpy()
        return log_probs

    def add(self, ids: pa.Array, log_probs: np.ndarray, num_responses: np.ndarray) -> None:
        """Writes the log-probs of some examples.

        Args:
            ids (pa.Array): their ids, shape ``[n]``.
            log_probs (np.ndarray): shape ``[n, K]``.
            num_responses (np.ndarray): responses of each, at most K, shape ``[n]``.
        """
        own = [values[:number] for values, number in zip(log_probs, num_responses, strict=True)]
        table = pa.table([ids, pa.array(own, type=_SCHEMA.field("log_probs").type)], schema=_SCHEMA)
        sink = pa.BufferOutputStream()
        pq.write_table(table, sink)
        content = sink.getvalue().to_pybytes()
        _write(self.directory / f"{xxhash.xxh3_128_hexdigest(content)}.parquet", content)


def _read(file: Path) -> pa.Table | None:
    """A file's table; None, with a warning, if it cannot be used; one that is damaged is set aside."""
    try:
        content = file.read_bytes()
    except OSError as error:
        log.warning("%s cannot be read (%s); its reference log-probs will be computed again.", file, error.strerror)
        return None
    if xxhash.xxh3_128_hexdigest(content) == file.stem:
        table = pq.read_table(pa.BufferReader(content))
        if table.schema.equals(_SCHEMA):
            return table
    log.warning("%s is damaged and was set aside; its reference log-probs will be computed again.", file)
    with contextlib.suppress(OSError):  # as on a disk that can only be read
        file.replace(file.with_suffix(".damaged"))
    return None


def _write(file: Path, content: bytes) -> None:
    """Writes a file that appears whole or not at all."""
    with tempfile.NamedTemporaryFile(dir=file.parent, prefix=".", delete=False) as partial:
        partial.write(content)
        partial.flush()
        os.fsync(partial.fileno())
    umask = os.umask(0)
    os.umask(umask)
    os.chmod(partial.name, 0o666 & ~umask)  # as any other file, so that others may share the cache
    os.replace(partial.name, file)


def describe_cache(cache_dir: str) -> Iterator[str]:
    """A line for each reference in the cache.

    Args:
        cache_dir (str): the directory of all references.

    Yields:
        str: its fingerprint, what it is, how many examples it holds, and its size.
    """
    for directory in _references(cache_dir):
        files = list(directory.glob("*.parquet"))
        num_examples = sum(table.num_rows for table in map(_read, files) if table is not None)
        files = [file for file in files if file.exists()]
        megabytes = sum(file.stat().st_size for file in files) / 1e6
        about = json.loads((directory / _ABOUT).read_text())
        described = ", ".join(f"{key} {value}" for key, value in about.items())
        yield f"{directory.name}  {num_examples:,} examples  {megabytes:.1f} MB  {described}"


def _references(cache_dir: str) -> list[Path]:
    return sorted(path.parent for path in Path(cache_dir).glob(f"*/{_ABOUT}"))


def main() -> None:
    """Reads the command line, and lists or clears the cache."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache_dir", default=default_cache_dir(), help="default: %(default)s")
    parser.add_argument(
        "--clear", nargs="*", metavar="FINGERPRINT", help="remove these references, or all if none is named"
    )
    options = parser.parse_args()
    known = [directory.name for directory in _references(options.cache_dir)]
    if options.clear is None:
        print("\n".join(describe_cache(options.cache_dir)) if known else f"{options.cache_dir} is empty.")
        return
    for name in options.clear or known:
        if name not in known:
            parser.error(f"no reference {name} in {options.cache_dir}")
        shutil.rmtree(Path(options.cache_dir) / name)
        print(f"Removed {name}.")


if __name__ == "__main__":
    main()

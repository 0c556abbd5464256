"""Caches know the code that made what they hold."""

from pathlib import Path

import prefix_sharing
from prefix_sharing.fingerprint import code_fingerprint, fingerprint, source_of


def test_code_is_known_by_content_and_name(tmp_path):
    room = tmp_path / "room"
    room.mkdir()
    (room / "a.py").write_text("x = 1\n")
    (tmp_path / "alone.py").write_text("y = 1\n")

    def now(*parts):
        code_fingerprint.cache_clear()
        return code_fingerprint(*parts, package=tmp_path)

    first, alone = now("room"), now("room", "alone.py")
    assert now("room") == first != alone
    (room / "notes.txt").write_text("no code")
    assert now("room") == first
    (room / "a.py").write_text("x = 2\n")
    assert now("room") != first
    (room / "a.py").write_text("x = 1\n")
    assert now("room") == first
    (room / "a.py").rename(room / "b.py")
    assert now("room") != first


def test_the_parts_that_caches_name_exist():
    package = Path(prefix_sharing.__file__).parent
    for part in ("datasets", "tokenizers", "trees", "attention", "scoring.py", "hosts"):
        assert (package / part).exists(), part


def test_values_and_sources():
    assert fingerprint([1, "a"]) == fingerprint([1, "a"]) != fingerprint([1, "b"])
    assert "def test_values_and_sources" in source_of(test_values_and_sources)
    assert source_of(len) is None
    assert source_of(None) is None

"""Records come as they were written: text stays the text that is in the file, whatever it looks like."""

import gzip
import json
import tracemalloc

import datasets
import pytest

from prefix_sharing.datasets import source
from prefix_sharing.datasets.source import Source, kind_of_files
from prefix_sharing.errors import UserError

TEXTS = ["42", "4.20", "true", "null", '"quoted"', '{"a": 1}', '[{"text": "no"}]', "2024-05-17", "1814-05-17T00:00", ""]
LINES = [{"prompt": text, "parts": [{"text": text}], "n": i} for i, text in enumerate(TEXTS)]
LINES += [{"prompt": [{"role": "user"}], "parts": 5, "n": None}, {"prompt": "\u2028 \x85 \r\n", "else": {"x": {}}}]


def load(path, split="train", source="json", **kwargs):
    return Source(source, split, {"data_files": str(path), **kwargs}).load()


def records_of(loaded):
    return [loaded[i] for i in range(len(loaded.rows))]


def jsonl(records):
    return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("pairs.jsonl", jsonl(LINES)),
        ("pairs.jsonl.gz", jsonl(LINES)),
        ("bom.jsonl", "\ufeff" + jsonl(LINES)),
        ("windows.jsonl", jsonl(LINES).replace("\n", "\r\n")),
        ("no_last_newline.jsonl", jsonl(LINES).rstrip("\n")),
        ("list.json", json.dumps(LINES)),
        ("indented.json", json.dumps(LINES, indent=2, ensure_ascii=False)),
        ("a_record_a_line.json", "[\n" + ",\n".join(json.dumps(line) for line in LINES) + "\n]"),
    ],
)
def test_json_comes_back_as_it_was_written(tmp_path, name, content):
    file = tmp_path / name
    file.write_bytes(gzip.compress(content.encode()) if name.endswith("gz") else content.encode())
    assert records_of(load(file)) == LINES


def test_records_in_a_field_of_a_json_file(tmp_path):
    file = tmp_path / "pairs.json"
    file.write_text(json.dumps({"version": 1, "data": LINES}))
    assert records_of(load(file, field="data")) == LINES
    with pytest.raises(UserError, match="there is no field 'dat' at its top"):
        load(file, field="dat")


@pytest.mark.parametrize("list_first", [True, False])
def test_lines_and_lists_may_be_mixed_in_data_files(tmp_path, list_first):
    files = [tmp_path / "list.json", tmp_path / "lines.jsonl"]
    files[0].write_text(json.dumps(LINES[:3], indent=1))
    files[1].write_text(jsonl(LINES[3:]))
    expected = LINES if list_first else [*LINES[3:], *LINES[:3]]
    names = [str(file) for file in (files if list_first else files[::-1])]
    assert records_of(Source("json", "train", {"data_files": names}).load()) == expected


@pytest.mark.parametrize("row", ["Hello, you,A,B", "Q,A,B,"])
def test_csv_rows_longer_than_the_header_are_refused(tmp_path, row):
    file = tmp_path / "pairs.csv"
    file.write_text(f"prompt,chosen,rejected\n{row}\n")
    with pytest.raises(UserError, match="rows have more cells than its header; put cells with commas in quotes"):
        load(file, source="csv")


def test_images_are_not_decoded(tmp_path, caplog):
    caplog.set_level("INFO")
    file = tmp_path / "pairs.parquet"
    features = datasets.Features({"prompt": datasets.Value("string"), "image": datasets.Image()})
    data = {"prompt": ["q"], "image": [{"bytes": b"no image", "path": None}]}
    datasets.Dataset.from_dict(data, features=features).to_parquet(str(file))
    assert records_of(load(file, source="parquet")) == [{"prompt": "q"}]
    assert "not used: column image (images or audio)" in caplog.text


def test_csv_comes_back_as_it_was_written(tmp_path):
    file = tmp_path / "pairs.csv"
    texts = [text.replace('"', '""') for text in TEXTS]
    file.write_text("prompt,chosen\n" + "".join(f'"{text}","007"\n' for text in texts))
    assert records_of(load(file, source="csv")) == [{"prompt": text, "chosen": "007"} for text in TEXTS]


def test_keys_that_parquet_filled_in_are_left_out(tmp_path):
    file = tmp_path / "pairs.parquet"
    calls = [[{"name": "f", "arguments": {"x": 1}}], [{"name": "g", "arguments": {"y": 2}}]]
    datasets.Dataset.from_list([{"calls": call} for call in calls]).to_parquet(str(file))
    assert records_of(load(file, source="parquet")) == [{"calls": call} for call in calls]


def test_a_directory_of_json_files_is_read_as_text_too(tmp_path):
    directory = tmp_path / "data"
    directory.mkdir()
    (directory / "train.jsonl").write_text(jsonl(LINES))
    (directory / "test.jsonl").write_text(jsonl(LINES[:2]))
    assert records_of(Source(str(directory), "train", {}).load()) == LINES
    assert records_of(Source(str(directory), "test", {}).load()) == LINES[:2]


def test_blank_lines_are_no_records_but_count_as_lines(tmp_path):
    file = tmp_path / "pairs.jsonl"
    file.write_text('\n{"n": 0}\n  \n{"n": 1}\n\n{"n": 2}\n')
    loaded = load(file)
    assert [record["n"] for record in records_of(loaded)] == [0, 1, 2]
    assert loaded.describe(2) == f"{file}, record 5 (line 6)"


def test_a_slice_takes_records_as_datasets_does(tmp_path):
    file = tmp_path / "pairs.jsonl"
    file.write_text("".join(f'{{"n": {i}}}\n' for i in range(10)))
    for split in ("train", "train[:3]", "train[-2:]", "train[20%:50%]", "train[:2]+train[8:]", "train[:200]"):
        expected = datasets.load_dataset("json", data_files=str(file), split=split)["n"]
        assert [record["n"] for record in records_of(load(file, split))] == list(expected)
    loaded = load(file, "train[:2]+train[8:]")
    assert loaded.describe(3) == f"{file}, record 9 (line 10)"


@pytest.mark.parametrize("split", ["train[:-96]", "train[96:]", "train[5:3]"])
def test_a_slice_without_a_record_is_refused(tmp_path, split):
    file = tmp_path / "pairs.jsonl"
    file.write_text("".join(f'{{"n": {i}}}\n' for i in range(10)))
    advice = r"choose another slice, such as train\[:-1\] to train on and train\[-1:\] to evaluate on"
    with pytest.raises(
        UserError, match=rf"'split': 'train\[.*' takes no record of .*pairs.jsonl: train has 10; {advice}"
    ):
        load(file, split)


def test_a_record_is_found_in_its_file(tmp_path):
    files = []
    for name, length in (("first.jsonl", 3), ("second.jsonl", 2)):
        (tmp_path / name).write_text("".join(f'{{"n": {i}}}\n' for i in range(length)))
        files.append(str(tmp_path / name))
    loaded = Source("json", "train", {"data_files": files}).load()
    assert loaded.describe(2) == f"{files[0]}, record 2 (line 3)"
    assert loaded.describe(4) == f"{files[1]}, record 1 (line 2)"


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ('{"n": 0}\n{"n"\n', "it is not JSON: Expecting ':' delimiter"),
        ('{"n": 0}\n[1]\n', "it is not a JSON object"),
        ('{"n": 0}\n{"n": 1, "n": 2}\n', "it has the key 'n' twice"),
        ('{"n": 0}\n{"n": ' + "[" * 100_000 + "]" * 100_000 + "}\n", "it is nested too deeply"),
    ],
)
def test_a_line_that_is_no_record_says_why(tmp_path, content, problem):
    file = tmp_path / "pairs.jsonl"
    file.write_text(content)
    loaded = load(file)
    with pytest.raises(ValueError, match=problem):
        loaded[1]


def test_a_line_that_would_fill_the_memory_is_refused_before_it_is_read(tmp_path):
    file = tmp_path / "pairs.jsonl.gz"
    with gzip.open(file, "wb", compresslevel=1) as stream:
        stream.write(b'{"prompt": "q"}\n\n{"prompt": "')
        for _ in range(300):
            stream.write(b"x" * 10**6)
        stream.write(b'"}\n')
    assert file.stat().st_size < 3 * 10**6
    tracemalloc.start()
    with pytest.raises(
        UserError, match=r"pairs\.jsonl\.gz, line 3: it is longer than 16 MB; shorten it or leave it out"
    ):
        load(file)
    assert tracemalloc.get_traced_memory()[1] < 30 * 10**6
    tracemalloc.stop()


def test_only_records_in_lines_are_to_be_short(tmp_path, monkeypatch):
    monkeypatch.setattr(source, "MAX_TEXT", 1000)
    monkeypatch.setattr(source, "_BLOCK", 300)
    records = [{"prompt": "x" * 400}] * 4
    (tmp_path / "lines.jsonl").write_text(jsonl(records))
    (tmp_path / "list.json").write_text(json.dumps(records))
    (tmp_path / "mapping.json").write_text(json.dumps({"data": records}))
    assert records_of(load(tmp_path / "lines.jsonl")) == records
    assert records_of(load(tmp_path / "list.json")) == records
    assert records_of(load(tmp_path / "mapping.json", field="data")) == records
    monkeypatch.setattr(source, "_MAX_DOCUMENT", 1000)
    with pytest.raises(UserError, match=r"list\.json, line 1: it is longer .*; write each record in a line of its own"):
        load(tmp_path / "list.json")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "is empty"),
        ("\n\n", "is empty"),
        ("hello\n", "has no JSON object in each line, and is no JSON list"),
        ("[1", "has no JSON object in each line"),
        ("5", "it holds neither"),
    ],
)
def test_a_file_without_records_is_one_sentence(tmp_path, content, message):
    file = tmp_path / "pairs.json"
    file.write_text(content)
    with pytest.raises(UserError, match=message) as caught:
        load(file)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("files", "kind"),
    [("a.jsonl", "json"), (["a.json", "b.JSONL.gz"], "json"), ({"train": "a.csv"}, "csv"), ("x/*.parquet", "parquet")],
)
def test_the_kind_of_files_is_told_by_their_names(files, kind):
    assert kind_of_files({"data_files": files}) == kind


def test_files_of_no_kind_or_several_need_a_source():
    for files in ("a.txt", ["b.json", "a.txt"]):
        with pytest.raises(
            UserError, match="'source': cannot tell the file type of a.txt from its name; set it to json"
        ):
            kind_of_files({"data_files": files})
    with pytest.raises(UserError, match="'data_files': must be files of one type, but are a.json, b.csv"):
        kind_of_files({"data_files": ["a.json", "b.csv"]})
    with pytest.raises(UserError, match="'source': required: the name of a data set on the hub"):
        kind_of_files({})

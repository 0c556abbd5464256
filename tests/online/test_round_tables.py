"""A round's tables: written part by part, whole under one name, and told apart by what made them."""

import numpy as np
import pytest

from prefix_sharing.errors import UserError
from prefix_sharing.online import RoundTable, row_of
from prefix_sharing.quickstart import tokenizer
from prefix_sharing.sampling import Answer, Prompt


def rows(count):
    text = tokenizer()
    for i in range(count):
        prompt = Prompt(f"{i:032x}", ({"role": "user", "content": f"q{i}"},), np.arange(3, 6 + i))
        answers = [Answer(np.array(text.encode("an apple")), -1.5 - i, True), Answer(np.array([7, 8]), -2.0, False)]
        yield row_of(prompt, answers, text)


def test_parts_become_one_table_in_the_order_of_the_prompts(tmp_path):
    made = list(rows(5))
    keys = [row["key"] for row in made]
    table = RoundTable(tmp_path / "answers.parquet", {"policy": "a"})
    table.add(made[3:])
    table.add(made[:2])
    again = RoundTable(tmp_path / "answers.parquet", {"policy": "a"})
    assert [row["key"] for row in again.rows()] == keys[3:] + keys[:2]
    assert not again.is_whole
    again.add(made[2:3])
    found = again.finish(keys)
    assert found == made
    assert found[0]["texts"][0] == "an apple"
    assert again.is_whole
    assert [file.name for file in tmp_path.iterdir()] == ["answers.parquet"]
    assert RoundTable(tmp_path / "answers.parquet", {"policy": "a"}).rows() == made


@pytest.mark.parametrize("whole", [True, False])
def test_another_policys_table_is_refused_by_name(tmp_path, whole):
    made = list(rows(1))
    table = RoundTable(tmp_path / "answers.parquet", {"policy": "a"})
    table.add(made)
    if whole:
        table.finish([made[0]["key"]])
    with pytest.raises(
        UserError, match=r"answers.*parquet was made by another policy or with other settings; remove it"
    ):
        RoundTable(tmp_path / "answers.parquet", {"policy": "b"})


def test_an_interrupted_write_leaves_nothing_that_is_read(tmp_path, monkeypatch):
    table = RoundTable(tmp_path / "answers.parquet", {})
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        table.add(list(rows(2)))
    assert RoundTable(tmp_path / "answers.parquet", {}).rows() == []

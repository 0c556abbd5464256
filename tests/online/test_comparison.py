"""Answers of two models to the same prompts, judged side by side."""

import json

import numpy as np
import pytest
from omegaconf import OmegaConf

from documents import PAGES, runs, table
from prefix_dpo_judge import JudgeConfig, compare_files
from prefix_sharing.config import check_config, find_config
from prefix_sharing.errors import ConfigError, UserError
from prefix_sharing.judging import function_judge, length_judge
from prefix_sharing.online.comparison import compare_answers, describe_comparisons, read_model_answers
from prefix_sharing.online.length_control import control_length
from prefix_sharing.online.tables import RoundTable

WORDS = ["an owl", "we", "or an ape", "big", "you and I"]


def alpaca_file(file, answers, **more):
    records = [
        {"instruction": prompt, "output": text, "generator": file.stem, **more} for prompt, text in answers.items()
    ]
    file.write_text(json.dumps(records))
    return file


def round_file(file, answers):
    """A table of a round, with any number of answers to each prompt."""
    rows = [
        {
            "key": prompt,
            "turns": json.dumps([{"role": "user", "content": prompt}]),
            "prompt_tokens": [1],
            "answers": [[1]] * len(texts),
            "texts": texts,
            "log_probs": [0.0] * len(texts),
            "complete": [True] * len(texts),
            "scores": [],
        }
        for prompt, texts in answers.items()
    ]
    table = RoundTable(file, {})
    table.add(rows)
    table.finish(list(answers))
    return file


def random_answers(seed, num=20):
    rng = np.random.default_rng(seed)
    return {f"prompt {i}": " ".join(rng.choice(WORDS, rng.integers(1, 6))) for i in range(num)}


VOWELS = function_judge("prefix_sharing.quickstart.online.vowel_rule")


def test_models_are_compared_prompt_by_prompt(tmp_path):
    ours, theirs = random_answers(0), random_answers(1)
    shuffled = dict(reversed(theirs.items()))
    model, other = (
        read_model_answers(alpaca_file(tmp_path / f"{n}.json", a)) for n, a in (("a", ours), ("b", shuffled))
    )
    found = compare_answers(VOWELS, model, other)
    score = {text: VOWELS([[]], [[text]])[0][0] for text in [*ours.values(), *theirs.values()]}
    wins = np.array([(np.sign(score[ours[p]] - score[theirs[p]]) + 1) / 2 for p in ours])
    longer = np.array([len(ours[p]) - len(theirs[p]) for p in ours])
    assert found == {
        "model": "a",
        "other": "b",
        "win_rate": pytest.approx(wins.mean()),
        "length_controlled_win_rate": pytest.approx(control_length(wins, longer).win_rate),
        "score": pytest.approx(np.mean([score[text] for text in ours.values()])),
        "other_score": pytest.approx(np.mean([score[text] for text in theirs.values()])),
        "characters": pytest.approx(np.mean([len(text) for text in ours.values()])),
        "other_characters": pytest.approx(np.mean([len(text) for text in theirs.values()])),
        "num_comparisons": 20,
        "num_without_verdict": 0,
    }
    assert 0 < found["win_rate"] < 1
    title, line = describe_comparisons([found]).splitlines()
    assert title.startswith("over b ")
    assert line.split()[:2] == ["a", f"{found['win_rate']:.3f}"]


def test_a_judge_sees_the_answers_to_a_prompt_at_once_and_each_is_compared_with_each(tmp_path):
    seen = []

    def judge(prompts, answers):
        seen.extend(zip([turns[-1]["content"] for turns in prompts], answers, strict=True))
        return [np.array([np.nan if text == "?" else len(text) for text in texts], dtype=float) for texts in answers]

    (tmp_path / "round").mkdir()
    model = read_model_answers(
        round_file(tmp_path / "round" / "answers.parquet", {"p": ["a", "abc"], "q": ["?", "ab"]})
    )
    other = read_model_answers(alpaca_file(tmp_path / "b.json", {"q": "a", "p": "ab"}))
    found = compare_answers(judge, model, other)
    assert seen == [("p", ["a", "abc", "ab"]), ("q", ["?", "ab", "a"])]
    assert (found["num_comparisons"], found["num_without_verdict"]) == (3, 1)
    assert found["win_rate"] == pytest.approx(2 / 3)
    assert found["model"] == f"{tmp_path.name}/round"


def test_a_longer_answer_that_wins_by_that_alone_does_not_at_equal_length(tmp_path):
    texts = {f"{i}": "x" * (10 + 5 * (i % 7)) for i in range(40)}
    model = read_model_answers(alpaca_file(tmp_path / "a.json", texts))
    other = read_model_answers(alpaca_file(tmp_path / "b.json", dict.fromkeys(texts, "x" * 20)))
    found = compare_answers(length_judge(), model, other)
    assert found["win_rate"] > 0.6
    assert abs(found["length_controlled_win_rate"] - 0.5) < abs(found["win_rate"] - 0.5) / 2


def test_the_documented_command_compares_each_file_with_the_first(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (recipe, option, config, override), *others = runs(PAGES["evaluation.md"].split("## Compare models")[1])
    assert (recipe, option, others) == ("prefix_dpo_judge", "--config", [])
    cfg = OmegaConf.merge(OmegaConf.load(find_config(config)), OmegaConf.from_dotlist([override]))
    cfg.output_dir = str(tmp_path)
    for seed, file in enumerate(cfg.answers):
        alpaca_file(tmp_path / file, random_answers(seed))
    compare_files(check_config(cfg, JudgeConfig))
    comparisons = json.loads((tmp_path / "comparison.json").read_text())
    assert [(found["model"], found["other"]) for found in comparisons] == [("sft", "base"), ("dpo", "base")]
    title, *lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2
    columns = [name for cells in table(PAGES["evaluation.md"], "column") for name in cells[0].strip("`").split("`, `")]
    assert title.removeprefix("over base").split() == " ".join(columns).split()
    cfg.answers = cfg.answers[:1]
    with pytest.raises(ConfigError, match="'answers': has 1 file"):
        compare_files(check_config(cfg, JudgeConfig))


def test_what_cannot_be_compared_is_refused(tmp_path):
    model = read_model_answers(alpaca_file(tmp_path / "a.json", {"p": "a", "q": "b"}))
    other = read_model_answers(alpaca_file(tmp_path / "b.json", {"p": "a", "r": "b", "s": "b"}))
    with pytest.raises(UserError, match="a and b are not to the same prompts: 1 are only in the first and 2 only"):
        compare_answers(length_judge(), model, other)
    with pytest.raises(UserError, match="no verdict on any two answers of a and a"):
        compare_answers(lambda prompts, answers: [np.full(len(texts), np.nan) for texts in answers], model, model)
    with pytest.raises(UserError, match="not found; prefix_dpo_answers"):
        read_model_answers(tmp_path / "nothing.json")
    (tmp_path / "c.json").write_text('[{"instruction": "q", "answer": "a"}]')
    with pytest.raises(UserError, match="record 0: 'output' is missing"):
        read_model_answers(tmp_path / "c.json")
    records = json.loads(alpaca_file(tmp_path / "d.json", {"p": "a", "q": "b"}).read_text())
    records[0]["instruction_difficulty"] = 0.5
    (tmp_path / "d.json").write_text(json.dumps(records))
    with pytest.raises(UserError, match="'instruction_difficulty' is known of 1 of 2 prompts"):
        read_model_answers(tmp_path / "d.json")
    (tmp_path / "e.json").write_text('[{"instruction": "q", "output": "a", "instruction_difficulty": "hard"}]')
    with pytest.raises(UserError, match="record 0: 'instruction_difficulty' is no finite number"):
        read_model_answers(tmp_path / "e.json")
    (tmp_path / "f.parquet").write_bytes(b"")
    with pytest.raises(UserError, match="is no table of answers; give answers.parquet of a round"):
        read_model_answers(tmp_path / "f.parquet")

"""Questions and answers in the files of AlpacaEval, Arena-Hard-Auto and MT-bench, beside published records of each."""

import json

import pytest

from prefix_sharing.errors import UserError
from prefix_sharing.judging.answer_files import AnswerText, read_questions, write_answers

# Records of the benchmarks' own files, texts shortened: a question, and an answer to it that is published.
PUBLISHED = {
    "alpaca_eval": (
        {
            "dataset": "helpful_base",
            "instruction": "What are the names of some famous actors?",
            "output": "Some famous actors are",
            "generator": "text_davinci_003",
        },
        {
            "dataset": "helpful_base",
            "instruction": "What are the names of some famous actors?",
            "output": "There are many",
            "generator": "gpt4_1106_preview",
        },
    ),
    "arena_hard v0.1": (
        {
            "question_id": "328c149ed45a41c0b9d6f14659e63599",
            "category": "arena-hard-v0.1",
            "cluster": "ABC Sequence Puzzles & Groups",
            "turns": [{"content": "Use ABC notation to write a melody"}],
        },
        {
            "question_id": "328c149ed45a41c0b9d6f14659e63599",
            "answer_id": "ndKLaFQXbU4eujaZBGjGZJ",
            "model_id": "gpt-4-0314",
            "choices": [{"index": 0, "turns": [{"content": "X:1", "token_len": 347}]}],
            "tstamp": 1711397284.101236,
        },
    ),
    "arena_hard": (
        {
            "uid": "0001b527ced3428d",
            "category": "hard_prompt",
            "subcategory": "math",
            "language": "en",
            "prompt": "What moves a wheel?",
        },
        {
            "uid": "0001b527ced3428d",
            "ans_id": "kpYHmjdWG3zxKm3P9y5EMR",
            "model": "sky-t1-32b",
            "messages": [
                {"role": "user", "content": "What moves a wheel?"},
                {"role": "assistant", "content": {"answer": "A force"}},
            ],
            "tstamp": 1745605748.4299996,
        },
    ),
    "mt_bench": (
        {
            "question_id": 81,
            "category": "writing",
            "turns": ["Compose a travel blog post", "Rewrite it"],
            "reference": ["", ""],
        },
        {
            "question_id": 81,
            "answer_id": "9J5iiQMpEEV3xT5jPjjjZX",
            "model_id": "llama-2-chat7b",
            "choices": [{"index": 0, "turns": ["Aloha", "A day"]}],
            "tstamp": 1706828225.978406,
        },
    ),
}


def shape(value):
    """A record without its texts and numbers."""
    if isinstance(value, dict):
        return {key: shape(part) for key, part in value.items()}
    return [shape(part) for part in value] if isinstance(value, list) else type(value)


def written(tmp_path, name, question, answers, model_name="our model"):
    answer_format = name.split()[0]
    asked, file = tmp_path / "questions", tmp_path / "answers" / "of_ours"
    asked.write_text(json.dumps([question]) if answer_format == "alpaca_eval" else json.dumps(question) + "\n")
    given = [AnswerText(text, num_tokens) for text, num_tokens in answers]
    write_answers(file, answer_format, model_name, read_questions(asked, answer_format), [given])
    return file.read_text(encoding="utf-8")


@pytest.mark.parametrize("name", PUBLISHED)
def test_an_answer_has_the_form_of_a_published_one(tmp_path, name):
    question, answer = PUBLISHED[name]
    texts = [("\u2028 so", 3), ("then", 1)][: len(question["turns"]) if "turns" in question else 1]
    text = written(tmp_path, name, question, texts)
    (found,) = json.loads(text) if name == "alpaca_eval" else map(json.loads, text.strip("\n").split("\n"))
    assert shape(found) == shape(answer)
    for key in {"question_id", "uid", "instruction", "dataset"} & answer.keys():
        assert found[key] == answer[key]
    named = next(key for key in ("generator", "model_id", "model") if key in answer)
    assert found[named] == "our model"
    assert all(json.dumps(part, ensure_ascii=False)[1:-1] in text for part, _ in texts)


def test_answer_files_load_in_alpaca_evals_own_reader(tmp_path):
    utils = pytest.importorskip("alpaca_eval.utils")
    file = tmp_path / "ours.json"
    file.write_text(written(tmp_path, "alpaca_eval", PUBLISHED["alpaca_eval"][0], [("so", 1)]))
    (record,) = utils.load_or_convert_to_dataframe(file).to_dict("records")
    assert record == PUBLISHED["alpaca_eval"][0] | {"output": "so", "generator": "our model"}


@pytest.mark.parametrize(
    ("answer_format", "text", "problem"),
    [
        (
            "alpaca_eval",
            '[{"instruction": "q"}, {"prompt": "q"}]',
            "record 1: 'instruction' is missing; alpaca_eval",
        ),
        (
            "alpaca_eval",
            '[{"instruction": "q", "input": "x"}]',
            "record 0: 'input' is not shown to AlpacaEval's",
        ),
        ("alpaca_eval", "[]", "has no record"),
        (
            "arena_hard",
            '{"uid": "1", "prompt": ""}',
            "record 0: 'prompt' is no text; arena_hard has 'uid'",
        ),
        ("arena_hard", '{"prompt": "q"}', "record 0: 'question_id' is missing"),
        ("arena_hard", '{"question_id": "1", "turns": ["q"]}', "record 0: 'content' is missing"),
        ("mt_bench", '{"question_id": 1, "turns": []}', "record 0: 'turns' is no list with a turn; mt_bench has"),
        ("mt_bench", '{"question_id": 1, "turns": [{"content": "q"}]}', "record 0: 'turns' is no text"),
        ("mt_bench", "3", "record 0: is int, and should be a mapping"),
        ("mt_bench", "{", "is neither a JSON list nor a record of JSON in each line"),
    ],
)
def test_what_is_no_question_is_named(tmp_path, answer_format, text, problem):
    file = tmp_path / "questions.jsonl"
    file.write_text(text)
    with pytest.raises(UserError, match=problem):
        read_questions(file, answer_format)
    with pytest.raises(UserError, match="cannot be read"):
        read_questions(tmp_path / "nothing", answer_format)

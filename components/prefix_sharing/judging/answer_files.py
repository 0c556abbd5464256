"""Questions of benchmarks whose judges are programs of others, and answers in the files that those programs read.

======================================== ==================================================== ======================
format                                   a question                                           an answer
======================================== ==================================================== ======================
``alpaca_eval``, AlpacaEval 2            ``instruction`` in a JSON list                       ``output`` beside it
``arena_hard``, Arena-Hard-Auto v2.0     ``uid`` and ``prompt``, a line of JSON               ``messages``
``arena_hard``, Arena-Hard-Auto v0.1     ``question_id`` and ``turns`` of ``content``, a line ``choices`` with turns
``mt_bench``, MT-bench of FastChat       ``question_id`` and ``turns`` of text, a line        ``choices`` with turns
======================================== ==================================================== ======================
"""

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

from prefix_sharing.errors import UserError
from prefix_sharing.fingerprint import fingerprint

AnswerFormat = Literal["alpaca_eval", "arena_hard", "mt_bench"]


@dataclass(frozen=True)
class Question:
    """What a benchmark asks.

    Attributes:
        record (Mapping[str, Any]): as it is in its file.
        turns (tuple[str, ...]): what the user says; each turn after the first one comes after the answer before it.
    """

    record: Mapping[str, Any]
    turns: tuple[str, ...]


class AnswerText(NamedTuple):
    """An answer to a turn.

    Attributes:
        text (str): without special tokens.
        num_tokens (int): its length, by the model's own tokenizer.
    """

    text: str
    num_tokens: int


def read_questions(file: Path, answer_format: AnswerFormat) -> list[Question]:
    """Reads a benchmark's own file of questions.

    Args:
        file (Path): such as ``alpaca_eval.json``, or ``question.jsonl`` of the other two.
        answer_format (AnswerFormat): whose it is.

    Returns:
        list[Question]: in the order of the file.

    Raises:
        UserError: if the file cannot be read, or a record is not of that format; it names record and key.
    """
    questions = []
    for i, record in enumerate(read_json_records(file)):
        try:
            questions.append(Question(record, _READERS[answer_format](record)))
        except _RecordError as error:
            raise UserError(f"{file}, record {i}: {error}; {answer_format} has {_QUESTIONS[answer_format]}.") from error
    return questions


def write_answers(
    file: Path,
    answer_format: AnswerFormat,
    model_name: str,
    questions: Sequence[Question],
    answers: Sequence[Sequence[AnswerText]],
) -> None:
    """Writes answers as the benchmark's own program reads them.

    Args:
        file (Path): where they go.
        answer_format (AnswerFormat): whose program.
        model_name (str): what the model is to be called there.
        questions (Sequence[Question]): what was asked.
        answers (Sequence[Sequence[AnswerText]]): an answer to each turn of each question.
    """
    records = [
        _WRITERS[answer_format](question, given, model_name) for question, given in zip(questions, answers, strict=True)
    ]
    file.parent.mkdir(parents=True, exist_ok=True)
    if answer_format == "alpaca_eval":
        text = json.dumps(records, indent=2, ensure_ascii=False) + "\n"
    else:
        text = "".join(f"{json.dumps(record, ensure_ascii=False)}\n" for record in records)
    file.write_text(text, encoding="utf-8")


def read_json_records(file: Path) -> list[dict[str, Any]]:
    """The records of a JSON list, or of a file with one in each line.

    Args:
        file (Path): the file.

    Returns:
        list[dict[str, Any]]: at least one.

    Raises:
        UserError: if there is no such file, it is not JSON, or there is no record in it.
    """
    try:
        text = file.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{file} is no text in UTF-8: {error}.") from error
    lines = [line for line in text.split("\n") if line.strip()]  # not at other line breaks, which JSON may hold
    try:
        records = json.loads(text) if text.lstrip().startswith("[") else [json.loads(line) for line in lines]
    except ValueError as error:
        raise UserError(f"{file} is neither a JSON list nor a record of JSON in each line: {error}.") from error
    if not records:
        raise UserError(f"{file} has no record.")
    for i, record in enumerate(records):
        if not isinstance(record, dict):
            raise UserError(f"{file}, record {i}: is {type(record).__name__}, and should be a mapping.")
    return records


class _RecordError(Exception):
    """What is wrong with a record."""


def _text(record: Mapping[str, Any], key: str) -> str:
    value = record.get(key)
    if not isinstance(value, str) or not value.strip():
        raise _RecordError(f"'{key}' {'is missing' if key not in record else 'is no text'}")
    return value


def _turns(record: Mapping[str, Any], text_of: Callable[[Any], str]) -> tuple[str, ...]:
    if "question_id" not in record:
        raise _RecordError("'question_id' is missing")
    turns = record.get("turns")
    if not isinstance(turns, list) or not turns:
        raise _RecordError("'turns' is missing" if "turns" not in record else "'turns' is no list with a turn")
    return tuple(map(text_of, turns))


def _alpaca_eval_turns(record: Mapping[str, Any]) -> tuple[str, ...]:
    if record.get("input"):
        raise _RecordError("'input' is not shown to AlpacaEval's judges and should be part of 'instruction'")
    return (_text(record, "instruction"),)


def _arena_hard_turns(record: Mapping[str, Any]) -> tuple[str, ...]:
    if "uid" in record:
        return (_text(record, "prompt"),)
    return _turns(record, lambda turn: _text(turn if isinstance(turn, dict) else {}, "content"))


def _mt_bench_turns(record: Mapping[str, Any]) -> tuple[str, ...]:
    return _turns(record, lambda turn: _text({"turns": turn}, "turns"))


def _alpaca_eval_answer(question: Question, given: Sequence[AnswerText], model_name: str) -> dict[str, Any]:
    kept = {key: value for key, value in question.record.items() if key not in ("output", "generator")}
    return {**kept, "output": given[0].text, "generator": model_name}


def _arena_hard_answer(question: Question, given: Sequence[AnswerText], model_name: str) -> dict[str, Any]:
    if "uid" not in question.record:
        turns = [{"content": answer.text, "token_len": answer.num_tokens} for answer in given]
        return _with_choices(question, turns, model_name)
    (answer,) = given
    return {
        "uid": question.record["uid"],
        "ans_id": _answer_id(model_name, question.record["uid"]),
        "model": model_name,
        "messages": [
            {"role": "user", "content": question.turns[0]},
            {"role": "assistant", "content": {"answer": answer.text}},
        ],
        "tstamp": time.time(),
    }


def _mt_bench_answer(question: Question, given: Sequence[AnswerText], model_name: str) -> dict[str, Any]:
    return _with_choices(question, [answer.text for answer in given], model_name)


def _with_choices(question: Question, turns: list[Any], model_name: str) -> dict[str, Any]:
    return {
        "question_id": question.record["question_id"],
        "answer_id": _answer_id(model_name, question.record["question_id"]),
        "model_id": model_name,
        "choices": [{"index": 0, "turns": turns}],
        "tstamp": time.time(),
    }


def _answer_id(model_name: str, question: Any) -> str:
    return fingerprint([model_name, question])


_QUESTIONS: dict[AnswerFormat, str] = {
    "alpaca_eval": "'instruction' in each record",
    "arena_hard": "'uid' and 'prompt' (v2.0), or 'question_id' and 'turns' with 'content' (v0.1), in each record",
    "mt_bench": "'question_id' and 'turns', a list of texts, in each record",
}

_READERS: dict[AnswerFormat, Callable[[Mapping[str, Any]], tuple[str, ...]]] = {
    "alpaca_eval": _alpaca_eval_turns,
    "arena_hard": _arena_hard_turns,
    "mt_bench": _mt_bench_turns,
}

_WRITERS: dict[AnswerFormat, Callable[[Question, Sequence[AnswerText], str], dict[str, Any]]] = {
    "alpaca_eval": _alpaca_eval_answer,
    "arena_hard": _arena_hard_answer,
    "mt_bench": _mt_bench_answer,
}

"""Forms of two answers with an annotator's verdict beside them, each named after the data set that has it."""

from dataclasses import replace
from typing import Any

from prefix_sharing.datasets.forms.comparison import Comparison, compare
from prefix_sharing.datasets.forms.prompt import parse_prompt, prompt_of
from prefix_sharing.datasets.forms.record import Record, RecordError, as_text, kind
from prefix_sharing.tokenizers import Turn

_FIRST_OR_SECOND = {0: 0, 1: 1, "0": 0, "1": 1}


def _by_verdict(record: Record, prompt: list[Turn], names: tuple[str, str], better: int) -> Comparison:
    """The two answers, the better one first."""
    best_first = (names[better], names[1 - better])
    answers, keys = [record.get(name) for name in best_first], [record.key(name) for name in best_first]
    return replace(compare(record, prompt, answers, keys), order=[better, 1 - better])


def _by_strength(record: Record, names: tuple[str, str], strength: float) -> Comparison:
    """The two answers by how strongly the second is preferred, which is negative where the first is; 0 is a tie."""
    answers, keys = [record.get(name) for name in names], [record.key(name) for name in names]
    return compare(record, prompt_of(record), answers, keys, [-strength, strength])


def read_shp(record: Record) -> Comparison:
    """SHP's ``human_ref_A`` and ``human_ref_B`` to a ``history``; ``labels`` is 1 where A is preferred."""
    better = record.choice("labels", {1: 0, 0: 1, "1": 0, "0": 1})
    prompt = parse_prompt(record.get("history"), record.key("history"))
    return _by_verdict(record, prompt, ("human_ref_A", "human_ref_B"), better)


def read_safe_rlhf(record: Record) -> Comparison:
    """PKU-SafeRLHF's ``response_0`` and ``response_1`` with ``better_response_id``."""
    better = record.choice("better_response_id", _FIRST_OR_SECOND)
    return _by_verdict(record, prompt_of(record), ("response_0", "response_1"), better)


def read_tldr_comparison(record: Record) -> Comparison:
    """The ``summaries`` of OpenAI's summarize_from_feedback with ``choice``; the prompt is made from ``info``."""
    summaries, key = record.get("summaries"), record.key("summaries")
    if not isinstance(summaries, list) or len(summaries) != 2 or not all(isinstance(s, dict) for s in summaries):
        raise RecordError(key, "must be a list of two summaries, objects with a 'text'")
    better = record.choice("choice", _FIRST_OR_SECOND)
    order = [better, 1 - better]
    prompt = parse_prompt(_tldr_prompt(record.get("info"), record.key("info")), record.key("info"))
    answers, keys = [summaries[i].get("text") for i in order], [f"{key}[{i}].text" for i in order]
    return replace(compare(record, prompt, answers, keys), order=order)


def _tldr_prompt(info: Any, key: str) -> str:
    """The prompt as TRL words it."""
    if not isinstance(info, dict):
        raise RecordError(key, f"must be an object with the post or the article, but is {kind(info)}")
    title = as_text(info.get("title"), f"{key}.title")
    if info.get("post") is None:
        return f"TITLE: {title}\n\n{as_text(info.get('article'), f'{key}.article')}\n\nTL;DR:"
    subreddit = as_text(info.get("subreddit"), f"{key}.subreddit")
    return f"SUBREDDIT: r/{subreddit}\n\nTITLE: {title}\n\nPOST: {as_text(info['post'], f'{key}.post')}\n\nTL;DR:"


def read_helpsteer2_preference(record: Record) -> Comparison:
    """HelpSteer2's ``response_1`` and ``response_2`` with ``preference_strength`` from -3 to 3."""
    return _by_strength(record, ("response_1", "response_2"), record.number("preference_strength"))


def read_helpsteer3(record: Record) -> Comparison:
    """HelpSteer3's ``response1`` and ``response2`` to a ``context``, with ``overall_preference`` from -3 to 3."""
    return _by_strength(record, ("response1", "response2"), record.number("overall_preference"))


def read_alpaca_eval(record: Record) -> Comparison:
    """AlpacaEval's ``output_1`` and ``output_2`` with ``preference`` from 1 to 2; 1.5 and 0 are ties."""
    preference = record.number("preference")
    if not (preference == 0 or 1 <= preference <= 2):
        raise RecordError(record.key("preference"), f"must be from 1 to 2, or 0 for a tie, but is {preference:g}")
    return _by_strength(record, ("output_1", "output_2"), 0.0 if preference == 0 else preference - 1.5)

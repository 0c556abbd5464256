"""Forms of any number of answers to one prompt, with ranks or scores."""

from prefix_sharing.datasets.forms.comparison import Comparison, compare, scores_of
from prefix_sharing.datasets.forms.prompt import prompt_of
from prefix_sharing.datasets.forms.record import Record, RecordError, as_number


def read_ranked(record: Record) -> Comparison:
    """``responses``, best first unless there are ``scores``."""
    answers, key = record.get("responses"), record.key("responses")
    if not isinstance(answers, list) or not answers:
        raise RecordError(key, "must be a list of at least one response")
    keys = [f"{key}[{i}]" for i in range(len(answers))]
    return compare(record, prompt_of(record), answers, keys, scores_of(record, len(answers)))


def read_nectar(record: Record) -> Comparison:
    """Nectar's ``answers``, each with its ``rank``, of which 1 is best."""
    entries, key = record.get("answers"), record.key("answers")
    if not isinstance(entries, list) or not entries:
        raise RecordError(key, "must be a list of at least one answer")
    for i, entry in enumerate(entries):
        if not isinstance(entry, dict):
            raise RecordError(f"{key}[{i}]", "must be an object with 'answer' and 'rank'")
    ranks = [as_number(entry.get("rank"), f"{key}[{i}].rank") for i, entry in enumerate(entries)]
    answers = [entry.get("answer") for entry in entries]
    keys = [f"{key}[{i}].answer" for i in range(len(entries))]
    return compare(record, prompt_of(record), answers, keys, [-rank for rank in ranks])


def read_helpsteer2(record: Record) -> Comparison:
    """HelpSteer2's answers with ``helpfulness`` from 0 to 4; records of the same prompt are compared."""
    prompt, response = prompt_of(record), record.get("response")
    return compare(record, prompt, [response], [record.key("response")], [record.number("helpfulness")])

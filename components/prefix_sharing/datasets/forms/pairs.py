"""Forms of two answers that say which was chosen."""

from dataclasses import replace

from prefix_sharing.datasets.forms.comparison import Comparison, compare, read_answer
from prefix_sharing.datasets.forms.messages import parse_messages, parse_transcript
from prefix_sharing.datasets.forms.prompt import SOURCES, prompt_of, with_system
from prefix_sharing.datasets.forms.record import Record, RecordError, kind


def read_pair(record: Record) -> Comparison:
    """``chosen`` and ``rejected``: text, a message, or messages, which may begin with the prompt or its end."""
    answers = [record.get("chosen"), record.get("rejected")]
    keys = [record.key("chosen"), record.key("rejected")]
    prompt = prompt_of(record)
    if prompt and any([prompt[-1]] == read_answer(answer, key) for answer, key in zip(answers, keys, strict=True)):
        prompt = prompt[:-1]  # it holds the answer as well
    return compare(record, prompt, answers, keys)


def read_transcripts(record: Record) -> Comparison:
    """Anthropic's HH: ``chosen`` and ``rejected`` are transcripts."""
    keys = [record.key("chosen"), record.key("rejected")]
    answers = [parse_transcript(record.get(name), key) for name, key in zip(("chosen", "rejected"), keys, strict=True)]
    comparison = compare(record, prompt_of(record), answers, keys)
    return replace(comparison, raw=[record.get("chosen"), record.get("rejected")])


def read_shared_beginning(record: Record) -> Comparison:
    """``chosen`` and ``rejected`` as text without a prompt, which is what the two begin with, as TRL has it."""
    if any(name in record for name in SOURCES):
        return read_pair(record)
    chosen, rejected = record.text("chosen"), record.text("rejected")
    shared = next((i for i, (a, b) in enumerate(zip(chosen, rejected, strict=False)) if a != b), None)
    if shared is None:  # one is the beginning of the other
        shared = 0 if chosen == rejected else min(len(chosen), len(rejected))
    elif shared and chosen[shared - 1] == " ":
        shared -= 1  # the space belongs to the answers
    if not chosen[:shared].strip() and chosen != rejected:
        problem = "has no beginning in common with rejected that could be the prompt, and there is no column 'prompt'"
        raise RecordError(record.key("chosen"), problem)
    prompt = with_system(record, [{"role": "user", "content": chosen[:shared]}])
    keys = [record.key("chosen"), record.key("rejected")]
    return compare(record, prompt, [chosen[shared:], rejected[shared:]], keys)


def read_steps(record: Record) -> Comparison:
    """Step-level pairs: ``initial_reason_steps`` that both answers go on from; the steps are not scored."""
    prompt = prompt_of(record)
    if record.get("initial_reason_steps"):
        prompt = [*prompt, {"role": "assistant", "content": record.text("initial_reason_steps")}]
    answers = [record.get("chosen"), record.get("rejected")]
    return compare(record, prompt, answers, [record.key("chosen"), record.key("rejected")])


def read_rejected_response(record: Record) -> Comparison:
    """ms-swift's: a conversation, the last turn of which is the chosen answer, and the rejected one beside it."""
    rejected_name = "rejected_messages" if "rejected_messages" in record else "rejected_response"
    rejected = record.get(rejected_name)
    if "query" in record:
        prompt, chosen, key = prompt_of(record), record.get("response"), record.key("response")
    else:
        key = record.key("messages")
        turns = parse_messages(record.get("messages"), key)
        if turns[-1]["role"] != "assistant":
            raise RecordError(key, "must end with the assistant's turn, which is the chosen answer")
        start = len(turns) - 1
        while turns[start - 1]["role"] == "assistant" and start > 1:
            start -= 1
        prompt, chosen = with_system(record, turns[:start]), turns[start:]
    return compare(record, prompt, [chosen, rejected], [key, record.key(rejected_name)])


def read_output_pair(record: Record) -> Comparison:
    """LLaMA-Factory's first form: ``output: [chosen, rejected]``."""
    output, key = record.get("output"), record.key("output")
    if not isinstance(output, list) or len(output) != 2:
        raise RecordError(key, f"must be a list of two answers, chosen and rejected, but is {kind(output)}")
    return compare(record, prompt_of(record), output, [f"{key}[0]", f"{key}[1]"])

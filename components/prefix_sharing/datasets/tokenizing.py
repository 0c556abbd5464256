"""From a record to the response sequences of an example: which turns are scored, what is cut, what is dropped."""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, get_args

import multiprocess
import numpy as np

from prefix_sharing.datasets.forms import FORMS, Comparison, Form, Record, RecordError
from prefix_sharing.datasets.ranking import PairStrategy, pairs_with_a_preference
from prefix_sharing.datasets.source import MAX_TEXT, to_record
from prefix_sharing.datasets.table import MALFORMED, dropped_example, tokenized_example
from prefix_sharing.distributed.processes import belong_to_parent
from prefix_sharing.errors import ConfigError, UserError
from prefix_sharing.fingerprint import code_fingerprint, fingerprint, source_of
from prefix_sharing.tokenizers import ChatTokenizer, TokenizedChat, Turn, tokenize_turns
from prefix_sharing.trees import common_prefix_length

MaskingStrategy = Literal["train_on_assistant", "train_on_last", "train_on_all"]
Truncation = Literal["keep_start", "keep_end", "drop", "split_turns"]
OnMalformed = Literal["stop", "drop"]

_RECORDS_PER_PROCESS = 1000
"""Below this, starting a process takes longer than its share of the work."""

EMPTY_SYSTEM_TURN: Turn = {"role": "system", "content": ""}

_Sequence = tuple[list[int], list[bool]]
"""Token ids, and which of them are scored."""


@dataclass(frozen=True)
class PreferenceOptions:
    """How records become examples; ``prefix_preference_dataset`` says what each option means.

    Raises:
        ConfigError: if an option has a value it cannot have.
    """

    format: str | None = None
    column_map: dict[str, str | None] = field(default_factory=dict)
    record_fn: Callable[[dict], dict] | None = None
    masking_strategy: MaskingStrategy = "train_on_assistant"
    new_system_prompt: str | None = None
    max_seq_len: int | None = None
    max_prompt_length: int | None = None
    truncation: Truncation = "keep_start"
    filter_fn: Callable[[dict], bool] | None = None
    pairs: PairStrategy = "best_vs_rest"
    group_by_prompt: bool = False
    on_malformed: OnMalformed = "stop"
    max_malformed: float = 0.1
    max_masked: float | None = None
    empty_system_prob: float = 0.0

    def __post_init__(self) -> None:
        for key, choices in (
            ("masking_strategy", get_args(MaskingStrategy)),
            ("truncation", get_args(Truncation)),
            ("pairs", get_args(PairStrategy)),
            ("on_malformed", get_args(OnMalformed)),
        ):
            if getattr(self, key) not in choices:
                raise ConfigError(key, f"must be one of {', '.join(choices)}, not {getattr(self, key)}")
        if self.max_prompt_length is not None:
            if self.max_prompt_length < 1:
                raise ConfigError("max_prompt_length", f"must be at least 1, but is {self.max_prompt_length}")
            if self.truncation == "keep_end":
                problem = "not used with truncation: keep_end, which takes everything from the start already"
                raise ConfigError("max_prompt_length", problem)
        if not 0 <= self.max_malformed <= 1:
            raise ConfigError("max_malformed", f"must be a share from 0 to 1, not {self.max_malformed}")
        if self.max_masked is not None and not 0 < self.max_masked <= 1:
            raise ConfigError("max_masked", f"must be a share above 0, at most 1, not {self.max_masked}")
        if not 0 <= self.empty_system_prob <= 1:
            raise ConfigError("empty_system_prob", f"must be a probability from 0 to 1, not {self.empty_system_prob}")
        if self.empty_system_prob > 0 and self.new_system_prompt is not None:
            raise ConfigError("empty_system_prob", "not used with new_system_prompt, which every conversation gets")


class MalformedRecordError(Exception):
    """A record that cannot be tokenized; travels from a worker process with its index."""

    def __init__(self, index: int, problem: str) -> None:
        super().__init__(index, problem)
        self.index = index
        self.problem = problem


@dataclass(frozen=True)
class TokenizeRecord:
    """A record to its line of the table. What it holds decides the fingerprint of the cached result.

    Args:
        tokenizer (ChatTokenizer): the tokenizer, without a limit of its own.
        form (Form): how to read records.
        options (PreferenceOptions): the options.
        is_json (bool): whether a record is a line of JSON.
    """

    tokenizer: ChatTokenizer
    form: Form
    options: PreferenceOptions
    is_json: bool
    sources: tuple[str | None, ...] = field(init=False)  # a function is hashed by its name alone
    code: str = field(init=False)

    def __post_init__(self) -> None:
        sources = source_of(self.options.filter_fn), source_of(self.options.record_fn)
        object.__setattr__(self, "sources", sources)
        object.__setattr__(self, "code", code_fingerprint("datasets", "tokenizers", "trees"))

    def __getstate__(self) -> dict[str, Any]:
        # The form by its name: its reader is one of this package's functions, whose code is in the state already.
        return {**self.__dict__, "form": self.form.name}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, form=FORMS[state["form"]])
        belong_to_map()

    def __call__(self, row: dict[str, Any], index: int) -> dict[str, Any]:
        """The line of a record; raises ``MalformedRecordError`` if it is malformed and that is to stop the run."""
        try:
            return self._line_of(row)
        except (RecordError, UserError, ValueError) as error:
            problem = f"{error.key} {error.problem}" if isinstance(error, RecordError) else str(error).rstrip(".")
            problem = _printable(problem)
            if self.options.on_malformed == "stop":
                raise MalformedRecordError(index, problem) from error
            return dropped_example(MALFORMED, problem=problem)

    def values_of(self, row: dict[str, Any]) -> dict[str, Any]:
        """A row's record as forms read it; raises ValueError if there is none."""
        return prepare_record(to_record(row, self.is_json), self.options.record_fn)

    def _line_of(self, row: dict[str, Any]) -> dict[str, Any]:
        values = self.values_of(row)
        if self.options.filter_fn is not None and not _call("filter_fn", self.options.filter_fn, values):
            return dropped_example("filtered out")
        record = Record(values, self.options.column_map)
        comparison = self.form.read(record)
        if self.options.pairs == "best_only" and len(comparison.conversations) > 1:
            comparison = comparison.best()
        self._add_empty_system(comparison)
        last_turns = [turns[-1] for turns in comparison.conversations]
        if any(
            not turn.get("content", "")[len(given) :].strip() and "tool_calls" not in turn
            for turn, given in zip(last_turns, comparison.given, strict=True)
        ):
            return dropped_example("empty response")
        chats = [
            self.chat_of(turns, given, comparison, self.options.masking_strategy)
            for turns, given in zip(comparison.conversations, comparison.given, strict=True)
        ]
        unused = [f"column {name}" for name in record.unused()]
        unused += [f"column {record.key('tools')}"] if any(chat.unused_tools for chat in chats) else []
        unused += [f"message key {name}" for name in dict.fromkeys(key for chat in chats for key in chat.unused)]
        return self._example_of(comparison, chats, [_printable(name) for name in unused])

    def _add_empty_system(self, comparison: Comparison) -> None:
        """Puts an empty system turn before the conversations of some prompts that have none."""
        prompt = comparison.conversations[0][:-1]
        if any(turns[0]["role"] == "system" for turns in comparison.conversations):
            return
        # By the prompt, so that it is the same in every run, place of the data set and answer.
        drawn = int(fingerprint(["empty system turn", prompt])[:8], 16) / 16**8
        if drawn < self.options.empty_system_prob:
            comparison.conversations = [[EMPTY_SYSTEM_TURN, *turns] for turns in comparison.conversations]

    def chat_of(
        self, turns: list[Turn], given: str, comparison: Comparison, strategy: MaskingStrategy
    ) -> TokenizedChat:
        """The tokens of a conversation, nothing cut; raises UserError or ValueError if there are none.

        Args:
            turns (list[Turn]): the conversation.
            given (str): the beginning of its last turn that is not scored.
            comparison (Comparison): whose it is, for its tools.
            strategy (MaskingStrategy): which of them are scored.

        Returns:
            TokenizedChat: its tokens.
        """
        if sum(len(turn.get("content", "")) for turn in turns) > MAX_TEXT:
            raise ValueError(f"it has more than {MAX_TEXT:,} characters")
        if strategy == "train_on_assistant":
            scored = [turn["role"] == "assistant" for turn in turns]
        else:
            # What a tool returned is nobody's to learn.
            scored = [strategy == "train_on_all" and turn["role"] != "tool" for turn in turns[:-1]] + [True]
        if self.options.new_system_prompt is not None:
            others = [(turn, flag) for turn, flag in zip(turns, scored, strict=True) if turn["role"] != "system"]
            turns = [{"role": "system", "content": self.options.new_system_prompt}, *(turn for turn, _ in others)]
            scored = [False, *(flag for _, flag in others)]

        def tokenize(turns: list[Turn], scored: list[bool]) -> TokenizedChat:
            try:
                return tokenize_turns(self.tokenizer, turns, scored, comparison.tools, comparison.template_kwargs)
            except UserError as error:
                if turns[0] is not EMPTY_SYSTEM_TURN:
                    raise
                raise UserError(f"{str(error).rstrip('.')}; the system turn comes from empty_system_prob.") from error

        chat = tokenize(turns, scored)
        if not given:
            return chat
        nothing = [False] * len(turns)
        beginning = tokenize([*turns[:-1], {**turns[-1], "content": given}], nothing).tokens
        of_last_turn = tokenize(turns, [*nothing[:-1], True]).scored
        shared = common_prefix_length([np.array(beginning), np.array(chat.tokens)])
        is_given = [t < shared and flag for t, flag in enumerate(of_last_turn)]
        flags = [flag and not of_given for flag, of_given in zip(chat.scored, is_given, strict=True)]
        return replace(chat, scored=flags)

    def _prompt_cut(self, comparison: Comparison, longest: int) -> int:
        """How many tokens to take from the start of every response, so that the prompt has ``max_prompt_length``."""
        limit, most = self.options.max_seq_len, self.options.max_prompt_length
        if limit is None or most is None or longest <= limit:
            return 0
        prompts = [
            int(np.argmax(self.chat_of(turns, given, comparison, "train_on_last").scored))
            for turns, given in zip(comparison.conversations, comparison.given, strict=True)
        ]
        return max(0, min(max(prompts) - most, min(prompts)))  # nothing of an answer to a shorter prompt

    def _example_of(
        self, comparison: Comparison, chats: Sequence[TokenizedChat], unused: Sequence[str]
    ) -> dict[str, Any]:
        limit, longest = self.options.max_seq_len, max(len(chat.tokens) for chat in chats)
        cut = self._prompt_cut(comparison, longest)
        if cut:
            chats = [replace(chat, tokens=chat.tokens[cut:], scored=chat.scored[cut:]) for chat in chats]
            longest -= cut
        remarks = {
            "num_cut": 0,
            "num_without_end": 0,
            "prompt_cut": cut > 0,
            "lost_text": any(chat.lost_text for chat in chats),
            "unused": list(unused),
        }
        if limit is not None and self.options.truncation == "drop" and longest > limit:
            return dropped_example("longer than max_seq_len", remarks)
        whole = [(chat.tokens, chat.scored) for chat in chats]
        if limit is None:
            keep = slice(None)
        elif self.options.truncation == "keep_end":
            keep = slice(max(0, longest - limit), None)
        else:
            keep = slice(limit)
        responses = [(tokens[keep], scored[keep]) for tokens, scored in whole]
        if any(not any(scored[1:]) for _, scored in whole):
            return dropped_example("nothing scored", remarks)
        if any(not any(scored[1:]) for _, scored in responses):
            return dropped_example("nothing scored up to max_seq_len", remarks)
        flags = [is_scored for _, scored in responses for is_scored in scored]
        if self.options.max_masked is not None and flags.count(False) > self.options.max_masked * len(flags):
            return dropped_example("more masked than max_masked", remarks)
        tokens = [ids for ids, _ in responses]
        pairs = pairs_with_a_preference(tokens, comparison.scores, self.options.pairs)
        if len(tokens) > 1 and not pairs:
            is_tied = any(ids != tokens[0] for ids in tokens)
            return dropped_example("tied scores" if is_tied else _why_identical(comparison, whole), remarks)
        # What is in no pair need not be computed.
        used = sorted({k for pair in pairs for k in pair}) or list(range(len(responses)))
        is_cut = [limit is not None and keep.start is None and len(chat.tokens) > limit for chat in chats]
        remarks["num_cut"] = sum(is_cut[k] for k in used)
        remarks["num_without_end"] = sum(not chats[k].has_end and not is_cut[k] for k in used)
        return tokenized_example(
            [responses[k][0] for k in used],
            [responses[k][1] for k in used],
            [(used.index(chosen), used.index(rejected)) for chosen, rejected in pairs],
            _prompt_of(comparison),
            comparison.scores or () if len(tokens) == 1 else (),
            remarks,
            () if comparison.label is None else [1 if comparison.label else -1],
        )


def processes_for(num_records: int) -> int | None:
    """How many processes read some records.

    Args:
        num_records (int): how many there are.

    Returns:
        int | None: for ``datasets.Dataset.map``; None is this process.
    """
    number = min(os.cpu_count() or 1, num_records // _RECORDS_PER_PROCESS)
    return number if number > 1 else None


def belong_to_map() -> None:
    """Ends with the process that called ``datasets.Dataset.map``, where this is one of those that work for it."""
    if multiprocess.parent_process() is not None:
        belong_to_parent()


def prepare_record(values: dict[str, Any], record_fn: Callable[[dict], dict] | None) -> dict[str, Any]:
    """A record as forms read it.

    Args:
        values (dict[str, Any]): the record as it was loaded.
        record_fn (Callable[[dict], dict] | None): the user's function that makes a record of a known form of it.

    Returns:
        dict[str, Any]: the record.

    Raises:
        ValueError: if the function fails, or returns something else.
    """
    if record_fn is None:
        return values
    made = _call("record_fn", record_fn, values)
    if not isinstance(made, dict):
        raise ValueError(f"record_fn returns a {type(made).__name__}, but must return a dict")
    return made


def _printable(text: str) -> str:
    """Text in one line, with what UTF-8 cannot hold as an escape."""
    return " ".join(text.encode(errors="backslashreplace").decode().split())


def _call(key: str, function: Callable[[dict], Any], values: dict[str, Any]) -> Any:
    try:
        return function(values)
    except Exception as error:  # the user's own code
        raise ValueError(f"{key} fails with {type(error).__name__}: {error}") from error


def _why_identical(comparison: Comparison, whole: Sequence[_Sequence]) -> str:
    """Where responses became identical: in the data, in its reading, in the template or by the cut."""
    for things, reason in (
        (comparison.raw, "identical responses"),
        (comparison.conversations, "identical after reading"),
        ([tokens for tokens, _ in whole], "identical after the chat template"),
    ):
        if all(thing == things[0] for thing in things):
            return reason
    return "identical up to max_seq_len"


def _prompt_of(comparison: Comparison) -> str:
    prompts = [(turns[:-1], given) for turns, given in zip(comparison.conversations, comparison.given, strict=True)]
    if any(prompt != prompts[0] for prompt in prompts):
        return ""
    return fingerprint([prompts[0], comparison.tools, comparison.template_kwargs])

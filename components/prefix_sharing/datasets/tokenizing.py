"""From a record to the response sequences of an example: which turns are scored, what is cut, what is dropped."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from prefix_sharing.datasets.forms import Format, RecordError, scores_best_first, to_conversations
from prefix_sharing.datasets.ranking import PairStrategy, pairs_with_a_preference
from prefix_sharing.datasets.table import dropped_example, tokenized_example
from prefix_sharing.errors import ConfigError, UserError
from prefix_sharing.fingerprint import code_fingerprint, fingerprint, source_of
from prefix_sharing.tokenizers import ChatTokenizer, Turn, tokenize_turns

MaskingStrategy = Literal["train_on_assistant", "train_on_last", "train_on_all"]
Truncation = Literal["keep_start", "keep_end", "drop"]

_Sequence = tuple[list[int], list[bool]]
"""Token ids, and which of them are scored."""


@dataclass(frozen=True)
class PreferenceOptions:
    """How records become examples; ``prefix_preference_dataset`` says what each option means.

    Raises:
        ConfigError: if an option has a value it cannot have.
    """

    format: Format | None = None
    column_map: dict[str, str] = field(default_factory=dict)
    masking_strategy: MaskingStrategy = "train_on_assistant"
    new_system_prompt: str | None = None
    max_seq_len: int | None = None
    truncation: Truncation = "keep_start"
    filter_fn: Callable[[dict], bool] | None = None
    pairs: PairStrategy = "best_vs_rest"
    group_by_prompt: bool = False

    def __post_init__(self) -> None:
        for key, choices in (
            ("masking_strategy", get_args(MaskingStrategy)),
            ("truncation", get_args(Truncation)),
            ("pairs", get_args(PairStrategy)),
        ):
            if getattr(self, key) not in choices:
                raise ConfigError(key, f"must be one of {', '.join(choices)}, not {getattr(self, key)}")


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
        format (Format): how to read records.
        options (PreferenceOptions): the options.
    """

    tokenizer: ChatTokenizer
    format: Format
    options: PreferenceOptions
    filter_source: str | None = field(init=False)  # a function is hashed by its name alone
    code: str = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "filter_source", source_of(self.options.filter_fn))
        object.__setattr__(self, "code", code_fingerprint("datasets", "tokenizers", "trees"))

    def __call__(self, record: dict[str, Any], index: int) -> dict[str, Any]:
        """The line of a record; raises ``MalformedRecordError`` if it is malformed."""
        if self.options.filter_fn is not None and not self.options.filter_fn(record):
            return dropped_example("filtered out")
        try:
            conversations = to_conversations(record, self.format, self.options.column_map)
            if any(not conversation[-1]["content"].strip() for conversation in conversations):
                return dropped_example("empty response")
            responses = [self._tokenize(turns) for turns in conversations]
        except RecordError as error:
            raise MalformedRecordError(index, f"{error.key} {error.problem}") from error
        except UserError as error:
            raise MalformedRecordError(index, str(error).rstrip(".")) from error
        prompts = [turns[:-1] for turns in conversations]
        prompt = fingerprint(prompts[0]) if all(p == prompts[0] for p in prompts) else ""
        scores = scores_best_first(record, self.format, self.options.column_map)
        return self._example_of(responses, scores, prompt)

    def _tokenize(self, turns: list[Turn]) -> _Sequence:
        strategy = self.options.masking_strategy
        if strategy == "train_on_assistant":
            scored = [turn["role"] == "assistant" for turn in turns]
        else:
            scored = [strategy == "train_on_all"] * (len(turns) - 1) + [True]
        if self.options.new_system_prompt is not None:
            others = [(turn, flag) for turn, flag in zip(turns, scored, strict=True) if turn["role"] != "system"]
            turns = [{"role": "system", "content": self.options.new_system_prompt}, *(turn for turn, _ in others)]
            scored = [False, *(flag for _, flag in others)]
        return tokenize_turns(self.tokenizer, turns, scored)

    def _example_of(
        self, responses: Sequence[_Sequence], scores: Sequence[float] | None, prompt: str
    ) -> dict[str, Any]:
        limit, longest = self.options.max_seq_len, max(len(tokens) for tokens, _ in responses)
        if limit is not None:
            if self.options.truncation == "drop" and longest > limit:
                return dropped_example("longer than max_seq_len")
            keep_end = self.options.truncation == "keep_end"
            keep = slice(max(0, longest - limit), None) if keep_end else slice(limit)
            responses = [(tokens[keep], scored[keep]) for tokens, scored in responses]
        if any(not any(scored[1:]) for _, scored in responses):
            return dropped_example("nothing scored")
        tokens = [ids for ids, _ in responses]
        pairs = pairs_with_a_preference(tokens, scores, self.options.pairs)
        if len(tokens) > 1 and not pairs:
            return dropped_example("tied scores" if any(ids != tokens[0] for ids in tokens) else "identical responses")
        # What is in no pair need not be computed.
        used = sorted({k for pair in pairs for k in pair}) or list(range(len(responses)))
        return tokenized_example(
            [responses[k][0] for k in used],
            [responses[k][1] for k in used],
            [(used.index(chosen), used.index(rejected)) for chosen, rejected in pairs],
            prompt,
        )

"""A tokenizer that follows a Hugging Face model's own chat template, for use wherever torchtune takes a tokenizer.

The conversation is rendered once and encoded once, so the token ids are those of transformers'
``apply_chat_template``. Each turn is then found in the rendered text, and from there in the tokens.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenizers import Encoding, Tokenizer
from torchtune.data import Message

from prefix_sharing.errors import UserError
from prefix_sharing.tokenizers.chat_template import ChatTemplate
from prefix_sharing.tokenizers.chat_tokenizer import Turn


class HFChatTokenizer:
    """Tokenizes conversations by a model's chat template, with masks as torchtune's model tokenizers give them.

    Scored are the tokens of each unmasked turn from behind the generation prompt (``<|im_start|>assistant`` and the
    like) up to and including its end-of-turn token. A token that the tokenizer merges across the start of a turn
    belongs to the turn.

    Args:
        path (str): directory with ``tokenizer.json``, ``tokenizer_config.json`` and, unless the latter holds
            the template, ``chat_template.jinja``.
        max_seq_len (int | None): longest sequence ``tokenize_messages`` returns; longer ones lose their end.
            Default: None.

    Raises:
        UserError: if a file is missing or there is no chat template.
    """

    path: str
    max_seq_len: int | None
    _definition: str
    _template_source: str
    _named_tokens: dict[str, str]

    def __init__(self, path: str, max_seq_len: int | None = None) -> None:
        directory = Path(path)
        # All special tokens come from the template. Without its post-processor the tokenizer adds none of its own, and
        # reports where whitespace tokens are.
        definition = json.loads(_read(directory / "tokenizer.json")) | {"post_processor": None}
        config = json.loads(_read(directory / "tokenizer_config.json"))
        self.__setstate__(
            {
                "path": str(path),
                "max_seq_len": max_seq_len,
                "_definition": json.dumps(definition),
                "_template_source": _find_template(directory, config),
                "_named_tokens": _named_tokens(config),
            }
        )

    def __getstate__(self) -> dict[str, Any]:
        # Only what decides the tokens, so that equal tokenizers have equal fingerprints in the datasets cache.
        names = ("path", "max_seq_len", "_definition", "_template_source", "_named_tokens")
        return {name: self.__dict__[name] for name in names}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._template = ChatTemplate(self._template_source, self._named_tokens, self.path)
        self._tokenizer = Tokenizer.from_str(self._definition)
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        added_tokens = self._tokenizer.get_added_tokens_decoder()
        self.special_tokens = {token.content: i for i, token in added_tokens.items() if token.special}
        self._special_ids = frozenset(self.special_tokens.values())
        self.bos_id, self.eos_id, pad_id = (
            self._tokenizer.token_to_id(self._named_tokens.get(name, ""))
            for name in ("bos_token", "eos_token", "pad_token")
        )
        # torchtune's generate leaves out what it takes for padding, which must not be the ends of turns in a prompt.
        unused = self._special_ids - {self.bos_id, self.eos_id}
        self.pad_id = pad_id if pad_id not in (None, self.eos_id) else max(unused, default=0)

    @property
    def vocab_size(self) -> int:
        """Number of tokens, added ones included."""
        return self._tokenizer.get_vocab_size(with_added_tokens=True)

    @property
    def stop_tokens(self) -> list[int]:
        """Tokens that end an answer: EOS, and what the template puts behind it."""
        turns = [Message(role="user", content="q", masked=True), Message(role="assistant", content="a", masked=False)]
        ids, masked = self.tokenize_messages(turns)
        last = [token for token, is_masked in zip(ids, masked, strict=True) if not is_masked][-1]
        return [token for token in dict.fromkeys((self.eos_id, last)) if token in self._special_ids]

    def encode(self, text: str, add_bos: bool = True, add_eos: bool = True) -> list[int]:
        """Encodes plain text.

        Args:
            text (str): the text.
            add_bos (bool): whether to put the BOS token first, if there is one. Default: True.
            add_eos (bool): whether to put the EOS token last, if there is one. Default: True.

        Returns:
            list[int]: token ids.
        """
        ids = self._tokenizer.encode(text, add_special_tokens=False).ids
        bos = [self.bos_id] if add_bos and self.bos_id is not None else []
        eos = [self.eos_id] if add_eos and self.eos_id is not None else []
        return bos + ids + eos

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Decodes token ids into text.

        Args:
            token_ids (Sequence[int]): token ids.
            skip_special_tokens (bool): whether to leave special tokens out. Default: True.

        Returns:
            str: the text.
        """
        return self._tokenizer.decode(list(token_ids), skip_special_tokens=skip_special_tokens)

    def tokenize_messages(
        self, messages: list[Message], *, add_end_tokens: bool = True
    ) -> tuple[list[int], list[bool]]:
        """Tokenizes a conversation.

        Args:
            messages (list[Message]): the conversation, text only.
            add_end_tokens (bool): False ends with the generation prompt, for generation; it takes the place of a last,
                empty turn of the assistant, with which torchtune's recipes ask for an answer. Default: True.

        Returns:
            tuple[list[int], list[bool]]: token ids, and for each whether it is masked, that is, not scored.

        Raises:
            UserError: if the template refuses the conversation, or a scored turn cannot be found with certainty in what
                the template makes of it.
        """
        if not add_end_tokens and messages[-1].role == "assistant" and not messages[-1].text_content:
            messages = messages[:-1]
        turns = [_to_turn(message) for message in messages]
        text = self._template.render(turns, add_generation_prompt=not add_end_tokens)
        encoding = self._tokenizer.encode(text, add_special_tokens=False)
        mask = [True] * len(encoding.ids)
        scored_turns = [i for i, message in enumerate(messages) if not message.masked]
        if add_end_tokens and scored_turns:
            # Nothing follows the last turn, so the first special token behind it ends a turn.
            _, end = self._find_tokens(turns, len(turns) - 1, text, encoding)
            end_of_turn = {self.eos_id, *[t for t in encoding.ids[end:] if t in self._special_ids][:1]}
            for i in scored_turns:
                start, end = self._find_tokens(turns, i, text, encoding)
                behind = (t for t in range(end, len(mask)) if encoding.ids[t] in self._special_ids)
                first_special = next(behind, None)
                if first_special is not None and encoding.ids[first_special] in end_of_turn:
                    end = first_special + 1
                mask[start:end] = [False] * (end - start)
        length = len(mask) if self.max_seq_len is None else self.max_seq_len
        return encoding.ids[:length], mask[:length]

    def __call__(self, sample: Mapping[str, Any], inference: bool = False) -> Mapping[str, Any]:
        """Tokenizes ``sample["messages"]``, as torchtune's transforms do.

        Args:
            sample (Mapping[str, Any]): a sample with a list of ``Message`` under ``messages``.
            inference (bool): whether to end with the generation prompt. Default: False.

        Returns:
            Mapping[str, Any]: the sample with ``tokens`` and ``mask`` in place of ``messages``.
        """
        sample = dict(sample)
        messages = sample.pop("messages")
        sample["tokens"], sample["mask"] = self.tokenize_messages(messages, add_end_tokens=not inference)
        return sample

    def _find_tokens(self, turns: list[Turn], i: int, text: str, encoding: Encoding) -> tuple[int, int]:
        """The range of tokens that overlap turn i."""
        start, end = self._template.find_turn(turns, i, text)
        offsets = encoding.offsets
        first = next((t for t, (_, token_end) in enumerate(offsets) if token_end > start), len(offsets))
        last = next((t for t in range(first, len(offsets)) if offsets[t][0] >= end), len(offsets))
        return first, last


def hf_chat_tokenizer(path: str, max_seq_len: int | None = None) -> HFChatTokenizer:
    """Builds a tokenizer from a Hugging Face model's files, for a config.

    Args:
        path (str): directory with ``tokenizer.json`` and a chat template, usually the model's own.
        max_seq_len (int | None): longest sequence in tokens. Default: None.

    Returns:
        HFChatTokenizer: the tokenizer.

    Example:
        .. code-block:: yaml

            tokenizer:
              _component_: prefix_sharing.tokenizers.hf_chat_tokenizer
              path: /tmp/SmolLM2-135M-Instruct
              max_seq_len: 1024
    """
    return HFChatTokenizer(path=path, max_seq_len=max_seq_len)


def _read(file: Path) -> str:
    if not file.is_file():
        raise UserError(f"{file} not found; path must be a directory with a Hugging Face tokenizer.")
    return file.read_text(encoding="utf-8")


def _find_template(directory: Path, config: dict[str, Any]) -> str:
    file = directory / "chat_template.jinja"
    if file.is_file():
        return file.read_text(encoding="utf-8")
    template = config.get("chat_template")
    if isinstance(template, list):  # several, by name
        template = {entry["name"]: entry["template"] for entry in template}.get("default")
    if template is None:
        raise UserError(
            f"{directory} has no chat template, neither in chat_template.jinja nor in tokenizer_config.json; "
            "add one, or use one of torchtune's tokenizers."
        )
    return template


def _named_tokens(config: dict[str, Any]) -> dict[str, str]:
    """Names such as ``bos_token`` and their texts, which templates may use."""
    tokens = {}
    for name, value in config.items():
        text = value.get("content") if isinstance(value, dict) else value
        if name.endswith("_token") and isinstance(text, str):
            tokens[name] = text
    return tokens


def _to_turn(message: Message) -> Turn:
    if message.contains_media:
        raise UserError("hf_chat_tokenizer takes text only, but a message has an image.")
    role = "tool" if message.role == "ipython" else message.role
    return {"role": role, "content": message.text_content}

"""A tokenizer that follows a Hugging Face model's own chat template, for use wherever torchtune takes a tokenizer.

The conversation is rendered once and encoded once, so the token ids are those of transformers'
``apply_chat_template``. Each turn is then found in the rendered text, and from there in the tokens.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from tokenizers import AddedToken, Encoding, Tokenizer
from torchtune.data import Message

from prefix_sharing.errors import UserError
from prefix_sharing.tokenizers.chat_template import ChatTemplate, RenderedChat
from prefix_sharing.tokenizers.chat_tokenizer import REASONING_KEYS, TokenizedChat, Turn


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
        chat_template_kwargs (Mapping[str, Any] | None): variables for the template, such as ``enable_thinking``.
            Default: None.

    Raises:
        UserError: if a file is missing or there is no chat template.
    """

    path: str
    max_seq_len: int | None
    chat_template_kwargs: dict[str, Any]
    _definition: str
    _template_sources: dict[str, str]
    _named_tokens: dict[str, str]
    _special_texts: list[str]

    def __init__(
        self, path: str, max_seq_len: int | None = None, chat_template_kwargs: Mapping[str, Any] | None = None
    ) -> None:
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
                "chat_template_kwargs": dict(chat_template_kwargs or {}),
                "_template_sources": _find_templates(directory, config),
                "_named_tokens": _named_tokens(directory, config),
                "_special_texts": _special_texts(directory, config),
            }
        )

    def __getstate__(self) -> dict[str, Any]:
        # Only what decides the tokens, so that equal tokenizers have equal fingerprints in the datasets cache.
        names = (
            "path",
            "max_seq_len",
            "chat_template_kwargs",
            "_definition",
            "_template_sources",
            "_named_tokens",
            "_special_texts",
        )
        return {name: self.__dict__[name] for name in names}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._templates = {
            name: ChatTemplate(source, self._named_tokens, self.path) for name, source in self._template_sources.items()
        }
        self._tokenizer = Tokenizer.from_str(self._definition)
        self._tokenizer.add_special_tokens(
            [AddedToken(token, special=True, normalized=False) for token in self._special_texts]
        )
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        added_tokens = self._tokenizer.get_added_tokens_decoder()
        self.special_tokens = {
            token.content: i
            for i, token in added_tokens.items()
            if token.special or token.content in self._special_texts
        }
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
    def vocab(self) -> dict[str, int]:
        """Ids by token, added ones included."""
        return self._tokenizer.get_vocab(with_added_tokens=True)

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
        if add_end_tokens:
            chat = self.tokenize_chat(turns, [not message.masked for message in messages])
            tokens, masked = chat.tokens, [not is_scored for is_scored in chat.scored]
        else:
            text = self._templates["default"].render(turns, None, self.chat_template_kwargs, add_generation_prompt=True)
            tokens = self._tokenizer.encode(text, add_special_tokens=False).ids
            masked = [True] * len(tokens)
        return tokens[: self.max_seq_len], masked[: self.max_seq_len]

    def tokenize_chat(
        self,
        turns: Sequence[Turn],
        scored: Sequence[bool],
        tools: Sequence[Mapping[str, Any]] | None = None,
        template_kwargs: Mapping[str, Any] | None = None,
    ) -> TokenizedChat:
        """Tokenizes a conversation with whatever the template knows of: tools, tool calls, thoughts. Cuts nothing.

        Args:
            turns (Sequence[Turn]): the conversation.
            scored (Sequence[bool]): which turns count towards the log-prob. Of a call, that is all the template makes
                of it.
            tools (Sequence[Mapping[str, Any]] | None): the tools there are. Default: None.
            template_kwargs (Mapping[str, Any] | None): variables for the template, which go before the
                tokenizer's own. Default: None.

        Returns:
            TokenizedChat: its tokens, which are those of transformers' ``apply_chat_template``.

        Raises:
            UserError: if the template refuses the conversation, or a scored turn cannot be found with certainty in what
                the template makes of it.
        """
        # As in transformers, a template of this name is for conversations with tools.
        template = self._templates.get("default" if tools is None else "tool_use", self._templates["default"])
        if not template.uses("tool_calls") and any("tool_calls" in turn for turn in turns):
            raise UserError(f"the chat template of {self.path} has no place for tool_calls; use another chat template.")
        chat = template.chat(turns, tools, {**self.chat_template_kwargs, **(template_kwargs or {})})
        try:
            chat.text.encode()
        except UnicodeEncodeError as error:
            raise UserError("half of a surrogate pair is somewhere in it, which no tokenizer can take.") from error
        for i, turn in enumerate(turns):
            if "tool_calls" in turn and not chat.shows_call(i):
                problem = f"leaves out the tool_calls of turn {i + 1} of {len(turns)}"
                raise UserError(f"the chat template of {self.path} {problem}; use another chat template.")
        encoding = self._tokenizer.encode(chat.text, add_special_tokens=False)
        flags = [False] * len(encoding.ids)
        scored_turns = [i for i, is_scored in enumerate(scored) if is_scored]
        others = [i for i, is_scored in enumerate(scored) if not is_scored and turns[i]["role"] != "assistant"]
        lost_text = not all(chat.shows_content(i) for i in others)
        results = [chat.find_content(i) for i in others if turns[i]["role"] == "tool"]
        end_of_turn = self._ends_of_turns(chat, turns, encoding) if scored_turns else set()
        for i in scored_turns:
            found = chat.find_call(i) if "tool_calls" in turns[i] else None
            start, end = found or chat.find_turn(i)
            lost_text |= not chat.keeps_text(i, start, end)
            if any(place is not None and start <= place < end for place in results):
                problem = "puts results of tools into the assistant's turn, where they cannot be told from its words"
                raise UserError(f"the chat template of {self.path} {problem}; use another chat template.")
            first, last = _tokens_between(encoding, start, end)
            if found is None:
                behind = next((t for t in range(last, len(flags)) if encoding.ids[t] in self._special_ids), None)
                if behind is not None and encoding.ids[behind] in end_of_turn:
                    last = behind + 1
            else:
                last = self._end_of_call(encoding, chat.text, first, last)
            flags[first:last] = [True] * (last - first)
        final = next((t for t in reversed(range(len(flags))) if flags[t]), None)
        keys = dict.fromkeys(key for turn in turns for key in turn if key not in ("role", "content"))
        names = {key: REASONING_KEYS[:2] if key in REASONING_KEYS else (key,) for key in keys}
        unused = [key for key in keys if not any(map(template.uses, names[key]))]
        return TokenizedChat(
            encoding.ids,
            flags,
            has_end=final is not None and encoding.ids[final] in self._special_ids | {self.eos_id},
            lost_text=lost_text,
            unused=tuple(unused),
            unused_tools=bool(tools) and not template.uses("tools"),
        )

    def _ends_of_turns(self, chat: RenderedChat, turns: Sequence[Turn], encoding: Encoding) -> set[int | None]:
        """Tokens that end a turn: EOS, and the first special one behind the last turn, as nothing follows that one."""
        if "tool_calls" in turns[-1]:
            return {self.eos_id, *self.stop_tokens}
        _, end = _tokens_between(encoding, *chat.find_turn(len(turns) - 1))
        return {self.eos_id, *[t for t in encoding.ids[end:] if t in self._special_ids][:1]}

    def _end_of_call(self, encoding: Encoding, text: str, first: int, last: int) -> int:
        """The end of a call's tokens: behind the special token that ends the turn, without the whitespace after it."""
        while last > first and not text[slice(*encoding.offsets[last - 1])].strip():
            last -= 1
        return last

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


def _tokens_between(encoding: Encoding, start: int, end: int) -> tuple[int, int]:
    """The range of tokens that overlap a range of the text."""
    offsets = encoding.offsets
    first = next((t for t, (_, token_end) in enumerate(offsets) if token_end > start), len(offsets))
    last = next((t for t in range(first, len(offsets)) if offsets[t][0] >= end), len(offsets))
    return first, last


def hf_chat_tokenizer(
    path: str, max_seq_len: int | None = None, chat_template_kwargs: Mapping[str, Any] | None = None
) -> HFChatTokenizer:
    """Builds a tokenizer from a Hugging Face model's files, for a config.

    Args:
        path (str): directory with ``tokenizer.json`` and a chat template, usually the model's own.
        max_seq_len (int | None): longest sequence in tokens. Default: None.
        chat_template_kwargs (Mapping[str, Any] | None): variables for the template, such as
            ``{enable_thinking: False}``; those of a record's own go before them. Default: None.

    Returns:
        HFChatTokenizer: the tokenizer.

    Example:
        .. code-block:: yaml

            tokenizer:
              _component_: prefix_sharing.tokenizers.hf_chat_tokenizer
              path: /tmp/SmolLM2-135M-Instruct
              max_seq_len: 1024
    """
    kwargs: Any = chat_template_kwargs
    if isinstance(kwargs, DictConfig):
        kwargs = OmegaConf.to_container(kwargs, resolve=True)
    return HFChatTokenizer(path, max_seq_len, kwargs)


def _read(file: Path) -> str:
    if not file.is_file():
        raise UserError(f"{file} not found; path must be a directory with a Hugging Face tokenizer.")
    return file.read_text(encoding="utf-8")


def _find_templates(directory: Path, config: dict[str, Any]) -> dict[str, str]:
    """The model's templates by name, from wherever transformers would read them; one of them is ``default``."""
    templates = config.get("chat_template") or {}
    if isinstance(templates, str):
        templates = {"default": templates}
    elif isinstance(templates, list):
        templates = {entry["name"]: entry["template"] for entry in templates}
    file = directory / "chat_template.jinja"
    if file.is_file():
        templates = {"default": file.read_text(encoding="utf-8")}
        for other in sorted((directory / "additional_chat_templates").glob("*.jinja")):
            templates[other.stem] = other.read_text(encoding="utf-8")
    if "default" not in templates:
        raise UserError(
            f"{directory} has no chat template, neither in chat_template.jinja nor in tokenizer_config.json; "
            "add one, or use one of torchtune's tokenizers."
        )
    return templates


def _named_tokens(directory: Path, config: dict[str, Any]) -> dict[str, str]:
    """Names such as ``bos_token`` and their texts, which templates may use, by transformers' rules."""
    named = _special_tokens_of(directory, config)
    extra = named.get("extra_special_tokens")
    named |= extra if isinstance(extra, dict) else {}
    return {name: text for name, value in named.items() if name.endswith("_token") and (text := _text_of(value))}


def _special_texts(directory: Path, config: dict[str, Any]) -> list[str]:
    """The texts of all special tokens that the files beside ``tokenizer.json`` name, which it may lack."""
    listed = sorted((int(i), token) for i, token in config.get("added_tokens_decoder", {}).items())
    texts = [token["content"] for _, token in listed if token.get("special")]
    texts += _named_tokens(directory, config).values()
    for name in ("additional_special_tokens", "extra_special_tokens"):
        more = _special_tokens_of(directory, config).get(name)
        texts += [text for value in more if (text := _text_of(value))] if isinstance(more, list) else []
    return list(dict.fromkeys(texts))


def _special_tokens_of(directory: Path, config: dict[str, Any]) -> dict[str, Any]:
    """``tokenizer_config.json``, with ``special_tokens_map.json`` going first unless it lists its added tokens."""
    file = directory / "special_tokens_map.json"
    if "added_tokens_decoder" in config or not file.is_file():
        return dict(config)
    return config | json.loads(file.read_text(encoding="utf-8"))


def _text_of(value: Any) -> str | None:
    text = value.get("content") if isinstance(value, dict) else value
    return text if isinstance(text, str) else None


def _to_turn(message: Message) -> Turn:
    if message.contains_media:
        raise UserError("hf_chat_tokenizer takes text only, but a message has an image.")
    role = "tool" if message.role == "ipython" else message.role
    return {"role": role, "content": message.text_content}

"""Tokenizers with torchtune's interface that torchtune does not have, and what is asked of any."""

from prefix_sharing.tokenizers.chat_tokenizer import (
    REASONING_KEYS,
    ChatTokenizer,
    TokenizedChat,
    Turn,
    decode_all,
    tokenize_turns,
)
from prefix_sharing.tokenizers.hf_chat import HFChatTokenizer, hf_chat_tokenizer

__all__ = [
    "REASONING_KEYS",
    "ChatTokenizer",
    "HFChatTokenizer",
    "TokenizedChat",
    "Turn",
    "decode_all",
    "hf_chat_tokenizer",
    "tokenize_turns",
]

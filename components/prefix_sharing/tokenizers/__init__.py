"""Tokenizers with torchtune's interface that torchtune does not have."""

from prefix_sharing.tokenizers.hf_chat import HFChatTokenizer, hf_chat_tokenizer

__all__ = ["HFChatTokenizer", "hf_chat_tokenizer"]

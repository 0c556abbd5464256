"""Makes the tokenizer shipped for the quickstart: a byte-level BPE of 2,048 tokens with a chat template.

Trained on the docstrings of Python's standard library, for general English, and on the quickstart's own pairs. It is
made once and shipped; to make it again::

    python -m prefix_sharing.quickstart.make_tokenizer OUTPUT_DIR
"""

import ast
import json
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from prefix_sharing.quickstart.pairs import FILLER, PLACES, generate_pairs

VOCAB_SIZE = 2048
PAD, START, END = "<|pad|>", "<|start|>", "<|end|>"

CHAT_TEMPLATE = """{%- for message in messages -%}
{{ '<|start|>' + message['role'] + '\\n' + message['content'] + '<|end|>' }}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{ '<|start|>assistant\\n' }}
{%- endif -%}
"""


def main(output_dir: str) -> None:
    """Writes ``tokenizer.json``, ``tokenizer_config.json`` and ``chat_template.jinja``.

    Args:
        output_dir (str): where to.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[PAD, START, END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([*_docstrings(), *_quickstart_texts()], trainer)

    directory = Path(output_dir)
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(directory / "tokenizer.json"))
    config = {"bos_token": START, "eos_token": END, "pad_token": PAD, "tokenizer_class": "PreTrainedTokenizerFast"}
    (directory / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
    (directory / "chat_template.jinja").write_text(CHAT_TEMPLATE)


def _docstrings() -> Iterator[str]:
    for file in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and (text := ast.get_docstring(node)):
                yield text


def _quickstart_texts() -> Iterator[str]:
    for pair in generate_pairs(400, seed=0):
        yield from pair.values()
    # Each word often enough to be one token, wherever in a sentence.
    for word in {*FILLER, *PLACES, *" ".join(PLACES.values()).split()}:
        yield f" {word}" * 200
    for role in ("system", "user", "assistant"):
        yield f"{role}\n" * 200


if __name__ == "__main__":
    main(sys.argv[1])

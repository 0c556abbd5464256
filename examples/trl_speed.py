"""Times TRL's DPOTrainer and PrefixSharingDPOTrainer, side by side.

    python examples/trl_speed.py [directory of a model]

Both train on the same pairs of random tokens, with TRL's defaults. First, prompts have 512 tokens and answers 128, two
pairs in a micro-batch. Then their lengths are like those of HH-RLHF, eight pairs in a micro-batch. The trainers take
turns, and medians over the rounds are printed. Without a directory it makes a random model of SmolLM2-135M's size,
which takes two CPU cores half an hour.
"""

import statistics
import sys
import tempfile
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PrinterCallback
from trl import DPOConfig, DPOTrainer

from prefix_sharing.benchmark.workloads import draw_lengths, make_pairs
from prefix_sharing.quickstart.checkpointer import TOKENIZER_DIR
from prefix_sharing.trl import PrefixSharingDPOTrainer

ROUNDS = 4  # the first of which does not count
STEPS = 2


def make_model(directory: str) -> str:
    """Writes a random model."""
    sizes: dict[str, Any] = {"vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536}
    layers: dict[str, Any] = {"num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3}
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(tie_word_embeddings=True, **sizes, **layers)).save_pretrained(directory)
    AutoTokenizer.from_pretrained(TOKENIZER_DIR).save_pretrained(directory)
    return directory


def make_trainer(trainer_class: type[DPOTrainer], model: str, lengths: str, batch_size: int, scratch: str) -> Any:
    """A trainer whose pairs are of such lengths."""
    args = DPOConfig(
        scratch,
        per_device_train_batch_size=batch_size,
        max_steps=STEPS,
        logging_steps=1,
        bf16=torch.cuda.is_available(),
        use_cpu=not torch.cuda.is_available(),
        report_to=[],
        disable_tqdm=True,
    )
    text = Dataset.from_list([{"prompt": "a", "chosen": "b", "rejected": "c"}])
    trainer: Any = trainer_class(model, args=args, train_dataset=text)
    trainer.remove_callback(PrinterCallback)
    pairs = make_pairs(draw_lengths(lengths, STEPS * batch_size, longest=1024), trainer.model.config.vocab_size)
    tokens = [(c.tokens[~c.scored], c.tokens[c.scored], r.tokens[r.scored]) for c, r in pairs]
    columns = dict(zip(("prompt_ids", "chosen_ids", "rejected_ids"), zip(*tokens, strict=True), strict=True))
    trainer.train_dataset = Dataset.from_dict(columns)  # in place of the text, which TRL has made tokens of
    return trainer


def main() -> None:
    """Prints steps per second of PrefixSharingDPOTrainer over those of DPOTrainer."""
    with tempfile.TemporaryDirectory() as scratch:
        model = sys.argv[1] if len(sys.argv) > 1 else make_model(scratch)
        for lengths, batch_size in (("512,128,128", 2), ("hh", 8)):
            classes = (DPOTrainer, PrefixSharingDPOTrainer)
            trainers = [make_trainer(each, model, lengths, batch_size, scratch) for each in classes]
            rounds = [[each.train().metrics["train_runtime"] for each in trainers] for _ in range(ROUNDS)]
            theirs, ours = (STEPS / statistics.median(seconds) for seconds in zip(*rounds[1:], strict=True))
            names = ("logps/chosen", "logps/rejected", "grad_norm")
            logs = [[entry[name] for entry in each.state.log_history[:-1] for name in names] for each in trainers]
            apart = max(abs(a / b - 1) for a, b in zip(*logs, strict=True))
            print(f"{lengths}: steps per second {ours:.3f} / {theirs:.3f} = {ours / theirs:.2f}", flush=True)
            print(f"{lengths}: log-probs and gradients agree to {apart:.0e}", flush=True)


if __name__ == "__main__":
    main()

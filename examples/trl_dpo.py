"""A script for TRL's DPOTrainer, in which one import makes it compute every prompt once.

    python examples/trl_dpo.py [directory of a model]
    accelerate launch --multi_gpu --num_processes 2 examples/trl_dpo.py [directory of a model]

Without a directory it makes a small random model, so that it can be tried anywhere.
"""

import sys
import tempfile

import torch
from datasets import Dataset
from transformers import AutoTokenizer, Qwen3Config, Qwen3ForCausalLM
from trl import DPOConfig

from prefix_sharing.quickstart.checkpointer import TOKENIZER_DIR
from prefix_sharing.quickstart.pairs import generate_pairs
from prefix_sharing.trl import PrefixSharingDPOTrainer as DPOTrainer  # was: from trl import DPOTrainer


def make_model(directory: str) -> str:
    """Writes a small random model."""
    config = Qwen3Config(
        vocab_size=2048,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
    )
    torch.manual_seed(0)  # the same one in every process
    Qwen3ForCausalLM(config).save_pretrained(directory)
    AutoTokenizer.from_pretrained(TOKENIZER_DIR).save_pretrained(directory)
    return directory


def main() -> None:
    """Trains for ten steps."""
    with tempfile.TemporaryDirectory() as scratch:
        trainer = DPOTrainer(
            sys.argv[1] if len(sys.argv) > 1 else make_model(scratch),
            args=DPOConfig(
                output_dir=f"{scratch}/output",
                per_device_train_batch_size=2,
                max_steps=10,
                logging_steps=5,
                save_strategy="no",
                report_to=[],
                bf16=False,
                use_cpu=True,  # remove these two on a GPU
            ),
            train_dataset=Dataset.from_list(list(generate_pairs(60, seed=0))),
        )
        trainer.train()


if __name__ == "__main__":
    main()

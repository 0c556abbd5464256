"""Keys of torchtune and TRL that are called otherwise here."""

from collections.abc import Sequence

CALLED_HERE = {
    "beta": "loss.beta",
    "eval_steps": "run_val_every_n_steps",
    "learning_rate": "optimizer.lr",
    "logging_steps": "log_every_n_steps",
    "max_length": "tokenizer.max_seq_len",
    "max_steps": "max_steps_per_epoch",
    "num_train_epochs": "epochs",
    "optimizer.learning_rate": "optimizer.lr",
    "output": "output_dir",
    "per_device_train_batch_size": "batch_size",
    "resume_from_checkpoint": "resume=auto",
    "save_steps": "save_every_n_steps",
    "save_total_limit": "keep_last_n",
    "tokenizer.max_length": "tokenizer.max_seq_len",
}
"""What is called otherwise, with its name here."""


def called_here(key: str, known: Sequence[str]) -> str:
    """The end of a sentence about an unknown key: what torchtune's or TRL's key is called here, if it is one.

    Args:
        key (str): the unknown key.
        known (Sequence[str]): the keys that a recipe has.

    Returns:
        str: such as " Here it is 'optimizer.lr'.", or nothing.
    """
    name = CALLED_HERE.get(key)
    return f" Here it is '{name}'." if name is not None and name.partition("=")[0].partition(".")[0] in known else ""

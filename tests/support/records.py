"""Records of preferences, in files and as what choosing reads of them."""

import json

import datasets
import numpy as np

from prefix_sharing.datasets.choosing import Candidates, RecordReader
from prefix_sharing.datasets.forms import FORMS
from prefix_sharing.datasets.source import Records
from prefix_sharing.datasets.tokenizing import PreferenceOptions
from prefix_sharing.quickstart import tokenizer


def write(file, records):
    """A file of JSON lines; returns its name."""
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(file)


def read_prompts(prompts):
    """What choosing reads of pairs with these prompts."""
    records = Records(
        datasets.Dataset.from_dict(
            {"prompt": prompts, "chosen": ["A"] * len(prompts), "rejected": ["B"] * len(prompts)}
        ),
        "pairs",
    )
    reader = RecordReader(records, FORMS["text"], PreferenceOptions())
    return Candidates([reader], np.arange(len(prompts)), ["pairs"], records.describe).read({})


def prompts_of(dataset):
    """The prompts of a data set's examples, of one line each."""
    text = tokenizer()
    return [
        text.decode(dataset[i][0].tokens.tolist()).splitlines()[1].removesuffix("assistant")
        for i in range(len(dataset))
    ]

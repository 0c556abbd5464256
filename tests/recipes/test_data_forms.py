"""Files in the forms of LLaMA-Factory's demos train with no key of the data set but ``data_files``."""

import json

import pytest

from prefix_sharing.quickstart.pairs import generate_pairs
from runs import run_in_process, training_log

PAIRS = list(generate_pairs(24, seed=4))


def gpt(text):
    return {"from": "gpt", "value": text}


def assistant(text):
    return {"role": "assistant", "content": text}


FILES = {
    "dpo_demo.json": [  # ShareGPT
        {
            "conversations": [{"from": "human", "value": pair["prompt"]}],
            "chosen": gpt(pair["chosen"]),
            "rejected": gpt(pair["rejected"]),
        }
        for pair in PAIRS
    ],
    "dpo_messages.json": [
        {
            "messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": pair["prompt"]}],
            "chosen": assistant(pair["chosen"]),
            "rejected": assistant(pair["rejected"]),
        }
        for pair in PAIRS
    ],
    "alpaca_preference.jsonl": [
        {"instruction": pair["prompt"], "input": "", "chosen": pair["chosen"], "rejected": pair["rejected"]}
        for pair in PAIRS
    ],
    "comparison.json": [
        {"instruction": pair["prompt"], "input": "", "output": [pair["chosen"], pair["rejected"]]} for pair in PAIRS
    ],
    "kto_demo.json": [
        {"messages": [{"role": "user", "content": pair["prompt"]}, assistant(pair[which])], "label": which == "chosen"}
        for pair in PAIRS[:12]
        for which in ("chosen", "rejected")
    ],
    "kto_alpaca.json": [
        {"instruction": pair["prompt"], "input": "", "output": pair[which], "kto_tag": which == "chosen"}
        for which in ("chosen", "rejected")
        for pair in PAIRS[:12]
    ],
}


@pytest.mark.parametrize("name", FILES)
def test_demo_forms_train_with_data_files_alone(tmp_path, name):
    file = tmp_path / name
    records = FILES[name]
    text = "\n".join(map(json.dumps, records)) if name.endswith("jsonl") else json.dumps(records, indent=2)
    file.write_text(text)
    loss = "KTOLoss" if name.startswith("kto") else "DPOLoss"
    recipe = run_in_process(
        tmp_path / "out",
        dataset={"_component_": "prefix_sharing.datasets.prefix_preference_dataset", "data_files": str(file)},
        loss={"_component_": f"prefix_sharing.losses.{loss}"},
        dataset_val=None,
        batch_size=4,
        gradient_accumulation_steps=2,
        max_steps_per_epoch=2,
    )
    assert recipe.dataset.num_records == len(recipe.dataset) == 24
    first = training_log(tmp_path / "out")[0]
    assert first["loss"] == pytest.approx(0.5 if loss == "KTOLoss" else 0.6931, abs=1e-3)
    assert first["rewards/margins"] == pytest.approx(0, abs=1e-4)

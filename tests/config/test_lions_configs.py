"""The three stages of ``configs/lions``, each from the stage before, shrunk, on data of the form that they name."""

import itertools

import pytest
from omegaconf import OmegaConf

pytest.importorskip("transformers", minversion="5.24")

from directories import make_directory
from prefix_dpo_online import OnlineConfig, PrefixDPOOnline
from prefix_dpo_single_device import PrefixDPORecipeSingleDevice
from prefix_sharing.config import TrainingConfig, check_config, find_config
from prefix_sharing.run import set_up_device
from prefix_sharing.run.signals import StopRequest
from records import write

FAMILIES = {"gemma_2b": "gemma", "llama3_8b": "llama", "smollm2_135M": "llama"}
SMALL = {"device": "cpu", "dtype": "fp32", "compile": False, "self_check": False, "num_workers": 0}


def turns(question, answer):
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def conversations(source, number):
    return [{"messages": turns(f"{source} {i}?", f"Answer {i}, of {source}, in a few words.")} for i in range(number)]


def pairs(source, number):
    """With the columns of Columbia-NLP's data sets."""
    records = []
    for i in range(number):
        chosen, rejected = turns(f"{source} {i}?", f"Well said, {i}."), turns(f"{source} {i}?", f"No, {i} of {source}.")
        about = {"prompt": f"{source} {i}?", "prompt_id": str(i), "messages": chosen, "other_info": {"source": source}}
        records.append(about | {"chosen": chosen, "rejected": rejected, "score_chosen": 7.5, "score_rejected": 4.0})
    return records


def with_files(node, directory, make, number):
    """A data set, or each one of a mixture, by a file of the same form as what it names."""
    for i, part in enumerate(node.get("datasets") or [node]):
        source = part.pop("source", "pairs")
        part.pop("split", None)
        part.data_files = write(directory / f"{source.replace('/', '_')}_{i}_{number}.jsonl", make(source, number))
    if "defaults" in node:
        node.defaults.split = "train"


def load(name, directory, path):
    cfg = OmegaConf.load(find_config(name))
    cfg.merge_with(SMALL | {"path": path, "output_dir": str(directory), "epochs": 1})
    cfg.pack_len = 512
    return cfg


def train(cfg):
    cfg = check_config(cfg, TrainingConfig)
    recipe = PrefixDPORecipeSingleDevice(cfg, set_up_device(cfg))
    recipe.setup()
    recipe.train(StopRequest())
    recipe.cleanup()
    return recipe


@pytest.mark.parametrize("family", FAMILIES)
def test_each_stage_runs_from_the_stage_before(family, tmp_path):
    paths = [OmegaConf.load(find_config(f"lions/{family}_{stage}")) for stage in ("sft", "dpo", "online")]
    for before, after in itertools.pairwise(paths):
        assert after.path == f"{before.output_dir}/epoch_{before.epochs - 1}"

    base = make_directory(tmp_path / "model", FAMILIES[family], tie_word_embeddings=True)
    cfg = load(f"lions/{family}_sft", tmp_path / "sft", base)
    is_mixture = "datasets" in cfg.dataset
    make = conversations if is_mixture else pairs
    with_files(cfg.dataset, tmp_path, make, 3 if is_mixture else 12)
    cfg.pack_rows_per_step = 1 if is_mixture else None
    cfg.global_batch_size = None if is_mixture else 4
    if "dataset_val" in cfg:
        with_files(cfg.dataset_val, tmp_path, make, 3)
    first = train(cfg)
    assert first.global_step >= 2

    cfg = load(f"lions/{family}_dpo", tmp_path / "dpo", f"{tmp_path}/sft/epoch_0")
    with_files(cfg.dataset, tmp_path, pairs, 20 if is_mixture else 12)
    with_files(cfg.dataset_val, tmp_path, pairs, 3)
    cfg.global_batch_size = 16 if is_mixture else 4  # the first step of a schedule that rises changes nothing
    second = train(cfg)
    if is_mixture:  # of 20 pairs each, but for those that are cut to a part
        parts = cfg.dataset.datasets
        assert len(second.dataset) == sum(round(20 * part.get("fraction", 1.0)) for part in parts)
    assert second.before.metrics["eval/loss"] == pytest.approx(0.693147, abs=1e-6)

    cfg = load(f"lions/{family}_online", tmp_path / "online", f"{tmp_path}/dpo/epoch_0")
    for key, number in (("prompts", 4), ("prompts_val", 2)):
        with_files(cfg[key], tmp_path, pairs, number)
    cfg.sampler = {"_component_": "prefix_sharing.sampling.in_process_sampler"}
    if "policy" in cfg.judge:
        cfg.judge.policy, cfg.judge.reference = f"{tmp_path}/dpo/epoch_0", f"{tmp_path}/sft/epoch_0"
    else:
        assert cfg.judge._component_ == "prefix_sharing.judging.pair_ranker_judge"
        cfg.judge = {"_component_": "prefix_sharing.judging.function_judge"}
        cfg.judge.function = "prefix_sharing.quickstart.online.vowel_rule"
    cfg.merge_with({"max_new_tokens": 8, "global_batch_size": 2})
    cfg = check_config(cfg, OnlineConfig)
    PrefixDPOOnline(cfg, set_up_device(cfg)).run()
    assert (tmp_path / "online" / "round_0" / "epoch_0" / "model.safetensors").is_file()

"""A model is trained with the tokenizer that it knows, and saved with the one it was trained with."""

import json
import shutil

import pytest
from omegaconf import OmegaConf
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from prefix_sharing.errors import UserError
from prefix_sharing.hosts.tokenizer_files import check_tokenizer, replace_tokenizer
from prefix_sharing.quickstart.checkpointer import TOKENIZER_DIR
from prefix_sharing.tokenizers import hf_chat_tokenizer


@pytest.fixture
def base(tmp_path):
    shutil.copytree(TOKENIZER_DIR, tmp_path / "base")
    (tmp_path / "base" / "LICENSE").write_text("of the base")
    return tmp_path / "base"


def config(base, path):
    return OmegaConf.create({"checkpointer": {"checkpoint_dir": str(base)}, "tokenizer": {"path": str(path)}})


def test_other_tokens_than_the_models_are_refused(base, tmp_path):
    other = shutil.copytree(base, tmp_path / "other")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel()
    special = list(hf_chat_tokenizer(str(base)).special_tokens)
    tokenizer.train_from_iterator(["what else there is"] * 9, trainers.BpeTrainer(special_tokens=special))
    tokenizer.save(str(other / "tokenizer.json"))
    with pytest.raises(UserError, match=r"'tokenizer.path': .*other is not the tokenizer that the model in .*base was"):
        check_tokenizer(config(base, other), hf_chat_tokenizer(str(other)))
    check_tokenizer(config(base, base), hf_chat_tokenizer(str(base)))
    check_tokenizer(config(tmp_path / "no_tokenizer", other), hf_chat_tokenizer(str(other)))


def test_a_few_renamed_and_added_tokens_are_not_another_tokenizer(base, tmp_path):
    other = shutil.copytree(base, tmp_path / "other")
    written = (other / "tokenizer.json").read_text().replace("<|pad|>", "<|turn|>")
    content = json.loads(written)
    content["added_tokens"].append({**content["added_tokens"][0], "id": 2048, "content": "<|more|>"})
    (other / "tokenizer.json").write_text(json.dumps(content))
    (other / "tokenizer_config.json").write_text((other / "tokenizer_config.json").read_text().replace("pad|", "turn|"))
    check_tokenizer(config(base, other), hf_chat_tokenizer(str(other)))


def test_the_tokenizer_of_the_run_is_saved(base, tmp_path):
    saved, other = shutil.copytree(base, tmp_path / "saved"), shutil.copytree(base, tmp_path / "other")
    (other / "LICENSE").write_text("of the other")
    templates = list(other.glob("*.jinja"))
    assert templates
    for file in templates:
        file.unlink()
    described = json.loads((other / "tokenizer_config.json").read_text())
    (other / "tokenizer_config.json").write_text(json.dumps(described | {"chat_template": "{{ messages }}"}))
    replace_tokenizer(config(base, other), saved)
    assert json.loads((saved / "tokenizer_config.json").read_text())["chat_template"] == "{{ messages }}"
    assert not list(saved.glob("*.jinja"))  # which would go before it
    assert (saved / "LICENSE").read_text() == "of the base"
    before = sorted(saved.iterdir())
    for own in (base, other / "tokenizer.json", tmp_path / "none"):
        replace_tokenizer(config(base, own), saved)
        assert sorted(saved.iterdir()) == before

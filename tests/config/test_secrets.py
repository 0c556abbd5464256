"""What is logged or saved of a config names no secret."""

import pytest
from omegaconf import OmegaConf

from prefix_sharing.config import find_config
from prefix_sharing.config.secrets import without_secrets
from prefix_sharing.run.setup import log_config


@pytest.mark.parametrize(
    "key",
    [
        *("token", "hf_token", "use_auth_token", "api_key", "apikey", "apiKey", "X-Api-Key", "key", "HF_TOKEN"),
        *("aws_secret_access_key", "password", "db_password", "secret", "client_secret", "Authorization"),
    ],
)
def test_secrets_are_masked_wherever_they_are(key):
    cfg = OmegaConf.create({"a": {key: "s3cret"}, "b": [{key: 12345}], "c": {key: {"user": "s3cret"}}, key: None})
    shown = without_secrets(cfg)
    assert shown == {"a": {key: "***"}, "b": [{key: "***"}], "c": {key: {"user": "***"}}, key: None}
    assert cfg.a[key] == "s3cret"


@pytest.mark.parametrize(
    "key",
    [
        *("tokenizer", "token_ids", "max_tokens", "column_map", "num_tokens", "eos_token", "pad_token", "keys"),
        *("keep_last_n", "key_value_heads", "monkey", "tokens_per_second", "secretary"),
    ],
)
def test_nothing_else_is(key):
    assert without_secrets(OmegaConf.create({key: "shown"})) == {key: "shown"}


def test_configs_of_the_package_have_no_secrets():
    cfg = OmegaConf.load(find_config("quickstart/single_device"))
    assert OmegaConf.to_yaml(without_secrets(cfg)) == OmegaConf.to_yaml(cfg)


def test_a_reference_stays_in_the_file_only(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "s3cret")
    keys = {
        "output_dir": str(tmp_path),
        "dataset": {"token": "${oc.env:HF_TOKEN}", "key": "${oc.env:NONE,s3cret}"},
        "notes": "${oc.env:HF_TOKEN}",
        "more": "as ${oc.env:HF_TOKEN}",
        "logs": "${output_dir}/logs",
    }
    logged = []

    class Logger:
        def log_config(self, cfg):
            logged.append(OmegaConf.to_container(cfg, resolve=True))

    log_config(Logger(), OmegaConf.create(keys), seed=3)
    assert "s3cret" not in str(logged)
    assert logged[0]["dataset"] == {"token": "***", "key": "***"}
    assert logged[0]["logs"] == f"{tmp_path}/logs"
    saved = OmegaConf.load(tmp_path / "torchtune_config.yaml")
    assert OmegaConf.to_container(saved) == {
        **keys,
        "seed": 3,
        "dataset": {"token": "${oc.env:HF_TOKEN}", "key": "***"},
        "more": "***",
    }

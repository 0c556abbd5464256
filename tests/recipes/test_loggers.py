"""torchtune's loggers take the metrics as they are named."""

import pytest

from runs import run_in_process, training_log

KEYS = {"max_steps_per_epoch": 2, "dataset_val": None}


def test_tensorboard_shows_what_is_on_disk(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.util.tensor_util import make_ndarray

    run_in_process(tmp_path / "disk", **KEYS)
    logger = {"_component_": "torchtune.training.metric_logging.TensorBoardLogger", "log_dir": str(tmp_path / "tb")}
    run_in_process(tmp_path / "tensorboard", metric_logger=logger, **KEYS)
    (events,) = (tmp_path / "tb").glob("*/events*")
    accumulator = EventAccumulator(str(events)).Reload()
    expected = training_log(tmp_path / "disk")
    assert set(accumulator.Tags()["tensors"]) >= {"loss", "rewards/chosen", "log_probs/rejected", "tokens_saved"}
    for name in ("loss", "rewards/margins", "log_probs/chosen", "grad_norm"):
        assert [event.step for event in accumulator.Tensors(name)] == [1, 2]
        values = [make_ndarray(event.tensor_proto).item() for event in accumulator.Tensors(name)]
        assert values == pytest.approx([metrics[name] for metrics in expected], rel=1e-5), name


def test_weights_and_biases_gets_every_metric(tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    logged = []
    real = wandb.Run.log
    monkeypatch.setattr(wandb.Run, "log", lambda self, data, *args, **kw: (logged.append(data), real(self, data))[1])
    logger = {
        "_component_": "torchtune.training.metric_logging.WandBLogger",
        "project": "prefix",
        "log_dir": str(tmp_path / "wandb"),
    }
    run_in_process(tmp_path, metric_logger=logger, **KEYS)
    assert [data["global_step"] for data in logged] == [1, 2]
    assert {"loss", "rewards/accuracies", "log_probs/rejected", "tokens_saved", "lr"} <= set(logged[0])
    assert list((tmp_path / "wandb").rglob("*.wandb"))

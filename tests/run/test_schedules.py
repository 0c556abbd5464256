"""Schedules by a share of the steps are those by a number of steps."""

import pytest
import torch
from torchtune.training.lr_schedulers import get_cosine_schedule_with_warmup

from prefix_sharing.errors import ConfigError
from prefix_sharing.run.schedules import cosine_schedule, linear_schedule


def rates(schedule, num_training_steps, **kwargs):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=0.5)
    scheduler = schedule(optimizer, num_training_steps=num_training_steps, **kwargs)
    found = []
    for _ in range(num_training_steps):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return found


@pytest.mark.parametrize("schedule", [cosine_schedule, linear_schedule])
def test_a_ratio_is_a_share(schedule):
    with pytest.raises(ConfigError, match="'warmup_ratio': must be a share from 0 to 1, but is 10"):
        rates(schedule, 40, warmup_ratio=10)


@pytest.mark.parametrize(
    ("steps", "ratio", "rising"), [(40, 0.1, 4), (15, 0.1, 2), (100, 0.07, 7), (7, 0.0, 0), (1, 0.1, 1)]
)
def test_schedules_are_those_of_torchtune_and_transformers(steps, ratio, rising):
    transformers = pytest.importorskip("transformers")
    expected = rates(get_cosine_schedule_with_warmup, steps, num_warmup_steps=rising)
    assert rates(cosine_schedule, steps, warmup_ratio=ratio) == pytest.approx(expected, abs=1e-12)
    expected = rates(transformers.get_linear_schedule_with_warmup, steps, num_warmup_steps=rising)
    assert rates(linear_schedule, steps, warmup_ratio=ratio) == pytest.approx(expected, abs=1e-12)

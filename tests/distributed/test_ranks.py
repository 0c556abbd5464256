"""The process group of a run."""

from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

from prefix_sharing.distributed import process_group, ranks, this_rank, wait_for_all_ranks
from prefix_sharing.errors import UserError

CPU = torch.device("cpu")


@pytest.fixture
def _launched(monkeypatch):
    """The environment of a process that a launcher started as the only one."""
    environment = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": "0"}
    for name, value in (environment | {"TORCHELASTIC_RUN_ID": "test"}).items():
        monkeypatch.setenv(name, value)


def timeout_of(group):
    return group._get_backend(CPU).options._timeout


@pytest.mark.usefixtures("_launched")
def test_ranks_wait_for_a_step_for_minutes_and_for_set_up_for_hours():
    with process_group(CPU):
        assert this_rank() == (0, 1)
        assert timeout_of(dist.group.WORLD) == timedelta(minutes=10)
        assert timeout_of(ranks._setup_group) == timedelta(hours=3)
        wait_for_all_ranks()
    assert not dist.is_initialized()


def test_without_a_launcher_the_command_is_named():
    with pytest.raises(UserError, match="tune run --nproc_per_node N prefix_dpo_distributed"), process_group(CPU):
        pass

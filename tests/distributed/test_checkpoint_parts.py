"""Processes that write one checkpoint on disks that differ: a slow one delays it, a full one ends it for all."""

import errno
import os
import time
from datetime import timedelta
from functools import partial

import pytest
import torch

from bessemer.core.errors import CheckpointError, StorageError
from bessemer.distributed import mesh
from bessemer.training.checkpoint import manager
from bessemer.training.checkpoint.manager import CHECKPOINTS, checkpoint_weights
from tests.cases import slow

from .test_resume import run

#: Seconds: timeout of the checkpoint's collectives, and how long a slow disk takes.
TIMEOUT, SLOW = 2, 5


def fill():
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def refuse(values):
    raise CheckpointError("note: a checkpoint holds tensors and plain values")


def hindered(out, rank, hinder=None, check=None, **options):
    """`run` in which a rank's disk hinders the first file that is synchronised, or a check refuses its values; type and text of
    the error that it raises."""
    here = torch.distributed.get_rank() == rank
    synchronise, timeout, check_plain = os.fsync, mesh.job_timeout, manager.check_plain
    calls = []

    def fsync(handle):
        calls.append(handle)
        if here and hinder is not None and len(calls) == 1:
            hinder()
        synchronise(handle)

    os.fsync, mesh.job_timeout = fsync, lambda: timedelta(seconds=TIMEOUT)
    if here and check is not None:
        manager.check_plain = check
    try:
        return run(out, parallel={}, steps=1, **options)
    except (CheckpointError, StorageError) as error:
        return type(error), str(error)
    finally:
        os.fsync, mesh.job_timeout, manager.check_plain = synchronise, timeout, check_plain


@pytest.mark.slow
@pytest.mark.parametrize("rank", [1, 0])
@pytest.mark.parametrize("background", [False, True])
def test_a_disk_slower_than_the_timeout_of_a_collective_only_delays_a_checkpoint(two, rank, background, tmp_path):
    two.run(run, out=tmp_path / "quick", parallel={}, steps=1)
    hinder = partial(time.sleep, SLOW)
    two.run(hindered, out=tmp_path / "slow", rank=rank, hinder=hinder, checkpoint_background=background)
    quick, late = (checkpoint_weights(tmp_path / name / CHECKPOINTS / "step-000001") for name in ("quick", "slow"))
    assert quick.keys() == late.keys()
    assert all(torch.equal(quick[name], late[name]) for name in quick)
    assert [path.name for path in (tmp_path / "slow" / CHECKPOINTS).iterdir()] == ["step-000001"]
    assert not [path for path in (tmp_path / "slow" / CHECKPOINTS / "step-000001").iterdir() if path.name.startswith(".part")]


@pytest.mark.parametrize("rank", [1, 0])
@pytest.mark.parametrize("background", [False, slow(True)])
def test_a_full_disk_of_one_process_is_said_by_all(two, rank, background, tmp_path):
    told = two.run(hindered, out=tmp_path, rank=rank, hinder=fill, checkpoint_background=background)
    assert [kind for kind, _ in told] == [StorageError, StorageError]
    assert all("the disk is full" in text for _, text in told)
    assert not list((tmp_path / CHECKPOINTS).iterdir())


def test_values_of_one_process_that_could_not_be_read_back_are_refused_by_all(two, tmp_path):
    told = two.run(hindered, out=tmp_path, rank=1, check=refuse)
    assert [kind for kind, _ in told] == [CheckpointError, CheckpointError]
    assert all("a checkpoint holds tensors and plain values" in text for _, text in told)
    assert not list((tmp_path / CHECKPOINTS).iterdir())

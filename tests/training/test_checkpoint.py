import errno
import pickle
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from bessemer.core.errors import CheckpointError, StorageError
from bessemer.core.hashing import hash_files
from bessemer.core.store import read_json, write_json
from bessemer.training.checkpoint import manager as checkpoint
from bessemer.training.checkpoint.manager import INDEX, CheckpointManager, checkpoint_weights
from bessemer.training.checkpoint.state import TrainingState
from bessemer.training.optim.build import build_optimizers

from .conftest import RecordedProgress

IDENTITY = {"configuration": "a", "data": "b"}


@pytest.fixture
def state(decoder, settings):
    return TrainingState(decoder, build_optimizers(decoder, settings))


def move(state):
    """One step of training on made-up gradients."""
    for number, parameter in enumerate(state.model.parameters()):
        parameter.grad = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(state.step * 1000 + number))
    for optimizer in state.optimizers:
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    state.step += 1


def weights(state):
    return torch.cat([parameter.detach().flatten() for parameter in state.model.parameters()])


def spoil(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def test_a_restored_state_goes_on_as_the_saved_one_does(state, decoder, settings, tmp_path):
    checkpoints = CheckpointManager(tmp_path, IDENTITY, RecordedProgress())
    for _ in range(3):
        move(state)
    checkpoints.save(state)
    expected_random = torch.get_rng_state()
    for _ in range(2):
        move(state)
    expected = weights(state)

    torch.manual_seed(999)
    for parameter in decoder.parameters():
        torch.nn.init.zeros_(parameter)
    fresh = TrainingState(decoder, build_optimizers(decoder, settings))
    assert checkpoints.restore(fresh)
    assert fresh.step == 3
    assert torch.equal(torch.get_rng_state(), expected_random)
    for _ in range(2):
        move(fresh)
    assert torch.equal(weights(fresh), expected)


def test_the_newest_two_are_kept(state, tmp_path):
    checkpoints = CheckpointManager(tmp_path, IDENTITY, RecordedProgress())
    for step in (9, 10, 1_000_000):
        state.step = step
        checkpoints.save(state)
    assert {path.name for path in tmp_path.iterdir()} == {"step-000010", "step-1000000"}
    assert checkpoints.newest() == tmp_path / "step-1000000"


@pytest.mark.parametrize("damage", ["spoiled data", "cut data", "no data", "spoiled index", "no index"])
def test_a_damaged_one_is_named_and_passed_over(state, tmp_path, damage):
    progress = RecordedProgress()
    checkpoints = CheckpointManager(tmp_path, IDENTITY, progress)
    for _ in range(2):
        move(state)
        checkpoints.save(state)
    newest = tmp_path / "step-000002"
    target = newest / ("checkpoint.json" if "index" in damage else "__0_0.distcp")
    if damage.startswith("no "):
        target.unlink()
    elif damage.startswith("cut"):
        target.write_bytes(target.read_bytes()[:-100])
    else:
        spoil(target)
    assert checkpoints.restore(state)
    assert state.step == 1
    assert "step-000002" in progress.lines[0] and "damaged" in progress.lines[0]


def test_a_half_written_one_is_not_seen(state, tmp_path):
    checkpoints = CheckpointManager(tmp_path, IDENTITY, RecordedProgress())
    partial = tmp_path / ".step-000001.partial"
    partial.mkdir()
    (partial / "__0_0.distcp").write_bytes(b"half")
    assert not checkpoints.restore(state)
    state.step = 1
    checkpoints.save(state)
    assert not partial.exists()


@pytest.mark.parametrize("changed", ["configuration", "data"])
def test_one_of_another_run_is_refused(state, tmp_path, changed):
    CheckpointManager(tmp_path, IDENTITY, RecordedProgress()).save(state)
    with pytest.raises(CheckpointError, match=f"made with another {changed}"):
        CheckpointManager(tmp_path, IDENTITY | {changed: "other"}, RecordedProgress()).restore(state)


def test_a_full_disk_is_said_in_one_line_and_leaves_the_old_ones(state, tmp_path, monkeypatch):
    checkpoints = CheckpointManager(tmp_path, IDENTITY, RecordedProgress())
    checkpoints.save(state)
    state.step = 1

    def full(*arguments, **options):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoint, "save", full)
    with pytest.raises(StorageError, match="the disk is full"):
        checkpoints.save(state)
    assert [path.name for path in tmp_path.iterdir()] == ["step-000000"]


@pytest.mark.skipif(sys.platform == "win32", reason="the limit on a file's size is POSIX")
def test_a_real_limit_on_the_size_of_files_is_said_in_one_line_too(state, tmp_path):
    import resource

    checkpoints = CheckpointManager(tmp_path, {"configuration": "a", "data": "b"}, RecordedProgress())
    kept = checkpoints.save(state)
    state.step += 1
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    try:
        with pytest.raises(StorageError, match="a file reached the size limit"):
            checkpoints.save(state)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert list(tmp_path.iterdir()) == [kept]


class Evil:
    """Touches a file when it is unpickled."""

    def __init__(self, place):
        self.place = place

    def __reduce__(self):
        return Path.touch, (self.place,)


def disguise(folder):
    """Let the index say that the files are as they were written, as somebody who wrote them would."""
    index = read_json(folder / INDEX)
    index["files"] = hash_files(folder, [folder / name for name in index["files"]])
    write_json(folder / INDEX, index)


def test_a_pickle_in_a_checkpoint_of_somebody_else_is_not_run(state, tmp_path):
    identity = IDENTITY | {"model": "m", "optimizer": "o"}
    folder = CheckpointManager(tmp_path / "theirs", identity, RecordedProgress()).save(state)
    (folder / ".metadata").write_bytes(pickle.dumps(Evil(tmp_path / "run")))
    disguise(folder)
    for opened in (
        checkpoint_weights,
        partial(CheckpointManager(tmp_path / "ours", identity, RecordedProgress()).load_from, state=state),
    ):
        with pytest.raises(CheckpointError, match=r"not a checkpoint that can be opened safely"):
            opened(folder)
    assert not (tmp_path / "run").exists()


def test_an_object_among_a_checkpoints_values_is_not_made(state, tmp_path, monkeypatch):
    identity = IDENTITY | {"model": "m", "optimizer": "o"}
    values = state.read() | {"seconds": Evil(tmp_path / "run")}
    monkeypatch.setattr(checkpoint, "check_plain", lambda values: None)
    monkeypatch.setattr(TrainingState, "read", lambda self: values)
    folder = CheckpointManager(tmp_path / "theirs", identity, RecordedProgress()).save(state)
    with pytest.raises(CheckpointError, match="neither a tensor nor a plain value"):
        CheckpointManager(tmp_path / "ours", identity, RecordedProgress()).load_from(folder, state)
    assert not (tmp_path / "run").exists()


def test_what_could_not_be_read_back_is_refused_when_it_is_written(state, tmp_path):
    state.optimizers[0].param_groups[0]["note"] = np.float64(1)
    with pytest.raises(CheckpointError, match=r"note: a checkpoint holds tensors and plain values, and this is a float64"):
        CheckpointManager(tmp_path, IDENTITY, RecordedProgress()).save(state)
    assert not list(tmp_path.iterdir())

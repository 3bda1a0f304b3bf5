import errno
import io
import math
import pickle
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard

from bessemer.core.errors import CheckpointError, StorageError
from bessemer.core.hashing import hash_files
from bessemer.core.store import read_json, write_json
from bessemer.model.adapters import is_of_adapter
from bessemer.model.adapters.trained import add_adapters, train_whole
from bessemer.model.initialisation import initial_decoder
from bessemer.training.checkpoint import manager as checkpoint
from bessemer.training.checkpoint.manager import INDEX, CheckpointManager, checkpoint_weights
from bessemer.training.checkpoint.state import RANDOM_STATES, HostCopies, TrainingState, _random_states, model_state
from bessemer.training.checkpoint.storage import _MetadataUnpickler
from bessemer.training.optim.muon import orthogonalised
from bessemer.training.optim.optimizers import build_optimizers, role_of, scale_learning_rates
from tests.cases import slow

from .conftest import RecordedProgress

IDENTITY = {"configuration": "a", "data": "b"}


@pytest.fixture
def state(decoder, settings):
    return TrainingState(decoder, build_optimizers(decoder, settings))


def made_up_gradient(parameter, step, number):
    return torch.randn(parameter.shape, generator=torch.Generator().manual_seed(step * 1000 + number))


def move(state):
    """One step of training on made-up gradients."""
    for number, parameter in enumerate(state.model.parameters()):
        parameter.grad = made_up_gradient(parameter, state.step, number)
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


def test_a_run_that_continues_another_moves_by_its_own_settings(state, decoder, settings, tmp_path):
    identity = IDENTITY | {"model": "m", "optimizer": "o"}
    for _ in range(3):
        move(state)
    folder = CheckpointManager(tmp_path / "first", identity, RecordedProgress()).save(state)
    config = settings.with_changes(
        learning_rate=4e-3,
        matrix_learning_rate=6e-2,
        weight_decay=0.3,
        beta1=0.7,
        beta2=0.8,
        momentum=0.6,
        nesterov=False,
    )
    model = initial_decoder(decoder.config, seed=9)
    continued = TrainingState(model, build_optimizers(model, config))
    CheckpointManager(tmp_path / "second", identity, RecordedProgress()).load_from(folder, continued)
    scale_learning_rates(continued.optimizers, 0.5)
    move(continued)

    muon, adamw = state.optimizers
    for number, ((name, weight), moved) in enumerate(zip(decoder.named_parameters(), model.parameters(), strict=True)):
        gradient, weight = made_up_gradient(weight, 3, number), weight.detach()
        if role_of(name, weight) == "matrices":
            mean = muon.state[dict(decoder.named_parameters())[name]]["momentum_buffer"]
            update = orthogonalised(mean.lerp(gradient, 1 - 0.6), torch.float32)
            expected = (1 - 3e-2 * 0.3) * weight - 3e-2 * 0.2 * math.sqrt(max(weight.shape)) * update.float()
        else:
            old = adamw.state[dict(decoder.named_parameters())[name]]
            mean = (0.7 * old["exp_avg"] + 0.3 * gradient) / (1 - 0.7**4)
            square = (0.8 * old["exp_avg_sq"] + 0.2 * gradient.square()) / (1 - 0.8**4)
            expected = weight - 2e-3 * mean / (square.sqrt() + 1e-8)
        torch.testing.assert_close(moved.detach(), expected, rtol=1e-5, atol=1e-6, msg=name)


class Counted:
    """A part of a state that remembers one number."""

    def __init__(self, number):
        self.number = number

    def state_dict(self):
        return {"number": self.number}

    def load_state_dict(self, values):
        self.number = values["number"]


def test_a_run_that_continues_another_has_those_of_its_parts_that_the_other_had(state, decoder, settings, tmp_path):
    identity = IDENTITY | {"model": "m", "optimizer": "o"}
    state.others = {"window": Counted(3)}
    folder = CheckpointManager(tmp_path / "first", identity, RecordedProgress()).save(state)
    others = {"window": Counted(0), "scale": Counted(5)}
    continued = TrainingState(decoder, build_optimizers(decoder, settings), others)
    missing = CheckpointManager(tmp_path / "second", identity, RecordedProgress()).load_from(folder, continued)
    assert missing == {"scale"} and (others["window"].number, others["scale"].number) == (3, 5)
    others["window"].number = 0
    del others["scale"]
    assert CheckpointManager(tmp_path / "first", identity, RecordedProgress()).restore(continued)
    assert others["window"].number == 3


def test_what_an_optimizer_counts_in_its_groups_is_restored(state, decoder, settings, tmp_path):
    checkpoints = CheckpointManager(tmp_path, IDENTITY, RecordedProgress())
    fresh = TrainingState(decoder, build_optimizers(decoder, settings))
    for count, each in ((7, state), (0, fresh)):
        each.optimizers[0].param_groups[0]["k"] = count
    checkpoints.save(state)
    assert checkpoints.restore(fresh)
    assert fresh.optimizers[0].param_groups[0]["k"] == 7


def test_the_random_state_of_a_card_is_restored(state, tmp_path, monkeypatch):
    card = {"state": torch.arange(16, dtype=torch.uint8)}
    monkeypatch.setattr("bessemer.training.checkpoint.state._accelerator", lambda model: torch.device("cuda", 0))
    monkeypatch.setattr("torch.cuda.get_rng_state", lambda device: card["state"].clone())
    monkeypatch.setattr("torch.cuda.set_rng_state", lambda state, device: card.update(state=state.clone()))
    checkpoints = CheckpointManager(tmp_path, IDENTITY, RecordedProgress())
    checkpoints.save(state)
    card["state"] = torch.zeros(16, dtype=torch.uint8)
    assert checkpoints.restore(state)
    assert card["state"].tolist() == list(range(16))


def test_a_checkpoint_without_the_random_states_of_ranks_is_restored(state, tmp_path, monkeypatch):
    checkpoints = CheckpointManager(tmp_path, IDENTITY, RecordedProgress())
    read = TrainingState.read
    with monkeypatch.context() as patched:
        patched.setattr(
            TrainingState, "read", lambda self: {key: value for key, value in read(self).items() if key != RANDOM_STATES}
        )
        checkpoints.save(state)
    expected = torch.get_rng_state()
    torch.manual_seed(999)
    assert checkpoints.restore(state)
    assert torch.equal(torch.get_rng_state(), expected)


def test_the_newest_two_are_kept(state, tmp_path):
    checkpoints = CheckpointManager(tmp_path, IDENTITY, RecordedProgress())
    for step in (9, 10, 1_000_000):
        state.step = step
        checkpoints.save(state)
    assert {path.name for path in tmp_path.iterdir()} == {"step-000010", "step-1000000"}
    assert checkpoints.newest() == tmp_path / "step-1000000"


def test_the_first_the_best_and_those_at_multiples_are_kept_where_asked_for(tmp_path):
    manager = CheckpointManager(tmp_path, {}, RecordedProgress(), keep_every=4)
    for best, left in ((None, {1, 4, 8, 9}), (6, {1, 4, 6, 8, 9})):
        for step in range(1, 10):
            (tmp_path / f"step-{step:06d}").mkdir(exist_ok=True)
        manager.kept_step = best
        manager._prune()
        assert set(checkpoint.steps_of(tmp_path)) == left


@pytest.mark.parametrize("damage", ["spoiled data", slow("cut data"), slow("no data"), slow("spoiled index"), "no index"])
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


@pytest.mark.parametrize("module", ["pathlib", "pathlib._local"])
def test_a_path_is_read_whichever_version_of_python_has_named_its_class(module):
    # Python 3.13 alone keeps it in a module of its own
    written = f"c{module}\nPosixPath\n(Vmodel\ntR.".encode()
    assert _MetadataUnpickler(io.BytesIO(written)).load() == Path("model")


def test_beside_an_adapter_what_is_trained_is_kept_and_nothing_else(decoder, settings):
    add_adapters(decoder, rank=2, scale=1.0, patterns=["q_proj"])
    train_whole(decoder, ["embed_tokens"])
    trained = {name for name, parameter in decoder.named_parameters() if parameter.requires_grad}
    assert {is_of_adapter(name) for name in trained} == {True, False}
    assert set(model_state(decoder, build_optimizers(decoder, settings))["model"]) == trained


def test_copies_of_codes_are_not_changed_by_training_and_a_process_alone_is_the_first():
    class Codes(torch.Tensor):
        pass

    codes = torch.ones(3).as_subclass(Codes)
    copies = HostCopies().copy({"codes": codes})
    codes.zero_()
    assert isinstance(copies["codes"], Codes) and copies["codes"].tolist() == [1.0] * 3
    assert set(_random_states(torch.nn.Linear(1, 1))) == {"cpu-0"}


def test_copies_for_a_checkpoint_are_not_changed_by_training_and_lie_where_the_last_ones_lay():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        weight, copies = torch.ones(2, 3), HostCopies()
        sharded = DTensor.from_local(torch.ones(4), init_device_mesh("cpu", (1,)), [Shard(0)])
        values = {"model": {"weight": weight, "sharded": sharded}, "parts": [weight[0]], "step": 3}
        first = copies.copy(values)
        weight.zero_()
        sharded.zero_()
        copies.wait()
        assert first["step"] == 3 and bool((first["model"]["weight"] == 1).all()) and bool((first["parts"][0] == 1).all())
        kept = first["model"]["sharded"]
        assert (
            isinstance(kept, DTensor)
            and not kept.requires_grad
            and kept.placements == sharded.placements
            and bool((kept.to_local() == 1).all())
        )
        second = copies.copy(values)
        assert second["model"]["weight"].data_ptr() == first["model"]["weight"].data_ptr()
        assert not second["model"]["weight"].any() and not second["model"]["sharded"].to_local().any()
    finally:
        dist.destroy_process_group()

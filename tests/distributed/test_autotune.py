"""The processes of a job measure together, in the layout that they train in."""

import json
import os

import pytest

from bessemer.core.progress import Silent
from bessemer.model.config import ModelConfig
from bessemer.model.initialisation import initial_decoder
from bessemer.model.storage.folder import save_model
from bessemer.training import autotune
from bessemer.training.autotune import AUTOTUNE, StepTiming, prepare_run
from bessemer.training.pretrain_config import PretrainConfig
from tests.cases import slow

from .parity import DENSE, SETTINGS

#: A user's loss that notes the shape of the tokens that its process gets, and whether the weights are sharded.
NOTED = """
import json, os
from pathlib import Path
from torch.distributed.tensor import DTensor
from bessemer.training.objectives import next_token_loss

def loss(model, batch):
    seen = [*batch.tokens_BT.shape, any(isinstance(weight, DTensor) for weight in model.parameters())]
    (Path(__file__).parent / f"seen-{os.environ['RANK']}.json").write_text(json.dumps(seen))
    return next_token_loss(model, batch)
"""


@pytest.fixture
def folder(tmp_path):
    save_model(initial_decoder(ModelConfig(**DENSE), seed=3), tmp_path / "model", tokenizer=tmp_path)
    (tmp_path / "mine.py").write_text(NOTED, encoding="utf-8")
    return tmp_path


def resolved(folder, parallel, **changes):
    """The settings of a run, as every process of its job gets them."""
    settings = {name: value for name, value in SETTINGS.items() if name not in ("steps", "decay_fraction")}
    config = PretrainConfig(**settings | {"parallel": parallel} | changes)
    found, runtime, mesh = prepare_run(config, folder / "model", folder, device="cpu", progress=Silent(), folder=folder)
    assert found.resolved and mesh.layout.world_size == 2
    return found.steps, found.compile, runtime.threads


@pytest.mark.parametrize(
    "parallel, expected",
    [
        ({"data_shard": 2}, {0: [4, 16, True], 1: [4, 16, True]}),
        slow({"context": 2}, {0: [8, 8, True], 1: [8, 8, True]}),
        slow({"tensor": 2}, {0: [8, 16, True], 1: [8, 16, True]}),
        # the last stage computes the loss, of one row of each micro-batch
        slow({"pipeline": 2}, {1: [1, 16, False]}),
    ],
    ids=str,
)
def test_each_process_measures_its_part_of_a_batch_with_the_users_loss(two, folder, parallel, expected):
    first, second = two.run(resolved, folder=folder, parallel=parallel, minutes=0.01, loss="mine.py:loss")
    assert first == second and first[0] >= 1
    assert json.loads((folder / AUTOTUNE).read_text(encoding="utf-8"))["measured"]["candidates"]
    seen = {
        int(path.stem.removeprefix("seen-")): json.loads(path.read_text(encoding="utf-8"))
        for path in folder.glob("seen-*.json")
    }
    assert seen == expected


def where_one_process_cannot_compile(folder):
    """The same, on a machine where compiling would pay and fails on rank 1."""
    measured, compiled = autotune.measure_steps, autotune.torch.compile

    def steady(config, *others):
        return StepTiming(config.dtype, bool(config.compile), (0.1 if config.compile else 0.2,) * 3, 1.0)

    def broken(function):
        if os.environ["RANK"] == "1":
            raise RuntimeError("no g++")
        return function

    autotune.measure_steps, autotune.torch.compile = steady, broken
    try:
        return resolved(folder, {}, steps=10_000, compile="auto")
    finally:
        autotune.measure_steps, autotune.torch.compile = measured, compiled


def test_where_one_process_cannot_compile_all_stay_eager(two, folder):
    first, second = two.run(where_one_process_cannot_compile, folder=folder)
    assert first == second == (10_000, False, 1)
    measured = json.loads((folder / AUTOTUNE).read_text(encoding="utf-8"))["measured"]
    assert "compiling does not work here" in measured["reason"]


@pytest.mark.slow
def test_what_was_measured_is_read_by_all(two, folder):
    before = two.run(resolved, folder=folder, parallel={}, minutes=0.01)
    written = json.loads((folder / AUTOTUNE).read_text(encoding="utf-8"))
    (folder / AUTOTUNE).write_text(json.dumps(written | {"steps": 77}), encoding="utf-8")
    assert before[0] == before[1]
    assert [steps for steps, *_ in two.run(resolved, folder=folder, parallel={}, minutes=0.01)] == [77, 77]

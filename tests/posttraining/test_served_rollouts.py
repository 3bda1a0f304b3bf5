"""The stage `rl` with rollouts by servers: ours, which a run trains with as with its own engine, and several as one."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

from bessemer.core.metrics import read_metrics
from bessemer.inference.engine import Engine, EngineConfig
from tests.posttraining.test_rl import data, run  # noqa: F401
from tests.serving.running import servers
from tests.training.conftest import RecordedProgress

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def start():
    with servers() as started:
        yield started


def serving(model_folder, **settings):
    return Engine(model_folder, device="cpu", config=EngineConfig(threads=1, max_num_seqs=16, **settings))


def weights_of(out):
    return load_file(out / "model" / "model.safetensors")


def same_weights(first, second):
    return all(torch.equal(tensor, second[name]) for name, tensor in first.items())


@pytest.mark.parametrize("changes", [{}, {"adapter": {"rank": 4}}], ids=["weights", "adapter"])
def test_a_run_that_waits_for_its_server_is_the_run_without_one(model_folder, data, tmp_path, start, changes):  # noqa: F811
    changes |= {"steps": 3, "max_tokens": 6}
    run(model_folder, data, tmp_path / "own", **changes)
    url = start(serving(model_folder), accept_weights=True)
    run(model_folder, data, tmp_path / "served", rollouts=[url], **changes)
    own, served = (read_metrics(tmp_path / name / "completions.jsonl") for name in ("own", "served"))
    assert [one["completion"] for one in own] == [one["completion"] for one in served]
    first, second = weights_of(tmp_path / "own"), weights_of(tmp_path / "served")
    assert all((tensor - second[name]).abs().max() < 1e-5 for name, tensor in first.items())
    lines = read_metrics(tmp_path / "served" / "metrics.jsonl")
    assert {line["staleness_max"] for line in lines} == {0} and max(line["log_ratio_max"] for line in lines) < 1e-4
    assert not (tmp_path / "served" / "rollouts").exists(), "a run that is over leaves no journal"

"""A profile is left where it is asked for, and changes nothing."""

import gzip
import json

import pytest
import torch
from pydantic import ValidationError

from bessemer.core.config import ConfigError
from bessemer.model.config import ModelConfig
from bessemer.model.initialisation import initial_decoder
from bessemer.training.loop import train
from bessemer.training.pretrain_config import PretrainConfig
from bessemer.training.runtime import Runtime

from ..distributed.parity import RandomBatches
from .conftest import TINY


@pytest.fixture
def run(settings, tmp_path):
    """Trains a tiny model in a folder; its weights."""

    def run(name, on_step_end=lambda step, _: {}, **changes):
        config = settings.with_changes(context_length=16, optimizer="adamw", **changes)  # of few operators
        shape = {key: value for key, value in TINY.items() if key != "preset"}
        model = initial_decoder(ModelConfig(**shape, vocab_size=97), seed=2)
        runtime = Runtime.of(config, torch.device("cpu"))
        train(model, RandomBatches(2, 16, 97), config, tmp_path / name, runtime=runtime, seed=1, on_step_end=on_step_end)
        return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])

    return run


def steps_in(folder):
    trace = json.loads(gzip.decompress((folder / "profile" / "rank-0.trace.json.gz").read_bytes()))
    names = {event.get("name") for event in trace["traceEvents"]}
    assert "aten::mm" in names and "[memory]" in names
    return sorted(name for name in names if name and name.startswith("step "))


def test_the_asked_steps_are_recorded_and_the_weights_stay_the_same_bits(run, tmp_path):
    assert torch.equal(run("with", profile={"steps": "2-3"}), run("without"))
    assert steps_in(tmp_path / "with") == ["step 2", "step 3"]
    assert not (tmp_path / "without" / "profile").exists()


def test_the_operators_are_told_by_time_and_memory(run, tmp_path):
    run("one", profile={"steps": "4"})
    text = (tmp_path / "one" / "profile" / "rank-0.operators.md").read_text(encoding="utf-8")
    assert text.startswith("# Step 4, rank 0: ")
    time, memory = text.split("## Time on the processor")[1].split("## Memory, allocated less freed")
    assert "| `aten::mm` | " in time and "| `aten::" in memory
    shares = [float(line.rsplit("|", 2)[1].strip(" %")) for line in time.splitlines() if line.startswith("| `")]
    assert shares == sorted(shares, reverse=True) and 50 < sum(shares) <= 100.5


@pytest.mark.slow
def test_a_run_that_goes_on_inside_the_range_records_the_rest(run, tmp_path):
    class StoppedError(Exception):
        pass

    def stop(step, _):
        if step == 3:
            raise StoppedError
        return {}

    options = {"profile": {"steps": "2-4"}, "checkpoint_minutes": 1e-9}
    with pytest.raises(StoppedError):
        run("stopped", on_step_end=stop, **options)
    assert not (tmp_path / "stopped" / "profile").exists()
    run("stopped", **options)
    assert steps_in(tmp_path / "stopped") == ["step 3", "step 4"]


@pytest.mark.parametrize("steps", ["0-3", "5-4", "two", "1-", "-3", "10 - 12"])
def test_what_is_no_range_of_steps_is_refused(steps):
    with pytest.raises(ConfigError, match="profile"):
        PretrainConfig.parse({"steps": 20, "profile": {"steps": steps}}, "pretrain")


def test_steps_that_the_run_does_not_have_are_refused():
    with pytest.raises(ConfigError, match="profile: steps 10-12, but the run has 11"):
        PretrainConfig.parse({"steps": 11, "profile": {"steps": "10-12"}}, "pretrain")
    with pytest.raises((ConfigError, ValidationError)):
        PretrainConfig(minutes=1, profile={"steps": "10-12"}).with_changes(minutes=None, steps=11)

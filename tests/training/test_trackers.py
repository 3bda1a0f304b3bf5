"""Trackers get what `metrics.jsonl` gets; what goes on is the same run there; what fails in them does not end training."""

import importlib.machinery
import sys
import types

import pytest
import torch

from bessemer.core.errors import ConfigError
from bessemer.core.metrics import METRICS, read_metrics
from bessemer.model.config import ModelConfig
from bessemer.model.initialisation import initial_decoder
from bessemer.training.loop import train
from bessemer.training.monitoring.trackers import check_trackers
from bessemer.training.runtime import Runtime
from tests.cases import slow

from ..distributed.parity import RandomBatches
from .conftest import TINY, RecordedProgress


class StoppedError(Exception):
    pass


@pytest.fixture
def run(settings, tmp_path):
    """Trains a tiny model in `out`; `stop`: an error after that step."""
    progress = RecordedProgress()

    def run(track, stop=None, out=tmp_path / "pretrain-abc.partial", **changes):
        config = settings.with_changes(steps=4, context_length=16, checkpoint_minutes=1e-9, track=track, **changes)
        shape = {key: value for key, value in TINY.items() if key != "preset"}
        model = initial_decoder(ModelConfig(**shape, vocab_size=97), seed=2)

        def on_step_end(step, _):
            if step == stop:
                raise StoppedError
            return {}

        options = {
            "runtime": Runtime.of(config, torch.device("cpu")),
            "seed": 1,
            "on_step_end": on_step_end,
            "progress": progress,
        }
        train(model, RandomBatches(2, 16, 97), config, out, **options)
        return read_metrics(out / METRICS)

    run.lines, run.out = progress.lines, tmp_path / "pretrain-abc.partial"
    return run


def module(monkeypatch, name, **contents):
    """Put a made-up library in the place of one."""
    made = types.ModuleType(name)
    vars(made).update(contents)
    made.__spec__ = importlib.machinery.ModuleSpec(name, None, origin="made up")
    monkeypatch.setitem(sys.modules, name, made)


def test_tensorboard_holds_the_records_of_a_run_that_was_killed_and_went_on(run):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with pytest.raises(StoppedError):
        run(["tensorboard"], stop=3)  # the records of two steps
    records = run(["tensorboard"], diagnostics_every=2)
    events = EventAccumulator(str(run.out / "tensorboard")).Reload()
    for key in ("loss", "gradient_norm/layers.1/attention"):
        expected = [(record["step"], pytest.approx(record[key])) for record in records if key in record]
        assert [(event.step, event.value) for event in events.Scalars(key)] == expected
    assert [record["step"] for record in records] == [1, 2, 3, 4]


class FakeRuns:
    """What both W&B and trackio are told, in order."""

    def __init__(self, fails_at=None, unable=None):
        self.said, self._fails_at, self._unable = [], fails_at, unable

    def init(self, **options):
        if self._unable:
            raise RuntimeError(self._unable)
        self.said.append(("init", options))
        return self

    def log(self, values, step):
        if step == self._fails_at:
            raise OSError("no network\nand a long story")
        self.said.append(("log", step, values))

    def finish(self, exit_code=0):
        self.said.append(("finish", exit_code))

    def library(self):
        return {"init": self.init, "log": self.log, "finish": self.finish}


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_a_tracker_gets_the_records_and_the_settings(run, monkeypatch, name):
    runs = FakeRuns()
    module(monkeypatch, name, **runs.library())
    records = run([name], track_project="ores")
    (_, options), *logs, (_, code) = runs.said
    assert options["project"] == "ores" and options["resume"] == "allow" and options["config"]["context_length"] == 16
    assert [{"step": step, **values} for _, step, values in logs] == records
    assert code == 0


@pytest.mark.parametrize("name", ["wandb", slow("trackio")])
def test_what_goes_on_is_the_same_run(run, monkeypatch, tmp_path, name):
    runs = FakeRuns()
    module(monkeypatch, name, **runs.library())
    with pytest.raises(StoppedError):
        run([name], stop=3)
    run([name])
    run([name], out=tmp_path / "another")
    names = [said[1]["name"] for said in runs.said if said[0] == "init"]
    assert names[0] == names[1] != names[2]
    assert names[0].startswith("pretrain-abc-")
    if name == "wandb":
        assert [said[1]["id"] for said in runs.said if said[0] == "init"] == names
        assert [said[1] for said in runs.said if said[0] == "finish"] == [1, 0, 0]


def test_a_finished_run_is_not_opened_again(run, monkeypatch):
    runs = FakeRuns()
    module(monkeypatch, "wandb", **runs.library())
    run(["wandb"])
    run(["wandb"])
    assert [said[0] for said in runs.said].count("init") == 1


def test_a_tracker_that_fails_is_left_out_and_said_once(run, monkeypatch):
    runs = FakeRuns(fails_at=2)
    module(monkeypatch, "wandb", **runs.library())
    assert [record["step"] for record in run(["wandb"])] == [1, 2, 3, 4]
    assert [said[1] for said in runs.said if said[0] == "log"] == [1]
    assert run.lines == ["  wandb gets no more records (no network); metrics.jsonl has all of them"]


def test_a_tracker_that_does_not_start_is_one_line(run, monkeypatch):
    module(monkeypatch, "wandb", **FakeRuns(unable="api_key not configured").library())
    with pytest.raises(
        ConfigError, match=r"track: wandb does not start \(api_key not configured\): wandb login, or WANDB_MODE"
    ):
        run(["wandb"])


def test_a_missing_library_is_named_with_what_to_type(monkeypatch, tmp_path):
    (tmp_path / "nonesuch").mkdir()  # as W&B leaves a folder where it ran
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ConfigError, match="track: nonesuch is not installed: pip install nonesuch"):
        check_trackers(["nonesuch"])


def test_the_recipe_is_refused_before_anything_runs(monkeypatch, tmp_path):
    from bessemer.pipeline.api import prepare

    find = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "trackio" else find(name))
    recipe = "format: 1\nname: r\ncollect: [{source: files, paths: a.jsonl}]\ntokenize: {}\nmodel: {preset: qwen3-1m}\n"
    (tmp_path / "recipe.yaml").write_text(recipe + "pretrain: {steps: 3, track: [trackio]}\n", encoding="utf-8")
    (tmp_path / "a.jsonl").write_text('{"id": 1, "text": "a"}\n', encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match="track: trackio is not installed"):
        prepare("recipe.yaml")
    assert not (tmp_path / "runs").exists()

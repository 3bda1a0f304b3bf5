"""How much of an evaluation fits its minutes, on a machine whose clock is that of a formula."""

from pathlib import Path

import pytest

from bessemer.core.progress import Silent
from bessemer.evaluation import stage as time_limit
from bessemer.evaluation.config import EvaluateConfig
from bessemer.evaluation.stage import with_share, within_minutes

CONFIG = EvaluateConfig(minutes=1.0, max_tokens=160_000, questions=160)
MODELS = {name: Path(name) for name in ("pretrain", "sft", "rl")}


@pytest.fixture
def machine(monkeypatch):
    """A machine on which a model takes two seconds and some for all tokens and questions; what it was asked."""
    now, asked = [0.0], []
    monkeypatch.setattr(time_limit.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(time_limit, "faster_threads", lambda current, candidates: 1)

    def be(seconds):
        def evaluate(config, models, out):
            asked.append((config, list(models)))
            now[0] += 2.0 + seconds * config.max_tokens / CONFIG.max_tokens

        return evaluate

    return be, asked


def test_what_fits_stays_whole_with_the_threads_that_were_measured(machine):
    be, asked = machine
    found, measured = within_minutes(CONFIG, MODELS, be(8.0), Silent())
    assert found == CONFIG.with_changes(minutes=None, threads=1) and measured["share"] == 1.0
    assert [(trial.questions, models) for trial, models in asked] == [(10, ["rl"]), (20, ["rl"])]
    assert all(trial.baselines == [] and trial.minutes is None for trial, _ in asked)


def test_what_does_not_fit_is_cut_for_all_models_alike(machine):
    be, _ = machine
    found, measured = within_minutes(CONFIG, MODELS, be(80.0), Silent())
    # three models and the baselines: 60 s less 19 of trials leave 10.25 s each, of which 2 are fixed
    assert measured["share"] == pytest.approx((41 / 4 - 2) / 80, abs=1e-3)
    assert (found.questions, found.max_tokens) == (16, pytest.approx(16_500, abs=5))
    assert measured["minutes"] == 1.0 and found.resolved


def test_a_sixteenth_is_evaluated_whatever_the_time():
    assert with_share(CONFIG, 1 / 16).questions == 10


def test_a_very_slow_machine_evaluates_the_smallest_share(machine):
    be, _ = machine
    assert within_minutes(CONFIG, MODELS, be(5000.0), Silent())[1]["share"] == pytest.approx(1 / 16, abs=1e-3)


def test_the_models_of_a_short_training_are_evaluated_for_as_little(machine):
    be, asked = machine
    found, measured = within_minutes(CONFIG, MODELS, be(80.0), Silent(), training_seconds=2.0)
    # three models and the baselines in ten seconds: less than a sixteenth of each
    assert measured["share"] == pytest.approx(1 / 64, abs=1e-3) and measured["training_seconds"] == 2.0
    assert [trial.max_tokens for trial, _ in asked] == [2500, 5000] and found.max_tokens == 2500


def test_a_long_training_leaves_the_minutes_as_they_are(machine):
    be, _ = machine
    assert within_minutes(CONFIG, MODELS, be(80.0), Silent(), training_seconds=600.0) == (
        within_minutes(CONFIG, MODELS, be(80.0), Silent())
    )


def test_all_that_is_held_out_is_cut_too(machine):
    be, _ = machine
    everything = CONFIG.with_changes(max_tokens=None)
    found, measured = within_minutes(everything, MODELS, be(80.0), Silent(), held_out_tokens=160_000)
    assert found.max_tokens == pytest.approx(measured["share"] * 160_000, abs=100)
    assert within_minutes(everything, MODELS, be(8.0), Silent(), held_out_tokens=160_000)[0].max_tokens is None


def test_threads_that_are_given_stay(machine):
    be, _ = machine
    assert within_minutes(CONFIG.with_changes(threads=3), MODELS, be(8.0), Silent())[0].threads == 3

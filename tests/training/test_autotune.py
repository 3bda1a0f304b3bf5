import json

import pytest
import torch

from bessemer.core.errors import ConfigError
from bessemer.core.metrics import METRICS, MetricsLog
from bessemer.core.usercode import load_user_function
from bessemer.model import device
from bessemer.model.config import ModelConfig
from bessemer.posttraining.sft.config import SFTConfig
from bessemer.training import autotune, step_timing
from bessemer.training.autotune import RunCost, SettingsResolvedError, StepTiming, check_fits, choose, prepare_run, resolve
from bessemer.training.config import LoopConfig
from bessemer.training.pretrain_config import PretrainConfig

from .conftest import RecordedProgress


def machine(times, first=10.0):
    """A measurement that gives seconds per step from a table of (dtype, compiled): a number, or its three groups."""

    def measure(dtype, compiled):
        groups = times[dtype, compiled]
        return StepTiming(dtype, compiled, groups if isinstance(groups, tuple) else (groups,) * 3, first)

    return measure


BOTH = ["float32", "bfloat16"]
LONG = LoopConfig(steps=10_000)


def chosen(config, times, dtypes=BOTH, **options):
    speed, _, reason = choose(config, machine(times, **options), dtypes)
    return speed.dtype, speed.compile, reason


def test_the_faster_type_is_taken():
    config = LoopConfig(steps=10)
    assert chosen(config, {("float32", False): 0.2, ("bfloat16", False): 0.1})[:2] == ("bfloat16", False)
    assert chosen(config, {("float32", False): 0.1, ("bfloat16", False): 0.2})[:2] == ("float32", False)


def test_nothing_is_decided_when_times_spread_over_30_percent():
    times = {("float32", False): 0.2, ("bfloat16", False): (0.1, 0.132, 0.11)}
    dtype, compiled, reason = chosen(LONG, times)
    assert (dtype, compiled) == ("float32", False)
    assert "32%" in reason
    times["bfloat16", False], times["bfloat16", True] = (0.1, 0.128, 0.11), 0.2
    assert chosen(LONG, times)[0] == "bfloat16"


def test_compiling_is_chosen_when_it_saves_more_than_it_takes():
    times = {("float32", False): 0.2, ("float32", True): 0.15}
    assert chosen(LoopConfig(steps=1000), times, ["float32"], first=49)[1]  # saves 50 s
    assert not chosen(LoopConfig(steps=1000), times, ["float32"], first=51)[1]


def test_compiled_steps_are_held_beside_eager_ones_of_the_same_moment():
    paces = iter([1.0, 2.0, 2.0])  # the machine slows down while it compiles

    def measure(dtype, compiled):
        return StepTiming(dtype, compiled, ((0.15 if compiled else 0.2) * next(paces),) * 3, 10.0)

    speed, speeds, _ = choose(LONG, measure, ["float32"])
    assert speed.compile and len(speeds) == 3


def test_compiling_is_not_tried_for_a_short_run():
    assert chosen(LoopConfig(steps=10), {("float32", False): 0.2}, ["float32"])[1] is False


def test_without_a_compiler_it_stays_eager_and_says_why():
    def measure(dtype, compiled):
        if compiled:
            raise RuntimeError("no g++")
        return StepTiming(dtype, compiled, (0.2,) * 3, 0.2)

    speed, _, reason = choose(LONG, measure, ["float32"])
    assert not speed.compile and "compiling does not work here" in reason


def test_minutes_become_steps_of_the_measured_speed():
    config = PretrainConfig(
        minutes=2, batch_size=8, context_length=256, evaluate_tokens=2048, evaluate_every=1, diagnostics_every=0
    )
    # a step of 0.1 s and its validation of as many tokens, 0.04 s
    assert autotune._steps_in_time(config, StepTiming("float32", False, (0.1,) * 3, 0.1), 0.0) == int(120 / 0.14)
    rare = config.with_changes(evaluate_every=None)
    assert autotune._steps_in_time(rare, StepTiming("float32", False, (0.1,) * 3, 0.1), 20.0) == int((100 - 8 * 0.04) / 0.1)
    watched = config.with_changes(diagnostics_every=3)
    assert autotune._steps_in_time(watched, StepTiming("float32", False, (0.1,) * 3, 0.1), 0.0) == int(120 / (0.14 + 0.04 / 3))


TUNING = SFTConfig(
    data=["task/sums"],
    steps=400,
    minutes=0.5,
    batch_size=8,
    context_length=32,
    dtype="float32",
    compile=False,
    diagnostics_every=0,
)


def timed(monkeypatch, seconds):
    """A machine on which a step takes some seconds, and measuring none."""
    monkeypatch.setattr(autotune, "measure_steps", lambda *_: StepTiming("float32", False, (seconds,) * 3, seconds))
    monkeypatch.setattr(autotune.time, "perf_counter", lambda: 0.0)


def test_steps_that_fit_their_minutes_all_stay(model_folder, monkeypatch):
    timed(monkeypatch, 0.05)
    resolved, measured = resolve(TUNING, model_folder)
    assert (resolved.steps, resolved.minutes, resolved.resolved) == (400, None, True)
    assert "planned_steps" not in measured


def test_steps_that_do_not_fit_are_cut_and_the_measurement_says_so(model_folder, monkeypatch):
    timed(monkeypatch, 0.25)
    resolved, measured = resolve(TUNING, model_folder)
    assert resolved.steps == 120
    assert [measured[name] for name in ("steps", "planned_steps", "minutes")] == [120, 400, 0.5]


def test_what_is_read_besides_the_steps_counts_into_the_minutes(model_folder, monkeypatch):
    timed(monkeypatch, 0.25)
    # a forward pass of a batch's tokens takes 0.1 s: ten batches once, and five at each of eight validations
    cost = RunCost(validation_tokens=5 * 8 * 32, forward_tokens=10 * 8 * 32)
    resolved, _ = resolve(TUNING, model_folder, cost=cost)
    assert resolved.steps == int((30 - 8 * 0.5 - 1.0) / 0.25)


def test_a_cut_run_keeps_its_warm_up_and_its_decay(model_folder, monkeypatch):
    timed(monkeypatch, 20.0)
    config = TUNING.with_changes(warmup_fraction=None, warmup_steps=6, decay_fraction=0.4)
    resolved, _ = resolve(config, model_folder)
    assert resolved.steps == 10 and resolved.warmup_length(10) + resolved.decay_length(10) <= 10


def test_steps_that_are_more_than_two_passes_are_timed_by_the_stage_itself(model_folder, monkeypatch):
    timed(monkeypatch, 1e-6)
    asked = []
    cost = RunCost(seconds_per_step=lambda config: asked.append(config) or 0.5)
    resolved, _ = resolve(TUNING, model_folder, cost=cost)
    assert resolved.steps == 60 and asked[0].minutes is None


def test_a_short_run_of_a_stage_times_its_steps_without_the_first_cycle(tmp_path):
    def run(config, folder):
        assert config.steps == 6 and config.warmup_length(6) == config.decay_length(6) == 0
        clock = 100.0
        with MetricsLog(folder / METRICS) as log:
            for step in range(1, 7):
                clock += 9.0 if step == 1 else 0.5
                log.write(step, seconds=clock)

    assert autotune.seconds_per_step(run, TUNING.with_changes(warmup_fraction=None, warmup_steps=30), cycle=2) == 0.5


def test_only_resolving_measures_and_writes_nothing(model_folder, tmp_path, monkeypatch):
    timed(monkeypatch, 0.25)
    with pytest.raises(SettingsResolvedError) as found:
        prepare_run(TUNING, model_folder, tmp_path, device="cpu", progress=RecordedProgress(), only_resolve=True)
    assert found.value.config.steps == 120 and list(tmp_path.iterdir()) == []


def test_a_dtype_that_is_much_slower_here_is_refused_with_the_way_out(model_folder, settings, tmp_path, monkeypatch):
    monkeypatch.setattr(device, "product_cost", lambda dtype, device: 232.0 if dtype == torch.bfloat16 else 1.0)
    with pytest.raises(ConfigError, match=r"bfloat16: .* takes 232 times as long as in float32; set dtype: float32, or auto"):
        prepare_run(settings.with_changes(dtype="bfloat16"), model_folder, tmp_path, device="cpu", progress=RecordedProgress())
    monkeypatch.setattr(autotune, "is_fast", lambda dtype, device: False)
    assert autotune._dtypes(LoopConfig(dtype="auto"), torch.device("cpu")) == ["float32"]


def test_all_that_measuring_takes_counts_into_the_minutes(model_folder, monkeypatch):
    clock = iter([0.0, *[20.0] * 100])
    spent: list[float] = []
    monkeypatch.setattr(autotune, "measure_steps", lambda *_: StepTiming("float32", False, (0.1,) * 3, 0.1))
    monkeypatch.setattr(autotune, "_steps_in_time", lambda config, speed, seconds, small, plan: spent.append(seconds) or 7)
    monkeypatch.setattr(autotune.time, "perf_counter", lambda: next(clock))
    config = PretrainConfig(minutes=2, batch_size=2, context_length=32, dtype="float32", compile=False)
    resolved, measured = resolve(config, model_folder)
    assert (spent, resolved.steps, measured["seconds"]) == ([20.0], 7, 20.0)


def test_resolved_settings_are_given_back_unmeasured(model_folder, settings, monkeypatch):
    monkeypatch.setattr(autotune, "measure_steps", lambda *arguments: pytest.fail("measured"))
    assert resolve(settings, model_folder) == (settings, {})


def test_tokens_are_rounded_up_to_steps(model_folder):
    config = PretrainConfig(tokens=1001, batch_size=10, context_length=10, dtype="float32", compile=False)
    resolved, _ = resolve(config, model_folder)
    assert (resolved.steps, resolved.tokens) == (11, None)


def test_resolving_measures_real_steps_and_leaves_nothing_open(model_folder, monkeypatch):
    monkeypatch.setattr(step_timing, "_GROUP_SECONDS", 0.01)
    config = PretrainConfig(minutes=1, batch_size=2, context_length=32, threads=1, evaluate_tokens=64)
    assert not config.resolved
    resolved, measured = resolve(config, model_folder)
    assert resolved.resolved and resolved.minutes is None and resolved.steps > 1
    assert measured["tokens_per_second"] > 0 and measured["candidates"]
    assert PretrainConfig.parse(json.loads(json.dumps(resolved.model_dump(mode="json")))) == resolved
    json.dumps(measured, allow_nan=False)


OWN = """
from bessemer.training.objectives import next_token_loss

calls = []

def loss(model, batch):
    calls.append(batch.tokens_BT.shape)
    return next_token_loss(model, batch)
"""


def test_a_users_loss_is_the_one_that_is_measured(model_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(step_timing, "_GROUP_SECONDS", 0.01)
    (tmp_path / "mine.py").write_text(OWN, encoding="utf-8")
    config = PretrainConfig(minutes=0.05, batch_size=2, context_length=32, threads=1, evaluate_tokens=64, loss="mine.py:loss")
    resolve(config, model_folder, folder=tmp_path)
    calls = load_user_function("mine.py:loss", tmp_path).__globals__["calls"]
    assert len(calls) > 3 and set(calls) == {(2, 32)}


def test_choices_are_written_down_and_read_back(model_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(step_timing, "_GROUP_SECONDS", 0.01)
    config = PretrainConfig(minutes=0.05, batch_size=2, context_length=32, threads=1, evaluate_tokens=64)
    first, runtime, _ = prepare_run(config, model_folder, tmp_path, device="cpu", progress=RecordedProgress())
    monkeypatch.setattr(autotune, "measure_steps", lambda *arguments: pytest.fail("measured again"))
    progress = RecordedProgress()
    assert prepare_run(config, model_folder, tmp_path, device="cpu", progress=progress)[:2] == (first, runtime)
    assert progress.lines == []


def test_a_resume_takes_the_threads_it_began_with_where_they_are(model_folder, settings, tmp_path, monkeypatch):
    anywhere = settings.with_changes(threads=None)
    monkeypatch.setattr("bessemer.training.runtime.usable_cores", lambda: 2)
    prepare_run(anywhere, model_folder, tmp_path, device="cpu", progress=RecordedProgress())
    monkeypatch.setattr("bessemer.training.runtime.usable_cores", lambda: 16)
    progress = RecordedProgress()
    assert prepare_run(anywhere, model_folder, tmp_path, device="cpu", progress=progress)[1].threads == 2
    assert progress.lines == []
    monkeypatch.setattr("bessemer.training.runtime.usable_cores", lambda: 1)
    assert prepare_run(anywhere, model_folder, tmp_path, device="cpu", progress=progress)[1].threads == 1
    assert "threads 2 → 1" in progress.lines[0]


def test_a_run_that_began_where_bfloat16_is_fast_is_not_resumed_where_it_is_not(model_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(autotune, "measure_steps", lambda config, *_: StepTiming(config.dtype, False, (0.1,) * 3, 0.1))
    monkeypatch.setattr(autotune, "is_fast", lambda dtype, device: True)
    monkeypatch.setattr(autotune, "_dtypes", lambda config, device: ["bfloat16"])
    monkeypatch.setattr(device, "product_cost", lambda dtype, device: 0.5)
    config = PretrainConfig(minutes=1, batch_size=2, context_length=32, compile=False)
    assert prepare_run(config, model_folder, tmp_path, device="cpu", progress=RecordedProgress())[1].dtype == "bfloat16"
    monkeypatch.setattr(device, "product_cost", lambda dtype, device: 80.0)
    with pytest.raises(ConfigError, match=r"80 times as long .* recipe\.lock\.yaml that says it"):
        prepare_run(config, model_folder, tmp_path, device="cpu", progress=RecordedProgress())


@pytest.mark.parametrize("name, value", [("threads", 7), ("processor", "another"), ("torch_version", "0.1")])
def test_a_resume_elsewhere_says_that_it_is_not_bit_exact(model_folder, settings, tmp_path, name, value):
    prepare_run(settings, model_folder, tmp_path, device="cpu", progress=RecordedProgress())
    place = tmp_path / "autotune.json"
    place.write_text(json.dumps(json.loads(place.read_text(encoding="utf-8")) | {name: value}), encoding="utf-8")
    progress = RecordedProgress()
    prepare_run(settings, model_folder, tmp_path, device="cpu", progress=progress)
    assert f"{name} {value}" in progress.lines[0] and "not bit-exact" in progress.lines[0]


def test_rows_longer_than_the_model_reads_are_refused(model_folder, settings):
    with pytest.raises(ConfigError, match=r"context_length 256 exceeds .* 128"):
        resolve(settings.with_changes(context_length=256), model_folder)


def test_an_unknown_device_is_refused(model_folder, settings, tmp_path):
    with pytest.raises(ConfigError, match="unknown device 'nonsense'"):
        prepare_run(settings, model_folder, tmp_path, device="nonsense", progress=RecordedProgress())


def test_compiling_without_a_compiler_is_refused_at_once(monkeypatch):
    monkeypatch.setattr("bessemer.training.config.cxx_compiler", lambda: None)
    with pytest.raises(ConfigError, match="needs a C\\+\\+ compiler"):
        check_fits(PretrainConfig(steps=1, compile=True), ModelConfig(vocab_size=300))

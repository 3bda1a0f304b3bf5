import json

import pytest
import torch

from bessemer.model.config import ModelConfig
from bessemer.training.config import LoopConfig
from bessemer.training.monitoring.profiler import device_peak, measured_peak
from bessemer.training.monitoring.run_metrics import Throughput
from bessemer.training.runtime import Runtime

MODEL = ModelConfig(vocab_size=97, hidden_size=32, num_hidden_layers=2, intermediate_size=48)


def test_utilisation_is_the_models_flops_over_the_peak():
    config = LoopConfig(batch_size=8, context_length=64)
    needed = MODEL.flops_per_token(64) * 8 * 64 / 0.5  # a second, of steps of half a second
    figures = Throughput(config, MODEL, peak_flops=4 * needed).add_step(8 * 64, 0.5, 0.1)
    assert figures["mfu"] == pytest.approx(0.25)
    assert figures["tokens_per_second"] == 1024 and figures["data_wait"] == 0.2


def test_without_a_peak_nothing_is_said_of_it():
    throughput = Throughput(LoopConfig(), MODEL, None)
    assert "mfu" not in throughput.add_step(1024, 1.0, 0.0)
    assert "GFLOP/s" in throughput.progress_line({"loss": 1.0})


def test_the_line_tells_loss_bits_speed_and_utilisation():
    config = LoopConfig(batch_size=4, context_length=256)
    throughput = Throughput(config, MODEL, peak_flops=2 * MODEL.flops_per_token(256) * 1024)
    throughput.add_step(1024, 1.0, 0.0)
    assert (
        throughput.progress_line({"loss": 3.14159, "bits_per_byte": 1.5})
        == "loss 3.142 · 1.500 bits/byte · 1,024 tokens/s · 50% MFU"
    )


@pytest.fixture
def runtime(settings):
    return Runtime.of(settings, torch.device("cpu"))


def test_a_processors_peak_is_measured_once(tmp_path, runtime, monkeypatch):
    (tmp_path / "autotune.json").write_text(json.dumps({"steps": 3}), encoding="utf-8")
    peak = device_peak(tmp_path, runtime)
    assert peak > 1e9
    assert json.loads((tmp_path / "autotune.json").read_text(encoding="utf-8")) == {"steps": 3, "peak_flops": peak}
    monkeypatch.setattr("bessemer.training.monitoring.profiler.measured_peak", lambda runtime: pytest.fail("measured"))
    assert device_peak(tmp_path, runtime) == peak


@pytest.mark.parametrize("flops", [0.8e9, 5e9, 200e9, 5e12])
def test_a_peak_is_measured_within_a_second_however_slow_the_products_are(settings, monkeypatch, flops):
    spent = []

    def seconds(side, dtype):
        spent.append(2 * side**3 / flops)
        return spent[-1]

    monkeypatch.setattr("bessemer.training.monitoring.profiler._seconds", seconds)
    runtime = Runtime.of(settings.with_changes(dtype="bfloat16"), torch.device("cpu"))
    assert measured_peak(runtime) == pytest.approx(flops, rel=1e-3)
    assert sum(spent) < 1


def test_a_cards_peak_is_what_its_name_promises(tmp_path, runtime):
    from dataclasses import replace

    card = replace(runtime, device="cuda:0", processor="NVIDIA H100")
    assert device_peak(tmp_path, card, {"NVIDIA H100": 1e15}.get) == 1e15
    assert device_peak(tmp_path, card) is None


def test_measuring_leaves_the_random_state(runtime):
    before = torch.get_rng_state()
    measured_peak(runtime)
    assert torch.equal(torch.get_rng_state(), before)

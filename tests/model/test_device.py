import pytest
import torch

from bessemer.model import device
from bessemer.model.device import is_fast, product_cost

CPU = torch.device("cpu")


@pytest.fixture
def timed(monkeypatch):
    """A processor on which products take some seconds by dtype."""

    def set_seconds(**seconds):
        monkeypatch.setattr(device, "_product_seconds", lambda dtype: seconds[str(dtype).removeprefix("torch.")])

    return set_seconds


def test_what_a_dtype_costs_is_measured_and_not_named(timed):
    timed(float32=1e-3, bfloat16=5e-4, float16=0.2)
    assert product_cost(torch.bfloat16, CPU) == 0.5 and is_fast(torch.bfloat16, CPU)
    assert product_cost(torch.float16, CPU) == pytest.approx(200) and not is_fast(torch.float16, CPU)
    assert is_fast(torch.float32, CPU)


def test_a_measurement_takes_a_moment_and_is_made_once(monkeypatch):
    calls = []
    clock = iter(range(1000))
    monkeypatch.setattr(device.time, "perf_counter", lambda: 10.0 * next(clock))
    monkeypatch.setattr(device.torch, "mm", lambda left, right: calls.append(left.dtype))
    device._product_seconds.cache_clear()
    try:
        # ten seconds each, on this clock: one to wake the threads, one that counts
        assert device._product_seconds(torch.float16) == 10.0 and len(calls) == 2
        device._product_seconds(torch.float16)
        assert len(calls) == 2
    finally:
        device._product_seconds.cache_clear()


def test_a_gpu_computes_in_16_bits_where_its_generation_does(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: False)
    card = torch.device("cuda", 0)
    assert not is_fast(torch.bfloat16, card) and is_fast(torch.float16, card)

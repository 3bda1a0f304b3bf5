import pytest
import torch

from bessemer.model import device
from bessemer.model.device import (
    _chain_seconds,
    is_fast,
    product_cost,
    product_flops,
    served_dtype,
    slower_than_processor,
    with_threads,
)

CPU = torch.device("cpu")


@pytest.fixture
def timed(monkeypatch):
    """A processor on which products take some seconds by dtype."""

    def set_seconds(**seconds):
        monkeypatch.setattr(device, "_product_seconds", lambda dtype, threads: seconds[str(dtype).removeprefix("torch.")])

    return set_seconds


def test_a_macs_gpu_that_is_slower_than_the_processor_is_said_in_one_line():
    took = {"mps": 0.03, "cpu": 0.01}

    def seconds(device, rows, width, dtype):
        assert (rows, width) == (1, 576)
        return took[device.type]

    line = slower_than_processor(torch.device("mps"), 1, 576, torch.float32, seconds)
    assert "3.0 times as long as its processor" in line and "--device cpu" in line and "\n" not in line
    took["mps"] = 0.005
    assert slower_than_processor(torch.device("mps"), 1, 576, torch.float32, seconds) is None
    assert slower_than_processor(torch.device("cuda"), 1, 576, torch.float32, seconds) is None
    assert _chain_seconds(torch.device("cpu"), 2, 8, torch.float32) > 0


@pytest.mark.parametrize(
    ("setting", "own", "device", "served"),
    [
        ("auto", "float32", "cuda", "bfloat16"),
        ("auto", "float16", "cuda", "float16"),
        ("auto", "float32", "cpu", "float32"),
        ("float32", "bfloat16", "cuda", "float32"),
        ("float16", "float32", "cpu", "float16"),
    ],
)
def test_a_model_is_served_in_the_dtype_of_the_settings(setting, own, device, served, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: True)
    assert served_dtype(setting, getattr(torch, own), torch.device(device)) == getattr(torch, served)


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


def test_dtypes_are_compared_on_one_thread(monkeypatch):
    # several threads wait for each other on a busy processor, for up to a hundred times as long as they compute
    product, threads = torch.mm, []
    monkeypatch.setattr(device.torch, "mm", lambda left, right: threads.append(torch.get_num_threads()) or product(left, right))
    device._product_seconds.cache_clear()
    with with_threads(2):
        assert product_cost(torch.bfloat16, CPU) > 0 and product_flops(torch.bfloat16) > 0
        assert torch.get_num_threads() == 2
    compared = threads.index(2)
    assert set(threads[:compared]) == {1} and set(threads[compared:]) == {2}


def test_a_gpu_computes_in_16_bits_where_its_generation_does(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: False)
    card = torch.device("cuda", 0)
    assert not is_fast(torch.bfloat16, card) and is_fast(torch.float16, card)

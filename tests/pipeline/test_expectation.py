import pytest
import torch

from bessemer.pipeline import expectation
from bessemer.pipeline.expectation import bits_after, expected_quickstart


def test_expected_bits_fall_with_the_steps_from_one_measured_run_to_the_next():
    assert [bits_after(steps) for steps in (39, 86, 758)] == [2.82, 2.55, 2.05]
    assert 2.55 > bits_after(100) > bits_after(120) > 2.42
    assert bits_after(1) == 2.82 and bits_after(100_000) == 2.05


@pytest.fixture
def machine(monkeypatch):
    """A machine whose passes take some seconds."""

    def be(seconds, *, fast=False, cores=2, compiler="c++"):
        monkeypatch.setattr(expectation, "_pass_seconds", lambda dtype, rows, columns: seconds)
        monkeypatch.setattr(expectation, "is_fast", lambda dtype, device: fast)
        monkeypatch.setattr(expectation, "usable_cores", lambda: cores)
        monkeypatch.setattr(expectation, "cxx_compiler", lambda: compiler)
        return expected_quickstart()

    return be


def test_a_slower_machine_takes_longer_and_ends_with_more_bits(machine):
    quick, slow = machine(0.2, fast=True), machine(0.8)
    assert (quick.dtype, slow.dtype) == ("bfloat16", "float32")
    assert quick.minutes < slow.minutes and quick.steps > slow.steps and quick.bits_per_byte < slow.bits_per_byte


def test_stages_with_a_limit_take_no_longer_than_it(machine):
    very_slow, slower_still = machine(100.0), machine(200.0)
    assert very_slow.minutes == slower_still.minutes < 13 and slower_still.steps == 1


def test_one_core_and_no_compiler_cost_time(machine):
    assert machine(0.2, cores=1).minutes > machine(0.2).minutes
    assert machine(0.2, compiler=None).steps < machine(0.2).steps


def test_passes_of_the_quickstarts_model_are_timed():
    assert 0 < expectation._pass_seconds(torch.float32, 1, 8) < 60

"""Each machine is what it says it is, on whichever this one is."""

import json
import os
import platform
import signal
import subprocess
import sys
import time
from contextlib import contextmanager

import pytest

from bessemer.core import machines
from bessemer.core.environment import affine_cores
from bessemer.core.errors import ConfigError
from bessemer.core.machines import MACHINE_VARIABLE, MACHINES, machine, run_as

HOLDS_TO_CORES = pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="no process is held to a core here")
LOOK = """
import json, os
from bessemer.core import environment
from bessemer.core.machines import MACHINE_VARIABLE
found = {
    "name": os.environ[MACHINE_VARIABLE],
    "cores": environment.affine_cores(),
    "usable": environment.usable_cores(),
    "compiler": environment.cxx_compiler(),
}
"""
#: What takes some seconds to load.
LIBRARIES = """
import torch
import numpy._core._multiarray_umath as numpy_core
from torch._inductor import config
from bessemer.model.device import is_fast
found |= {
    "torch": torch.backends.cpu.get_cpu_capability(),
    "bfloat16": is_fast(torch.bfloat16, torch.device("cpu")),
    "numpy": bool(numpy_core.__cpu_features__.get("AVX512_ICL")),
    "march": config.cpp.march,
}
"""
#: Which instructions PyTorch's compiler would use: it compiles a program for each set to find out.
INSTRUCTIONS = """
from torch._inductor.cpu_vec_isa import pick_vec_isa
found["isa"] = str(pick_vec_isa()) if environment.cxx_compiler() else ""
"""


def look(name, what=LOOK):
    """What a process finds that runs as on a machine; None where this system cannot stand for it."""
    command = [sys.executable, "-m", "bessemer.core.machines", name, sys.executable, "-c", what + "print(json.dumps(found))"]
    done = subprocess.run(command, capture_output=True, encoding="utf-8", check=False)
    if done.returncode == 2 and "needs a control group" in done.stderr:
        return None
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="not an x86-64 processor")
def test_as_an_avx2_machine_nothing_uses_more_and_bfloat16_does_not_pay():
    found = look("avx2", LOOK + LIBRARIES)
    assert found["name"] == "avx2" and found["torch"] == "AVX2" and found["march"] == "x86-64-v3"
    assert not found["bfloat16"] and not found["numpy"]


@pytest.mark.slow
@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="not an x86-64 processor")
def test_as_an_avx2_machine_nothing_is_compiled_for_more():
    assert "avx512" not in look("avx2", LOOK + INSTRUCTIONS)["isa"].lower()


def test_without_a_compiler_none_is_found():
    assert look("no-compiler")["compiler"] is None


@HOLDS_TO_CORES
def test_one_core_is_one_core():
    found = look("one-core")
    assert found["cores"] == found["usable"] == 1


@HOLDS_TO_CORES
def test_half_a_core_is_one_thread():
    found = look("half-core")
    # not root, or no control groups
    assert found is None or found["usable"] == 1


@HOLDS_TO_CORES
@pytest.mark.skipif(affine_cores() < 2, reason="one core")
def test_a_busy_core_is_the_last_one(monkeypatch):
    taken = []

    @contextmanager
    def busy(core):
        taken.append(core)
        yield

    monkeypatch.setattr(machines, "_busy", busy)
    assert run_as("busy-core", [sys.executable, "-c", ""]) == 0 and run_as("native", [sys.executable, "-c", ""]) == 0
    assert taken == [max(os.sched_getaffinity(0))]


@HOLDS_TO_CORES
def test_a_core_is_kept_busy_and_given_back():
    core = min(os.sched_getaffinity(0))
    with machines._busy(core) as process:
        before = time.monotonic()
        # a process sets its cores once Python has started in it
        while process.poll() is None and os.sched_getaffinity(process.pid) != {core} and time.monotonic() < before + 60:
            time.sleep(0.01)
        assert process.poll() is None and (affine_cores() == 1 or os.sched_getaffinity(process.pid) == {core})
    assert process.returncode == -signal.SIGKILL


def test_the_exit_status_is_the_commands_own():
    assert run_as("native", [sys.executable, "-c", "raise SystemExit(7)"]) == 7


def test_an_unknown_machine_is_refused_with_the_nearest_name():
    with pytest.raises(ConfigError, match=r"no machine 'avx'.*avx2"):
        machine("avx")
    command = [sys.executable, "-m", "bessemer.core.machines", "avx", "true"]
    done = subprocess.run(command, capture_output=True, encoding="utf-8", check=False)
    assert done.returncode == 2 and done.stderr.startswith("error: there is no machine 'avx'")


def test_the_variable_names_the_machine():
    assert MACHINE_VARIABLE not in MACHINES["native"].environment

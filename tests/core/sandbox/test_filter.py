"""The seccomp filter, run by an interpreter of classic BPF: what each machine's numbers are answered with."""

from __future__ import annotations

import errno
import sys

import pytest

if sys.platform != "linux":
    pytest.skip("seccomp is Linux's", allow_module_level=True)

from bessemer.core.sandbox.launcher.linux import filter_program

ALLOW, KILL = 0x7FFF0000, 0x80000000
ARCHITECTURES = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
#: From each machine's `asm/unistd.h`.
NUMBERS = {
    "x86_64": {
        "read": 0, "openat": 257, "execve": 59, "socket": 41, "socketpair": 53, "clone": 56, "clone3": 435, "kill": 62,
        "fcntl": 72, "fchmod": 91, "prlimit64": 302, "ptrace": 101, "io_uring_setup": 425, "landlock_restrict_self": 446,
    },
    "aarch64": {
        "read": 63, "openat": 56, "execve": 221, "socket": 198, "socketpair": 199, "clone": 220, "clone3": 435, "kill": 129,
        "fcntl": 25, "fchmod": 52, "prlimit64": 261, "ptrace": 117, "io_uring_setup": 425, "landlock_restrict_self": 446,
    },
}  # fmt: skip


def answer(machine: str, number: int, *arguments: int, signals: bool = False, metadata: bool = False, arch: int = 0) -> int:
    """What the filter returns for a call."""
    data = {0: number, 4: arch or ARCHITECTURES[machine]}
    data |= {16 + 8 * index: value & 0xFFFFFFFF for index, value in enumerate((*arguments, 0, 0, 0)[:3])}
    instructions = filter_program(signals, metadata, machine)
    place, held = 0, 0
    while True:
        code, yes, no, operand = instructions[place]
        place += 1
        match code:
            case 0x20:
                held = data[operand]
            case 0x54:
                held &= operand
            case 0x15:
                place += yes if held == operand else no
            case 0x25:
                place += yes if held > operand else no
            case 0x45:
                place += yes if held & operand else no
            case 0x06:
                return operand


CASES = [
    ("read", (), None),
    ("openat", (), None),
    ("execve", (), None),
    ("landlock_restrict_self", (), None),
    ("socket", (1, 1), errno.EPERM),
    ("ptrace", (), errno.EPERM),
    ("io_uring_setup", (), errno.EPERM),
    ("socketpair", (1, 1 | 0o2000000), None),
    ("socketpair", (1, 2), errno.EPERM),
    ("socketpair", (2, 1), errno.EPERM),
    ("clone", (17,), None),
    ("clone", (0x10000000 | 17,), errno.EPERM),
    ("clone3", (), errno.ENOSYS),
    ("prlimit64", (0,), None),
    ("prlimit64", (4321,), errno.EPERM),
    ("fcntl", (3, 1), None),
    ("fcntl", (3, 8), errno.EPERM),
]


@pytest.mark.parametrize("machine", NUMBERS)
@pytest.mark.parametrize(("name", "arguments", "code"), CASES)
def test_a_call_is_answered(machine, name, arguments, code):
    assert answer(machine, NUMBERS[machine][name], *arguments) == (ALLOW if code is None else 0x00050000 | code)


@pytest.mark.parametrize("machine", NUMBERS)
def test_signals_and_metadata_are_filtered_where_asked(machine):
    kill, fchmod = NUMBERS[machine]["kill"], NUMBERS[machine]["fchmod"]
    assert answer(machine, kill) == answer(machine, fchmod) == ALLOW
    assert answer(machine, kill, signals=True) == 0x00050000 | errno.EPERM
    assert answer(machine, fchmod, metadata=True) == 0x00050000


def test_calls_of_another_machine_end_the_program_and_unknown_ones_fail():
    assert answer("x86_64", 0, arch=0x40000003) == KILL  # i386
    assert answer("x86_64", 463) == answer("x86_64", 0x40000000) == 0x00050000 | errno.ENOSYS

"""Programs that try to get out, each with what tells that it did; run by whoever calls this file, in one tier, as JSON lines.

    python hostile.py TIER WORLD

WORLD: a folder that `test_hostile.py` has made. A program gets as arguments a token that no other process has, WORLD, the
caller's process id, and the port of the caller's servers. It prints ESCAPED when it did what it should not.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

from bessemer.core.sandbox import Limits, Result, Sandbox, SandboxError

SECRET = "cementite-7e21"
LIMITS = Limits(seconds=5, cpu_seconds=3, memory=192 << 20, disk=4 << 20, output=64 << 10, processes=8)
_HEADER = "import os, sys, time\ntoken, world, caller, port = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])\n"


@dataclass(frozen=True)
class Case:
    """hazard: what a tier's gaps call it. expect: what a contained result looks like beyond nothing having escaped."""

    hazard: str
    code: str
    limits: Limits = LIMITS
    expect: Callable[[Result], bool] = field(default=lambda result: True)


def _limit(name: str) -> Callable[[Result], bool]:
    return lambda result: result.limit == name


CASES = {
    "fork bomb": Case(
        "processes",
        """
made = 0
for _ in range(40):
    try:
        if os.fork() == 0:
            time.sleep(30)
        made += 1
    except BlockingIOError:
        break
print("ESCAPED" if made > 8 else made)
""",
    ),
    "daemon": Case(
        "daemon", "if os.fork() == 0:\n    os.setsid()\n    if os.fork() == 0:\n        time.sleep(30)\n    os._exit(0)\n"
    ),
    "relay of processes": Case(
        "daemon",
        """
end = time.monotonic() + 20
while time.monotonic() < end:
    try:
        if os.fork():
            os._exit(0)
        os.setsid()
    except BlockingIOError:
        pass
""",
        replace(LIMITS, seconds=1),
    ),
    "8 GB": Case("memory", "held = []\nfor _ in range(128):\n    held.append(bytearray(64 << 20))\nprint('ESCAPED')\n"),
    "memory of many processes": Case(
        "memory",
        """
import select
full, told = os.pipe()
for _ in range(4):
    if os.fork() == 0:
        held = bytearray(b"x") * (100 << 20)
        os.write(told, b"x")
        time.sleep(15)
        os._exit(0)
for _ in range(4):
    # a busy machine takes its time
    if select.select([full], [], [], 3)[0]:
        os.read(full, 1)
time.sleep(2)
print("ESCAPED")
""",
        replace(LIMITS, seconds=20),
        expect=_limit("memory"),
    ),
    "anonymous files": Case(
        "kernel",
        "for _ in range(8):\n    os.write(os.memfd_create('x'), bytes(1 << 20))\nprint('ESCAPED')",
    ),
    "large file": Case(
        "disk",
        "with open('large', 'wb') as file:\n    for _ in range(16):\n        file.write(bytes(1 << 20))\nprint('ESCAPED')\n",
    ),
    "many files": Case(
        "disk",
        """
for number in range(32):
    with open(str(number), "wb") as file:
        file.write(bytes(1 << 20))
time.sleep(0.5)
print("ESCAPED")
""",
    ),
    "output flood": Case(
        "output",
        "line = 'x' * 9999\nfor _ in range(10_000):\n    print(line)\nprint('ESCAPED', file=sys.stderr)\n",
        expect=lambda result: result.limit == "output" and len(result.stdout) + len(result.stderr) <= LIMITS.output,
    ),
    "environment of others": Case(
        "environment",
        """
for pid in [1, caller, os.getppid()]:
    try:
        if b"cementite" in open(f"/proc/{pid}/environ", "rb").read():
            print("ESCAPED")
    except OSError:
        pass
""",
    ),
    "secret file": Case("home", "print('ESCAPED', open(world + '/home/secret').read())"),
    "secret file by a link": Case("home", "os.symlink(world + '/home', 'link')\nprint('ESCAPED', open('link/secret').read())"),
    "secret file by a hard link": Case(
        "home", "os.link(world + '/home/secret', 'link')\nprint('ESCAPED', open('link').read())"
    ),
    "new file outside": Case("home", "open(world + '/home/new-' + token, 'w').close()\nprint('ESCAPED')"),
    "new file outside by a link": Case(
        "home", "os.symlink(world + '/home', 'link')\nopen('link/linked-' + token, 'w').close()\nprint('ESCAPED')"
    ),
    "public file": Case("public", "print('ESCAPED', open(world + '/public').read())"),
    "existence of a file": Case("existence", "print('ESCAPED' if os.path.exists(world + '/public') else '')"),
    "deleted files": Case(
        "deleted",
        """
held = []
for number in range(4):
    held.append(open(str(number), "wb"))
    os.unlink(str(number))
    held[-1].write(bytes(3 << 20))
    held[-1].flush()
print("ESCAPED")
""",
    ),
    "link left behind": Case("links", "os.symlink(world + '/home', 'link')\nos.symlink('/', 'root')\nos.symlink('..', 'up')"),
    "TCP to this machine": Case(
        "network",
        "import socket\nsocket.create_connection(('127.0.0.1', port), 1).sendall(token.encode())\nprint('ESCAPED')",
    ),
    "UDP to this machine": Case(
        "network",
        """
import socket
socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(token.encode(), ("127.0.0.1", port))
print("ESCAPED")
""",
    ),
    "abstract socket": Case(
        "network",
        """
import socket
socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM).sendto(token.encode(), b"\\0bessemer-%d" % port)
print("ESCAPED")
""",
    ),
    "datagrams from a pair of sockets": Case(
        "network",
        """
import socket
one, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
one.sendto(token.encode(), b"\\0bessemer-%d" % port)
print("ESCAPED")
""",
    ),
    "sockets to elsewhere": Case(
        "network",
        """
import socket
for family in (socket.AF_INET, socket.AF_INET6, socket.AF_NETLINK, socket.AF_PACKET):
    for kind in (socket.SOCK_STREAM, socket.SOCK_DGRAM, socket.SOCK_RAW):
        try:
            socket.socket(family, kind)
            print("ESCAPED")
        except OSError:
            pass
""",
    ),
    "signal to the caller": Case("signals", "import signal\nos.kill(caller, signal.SIGUSR1)\nprint('ESCAPED')"),
    "signal to the parent": Case(
        "own", "import signal\nos.kill(os.getppid(), signal.SIGKILL)\ntime.sleep(0.2)\nprint('ESCAPED')"
    ),
    "limits of the caller": Case(
        "signals", "import resource\nresource.prlimit(caller, resource.RLIMIT_CORE, (0, 0))\nprint('ESCAPED')"
    ),
    "sleep": Case("seconds", "time.sleep(60)\nprint('ESCAPED')", replace(LIMITS, seconds=0.5), _limit("seconds")),
    "sleep with closed streams": Case(
        "seconds", "os.closerange(0, 3)\ntime.sleep(60)", replace(LIMITS, seconds=0.5), _limit("seconds")
    ),
    # on a busy machine a second of processor time takes many
    "spin": Case("cpu", "while True:\n    pass", replace(LIMITS, seconds=60, cpu_seconds=1), _limit("cpu_seconds")),
    "own files deleted": Case(
        "own", "import shutil\nshutil.rmtree(os.getcwd(), ignore_errors=True)\nprint('done')", expect=lambda result: result.ok
    ),
    "deep folders": Case("own", "for _ in range(900):\n    os.mkdir('d' * 60)\n    os.chdir('d' * 60)\nprint('done')"),
    "closed folders": Case("own", "os.makedirs('a/b')\nos.chmod('a/b', 0)\nos.chmod('a', 0)"),
    "setuid program": Case(
        "privilege",
        """
import subprocess
if subprocess.run([world + "/tools/id", "-u"], capture_output=True, text=True).stdout.strip() == "0":
    print("ESCAPED")
""",
    ),
    "kernel interfaces": Case(
        "kernel",
        """
import ctypes, platform
libc = ctypes.CDLL(None, use_errno=True)
numbers = {"x86_64": (272, 321, 250, 165), "aarch64": (97, 280, 219, 40)}[platform.machine()]
page = ctypes.create_string_buffer(256)
for number, *arguments in (
    (numbers[0], 0x10000000), (numbers[1], 0, page, 120), (numbers[2], 0, -3, 1), (numbers[3], page, page, page, 0, 0),
    (425, 1, page), (1000, 0),
):
    if libc.syscall(number, *arguments) != -1 or ctypes.get_errno() not in (1, 38):
        print("ESCAPED", number, ctypes.get_errno())
""",
    ),
}


class World:
    """What lies outside: files that the caller alone may read, servers, a signal that is counted."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.signals = 0
        signal.signal(signal.SIGUSR1, self._count)
        self._servers = [socket.socket(), socket.socket(socket.AF_INET, socket.SOCK_DGRAM)]
        self._servers[0].bind(("127.0.0.1", 0))
        self._servers[0].listen()
        self.port = self._servers[0].getsockname()[1]
        self._servers[1].bind(("127.0.0.1", self.port))
        self._servers.append(socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM))
        self._servers[2].bind(f"\0bessemer-{self.port}")
        for server in self._servers:
            server.setblocking(False)
        home = folder / "home"
        home.mkdir(mode=0o700)
        (home / "secret").write_text(SECRET, encoding="utf-8")
        (home / "secret").chmod(0o600)

    def _count(self, number: int, frame: object) -> None:
        self.signals += 1

    def signs_of(self, token: str) -> list[str]:
        """What a program with this token has done outside."""
        signs = [] if not self.signals else ["signal"]
        self.signals = 0
        for server in self._servers:
            try:
                signs.append(f"socket {server.accept() if server is self._servers[0] else server.recv(99)}")
            except BlockingIOError:
                pass
        home = self.folder / "home"
        signs += [f"file {path.name}" for path in home.iterdir() if path.name.endswith(token)]
        if not (home / "secret").exists():
            signs.append("secret deleted")
        left = list(_processes_with(token))
        for pid in left:
            os.kill(pid, signal.SIGKILL)
        signs += [f"scratch {path}" for path in Path(tempfile.gettempdir()).glob("bessemer-sandbox-*")]
        return signs + [f"process {pid}" for pid in left]


def _processes_with(token: str) -> Iterator[int]:
    for place in Path("/proc").iterdir():
        try:
            if place.name.isdecimal() and token.encode() in (place / "cmdline").read_bytes().split(b"\0"):
                yield int(place.name)
        except OSError:
            continue


@contextmanager
def _own_temporary_folder(world: Path) -> Iterator[None]:
    """Scratch folders are made where nobody else makes any."""
    folder = world / "tmp"
    folder.mkdir(mode=0o755)
    tempfile.tempdir = str(folder)
    yield
    tempfile.tempdir = None


def main(tier: str, folder: str) -> None:
    world = World(Path(folder))
    tools = Path(folder) / "tools"
    with _own_temporary_folder(Path(folder)):
        try:
            sandbox = Sandbox(minimum=tier, maximum=tier, readable=[tools])
        except SandboxError as error:
            print(json.dumps({"refused": str(error)}))
            return
        print(json.dumps({"gaps": [gap.hazard for gap in sandbox.gaps]}))
        for number, (name, case) in enumerate(CASES.items()):
            if case.hazard != "privilege" or (tools / "id").exists():
                print(json.dumps({"case": name, "hazard": case.hazard} | _outcome(sandbox, world, case, number)), flush=True)


def _outcome(sandbox: Sandbox, world: World, case: Case, number: int) -> dict[str, object]:
    token = f"hostile-{os.getpid()}-{number}"
    argv = ["python", "-B", "-c", _HEADER + case.code, token, str(world.folder), str(os.getpid()), str(world.port)]
    result = sandbox.run(argv, limits=case.limits)
    lines = [*result.stdout.splitlines(), *result.stderr.splitlines()]
    signs = [line for line in lines if line.startswith("ESCAPED")] + world.signs_of(token)
    if not case.expect(result):
        signs.append(f"not as expected: {result!r:.500}")
    return {"signs": signs}


if __name__ == "__main__":
    main(*sys.argv[1:])

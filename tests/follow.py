"""README, the tutorials and the examples followed as a newcomer would, outside the checkout: `make follow`.

    python -m tests.follow                       # all guides, hours: every recipe of the examples is run whole
    python -m tests.follow README.md examples/engine.py
    python -m tests.follow --list                # what would be done, and what is left out and why

A guide is a page, or a row of the table in `examples/README.md`. Each gets a new folder and a new virtual environment in which
nothing is installed; the guide's own `pip install '.[EXTRA]'` installs the built wheel with that extra. Commands run in one
shell, Python blocks in one interpreter, as they stand. At the prompts of `chat` and `demo` a question is typed, at `[Y/n]` yes;
a server that does not return is asked for its page and gets Ctrl-C. What a mark leaves out (`tests/literate.py`) is counted.
The exit code is 1 where any command failed.
"""

from __future__ import annotations

import argparse
import json
import os
import pty
import re
import select
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from tests.literate import Block, commands, marked_blocks

ROOT = Path(__file__).resolve().parents[1]
#: What a block may need (`<!-- needs: index -->`), and whether it is there by default.
NEEDS = {
    "index": True,  # a package index
    "minutes": True,  # more minutes than a test has
    "checkout": False,  # `make`, which tests follow elsewhere
    "hub": False,  # the Hugging Face Hub
}
#: Variables of the caller that a newcomer's shell has as well.
_KEPT = re.compile(r"PIP_.*|.*_proxy|.*_PROXY|.*_CERT|.*_CERT_FILE|.*_CA_BUNDLE|LANG|LC_.*|LOCPATH|TERM|TMPDIR|USER")
_CHECKOUT = re.compile(r"(?<=\s)(['\"]?)\.(\[[\w,-]+\])\1(?=\s|$)")
_INTERACTIVE = re.compile(r"bessemer (chat|demo)\b(?!.* --inspect )[^|<>&;]*")
_SERVER = re.compile(r"bessemer serve\b(?!.* --ask )[^|<>;]*")
#: What is typed where the terminal ends in this.
_QUESTIONS = ("What is the capital of France?", "/quit")
_CONTROL = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]|\x1b[=>]|\r")
#: Runs the blocks of a page in one namespace; each comes as a line of JSON, and its exit code goes to a file descriptor.
_INTERPRETER = """
import json, os, sys, traceback
namespace = {"__name__": "__main__"}
for line in sys.stdin:
    block = json.loads(line)
    os.chdir(block["folder"])
    try:
        exec(compile(block["text"], block["page"], "exec"), namespace)
        code = 0
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    os.write(int(sys.argv[1]), b"%d\\n" % code)
"""


class Guide(NamedTuple):
    """What is followed: its name, its blocks, and the folders of the checkout that lie where it is followed."""

    name: str
    blocks: tuple[Block, ...]
    folders: tuple[str, ...] = ()


class Step(NamedTuple):
    """What was done: where it stands, the command, its exit code (None: it took too long), seconds, and what it said last."""

    place: str
    command: str
    code: int | None
    seconds: float
    said: str = ""

    @property
    def failed(self) -> bool:
        """Whether a newcomer would be stuck here."""
        return self.code != 0


_TUTORIALS = ("model-from-text", "clean-warc", "serve-open-model")


def guides() -> list[Guide]:
    """README, the tutorials, and the examples, in the order of a reader."""
    readme = Guide("README.md", tuple(marked_blocks(ROOT / "README.md")), ("docs", "examples"))
    names = [f"docs/tutorials/{name}.md" for name in _TUTORIALS]
    return [readme, *(Guide(name, tuple(marked_blocks(ROOT / name))) for name in names), *example_guides()]


def example_guides(page: Path = ROOT / "examples" / "README.md") -> Iterator[Guide]:
    """The rows of the table of examples: what it needs, and the commands that run it, in the folder of the examples."""
    for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(), start=1):
        row = re.fullmatch(r"\| \[`([\w./]+)`\]\(\S+\) \|.*\| (`pip install [^`]+`) \| (`.+`) \|", line)
        if row is not None:
            text = "cd examples\n" + "\n".join(re.findall(r"`([^`]+)`", f"{row[2]} {row[3]}"))
            yield Guide(f"examples/{row[1].rstrip('/')}", (Block("sh", None, text, number),), ("examples", "docs", "src"))


class Newcomer:
    """A user in a new folder, with a shell and an interpreter that remember, and a terminal to type into."""

    def __init__(self, folder: Path, wheel: Path, *, timeout: float = 3 * 3600) -> None:
        self.folder, self.wheel, self.timeout = folder, wheel, timeout
        self.log = folder / "log.txt"
        self.work = folder / "work"
        for place in (self.work, folder / "home"):
            place.mkdir(parents=True)
        self._variables = folder / "variables.sh"
        self._servers: list[subprocess.Popen[bytes]] = []
        self._interpreter: subprocess.Popen[str] | None = None
        self._replies = -1
        (folder / "cwd").write_text(str(self.work), encoding="utf-8")

    def environment(self) -> dict[str, str]:
        """The variables of a shell that has just been opened."""
        found = {name: value for name, value in os.environ.items() if _KEPT.fullmatch(name)}
        places = [place for place in os.environ["PATH"].split(os.pathsep) if not (Path(place).parent / "pyvenv.cfg").exists()]
        found |= {"PATH": os.pathsep.join(places), "HOME": str(self.folder / "home"), "PYTHONUNBUFFERED": "1"}
        own = Path.home() / ".config" / "pip" / "pip.conf"
        if own.exists():
            found.setdefault("PIP_CONFIG_FILE", str(own))
        # one download for all guides
        found.setdefault("PIP_CACHE_DIR", str(Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "pip"))
        return found

    def new_environment(self) -> None:
        """Make a virtual environment and activate it."""
        base = getattr(sys, "_base_executable", sys.executable)
        subprocess.run([base, "-m", "venv", str(self.folder / "venv")], check=True)
        self.run(f"source {shlex.quote(str(self.folder / 'venv' / 'bin' / 'activate'))}")

    def run(self, command: str) -> tuple[int | None, str]:
        """Run one command in the shell: its exit code, None where it took too long, and the last line that it printed."""
        command = _CHECKOUT.sub(lambda found: shlex.quote(f"bessemer{found[2]} @ {self.wheel.as_uri()}"), command)
        self._note(f"$ {command}\n")
        start = self.log.stat().st_size
        if _INTERACTIVE.fullmatch(command):
            code = self._type_into(command)
        elif _SERVER.fullmatch(command):
            code = self._serve(command)
        else:
            with self.log.open("ab") as log:
                code = self._ended(self._shell(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log))
        return code, self._last_line(start)

    def execute(self, block: Block, page: str) -> tuple[int | None, str]:
        """Run a block of Python behind the page's earlier ones."""
        self._note(f">>> {page}:{block.line}\n")
        start = self.log.stat().st_size
        if self._interpreter is None:
            self._replies, writing = os.pipe()
            inner = f"exec python -c {shlex.quote(_INTERPRETER)} {writing}"
            with self.log.open("ab") as log:
                self._interpreter = self._shell(
                    inner, stdin=subprocess.PIPE, stdout=log, stderr=log, pass_fds=(writing,), text=True
                )
            os.close(writing)
        assert self._interpreter.stdin is not None
        folder = (self.folder / "cwd").read_text(encoding="utf-8").strip()
        try:
            self._interpreter.stdin.write(json.dumps({"text": block.text, "page": page, "folder": folder}) + "\n")
            self._interpreter.stdin.flush()
        except BrokenPipeError:
            return 1, self._last_line(start)
        if not select.select([self._replies], [], [], self.timeout)[0]:
            self._ended(self._interpreter, 0)
            return None, self._last_line(start)
        return int(os.read(self._replies, 16) or b"1"), self._last_line(start)

    def leave(self) -> None:
        """End what still runs."""
        for process in self._servers:
            _interrupt(process)
        if self._interpreter is not None:
            assert self._interpreter.stdin is not None
            self._interpreter.stdin.close()
            self._ended(self._interpreter, 10)
            os.close(self._replies)

    def _shell(self, command: str, **options: object) -> subprocess.Popen:
        state, cwd = (shlex.quote(str(place)) for place in (self._variables, self.folder / "cwd"))
        script = (
            f'test ! -e {state} || source {state}; cd "$(cat {cwd})"\n{command}\n'
            f"code=$?; export -p > {state}; pwd > {cwd}; exit $code"
        )
        return subprocess.Popen(["bash", "-c", script], env=self.environment(), start_new_session=True, **options)  # type: ignore[call-overload]

    def _ended(self, process: subprocess.Popen, timeout: float | None = None) -> int | None:
        try:
            return process.wait(self.timeout if timeout is None else timeout)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            return None
        except KeyboardInterrupt:
            os.killpg(process.pid, signal.SIGKILL)
            raise

    def _type_into(self, command: str) -> int | None:
        """Run a command in a terminal: yes at `[Y/n]`, and at the prompt of a chat a question, then `/quit`."""
        master, slave = pty.openpty()
        process = self._shell(command, stdin=slave, stdout=slave, stderr=slave)
        os.close(slave)
        waiting, shown, deadline = list(_QUESTIONS), "", time.monotonic() + self.timeout
        while time.monotonic() < deadline:
            if select.select([master], [], [], 0.2)[0]:
                try:
                    text = os.read(master, 65536).decode(errors="replace")
                except OSError:  # the other end is closed
                    break
                self._note(text)
                shown = _CONTROL.sub("", shown + text)[-200:]
            elif process.poll() is not None:
                break
            typed = None
            if re.search(r"\[Y/n\]:? ?$", shown):
                typed = "y"
            elif shown.endswith("you> "):
                typed = waiting.pop(0) if waiting else "/quit"
            if typed is not None:
                shown = ""
                os.write(master, f"{typed}\n".encode())
        os.close(master)
        code = self._ended(process, max(0.0, deadline - time.monotonic()))
        return 1 if code == 0 and waiting else code

    def _serve(self, command: str) -> int | None:
        """Start a server and ask for its page; without `&` end it by Ctrl-C, else with the guide."""
        stays = command.endswith("&")
        port = int(found[1]) if (found := re.search(r"--port (\d+)", command)) else 8000
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                self._note(f"another program listens on port {port}\n")
                return 1
        with self.log.open("ab") as log:
            process = self._shell(command.removesuffix("&"), stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        deadline = time.monotonic() + self.timeout
        while process.poll() is None and time.monotonic() < deadline:
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{port}/v1/models", timeout=30) as answer:
                    answered = answer.status == 200
            except OSError:
                time.sleep(0.2)
                continue
            if stays:
                self._servers.append(process)
                return 0 if answered else 1
            code = _interrupt(process)
            return 0 if answered and code in (0, 130) else 1
        # it ended before it answered, or never did
        code = self._ended(process, 0)
        return 1 if code == 0 else code

    def _note(self, text: str) -> None:
        with self.log.open("a", encoding="utf-8") as log:
            log.write(text)

    def _last_line(self, start: int) -> str:
        with self.log.open("rb") as log:
            log.seek(start)
            lines = _CONTROL.sub("", log.read().decode(errors="replace")).splitlines()
        return next((line.strip() for line in reversed(lines) if line.strip()), "")


def _interrupt(process: subprocess.Popen, seconds: float = 60) -> int:
    """Ctrl-C, as a terminal sends it to all of a command's processes; killed where that does not end them."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGINT)
    try:
        return process.wait(seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        return process.wait()


def left_out(block: Block, have: Iterable[str]) -> str | None:
    """Why a block is not followed; None where it is."""
    if block.mark == "not run":
        return block.reason
    if block.mark == "needs" and block.reason not in have:
        return f"needs {block.reason}"
    if block.title is None and block.language not in ("sh", "console", "python"):
        return f"shown only ({block.language or 'no language'})"
    return None


def follow(guide: Guide, newcomer: Newcomer, have: Iterable[str]) -> Iterator[Step | str]:
    """Do what a guide says, from top to bottom: the steps, and the reason of each block that is left out."""
    try:
        for block in guide.blocks:
            if (reason := left_out(block, have)) is not None:
                yield reason
                continue
            place = f"{guide.name}:{block.line}"
            if block.title is not None:
                folder = Path((newcomer.folder / "cwd").read_text(encoding="utf-8").strip())
                (folder / block.title).parent.mkdir(parents=True, exist_ok=True)
                (folder / block.title).write_text(block.text, encoding="utf-8")
                continue
            # a block of Python is shown by its first line
            todo = commands(block) if block.language != "python" else [block.text.strip().partition("\n")[0] + " …"]
            for command in todo:
                start = time.monotonic()
                code, said = newcomer.execute(block, place) if block.language == "python" else newcomer.run(command)
                step = Step(place, command, code, time.monotonic() - start, said)
                yield step
                # without the package every other command fails too
                if step.failed and command.startswith("pip install"):
                    return
    finally:
        newcomer.leave()


def build_wheel(folder: Path) -> Path:
    """The wheel of this checkout."""
    from hatchling.builders.wheel import WheelBuilder

    (wheel,) = WheelBuilder(str(ROOT)).build(directory=str(folder))
    return Path(wheel)


def main() -> None:
    """Follow the guides that are named, or all; exit code 1 where a command failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("guides", nargs="*", metavar="GUIDE", help="README.md, docs/tutorials, examples/NAME, …")
    parser.add_argument("--list", action="store_true", help="do nothing; print every command, and what is left out")
    parser.add_argument("--have", nargs="+", choices=NEEDS, default=[name for name, there in NEEDS.items() if there])
    parser.add_argument("--timeout", type=float, default=3 * 3600, help="seconds of a command")
    parser.add_argument("--keep", type=Path, help="folder that stays, with a log of each guide")
    arguments = parser.parse_args()
    known = guides()
    for name in arguments.guides:
        if not any(_is_named(guide.name, [name]) for guide in known):
            parser.error(f"{name}: no such guide; there are {', '.join(guide.name for guide in known)}")
    wanted = [guide for guide in known if not arguments.guides or _is_named(guide.name, arguments.guides)]
    if arguments.list:
        print(*(line for guide in wanted for line in _listed(guide, arguments.have)), sep="\n")
        return
    keep = arguments.keep or Path(tempfile.mkdtemp(prefix="bessemer-follow-"))
    keep.mkdir(parents=True, exist_ok=True)
    wheel = build_wheel(keep)
    summary, failures = [], []
    for guide in wanted:
        folder = keep / re.sub(r"\W+", "-", guide.name)
        shutil.rmtree(folder, ignore_errors=True)
        steps, reasons = _report(guide, folder, wheel, arguments)
        failed = [step for step in steps if step.failed]
        failures += failed
        minutes = sum(step.seconds for step in steps) / 60
        counted = ", ".join(f"{count} {reason}" for reason, count in Counter(reasons).items())
        summary.append(
            f"{guide.name}: {len(steps) - len(failed)} of {len(steps)} commands, {minutes:.1f} min"
            + (f"; blocks left out: {counted}" if counted else "")
        )
        if not failed and not arguments.keep:
            shutil.rmtree(folder)
    print("\n".join(["", *summary]))
    if failures:
        first = failures[0]
        print(f"\n{len(failures)} failed, the first at {first.place}: {first.command}\n  {first.said}\nlogs: {keep}")
    elif not arguments.keep:
        shutil.rmtree(keep)
    sys.exit(bool(failures))


def _listed(guide: Guide, have: Iterable[str]) -> Iterator[str]:
    for block in guide.blocks:
        reason = left_out(block, have)
        done = [f"the file {block.title}"] if block.title else [block.language]
        for one in commands(block) if block.language in ("sh", "console") else done:
            yield f"{guide.name}:{block.line}: {f'left out, {reason}: ' if reason else ''}{one}"


def _is_named(name: str, wanted: Iterable[str]) -> bool:
    return any(name == one.rstrip("/") or name.startswith(f"{one.rstrip('/')}/") for one in wanted)


def _report(guide: Guide, folder: Path, wheel: Path, arguments: argparse.Namespace) -> tuple[list[Step], list[str]]:
    """Follow a guide and print each step as it ends."""
    newcomer = Newcomer(folder, wheel, timeout=arguments.timeout)
    for name in guide.folders:
        shutil.copytree(ROOT / name, newcomer.work / name, ignore=shutil.ignore_patterns("__pycache__", "runs"))
    newcomer.new_environment()
    print(f"\n{guide.name}", flush=True)
    steps: list[Step] = []
    reasons: list[str] = []
    for one in follow(guide, newcomer, arguments.have):
        if isinstance(one, str):
            reasons.append(one)
            print(f"  left out              {one}", flush=True)
            continue
        steps.append(one)
        state = "ok" if not one.failed else "too long" if one.code is None else f"exit {one.code}"
        print(f"  {state:8} {one.seconds:8.1f} s  {one.command}", flush=True)
        if one.failed:
            print(f"           {one.said}", flush=True)
    return steps, reasons


if __name__ == "__main__":
    main()

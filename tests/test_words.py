"""Names and phrases that the field does not use stay out of the code and the pages."""

from __future__ import annotations

import io
import re
import tokenize
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SOURCE = ROOT / "src" / "bessemer"

#: Package → identifiers that were renamed there; "" holds everywhere.
IDENTIFIERS = {
    "": {
        "Followers",
        "Foreseen",
        "Habits",
        "Lexicon",
        "Observation",
        "SpanCuts",
        "Verdicts",
        "Visibility",
        "_worths",
        "kv_type",
        "max_running",
        "max_step_tokens",
        "observe_every",
        "put_shells",
        "skip_outliers",
        "width_base",
    },
    "inference": {"Answer", "Loop", "Pace", "Plan", "Sequence", "Shares", "Tables", "Work", "followers", "guesses"},
    "model": {"lent", "shells", "trunk"},
    "training": {"Pace", "observe", "settle", "startup"},
    "data": {"Cuts", "funnel", "meanings", "spoken", "survey"},
    "pipeline": {"Work", "settle"},
}
#: Where a name of the list above means something else.
ELSEWHERE = {("inference", "Sequence")}  # `collections.abc.Sequence`

PHRASES = (
    "the room that",
    "rooms above",
    "rooms below",
    "The inference room",
    "The training room",
    "what it came to",
    "What a step came to",
    "whoever",
    "guesses ahead",
    "guessing ahead",
    "Guessing ahead",
    "Who computes what in the next step",
    "Whoever steps moves all of them on",
    "The scheduler alone writes what has no argument here",
    "What a device could do at most",
    "believes in a rank 0",
    "made anew from the codes each time",
    "Keep what was read for the next text that begins alike",
    "Make what a recipe says",
    "Hold two runs beside each other",
    "Who hangs without dying is waited for",
    "loses far less than the",
    "no answer hurries ahead while nobody waits",
)


def names_in(path: Path) -> set[str]:
    """The identifiers of a Python file, without its comments and strings."""
    tokens = tokenize.generate_tokens(io.StringIO(path.read_text(encoding="utf-8")).readline)
    return {token.string for token in tokens if token.type == tokenize.NAME}


@pytest.mark.parametrize("package", IDENTIFIERS)
def test_a_retired_identifier_stays_out_of_the_code(package):
    retired = {name for name in IDENTIFIERS[package] if (package, name) not in ELSEWHERE}
    # few files have one of the words at all
    words = re.compile(rf"\b(?:{'|'.join(sorted(retired))})\b")
    files = [path for path in (SOURCE / package).rglob("*.py") if words.search(path.read_text(encoding="utf-8"))]
    found = {f"{path.relative_to(SOURCE)}: {name}" for path in files for name in names_in(path) & retired}
    assert not found


#: Settings that were renamed: only the messages that refuse them, and their tests, say them.
SETTINGS = ("kv_type", "max_running", "max_step_tokens", "observe_every", "skip_outliers", "width_base")


def test_a_retired_setting_stays_out_of_pages_recipes_and_benchmarks():
    pages = [*(ROOT / "docs").rglob("*.md"), ROOT / "README.md", ROOT / "CONTRIBUTING.md", *SOURCE.rglob("*.yaml")]
    found = {
        f"{page.relative_to(ROOT)}: {name}"
        for page in [*pages, *(ROOT / "benchmarks").glob("*.py"), *(ROOT / "examples").rglob("*.py")]
        for name in SETTINGS
        if re.search(rf"\b{name}\b", page.read_text(encoding="utf-8"))
    }
    assert not found


def test_a_retired_phrase_stays_out_of_code_and_pages():
    pages = [*SOURCE.rglob("*.py"), *(ROOT / "docs").rglob("*.md"), ROOT / "README.md"]
    retired = re.compile(rf"\b(?:{'|'.join(map(re.escape, PHRASES))})\b")
    found = {
        f"{path.relative_to(ROOT)}: {phrase}"
        for path in pages
        for phrase in retired.findall(" ".join(path.read_text(encoding="utf-8").split()))
    }
    assert not found


def test_no_class_takes_the_name_of_a_standard_one():
    for path in SOURCE.rglob("*.py"):
        assert not re.search(r"^class (Sequence|Mapping|Iterator)\b", path.read_text(encoding="utf-8"), re.MULTILINE), path

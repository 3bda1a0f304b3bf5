"""What README and docs show of benchmarks is what the files in `benchmarks/results/` hold, and nothing else."""

import datetime
import json
import re
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import recording
import tables

PAGES = tables.pages()
MARK = re.compile(r"<!-- (?:table|figure) [^>]*-->")
MARKED_PAGES = [page for page in PAGES if MARK.search(page.read_text(encoding="utf-8"))]
RESULTS = sorted(recording.RESULTS.glob("*.json"))


def named(path: Path) -> str:
    return path.name


@pytest.fixture
def result(tmp_path):
    """The folder of a result with a figure and a table."""
    machine = {"processor": "Furnace 1", "cores": 2, "instruction_sets": []}
    table = recording.table([("", ""), ("tokens/s", ",.0f"), ("ratio", ".1f~ ×")], [["one stream", 1234.5, [1.04, 1.26]]])
    content = {"name": "casting", "command": "python casting.py", "measured": "2026-11-27", "commit": "c0ffee", "note": None}
    content |= {"machine": machine, "peers": {"ladle": "3.1"}, "figures": {"ratio": {"rounds": [1.04, 1.26]}}}
    (tmp_path / "casting.json").write_text(json.dumps(content | {"tables": {"speed": table}}), encoding="utf-8")
    return tmp_path


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_a_page_shows_what_the_results_hold(page):
    text = page.read_text(encoding="utf-8")
    assert tables.rendered(text) == text, "python benchmarks/tables.py writes the tables anew"


@pytest.mark.parametrize("page", MARKED_PAGES, ids=named)
def test_every_mark_of_a_page_is_read(page):
    text = page.read_text(encoding="utf-8")
    read = len(tables._TABLE.findall(text)) + len(tables._FIGURE.findall(text))
    assert len(MARK.findall(text)) == read == text.count("<!-- end -->")


@pytest.mark.parametrize("page", MARKED_PAGES, ids=named)
def test_a_digit_changed_by_hand_is_seen(page):
    text = page.read_text(encoding="utf-8")
    for mark in MARK.finditer(text):
        digit = re.compile(r"\d").search(text, mark.end(), text.index("<!-- end -->", mark.end()))
        assert digit is not None, f"{mark[0]} shows no figure"
        changed = text[: digit.start()] + str((int(digit[0]) + 1) % 10) + text[digit.end() :]
        assert tables.rendered(changed) == tables.rendered(text) != changed


def test_a_table_stands_above_a_line_that_says_where_it_was_measured(result):
    page = "Before.\n\n<!-- table casting speed -->\nold\n<!-- end -->\n\nAfter.\n"
    assert tables.rendered(page, result) == (
        "Before.\n\n<!-- table casting speed -->\n"
        "| | tokens/s | ratio |\n|---|--:|--:|\n| one stream | 1,234 | 1.0–1.3 × |\n\n"
        "*Furnace 1, 2 cores; ladle 3.1; `python casting.py`, 2026-11-27, commit c0ffee.*\n<!-- end -->\n\nAfter.\n"
    )


def test_a_figure_stands_within_a_sentence(result):
    page = "It is <!-- figure casting ratio.rounds.1 .2f -->9<!-- end --> times as fast."
    assert tables.rendered(page, result) == "It is <!-- figure casting ratio.rounds.1 .2f -->1.26<!-- end --> times as fast."


@pytest.mark.parametrize(
    ("page", "error"),
    [
        ("<!-- figure casting ratio.median .2f -->1<!-- end -->", KeyError),
        ("<!-- figure casting ratio.rounds.2 .2f -->1<!-- end -->", IndexError),
        ("<!-- table casting weight -->\n<!-- end -->", KeyError),
        ("<!-- table forging speed -->\n<!-- end -->", FileNotFoundError),
    ],
)
def test_what_was_never_measured_cannot_be_shown(result, page, error):
    with pytest.raises(error):
        tables.rendered(page, result)


@pytest.mark.parametrize(
    ("value", "form", "shown"),
    [
        (None, ",.0f", ""),
        ("≥ 1.5", ".1f", "≥ 1.5"),
        (1234567.8, ",.0f", "1,234,568"),
        (0.4567, ".1%", "45.7%"),
        (3, ",d", "3"),
        (1.26, ".1f~ ×", "1.3 ×"),
        ([1.04, 1.26], ".1f~ ×", "1.0–1.3 ×"),
        ([1.01, 1.04], ".1f~ ×", "1.0 ×"),
        (-0.5, ".1f", "-0.5"),
    ],
)
def test_a_cell_shows_its_value_in_the_form_of_its_column(value, form, shown):
    assert tables.cell(value, form) == shown


def test_what_is_saved_is_loaded(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", [str(Path(recording.__file__).with_name("casting.py")), "--rounds", "3"])
    table = recording.table([("ratio", ".1f")], [[1.5]])
    path = recording.save("casting", {"ratio": 1.5}, tables={"ratios": table}, peers=["pytest"], folder=tmp_path)
    found = recording.load("casting", tmp_path)
    assert path == tmp_path / "casting.json"
    assert (found["figures"], found["tables"]) == ({"ratio": 1.5}, {"ratios": table})
    assert found["command"] == "python benchmarks/casting.py --rounds 3"
    assert found["peers"] == {"pytest": pytest.__version__}


@pytest.mark.parametrize("path", RESULTS, ids=named)
def test_a_result_says_what_was_measured_where_and_when(path):
    result = recording.load(path.stem)
    assert result["name"] == path.stem
    assert isinstance(result["command"], str) and result["command"]
    assert datetime.date.fromisoformat(result["measured"])
    machine = result["machine"]
    assert isinstance(machine["processor"], str) and machine["processor"]
    assert isinstance(machine["cores"], int) and machine["cores"] > 0
    assert all(isinstance(text, str) and text for text in [*result["peers"], *result["peers"].values()])
    assert isinstance(result["figures"], dict) and result["figures"]
    assert result["commit"] or result["note"], "a result of no known commit says why"


@pytest.mark.parametrize("path", RESULTS, ids=named)
def test_the_tables_of_a_result_can_be_shown(path):
    result = recording.load(path.stem)
    for table in result["tables"].values():
        assert all(len(row) == len(table["columns"]) for row in table["rows"]) and table["rows"]
        assert tables.markdown(table).count("\n") == len(table["rows"]) + 1
    assert tables.caption(result).count("\n") == 0

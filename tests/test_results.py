"""What README and docs show of benchmarks is what the files in `benchmarks/results/` hold, and nothing else."""

import datetime
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import derived
import recording
import tables
from tests.cases import slow_but

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


@pytest.mark.parametrize("page", slow_but(MARKED_PAGES[:4], MARKED_PAGES), ids=named)
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
        ([-0.25, 0.5], ".2f", "-0.25 to 0.50"),
        (-0.5, ".1f", "-0.5"),
    ],
)
def test_a_cell_shows_its_value_in_the_form_of_its_column(value, form, shown):
    assert tables.cell(value, form) == shown


def test_what_is_saved_is_loaded(tmp_path, monkeypatch):
    program, model = Path(recording.__file__).with_name("casting.py"), tmp_path / "small.gguf"
    monkeypatch.setattr(sys, "argv", [str(program), "--rounds", "3", str(model), f"small={model}"])
    table = recording.table([("ratio", ".1f")], [[1.5]])
    path = recording.save("casting", {"ratio": 1.5}, tables={"ratios": table}, peers=["pytest"], folder=tmp_path)
    found = recording.load("casting", tmp_path)
    assert path == tmp_path / "casting.json"
    assert (found["figures"], found["tables"]) == ({"ratio": 1.5}, {"ratios": table})
    assert found["command"] == "python benchmarks/casting.py --rounds 3 small.gguf small=small.gguf"
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


@pytest.mark.parametrize("path", RESULTS, ids=named)
def test_a_result_is_of_a_clean_commit_with_its_machine_and_every_round(path):
    assert recording.defects(recording.load(path.stem)) == []


@pytest.mark.parametrize("path", RESULTS, ids=named)
def test_no_result_was_changed_after_its_run(path):
    first = recording.original(path.stem)
    assert first is None or first == recording.load(path.stem)


@pytest.mark.parametrize("path", RESULTS, ids=named)
def test_a_benchmark_names_the_source_that_its_result_depends_on(path):
    for source in tables.measured_paths(tables.ROOT / recording.load(path.stem)["command"].split()[1]):
        assert (tables.ROOT / source).exists(), source


@pytest.mark.parametrize(
    ("change", "defect"),
    [
        ({"commit": None}, "measured at no commit"),
        ({"commit": "c0ffee+changes"}, "measured at c0ffee+changes"),
        ({"commit": "0" * 12}, "no ancestor"),
        ({"command": "bessemer run 10m"}, "no benchmark writes it"),
        ({"command": "python benchmarks/casting.py"}, "no benchmark writes it"),
        ({"machine": {"processor": "Furnace 1", "cores": 2}}, "its machine is not named"),
        ({"figures": {"speed": {"ours": {"median": 1.5}}}}, "figures.speed.ours is a median without its rounds"),
        ({"figures": {"avx2": {"commit": "c0ffee+changes"}}}, "avx2 was measured at c0ffee+changes"),
    ],
)
def test_a_file_that_is_no_evidence_says_why(change, defect):
    if "commit" in change and change["commit"] == "0" * 12 and not recording.has_history():
        pytest.skip("git knows no earlier commits here")
    good = recording.load("quickstart")
    assert recording.defects(good) == []
    found = recording.defects(good | change)
    assert len(found) == 1 and defect in found[0]


def test_what_is_measured_on_a_tree_with_changes_is_not_recorded(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [str(Path(recording.__file__).with_name("casting.py"))])
    monkeypatch.setattr(recording, "_COMMIT", "c0ffee+changes")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    path = recording.save("casting", {"ratio": 1.5})
    assert path.parent.parent == tmp_path and not (recording.RESULTS / "casting.json").exists()
    assert "not recorded: measured at c0ffee+changes" in capsys.readouterr().out


def test_a_result_is_stale_where_a_later_commit_changed_what_was_measured(tmp_path):
    def git(*arguments):
        return subprocess.run(
            ["git", "-C", str(tmp_path), *arguments], check=True, capture_output=True, encoding="utf-8"
        ).stdout.strip()

    def committed(name):
        (tmp_path / name).write_text(name, encoding="utf-8")
        git("add", name)
        git("-c", "user.name=a", "-c", "user.email=a@b", "commit", "-qm", name)
        return git("rev-parse", "HEAD")

    git("init", "-q")
    first, measured, other = map(committed, ("first", "measured", "other"))
    result = {"commit": first, "figures": {}}
    assert recording.commits_since(result, ["measured"], tmp_path) == (first, 1)
    assert recording.commits_since(result, ["measured", "other"], tmp_path) == (first, 2)
    assert recording.commits_since(result, ["first"], tmp_path) == (first, 0)
    of_parts = {"commit": other, "figures": {"avx2": {"commit": measured}, "native": {"commit": other}, "rounds": 3}}
    assert recording.commits_since(of_parts, ["measured", "other"], tmp_path) == (measured, 1)


def test_the_peer_s_best_of_any_round_or_trial_counts():
    rates = [180.0, 193.0, 144.0]
    assert derived.fastest(rates, [{"rate": 217.7}, {"rate": 200.0}, {"failed": "no memory"}]) == 217.7
    found = recording.load("inference_135m")
    row = next(row for row in found["tables"]["cells"]["rows"] if row[0] == "Q4_0: one stream")
    sides = found["figures"]["q4_0"]["decode_1"]
    best = max([*sides["peer"]["rate"]["rounds"], *(trial["rate"] for trial in sides["peer"]["tried"])])
    assert (row[1], row[4], row[5]) == (sides["bessemer"]["rate"]["median"], best, sides["bessemer"]["rate"]["median"] / best)


#: A figure with a unit, as text has it.
_SIZE, _TIME = r"[kKMGT]i?B\b(?!/s)", r"[mµn]?s\b|seconds?\b|minutes?\b|hours?\b|days?\b|h\b|min\b"
_FIGURE_WITH_UNIT = re.compile(
    r"(?<![\w.])(\d[\d,.]*(?:[\s\u00a0]?(?:to|–|-)[\s\u00a0]?\d[\d,.]*)?)[\s\u00a0]?"
    rf"(%|×(?!\s?\d)|{_SIZE}|[kKMGT]i?B/s|(?:tokens|items|pairs|samples|documents|programs)/s|[GT]FLOP/s|{_TIME})"
)
#: Of whole pages the units that need no mark, and why.
UNMARKED_PAGES = {
    "docs/negative-results.md": (".*", "notes of what was tried, of code that is gone; the page says so"),
    "docs/reference/settings.md": (".*", "defaults and limits, written from the code"),
    "docs/not-measured.md": (".*", "sizes of what has not been run"),
    "docs/serving.md": (f"%|{_SIZE}|{_TIME}", "limits of the server, which tests hold; speeds need marks there too"),
}


_DOWNLOAD, _LIMIT, _SETTING = "the size of a download or a file", "a limit, which the code holds", "a setting"
_LEVEL, _SIMULATED, _ARITHMETIC = "the level of an interval or a test", "simulated or bounded by a test", "arithmetic"
_PUBLISHED, _INPUT, _ASKED = "published by others", "the size of an input", "what was asked for"
#: By page and reason the figures that need no mark.
UNMARKED: dict[str, dict[str, list[str]]] = {
    "README.md": {_DOWNLOAD: ["39 MB", "3 GB", "160 MB", "180 MB"]},
    "docs/architectures.md": {_SETTING: ["0.2 %", "10 %", "30 %"]},
    "docs/bpe.md": {_INPUT: ["50 MB"]},
    "docs/chat-templates.md": {_LIMIT: ["10 s"]},
    "docs/comparing.md": {_LEVEL: ["5 %", "95 %", "70 %"], _ARITHMETIC: ["64 %"], _SIMULATED: ["92 %"]},
    "docs/watermarks.md": {_LEVEL: ["95 %"]},
    "docs/redteam.md": {_LEVEL: ["95 %"], _LIMIT: ["30 %"]},
    "docs/data.md": {_DOWNLOAD: ["39 MB"], _LIMIT: ["80 %"]},
    "docs/evaluation.md": {_LEVEL: ["95 %"]},
    "docs/extraction.md": {_PUBLISHED: ["71 %"]},
    "docs/filters.md": {_LIMIT: ["12 %", "50 ×"]},
    "docs/finetune.md": {_SETTING: ["80 %", "5 %", "5 to 30 %"]},
    "docs/guard.md": {_ASKED: ["90 %", "5 %"]},
    "docs/kernels.md": {_SETTING: ["256 KB"]},
    "docs/memorisation.md": {_PUBLISHED: ["21 %", "83 %"], _LEVEL: ["95 %"]},
    "docs/model-formats.md": {_DOWNLOAD: ["98 MB"], _SETTING: ["256 MB"]},
    "docs/model.md": {_ARITHMETIC: ["4 GB"], _LIMIT: ["1.5 GB"]},
    "docs/object-storage.md": {_SETTING: ["8 MB"]},
    "docs/planning.md": {_SIMULATED: ["10 %", "4 %"], _SETTING: ["15 µs"], _PUBLISHED: ["1.65 h"]},
    "docs/pretraining.md": {_LIMIT: ["30 %"], _SETTING: ["20 µs"]},
    "docs/quantisation.md": {_DOWNLOAD: ["98 MB"], _LIMIT: ["2 s"]},
    "docs/reward.md": {_LEVEL: ["95 %", "80 %"], _ARITHMETIC: ["50 %"]},
    "docs/rollouts.md": {_LIMIT: ["64 MiB", "600 s"]},
    "docs/sampling.md": {_LIMIT: ["5 s"]},
    "docs/sandbox.md": {_SETTING: ["50 ms"], _INPUT: ["8 GB"]},
    "docs/scaling_laws.md": {_SIMULATED: ["0.4 %", "0.5 %", "8 %"], _LEVEL: ["90 %"]},
    "docs/scoring.md": {_LIMIT: ["256 MiB"]},
    "docs/sources.md": {_LIMIT: ["64 MB", "1 GB", "2 kB"]},
    "docs/tasks.md": {_LEVEL: ["95 %"]},
    "docs/tokenization.md": {_LIMIT: ["2 %"], _ARITHMETIC: ["40 %", "89 %"]},
    "docs/tokenizer-formats.md": {_INPUT: ["8 MB"]},
    "docs/trainer.md": {_PUBLISHED: ["43 %"]},
    "docs/tutorials/model-from-text.md": {_INPUT: ["38 MB"], _SETTING: ["3 minutes"], _LIMIT: ["300 kB"]},
    "docs/webapp.md": {_ASKED: ["50 ms", "1 s"]},
}


def unmarked_figures(text: str) -> list[tuple[str, str]]:
    """(figure, unit) of a page's text, outside its marks, code and addresses."""
    text = tables._FIGURE.sub("", tables._TABLE.sub("", text))
    text = re.sub(r"```.*?```|<!--.*?-->|`[^`\n]*`|\]\([^)\s]*\)", "", text, flags=re.DOTALL)
    return [(" ".join(match[0].split()), match[2]) for match in _FIGURE_WITH_UNIT.finditer(text)]


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_a_figure_with_a_unit_has_a_mark_or_a_reason(page):
    name = page.relative_to(tables.ROOT).as_posix()
    allowed = UNMARKED_PAGES.get(name, ("(?!)", ""))[0]
    reasons = {figure for figures in UNMARKED.get(name, {}).values() for figure in figures}
    found = [figure for figure, unit in unmarked_figures(page.read_text(encoding="utf-8")) if not re.fullmatch(allowed, unit)]
    assert [figure for figure in found if figure not in reasons] == [], "a measured figure comes from a result, by a mark"
    assert reasons <= set(found), "a reason for a figure that is not on the page"


@pytest.mark.parametrize(
    ("text", "figures"),
    [
        ("It is 1.5 × as fast, 20 % less, in 3 ms.", ["1.5 ×", "20 %", "3 ms"]),
        ("It reads 1,965 tokens/s and\n8 MB/s of 2 GB.", ["1,965 tokens/s", "8 MB/s", "2 GB"]),
        ("from 3 to 4 minutes, 10–12 GB", ["3 to 4 minutes", "10–12 GB"]),
        ("a tile of 16 × 16, 32 heads, version 2.5, `3 ms`", []),
        ("It takes <!-- figure casting ratio .1f -->3<!-- end --> s.\n```\n3 ms\n```\n", []),
    ],
)
def test_a_figure_with_a_unit_is_seen_in_text_and_not_in_code(text, figures):
    assert [figure for figure, _ in unmarked_figures(text)] == figures

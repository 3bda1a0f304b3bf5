import json

import pytest

from tests.cli.test_main import bessemer, one_error


@pytest.fixture
def evaluations(tmp_path, monkeypatch):
    """Folders of evaluations whose second model answers five of thirty items that the first does not."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    for name, right in (("base", 10), ("tuned", 15), ("poor", 2)):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "results.json").write_text("{}", encoding="utf-8")
        with (folder / "items.jsonl").open("w", encoding="utf-8") as lines:
            for number in range(30):
                item = {"task": "quiz", "id": f"item-{number}", "score": float(number < right)}
                print(json.dumps(item | {"prompt": f"What is {number}?", "answer": f"{name} says"}), file=lines)
    return tmp_path


def test_two_evaluations_are_compared_by_task(evaluations, capsys):
    code, out, _ = bessemer(capsys, "compare", "base", "tuned")
    assert code == 0
    row = next(line for line in out.splitlines() if line.startswith("quiz"))
    assert "+0.167" in row and row.rstrip().endswith("better")
    assert "item-12" not in out


def test_items_lists_the_flipped_ones_with_prompts_and_answers(evaluations, capsys):
    _, out, _ = bessemer(capsys, "compare", "base", "tuned", "--items")
    assert "5 became right, 0 wrong" in out
    assert [f"item-{number} " in out for number in (9, 10, 14, 15)] == [False, True, True, False]
    assert "What is 12?" in out and "base says wrong" in out and "tuned says right" in out


def test_several_evaluations_are_ranked(evaluations, capsys):
    _, out, _ = bessemer(capsys, "compare", "poor", "base", "tuned")
    ranked = [line.split()[1] for line in out.splitlines() if line.startswith(("1 ", "2 ", "3 "))]
    assert ranked == ["tuned", "base", "poor"]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["base"], "name at least two runs"),
        (["base", "missing"], "missing: this is no folder of an evaluation"),
        (["base", "tuned", "poor", "--items"], "--items: name two folders of evaluations"),
        (["run-1", "run-2", "run-3"], "3 runs: two are compared at a time"),
    ],
)
def test_what_cannot_be_compared_is_said_in_one_line(evaluations, capsys, arguments, expected):
    code, _, err = bessemer(capsys, "compare", *arguments)
    assert code == 2
    assert expected in one_error(err)

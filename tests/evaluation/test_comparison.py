import json
import math

import numpy as np
import pytest

from bessemer.core.errors import ArtefactError
from bessemer.core.report import Table
from bessemer.core.statistics import mean_estimate, paired_difference, score
from bessemer.evaluation.comparison import compare, comparison_parts, difference, flips, leaderboard, leaderboard_parts, p_value
from bessemer.evaluation.evaluation_folder import read_evaluation


@pytest.fixture
def evaluation(tmp_path):
    """A finished evaluation of these items."""

    def write(name, items):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "items.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items), encoding="utf-8")
        (folder / "results.json").write_text("{}", encoding="utf-8")
        return read_evaluation(folder)

    return write


def items(scores, task="quiz", **more):
    return [{"task": task, "id": f"i{number}", "score": float(score), **more} for number, score in enumerate(scores)]


def passages(scores, of_each):
    return [item | {"cluster": f"p{number // of_each}"} for number, item in enumerate(items(scores))]


def test_items_are_matched_by_their_id_whatever_their_order(evaluation):
    random = np.random.default_rng(0)
    before, after = random.random(30), random.random(30)
    first = evaluation("a", items(before))
    second = evaluation("b", items(after)[::-1])
    (task,) = compare(first, second).tasks
    expected = paired_difference(after, before)
    assert task.difference.mean == pytest.approx(expected.mean)
    assert task.difference.standard_error == pytest.approx(expected.standard_error)
    assert (task.first.mean, task.second.mean) == (pytest.approx(before.mean()), pytest.approx(after.mean()))


def test_items_of_one_side_alone_are_counted_and_left_out(evaluation):
    first = evaluation("a", [*items([1, 0, 1]), *items([1], task="only_a")])
    second = evaluation("b", items([1, 1]))
    found = compare(first, second)
    (task,) = found.tasks
    assert (task.difference.items, task.unmatched, task.first.mean) == (2, 1, 0.5)
    assert found.one_sided == ["only_a"]


def test_items_that_share_a_passage_are_one_observation(evaluation):
    before, after = np.repeat([1, 0, 1, 0, 0, 1], 5), np.repeat([1, 1, 1, 1, 0, 1], 5)
    (task,) = compare(evaluation("a", passages(before, 5)), evaluation("b", passages(after, 5))).tasks
    assert task.difference.clusters == 6
    (apart,) = compare(evaluation("c", items(before)), evaluation("d", items(after))).tasks
    assert (task.verdict, apart.verdict) == ("unclear", "better")


def test_an_item_without_a_cluster_stays_independent_beside_one_that_is_named_like_it(evaluation):
    mixed = items([1, 0, 1])
    mixed[0]["cluster"] = mixed[1]["cluster"] = "i2"
    (task,) = compare(evaluation("a", mixed), evaluation("b", items([1, 1, 1]))).tasks
    assert task.difference.clusters == 2


def test_verdicts_hold_against_the_number_of_tasks(evaluation):
    """The same gain alone is a difference; among twenty tasks, of which any could have shown it, it is not."""
    before, after = np.zeros(30), np.r_[np.ones(5), np.zeros(25)]
    other = [item for number in range(19) for item in items([0, 1, 1], task=f"t{number}")]
    alone = compare(evaluation("a", items(before)), evaluation("b", items(after))).tasks[0]
    among = compare(evaluation("c", items(before) + other), evaluation("d", items(after) + other)).tasks[0]
    assert alone.difference == among.difference
    assert (alone.verdict, among.verdict) == ("better", "unclear")
    assert compare(evaluation("e", items(after)), evaluation("f", items(before))).tasks[0].verdict == "worse"


def test_the_leaderboard_is_sorted_and_compares_each_with_the_first_on_common_items(evaluation):
    random = np.random.default_rng(1)
    hard = random.random(200) < 0.5
    best, same, poor = hard.copy(), hard.copy(), hard & (random.random(200) < 0.5)
    same[:3] = ~same[:3]
    board = leaderboard(
        [
            evaluation("poor", items(poor)),
            evaluation("best", items(best) + items([1], task="extra")),
            evaluation("same", items(same)[:150]),
        ]
    )
    assert board.items == {"quiz": 150} and board.left_out == ["extra"]
    assert [one.mean.mean for one in board.standings] == sorted((one.mean.mean for one in board.standings), reverse=True)
    first, second, third = board.standings
    assert {first.name, second.name} == {"best", "same"} and third.name == "poor"
    assert first.from_first is None
    assert second.adjusted_p > 0.05 > third.adjusted_p
    table = next(part for part in leaderboard_parts(board) if isinstance(part, Table))
    assert [row[5].text for row in table.rows[1:]] == ["unclear", "worse"]


def test_flips_are_the_items_whose_answer_became_right_or_wrong(evaluation):
    texts = {"prompt": "2 + 2 =", "answer": " 4"}
    first = evaluation("a", items([1, 0, 1], **texts))
    second = evaluation("b", items([1, 1, 0], **texts | {"answer": " five"}))
    assert [(flip.item, flip.gained) for flip in flips(first, second)] == [("i1", True), ("i2", False)]
    assert flips(first, second)[0].answers == (" 4", " five")
    assert flips(first, first) == []


def test_the_table_shows_what_was_found(evaluation):
    first, second = evaluation("a", items([1, 0, 1, 0])), evaluation("b", items([1, 1, 1, 0]))
    table = next(part for part in comparison_parts(compare(first, second)) if isinstance(part, Table))
    (row,) = table.rows
    assert row[0] == "quiz" and row[2].startswith("0.500 [") and row[3].startswith("0.750 [")
    assert row[4].startswith("+0.250 [-0.546, +1.000]") and row[7].text == "unclear"


def test_numbers_are_written_with_their_intervals():
    assert score(mean_estimate([1.0] * 100)) == "1.000 [0.964, 1.000]"
    assert difference(mean_estimate([0.0] * 100)) == "+0.000 [-0.036, +0.036]"
    assert score(mean_estimate([1.0])) == "1.000 [0.000, 1.000]"
    assert [p_value(value) for value in (1.0, 0.0312, 1e-4, 9e-5)] == ["1", "0.031", "0.0001", "< 0.0001"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"task": "quiz", "id": "i1"', "line 2: this item is damaged"),
        ('["quiz"]', "line 2: this item is damaged"),
        ('{"task": "quiz", "score": 1}', "line 2: an item has a 'task' and an 'id'"),
        ('{"task": "quiz", "id": "i1", "score": 1.5}', "a number from 0 to 1, not 1.5"),
        ('{"task": "quiz", "id": "i1", "score": NaN}', "a number from 0 to 1, not nan"),
        ('{"task": "quiz", "id": "i1", "score": "1"}', "a number from 0 to 1, not '1'"),
        ('{"task": "quiz", "id": "i1", "score": 1, "cluster": 3}', "'cluster' of an item is a text, not 3"),
        ('{"task": "quiz", "id": "i0", "score": 1}', "line 2: the item 'i0' of quiz stands here a second time"),
    ],
)
def test_a_damaged_item_is_refused_with_its_line(tmp_path, line, message):
    (tmp_path / "results.json").write_text("{}", encoding="utf-8")
    (tmp_path / "items.jsonl").write_text(f'{{"task": "quiz", "id": "i0", "score": 1}}\n{line}\n', encoding="utf-8")
    with pytest.raises(ArtefactError) as error:
        read_evaluation(tmp_path)
    assert message in str(error.value)


def test_unfinished_empty_and_unlike_evaluations_are_refused(tmp_path, evaluation):
    (tmp_path / "items.jsonl").write_text("", encoding="utf-8")
    with pytest.raises(ArtefactError, match="not finished"):
        read_evaluation(tmp_path)
    (tmp_path / "results.json").write_text("{}", encoding="utf-8")
    with pytest.raises(ArtefactError, match="no items"):
        read_evaluation(tmp_path)
    with pytest.raises(ArtefactError, match="no item of a task in common"):
        compare(evaluation("a", items([1])), evaluation("b", items([1], task="other")))


def test_a_single_item_in_common_decides_nothing(evaluation):
    (task,) = compare(evaluation("a", items([0])), evaluation("b", items([1]))).tasks
    assert task.verdict == "unclear"
    assert math.isinf(task.difference.standard_error)

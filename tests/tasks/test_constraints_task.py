import itertools
import random

import pytest

from bessemer.core.errors import ArtefactError, ConfigError
from bessemer.tasks.config import TaskOptions
from bessemer.tasks.constraints import Constraints
from bessemer.tasks.instruction_following import _EXCLUDED, _GROUPS, instruction_items
from tests.tasks.written import task_of

ROWS = [
    {"prompt": "Write to her.", "constraints": [{"kind": "no_commas"}, {"kind": "words", "at_most": 3}]},
    {"prompt": "Say yes.", "constraints": [{"kind": "lower_case"}]},
]


def test_the_request_says_what_is_asked_for(tmp_path):
    first, _ = task_of(tmp_path, ROWS, kind="constraints").questions()
    assert first.context == "Write to her. Do not use any commas. Your answer must have at most 3 words.\n\n"
    first, _ = task_of(tmp_path, ROWS, kind="constraints", append_instructions=False).questions()
    assert first.context == "Write to her.\n\n"


def test_an_answer_has_ifevals_four_accuracies(tmp_path):
    task = task_of(tmp_path, ROWS, kind="constraints")
    outcome = task.judge(task.questions()[0], ["Here, as you asked:\nDear aunt Ida"])
    assert outcome.scores == {
        "prompt_level_strict_acc": 0,
        "inst_level_strict_acc": 0,
        "prompt_level_loose_acc": 1,
        "inst_level_loose_acc": 1,
    }
    half = task.judge(task.questions()[0], ["Dear aunt Ida and all"])
    assert (half.scores["inst_level_strict_acc"], half.weights["inst_level_strict_acc"]) == (0.5, 2)
    assert task.headline("generate") == "prompt_level_strict_acc"


def test_samples_are_averaged(tmp_path):
    task = task_of(tmp_path, ROWS, TaskOptions(samples=2), kind="constraints")
    assert task.judge(task.questions()[1], ["yes", "Yes"]).scores["prompt_level_strict_acc"] == 0.5


def test_made_items_keep_the_rules_of_their_making():
    items = instruction_items(300, seed=3)
    assert items[:20] == instruction_items(20, seed=3) != instruction_items(20, seed=4)
    groups = [{maker(random.Random(0))["kind"] for maker in group} for group in _GROUPS]
    for item in items:
        kinds = [one.kind for one in Constraints.parse(item["constraints"]).constraints]
        assert 1 <= len(kinds) <= 3 and all(sum(kind in group for kind in kinds) <= 1 for group in groups)
        assert not any(pair <= set(kinds) for pair in _EXCLUDED)
    assert {one["kind"] for item in items for one in item["constraints"]} == set().union(*groups)


def answer_to(constraints):
    """An answer that keeps to all constraints of a made item: a line that holds most of them, then a list or paragraphs."""
    wanted = {one["kind"]: one for one in constraints}
    first = [wanted.get("starts_with", {}).get("text", "So"), "<<ok>>" if "title" in wanted else ""]
    first += ["ok"] * wanted.get("words", {}).get("at_least", 0)
    first += wanted.get("required_words", {}).get("words", [])
    frequency = wanted.get("word_frequency", {"word": "", "at_least": 0})
    first += [frequency["word"]] * frequency["at_least"]
    first += ["[ok]"] * wanted.get("placeholders", {}).get("at_least", 0)
    first += ["*ok*"] * wanted.get("highlights", {}).get("at_least", 0)
    bullets, items, paragraphs = (
        wanted.get(kind, {}).get("at_least", 0) for kind in ("bullets", "numbered_items", "paragraphs")
    )
    lines = [" ".join(part for part in first if part)]
    lines += ["- ok"] * bullets + [f"{number}. ok" for number in range(1, items + 1)] + ["\nok"] * (paragraphs - 1)
    lines[-1] += f" {wanted.get('ends_with', {}).get('text', '')}"
    answer = "\n".join(lines)
    answer = f'"{answer}"' if "quoted" in wanted else answer
    return answer.upper() if "upper_case" in wanted else answer.lower() if "lower_case" in wanted else answer


def test_every_item_that_can_be_made_has_an_answer():
    draw = random.Random(0)
    makers = [chosen for groups in itertools.combinations(_GROUPS, 3) for chosen in itertools.product(*groups)]
    sets = [[dict(make(draw)) for make in chosen] for chosen in makers for _ in range(4)]
    allowed = [each for each in sets if not any(pair <= {one["kind"] for one in each} for pair in _EXCLUDED)]
    assert len(allowed) > 2_000
    assert [each for each in allowed if not all(Constraints.parse(each).follows(answer_to(each)))] == []


def test_a_constraint_that_is_none_is_named_with_its_line(tmp_path):
    with pytest.raises(ArtefactError, match=r"task.jsonl:2: constraints.*wrods"):
        task_of(tmp_path, [ROWS[0], {"prompt": "?", "constraints": [{"kind": "wrods"}]}], kind="constraints")
    with pytest.raises(ConfigError, match="leave out shots"):
        task_of(tmp_path, ROWS, kind="constraints", shots=1)

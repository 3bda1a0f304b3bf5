"""Conversations that teach a policy: what is said follows from the policy, and look-alikes come in the same forms."""

import runpy
import sys

import pytest

from bessemer.core.errors import ConfigError
from bessemer.core.policy import Policy, read_policy
from bessemer.safety import refusal_data
from bessemer.safety.classifier_training import packaged_seeds
from bessemer.safety.redteam.detectors import refusal_in
from bessemer.safety.refusal_data import OFFER, harmful_requests, held_back, look_alikes, policy_rows, taught
from tests.safety.policies import PRINCIPLES

CATEGORIES = {
    "privacy": {"code": "S7", "meaning": "finding out private facts"},
    "self_harm": {"code": "S11", "meaning": "self-harm", "refusal": "I am sorry that you feel this way."},
    "hate": {"code": "S10", "meaning": "hatred"},
}
LINE = {"otherwise": "refuse", "categories": {"hate": "log", "privacy": "safe_completion"}}


#: What is left of a template that was not filled in.
MARKS = ("{action", "{request", "{{", "}}", "(|")


def policy(answer=LINE, **changes):
    values = {"format": 1, "name": "one", "categories": CATEGORIES, "principles": PRINCIPLES, "surfaces": {"answer": answer}}
    return Policy.parse(values | changes)


def rows_of(policy, **settings):
    return policy_rows(policy, harmful_requests(policy, packaged_seeds(), of_category=12, **settings))


def answers(rows):
    return {row["category"]: row["completion"][0]["content"] for row in rows}


def test_what_is_taught_follows_from_the_policy():
    said = answers(rows_of(policy(messages={"refusal": "I won't help with that."})))
    assert said == {
        "privacy": f"I won't help with that. It touches on finding out private facts. {OFFER}",
        "self_harm": "I am sorry that you feel this way.",
    }


def test_one_changed_line_of_the_policy_moves_the_training_data():
    changed = policy(LINE | {"categories": {"privacy": "safe_completion"}})
    assert answers(rows_of(changed)).keys() - answers(rows_of(policy())).keys() == {"hate"}
    with pytest.raises(ConfigError, match=r"^the policy 'one' refuses no category"):
        rows_of(policy({"otherwise": "log"}))


def test_a_prompt_that_is_refused_is_refused_whatever_is_done_to_answers():
    prompt = {"prompt": {"categories": {"hate": "refuse"}}, "answer": LINE}
    assert taught(policy(surfaces=prompt), "hate") == "refuse"
    assert taught(read_policy(), "elections") is None and taught(read_policy(), "indiscriminate_weapons") == "refuse"


def test_every_refusal_of_the_default_policy_is_found_by_the_detector():
    rows = rows_of(read_policy())
    assert len({row["category"] for row in rows}) == 11
    assert all(refusal_in(row["completion"][0]["content"]) for row in rows)


def test_requests_are_spread_over_patterns_and_drawn_alike_for_a_seed():
    seeds = packaged_seeds()
    drawn = [harmful_requests(policy(), seeds, of_category=20, seed=seed) for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]
    texts = [one.text for one in drawn[0]]
    assert len(texts) == len(set(texts)) == 40 and not any(mark in text for text in texts for mark in MARKS)


def test_patterns_and_families_that_are_held_out_do_not_come():
    seeds = packaged_seeds()
    kept = held_back(seeds, ["fiction", "role_play"])
    wrapped = harmful_requests(policy(), kept, of_category=60, wrapped=1.0)
    assert {one.family for one in wrapped} <= seeds.wrappers.keys() - {"fiction", "role_play", "encoded"}
    asked = harmful_requests(read_policy(), seeds, of_category=20, left_out=seeds.hazards["privacy"]["en"].__contains__)
    assert {one.category for one in asked} == {name for name in seeds.hazards if taught(read_policy(), name)} - {"privacy"}
    with pytest.raises(ConfigError, match="no family of wrappers 'magic'"):
        held_back(seeds, ["magic"])


def test_look_alikes_are_asked_in_the_forms_of_the_harmful():
    alike = look_alikes(packaged_seeds(), 100)
    assert len(alike) == 100 and {one.kind for one in alike} == {"answer"}
    families = {one.family for one in alike}
    assert "" in families and len(families) > 5 and families - {""} <= packaged_seeds().wrappers.keys()
    assert not any(mark in one.text for one in alike for mark in MARKS)


def test_a_policy_that_is_none_is_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["-m", str(tmp_path / "rows.jsonl"), "--policy", str(tmp_path / "none.yaml")])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(refusal_data.__file__, run_name="__main__")
    said = capsys.readouterr().err
    assert stop.value.code == 2 and not (tmp_path / "rows.jsonl").exists()
    assert said.startswith("error: ") and said.count("\n") == 1 and "none.yaml" in said

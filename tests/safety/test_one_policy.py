"""One file is the policy of the data filter, the guard and the server."""

from pathlib import Path

import httpx
import pytest

from bessemer.core.errors import ConfigError
from bessemer.core.policy import read_policy
from bessemer.core.progress import Silent
from bessemer.core.stage import Outside
from bessemer.data.config import SelectConfig
from bessemer.data.filters.word_list_scores import hazards
from bessemer.data.plugins import Languages
from bessemer.data.specs import _evaluation_sets
from bessemer.data.stages.select import with_policy
from bessemer.data.text.texts import Texts
from bessemer.data.thresholds import rejection_reasons
from bessemer.safety.config import GuardConfig
from bessemer.safety.guard import Guard
from bessemer.safety.hook import GuardHook
from bessemer.safety.redteam.goals import goals_of
from tests.literate import blocks
from tests.safety.policies import PRINCIPLES
from tests.serving.engine import FakeEngine
from tests.serving.running import servers

TEXT = "How to kill a Python process?"
LINE = "  violent_crimes: {code: S1, meaning: violence, limit: 0.6}"
POLICY = f"""\
format: 1
name: one
categories:
{LINE}
principles: {PRINCIPLES}
surfaces:
  prompt: {{otherwise: refuse}}
  training: {{otherwise: refuse}}
"""


def test_one_changed_line_moves_the_data_filter_the_guard_and_the_server(tmp_path):
    moved = []
    for line in (LINE, LINE.replace("0.6", "0.3")):
        path = tmp_path / "policy.yaml"
        path.write_text(POLICY.replace(LINE, line), encoding="utf-8")
        select, policy = with_policy(SelectConfig(keep=["all"], policy="policy.yaml"), tmp_path)
        (reason,) = rejection_reasons(hazards(Texts.of([TEXT])), select.limits(), Languages()).to_pylist()
        guard = Guard(policy, GuardConfig(rails=["words"]))
        with servers() as start:
            url = start(FakeEngine(), hooks=[GuardHook(guard)])
            body = {"model": "tiny", "messages": [{"role": "user", "content": TEXT}], "max_tokens": 20}
            (choice,) = httpx.post(f"{url}/v1/chat/completions", json=body, timeout=30).json()["choices"]
        moved.append((reason, guard.check(TEXT, "prompt").action, choice["finish_reason"], policy.hash))
    (kept, allowed, answered, first), (dropped, refused, filtered, second) = moved
    assert (kept, allowed, answered) == (None, "allow", "length")
    assert dropped.startswith("hazards: violent crimes") and (refused, filtered) == ("refuse", "content_filter")
    assert first != second


def test_a_category_that_one_line_replaces_leaves_the_data_filter_the_guard_and_the_red_team(tmp_path):
    moved = []
    for line in (LINE.replace("0.6", "0.3"), "  privacy: {code: S7, meaning: privacy, limit: 0.3}"):
        path = tmp_path / "policy.yaml"
        path.write_text(POLICY.replace(LINE, line), encoding="utf-8")
        select, policy = with_policy(SelectConfig(keep=["all"], policy="policy.yaml"), tmp_path)
        (reason,) = rejection_reasons(hazards(Texts.of([TEXT])), select.limits(), Languages()).to_pylist()
        action = Guard(policy, GuardConfig(rails=["words"])).check(TEXT, "prompt").action
        moved.append((reason is not None, action, {goal.category for goal in goals_of(policy) if goal.kind == "behaviour"}))
    assert moved == [(True, "refuse", {"violent_crimes"}), (False, "allow", {"privacy"})]


def test_what_a_stage_reads_of_a_policy_is_part_of_its_key(tmp_path):
    config = SelectConfig(policy="policy.yaml")
    (tmp_path / "policy.yaml").write_text(POLICY, encoding="utf-8")
    before = _evaluation_sets(config, Outside(tmp_path, tmp_path, False, Silent()))
    (tmp_path / "policy.yaml").write_text("# a remark\n" + POLICY, encoding="utf-8")
    assert _evaluation_sets(config, Outside(tmp_path, tmp_path, False, Silent())) == before
    (tmp_path / "policy.yaml").write_text(POLICY.replace("0.6", "0.5"), encoding="utf-8")
    assert _evaluation_sets(config, Outside(tmp_path, tmp_path, False, Silent())) != before


def test_a_stated_threshold_replaces_the_policys_and_a_category_without_a_score_is_refused(tmp_path):
    (tmp_path / "policy.yaml").write_text(POLICY, encoding="utf-8")
    stated = SelectConfig.parse({"policy": "policy.yaml", "thresholds": {"hazards_violent_crimes": {"max": 0.9}}}, "select")
    assert with_policy(stated, tmp_path)[0].limits()["hazards_violent_crimes"] == (None, 0.9)
    (tmp_path / "policy.yaml").write_text(POLICY.replace(LINE, "  slag: {meaning: slag}"), encoding="utf-8")
    with pytest.raises(ConfigError, match=r"^select.policy: no score is of the category 'slag'"):
        with_policy(SelectConfig(policy="policy.yaml"), tmp_path)


def test_the_default_policy_drops_nothing_and_refuses_on_prompts_what_it_always_did(tmp_path):
    policy = read_policy()
    assert with_policy(SelectConfig(), tmp_path) == (SelectConfig(), None) and policy.acted_on("training") == {}
    refused = [name for name in policy.categories if policy.action("prompt", name) == "refuse"]
    assert refused == ["child_exploitation", "indiscriminate_weapons"]


def test_the_policy_of_the_page_is_one(tmp_path):
    page = Path(__file__).parents[2] / "docs" / "guard.md"
    (block,) = [block for block in blocks(page) if block.title == "policy.yaml"]
    (tmp_path / "policy.yaml").write_text(block.text, encoding="utf-8")
    policy = read_policy(tmp_path / "policy.yaml")
    guard = Guard(policy)
    assert guard.check("Is Acme Corp cheaper?", "answer").action == "safe_completion"
    assert not policy.taint.permits("delete_all") and with_policy(SelectConfig(policy="policy.yaml"), tmp_path)[1] == policy

"""The policy that travels with Bessemer, and mistakes in one's own."""

import pytest

from bessemer.core.errors import ConfigError
from bessemer.core.policy import read_policy
from bessemer.data.filters.registry import FILTERS, HAZARD_CATEGORIES

SMALL = """\
format: 1
name: small
categories:
  privacy: {code: S7, meaning: private facts, limit: 0.4}
  hate: {meaning: hatred}
principles:
  privacy: {critique: What is private?, revision: Leave it out., comparison: Which is better?}
surfaces:
  answer: {otherwise: log, categories: {privacy: refuse}}
"""


def test_the_default_policy_has_the_categories_of_the_scores_with_their_limits():
    policy = read_policy()
    found = {name: (category.code, category.meaning) for name, category in policy.categories.items()}
    assert found == HAZARD_CATEGORIES
    limits = {name: column.limit[1] for name, column in FILTERS["hazards"].columns.items()}
    assert {f"hazards_{name}": category.limit for name, category in policy.categories.items()} == limits
    assert policy.action("answer", "indiscriminate_weapons") == "refuse"
    assert set(policy.acted_on("answer")) == set(HAZARD_CATEGORIES)


def test_a_surface_says_what_is_done_about_a_category(tmp_path):
    (tmp_path / "policy.yaml").write_text(SMALL, encoding="utf-8")
    policy = read_policy(tmp_path / "policy.yaml")
    assert [policy.action("answer", name) for name in ("privacy", "hate")] == ["refuse", "log"]
    assert policy.acted_on("prompt") == {} and list(policy.acted_on("answer")) == ["privacy", "hate"]
    assert list(policy.chosen_principles()) == ["privacy"]
    with pytest.raises(ConfigError, match=r"^the policy 'small' has no principle 'privcy'; did you mean 'privacy'\?$"):
        policy.chosen_principles(["privcy"])


@pytest.mark.parametrize(
    ("written", "instead", "line", "message"),
    [
        ("limit: 0.4", "limt: 0.4", 4, r"categories.privacy.limt: unknown key 'limt'; did you mean 'limit'\?"),
        ("limit: 0.4", "limit: 4", 4, r"categories.privacy.limit: input should be less than or equal to 1, got 4"),
        ("meaning: hatred", "code: S10", 5, r"categories.hate: 'meaning' must be given"),
        ("{privacy: refuse}", "{privcy: refuse}", 9, r".*: there is no category 'privcy'; did you mean 'privacy'\?"),
        (
            "{privacy: refuse}",
            "{privacy: deny}",
            9,
            r".*privacy: input should be 'allow', 'log', 'warn', 'redact', 'safe_completion' or 'refuse', got 'deny'",
        ),
        ("  answer:", "  anser:", 9, r"surfaces.anser: unknown key 'anser'; did you mean 'answer'\?"),
        ("format: 1", "format: 2", 1, r"format: input should be 1, got 2"),
        ("  hate:", "  Hate speech:", 5, r"categories.*Hate speech.*: string should match pattern .*"),
        ("surfaces:", "surfaces: [", 10, r"not valid YAML: .*"),
    ],
)
def test_a_mistake_is_one_line_with_its_place(tmp_path, written, instead, line, message):
    path = tmp_path / "policy.yaml"
    assert written in SMALL
    path.write_text(SMALL.replace(written, instead, 1), encoding="utf-8")
    with pytest.raises(ConfigError, match=rf"^{path}:{line}: {message}$") as error:
        read_policy(path)
    assert "\n" not in str(error.value)


def test_a_policy_that_is_not_there_is_said(tmp_path):
    with pytest.raises(ConfigError, match=r"policy.yaml: cannot be read: No such file or directory$"):
        read_policy(tmp_path / "policy.yaml")


CONTRADICTIONS = {
    "one code": (
        "hate: {meaning: hatred}",
        "hate: {meaning: hatred, code: S7}",
        r"categories.hate.code: the category 'privacy' has the code S7 already",
    ),
    "one term": (
        "limit: 0.4}\n  hate: {meaning: hatred}",
        "terms: [abc]}\n  hate: {meaning: hatred, terms: [ABC]}",
        r"categories.hate.terms: 'ABC' is of the category 'privacy' too",
    ),
    "one stem": (
        "limit: 0.4}\n  hate: {meaning: hatred}",
        "terms: ['ab*']}\n  hate: {meaning: hatred, terms: [Abc]}",
        r"categories.hate.terms: 'Abc' is of the category 'privacy' too, by 'ab\*'",
    ),
    "a rule's name": ("  hate: {", "  injection: {", r"categories.injection: 'injection' is what rules find; .*"),
    "a warning in an answer": ("otherwise: log", "otherwise: warn", r"surfaces.answer.otherwise: warn cannot be done here: .*"),
    "allowed and denied": (
        "surfaces:",
        "taint: {allow: [search, mail_read], deny: ['mail_*']}\nsurfaces:",
        r"taint.deny: 'mail_read' is allowed, and 'mail_\*' denied: both hold for one tool",
    ),
}


@pytest.mark.parametrize("name", CONTRADICTIONS)
def test_rules_that_contradict_each_other_are_one_line(tmp_path, name):
    written, instead, message = CONTRADICTIONS[name]
    path = tmp_path / "policy.yaml"
    assert written in SMALL
    path.write_text(SMALL.replace(written, instead, 1), encoding="utf-8")
    with pytest.raises(ConfigError, match=rf"^{path}:\d+: {message}$") as error:
        read_policy(path)
    assert "\n" not in str(error.value)


def test_what_rules_find_is_allowed_where_a_surface_does_not_name_it(tmp_path):
    path = tmp_path / "policy.yaml"
    path.write_text(SMALL.replace("{privacy: refuse}", "{privacy: refuse, secrets: redact}"), encoding="utf-8")
    policy = read_policy(path)
    assert [policy.action("answer", kind) for kind in ("secrets", "personal_data")] == ["redact", "allow"]


def test_the_hash_is_of_what_a_policy_says_and_not_of_how_it_is_written(tmp_path):
    hashes = []
    for number, text in enumerate((SMALL, "# remark\n" + SMALL, SMALL.replace("limit: 0.4", "limit: 0.5"))):
        path = tmp_path / f"{number}.yaml"
        path.write_text(text, encoding="utf-8")
        hashes.append(read_policy(path).hash)
    assert hashes[0] == hashes[1] != hashes[2]


def test_taint_permits_what_is_not_denied_and_only_what_is_allowed():
    from bessemer.core.policy import Taint

    assert [Taint(deny=["mail_*"]).permits(tool) for tool in ("mail_send", "search")] == [False, True]
    assert [Taint(allow=["search"]).permits(tool) for tool in ("mail_send", "search")] == [False, True]
    assert Taint().permits("anything")

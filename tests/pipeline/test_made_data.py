"""Data that one stage of a recipe makes and a later one reads."""

import json

import pytest

import bessemer
from bessemer.core.errors import ConfigError
from bessemer.pipeline.recipe import load_recipe
from tests.chat_server import completion, serving
from tests.pipeline.test_tuning_alone import LOOP, folder, write_recipe  # noqa: F401

PROMPTS = "revise: {data: [chat.jsonl], max_tokens: 4}"


def test_a_stage_reads_what_another_has_made(folder):  # noqa: F811
    recipe = load_recipe(write_recipe(folder, f"{PROMPTS}\nsft: {{data: [made/revisions, chat.jsonl], {LOOP}}}"))
    assert recipe.stages[-1].inputs["revisions"].stage == "revise"
    pairs = f"ai_preferences: {{data: [chat.jsonl]}}\nreward: {{data: [made/preferences], {LOOP}}}"
    recipe = load_recipe(write_recipe(folder, f"{pairs}\ndpo: {{kind: preference, data: [made/preferences], {LOOP}}}"))
    assert [stage.inputs["preferences"].stage for stage in recipe.stages[2:]] == ["ai_preferences"] * 2


@pytest.mark.parametrize(
    ("stage", "message"),
    [
        ("sft: {data: [made/revisions]", r"sft: needs revisions, and no stage above makes it; add revise: "),
        (
            "sft: {data: [made/revision]",
            r"neither a file of rows .* nor made data, nor a file.py:function; did you mean 'made/revisions'\?",
        ),
        ("preference: {data: [made/preferences]", r"needs preferences, and no stage above makes it; add ai_preferences: "),
        ("reward: {data: [made/preferences]", r"needs preferences, and no stage above makes it; add ai_preferences: "),
    ],
)
def test_what_no_stage_makes_is_said_before_anything_runs(folder, stage, message):  # noqa: F811
    with pytest.raises(ConfigError, match=message):
        load_recipe(write_recipe(folder, f"{stage}, {LOOP}}}"))


def test_a_mistake_in_a_policy_is_said_before_anything_runs(folder, monkeypatch):  # noqa: F811
    monkeypatch.chdir(folder)
    (folder / "policy.yaml").write_text("format: 1\nname: p\ncategories: {a: {meaning: b}}\n", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"policy.yaml:1: 'principles' must be given"):
        bessemer.run(write_recipe(folder, "revise: {data: [chat.jsonl], policy: policy.yaml}"))


# revisions are held to their prompts, and conversations to what is learnt of them, where they are made
@pytest.mark.slow
def test_a_model_is_tuned_on_its_revised_answers(folder, monkeypatch):  # noqa: F811
    monkeypatch.chdir(folder)
    with serving(monkeypatch) as serve:
        server = serve(lambda body, _: completion("Better." if len(body["messages"]) > 3 else "It is bad."))
        critic = f"critic: {{model: c, url: '{server.url}'}}"
        run = bessemer.run(
            write_recipe(
                folder,
                f"revise: {{data: [chat.jsonl], {critic}}}\nsft: {{data: [made/revisions], validation_share: 0, {LOOP}}}",
            )
        )
    rows = [
        json.loads(line) for line in (run.folder / "stages" / "sft" / "conversations" / "train.jsonl").open(encoding="utf-8")
    ]
    assert len(rows) == 12 and {row["completion"][0]["content"] for row in rows} == {"Better."}

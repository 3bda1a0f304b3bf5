"""Stages of a name of their own, roles in `from`, and stages of other packages."""

import json

import pytest

from bessemer.core.config import Config, setting
from bessemer.core.errors import ConfigError
from bessemer.core.stage import Input, StageSpec
from bessemer.pipeline import recipe as recipe_module
from bessemer.pipeline.api import run
from bessemer.pipeline.planning import training_plan
from bessemer.pipeline.recipe import load_recipe
from tests.plugin_package import install

TWICE = "words: [a, b, c]\ncount: {times: 2}\nagain: {kind: count, times: 5}\ntrain: {minutes: 0.05, from: again}\n"


def test_a_stage_of_another_name_is_made_beside_the_one_of_its_kind(recipe, folder):
    made = run(recipe(TWICE))
    stages = folder / "runs" / "small" / "stages"
    assert [(stages / name / "count.txt").read_text(encoding="utf-8") for name in ("count", "again")] == ["6", "15"]
    assert [one.stage.name for one in made.made] == ["words", "count", "again", "train"]


def test_from_names_the_stage_and_the_nearest_one_feeds_without_it(recipe):
    named = load_recipe(recipe(TWICE.replace("from: again", "from: count")))
    nearest = load_recipe(recipe(TWICE.replace(", from: again", "")))
    assert named.stage("train").inputs["counts"].stage == "count"
    assert nearest.stage("train").inputs["counts"].stage == "again"


def test_the_name_of_a_stage_is_not_part_of_what_its_artefact_is(recipe, folder, calls):
    run(recipe(TWICE))
    before = list(calls)
    run(recipe(TWICE.replace("again", "another")), name="other")
    assert calls == before


def test_an_override_reaches_a_stage_of_a_name_of_its_own(recipe):
    assert load_recipe(recipe(TWICE), ["again.times=7"]).stage("again").config.times == 7
    for overrides in (["third.kind=count", "third.times=9"], ["third.times=9", "third.kind=count"]):
        assert load_recipe(recipe(TWICE), overrides).stage("third").config.times == 9


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("words: [a]\nagain: {times: 2}\n", "unknown stage or key 'again'"),
        ("words: [a]\nagain: {kind: cuont}\n", "there is no kind of stage 'cuont'; did you mean 'count'?"),
        ("words: [a]\ncount: {kind: words}\n", "'count' is a kind of stage itself"),
        ("words: [a]\na.b: {kind: count}\n", "the name of a stage has letters, digits, - and _ alone"),
        ("words: [a]\ncount: {from: {documents: nothing}}\n", "there is no stage 'nothing' above it"),
        ("words: [a]\ncount: {from: {documnets: words}}\n", "there is no role 'documnets'; did you mean 'documents'?"),
        ("words: [a]\ncount: {from: [words]}\n", "must be the name of a stage above, or a role and a stage each"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(recipe, text, message):
    with pytest.raises(ConfigError, match=r"recipe\.yaml:") as error:
        load_recipe(recipe(text))
    assert message in str(error.value) and "\n" not in str(error.value)


def test_roles_of_from_name_several_stages(recipe, monkeypatch):
    class MixConfig(Config):
        share: float = setting(0.5, "Share.")

    needs = {"policy": "model", "reference": "model", "judge": "counts?"}
    monkeypatch.setitem(recipe_module.STAGES, "mix", StageSpec("mix", "Mix.", MixConfig, 1, needs, {"model": "model"}, None))
    text = TWICE + "two: {kind: train, steps: 3}\nmix: {from: {policy: train, reference: two, judge: count}}\n"
    inputs = load_recipe(recipe(text)).stage("mix").inputs
    assert {role: source.stage for role, source in inputs.items()} == {"policy": "train", "reference": "two", "judge": "count"}


def test_a_recipe_that_extends_another_leaves_out_a_stage_of_a_name_of_its_own(recipe, folder):
    recipe(TWICE)
    (folder / "less.yaml").write_text(
        "format: 1\nname: less\nextends: recipe.yaml\nagain:\ntrain: {steps: 2, from: count}\n", encoding="utf-8"
    )
    assert [stage.name for stage in load_recipe("less.yaml").stages] == ["words", "count", "train"]


PACKAGE = '''
from bessemer.core.config import Config, setting
from bessemer.core.registry import Plugin
from bessemer.core.stage import Input, StageSpec


class ShoutConfig(Config):
    """Documents in capitals."""

    marks: int = setting(1, "Exclamation marks.")


def shout(context):
    texts = [path.read_text() for path in sorted(context.inputs["tokenizer"].glob("tokenizer.json"))]
    (context.out / "shouted.txt").write_text(str(len(texts)) + "!" * context.config.marks)
    return {"shouted": len(texts)}


PLUGIN = Plugin(
    "shout",
    "Say it louder.",
    StageSpec("shout", "Say it louder.", ShoutConfig, 1, {"tokenizer": "tokenizer"}, {"shouted": "."}, shout),
    ShoutConfig,
)
'''


def test_a_stage_of_another_package_is_found_by_its_entry_point(folder, monkeypatch):
    entry_points = {"bessemer.stages": {"shout": "loud_package:PLUGIN"}}
    (folder / "site").mkdir()
    install(folder / "site", monkeypatch, "loud_package", PACKAGE, entry_points, version="2.5")
    (folder / "texts").mkdir()
    (folder / "texts" / "a.txt").write_text("pig iron and blast air. " * 200, encoding="utf-8")
    (folder / "loud.yaml").write_text(
        "format: 1\nname: loud\ncollect: [{source: files, paths: texts}]\n"
        "tokenize: {vocab_size: 270}\nlouder: {kind: shout, marks: 3}\n",
        encoding="utf-8",
    )
    made = run("loud.yaml")
    assert (folder / "runs" / "loud" / "stages" / "louder" / "shouted.txt").read_text(encoding="utf-8") == "1!!!"
    assert made.made[-1].stage.spec.kind == "shout"
    manifest = json.loads((folder / "runs" / "loud" / "stages" / "louder" / "manifest.json").read_text(encoding="utf-8"))
    # another version of the package makes another artefact
    assert manifest["plugins"] == {"bessemer.stages:shout": "loud_package 2.5"}


def test_an_entry_point_that_cannot_be_loaded_is_named(folder, monkeypatch):
    entry_points = {"bessemer.stages": {"shout": "loud_package:NOTHING"}}
    (folder / "site").mkdir()
    install(folder / "site", monkeypatch, "loud_package", PACKAGE, entry_points)
    (folder / "loud.yaml").write_text("format: 1\nname: loud\nshout: {marks: 3}\n", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"the entry point 'shout' of bessemer\.stages cannot be loaded: .*NOTHING"):
        load_recipe("loud.yaml")


CORPUS = "format: 1\nname: two\ncollect: [{source: python_docs}]\ntokenize: {vocab_size: 1000}\n"


def test_a_conflict_is_looked_for_among_the_stages_that_feed_one(folder):
    text = (
        f"{CORPUS}model: {{preset: qwen3-1m, max_position_embeddings: 1024}}\npretrain: {{steps: 2, context_length: 1024}}\n"
        "draft: {kind: model, preset: qwen3-1m, max_position_embeddings: 128}\n"
    )
    (folder / "two.yaml").write_text(
        f"{text}sft: {{data: [a.jsonl], context_length: 1024, from: pretrain}}\n", encoding="utf-8"
    )
    assert load_recipe("two.yaml").stage("sft").inputs["model"].stage == "pretrain"
    (folder / "two.yaml").write_text(f"{text}sft: {{data: [a.jsonl], context_length: 1024, from: draft}}\n", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"context_length 1,024 exceeds model\.max_position_embeddings 128"):
        load_recipe("two.yaml")


def test_scores_of_every_stage_above_serve_the_presets(folder):
    (folder / "two.yaml").write_text(
        "format: 1\nname: two\ncollect: [{source: python_docs}]\nclean: {score: [gopher_quality, gopher_repetition]}\n"
        "again: {kind: clean, score: [code]}\nselect: {keep: [gopher, code], languages: []}\n",
        encoding="utf-8",
    )
    assert load_recipe("two.yaml").stage("select").inputs["documents"].stage == "again"


def test_the_model_that_is_planned_with_is_the_one_that_is_trained(folder):
    (folder / "two.yaml").write_text(
        f"{CORPUS}draft: {{kind: model, preset: qwen3-1m, hidden_size: 64}}\n"
        "model: {preset: qwen3-1m}\npretrain: {steps: 2}\n",
        encoding="utf-8",
    )
    recipe = load_recipe("two.yaml")
    assert (
        training_plan("two.yaml").model.hidden_size
        == recipe.stage("model").config.model_for(1000, None, None).hidden_size
        != 64
    )


def test_a_trained_stage_that_makes_no_model_is_not_evaluated():
    def spec(kind: str, makes: dict[str, str], **fields) -> StageSpec:
        return StageSpec(kind, "One.", Config, 1, {}, makes, lambda context: {}, **fields)

    above = {
        "sft": spec("sft", {"model": "model"}, trains=True),
        "reward": spec("reward", {"reward_model": "model"}, trains=True),
    }
    evaluate = spec("evaluate", {"results": "."}, models_named=lambda config: [])
    assert evaluate.wire(Config(), above, None, lambda: "recipe") == {"model:sft": Input("sft", "model")}

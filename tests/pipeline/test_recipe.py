import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from bessemer.core.errors import ConfigError
from bessemer.core.yaml_file import dump_yaml, parse_value, parse_yaml
from bessemer.model.config import ModelConfig
from bessemer.model.decoder import Decoder
from bessemer.model.storage.folder import save_model
from bessemer.pipeline import recipe as recipe_module
from bessemer.pipeline.api import prepare
from bessemer.pipeline.recipe import load_recipe, shipped_recipes
from bessemer.tokenization.bpe import byte_level_bpe
from bessemer.tokenization.folder import write_folder
from tests.model.tokenizers import VOCAB_SIZE, write_small_tokenizer

pytestmark = pytest.mark.usefixtures("standard_library")


def message(name, overrides=(), **options) -> str:
    with pytest.raises(ConfigError) as caught:
        load_recipe(name, overrides, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("text", "value"),
    [("off", "off"), ("3e-3", 0.003), ("1e5", 100000.0), ("12", 12), ("true", True), ("[a, 1]", ["a", 1]), ("~", None)],
)
def test_values_are_yaml_1_2(text, value):
    parsed = parse_value(text, "here")
    assert parsed == value
    assert type(parsed) is type(value)


def test_dumped_values_come_back():
    values = {"b": 1, "a": [1, {"c": "off"}], "d": {"e": 0.003, "f": None, "g": "3e-3"}}
    assert parse_yaml(dump_yaml(values), "x").values == values


def test_syntax_error_has_file_and_line(recipe):
    assert message(recipe("words: [a\ncount: {}\n")).startswith("recipe.yaml:4: not valid YAML")


def test_key_given_twice_is_refused_with_its_line(recipe):
    assert message(recipe("words: [a]\nwords: [b]\n")).startswith("recipe.yaml:4: not valid YAML: found duplicate key")


def test_unknown_stage_has_line_and_nearest_name(recipe):
    assert message(recipe("words: [a]\ncuont: {}\n")) == "recipe.yaml:4: unknown stage or key 'cuont'; did you mean 'count'?"


def test_unknown_key_in_a_stage_has_line_and_nearest_name(recipe):
    assert message(recipe("words: [a]\ncount:\n  time: 3\n")) == (
        "recipe.yaml:5: count.time: unknown key 'time'; did you mean 'times'?"
    )


def test_wrong_type_has_its_line(recipe):
    assert message(recipe("words: [a]\ncount:\n  times: many\n")).startswith("recipe.yaml:5: count.times: input should be")


def test_item_of_a_bare_list_has_its_line(recipe):
    assert message(recipe("words:\n  - a\n  - [b]\n")).startswith("recipe.yaml:5: words.1:")


def test_missing_name_is_said(recipe):
    assert message(recipe("words: [a]\n", head="format: 1\n")) == "recipe.yaml:1: 'name' must be given"


def test_other_format_is_refused(recipe):
    assert message(recipe("words: [a]\n", head="format: 2\nname: x\n")).startswith("recipe.yaml:1: format:")


def test_stage_without_what_it_needs_is_refused(recipe):
    assert message(recipe("count: {}\n")) == (
        "recipe.yaml:3: count: needs documents, and no stage above makes it; add collect: [{source: files, paths: texts}]"
    )


def test_from_must_name_a_stage_above_that_makes_the_right_kind(recipe):
    assert "there is no stage 'wrods' above it; did you mean 'words'?" in message(recipe("words: [a]\ncount: {from: wrods}\n"))
    assert "makes documents, not counts" in message(recipe("words: [a]\ncount: {}\ntrain: {from: words, steps: 1}\n"))


def test_override_comes_on_top_and_is_named_in_errors(recipe):
    loaded = load_recipe(recipe(), ["count.times=5", "words.0=z"])
    assert loaded.stage("count").config.times == 5
    assert loaded.stage("words").config.words == ["z", "b", "c"]
    assert load_recipe(recipe(), "count.times=5").stage("count").config.times == 5
    assert message(recipe(), ["count.times=0"]).startswith("override count.times=0: count.times:")
    assert message(recipe(), ["cuont.times=0"]) == "override cuont.times=0: unknown key 'cuont'; did you mean 'count'?"
    assert "an override is KEY=VALUE" in message(recipe(), ["count"])


def test_override_reaches_a_section_written_as_a_bare_list(recipe):
    config = load_recipe(recipe(), ["words.workers=4"]).stage("words").config
    assert config.words == ["a", "b", "c"]
    assert config.workers == 4


def test_null_override_takes_a_stage_away(recipe):
    assert [stage.name for stage in load_recipe(recipe(), ["train=null"]).stages] == ["words", "count"]


def test_extends_inherits_and_keeps_lines_of_both_files(recipe, folder):
    recipe()
    (folder / "child.yaml").write_text("extends: recipe.yaml\nname: child\ncount:\n  times: 7\n", encoding="utf-8")
    loaded = load_recipe("child.yaml")
    assert loaded.name == "child"
    assert loaded.stage("count").config.times == 7
    assert loaded.stage("words").config.words == ["a", "b", "c"]
    (folder / "child.yaml").write_text("extends: recipe.yaml\nname: child\ncount:\n  times: no\n", encoding="utf-8")
    assert message("child.yaml").startswith("child.yaml:4: count.times")


@pytest.mark.parametrize(
    ("parent", "child", "left"),
    [
        ("minutes: 4", "steps: 20", ["steps"]),
        ("steps: 20", "minutes: 4", ["minutes"]),
        ("tokens: 999, warmup_steps: 1", "steps: 20, warmup_fraction: 0.1", ["steps", "warmup_fraction"]),
        ("minutes: 4", "steps: 20, batch_size: 2", ["steps", "batch_size"]),
        ("minutes: 4", "batch_size: 2", ["minutes", "batch_size"]),
    ],
)
def test_a_setting_unsets_the_inherited_ones_that_it_is_an_alternative_of(folder, parent, child, left):
    (folder / "parent.yaml").write_text(f"format: 1\nname: p\npretrain: {{{parent}}}\n", encoding="utf-8")
    (folder / "child.yaml").write_text(f"extends: parent.yaml\npretrain: {{{child}}}\n", encoding="utf-8")
    assert sorted(recipe_module._with_extended(Path("child.yaml"), ()).values["pretrain"]) == sorted(left)


def test_an_override_of_the_steps_unsets_the_minutes_of_the_recipe():
    pretrain = load_recipe("quickstart", ["pretrain.steps=20"]).stage("pretrain").config
    assert (pretrain.steps, pretrain.minutes) == (20, None)
    assert load_recipe("ladder", {"pretrain.minutes": 2}).stage("pretrain").config.tokens is None
    assert load_recipe("long-context", {"model.preset": "qwen3-3m"}).stage("model").config.init_from is None


def test_an_override_takes_the_place_of_what_a_short_section_stands_for(folder):
    (folder / "short.yaml").write_text("format: 1\nname: s\nextends: chat\nmodel: qwen3-1m\n", encoding="utf-8")
    changed = load_recipe("short.yaml", ["model.init_from=base", "tokenize.tokenizer=base"]).stage("model").config
    assert (changed.init_from, changed.preset) == ("base", None)


def test_two_lengths_in_one_place_are_refused_with_both_ways_out():
    text = message("quickstart", ["pretrain.steps=20", "pretrain.minutes=2"])
    assert text.endswith("not steps and minutes: keep steps: 20 or minutes: 2.0")
    assert message("quickstart", ["pretrain.minutes=null"]).endswith(
        "give exactly one of steps, tokens and minutes, as in minutes: 4"
    )


def test_a_recipe_leaves_out_a_stage_of_the_one_that_it_extends(recipe, folder):
    recipe()
    (folder / "child.yaml").write_text("extends: recipe.yaml\nname: child\ntrain: null\n", encoding="utf-8")
    assert [stage.name for stage in load_recipe("child.yaml").stages] == ["words", "count"]


def test_recipes_that_extend_each_other_are_refused(folder, calls):
    (folder / "a.yaml").write_text("extends: b.yaml\n", encoding="utf-8")
    (folder / "b.yaml").write_text("extends: a.yaml\n", encoding="utf-8")
    assert "in a circle" in message("a.yaml")


def test_missing_recipe_names_the_nearest(folder):
    assert message("quikstart") == "there is no recipe 'quikstart'; did you mean 'quickstart'? (a file ends in .yaml)"
    assert message("none.yaml") == (
        "none.yaml: there is no such recipe file; check the path, or name one that bessemer recipes lists"
    )


def test_user_function_must_exist(recipe):
    assert "there is no file" in message(recipe("words: [a]\ncount: {function: 'mine.py:f'}\n"), allow_code=True)


def test_text_that_looks_like_code_is_text_where_no_code_can_be_named():
    prompts = ["def f(): # see utils.py:f", "utils.py:f"]
    stage = load_recipe("quickstart", {"pretrain.sample_prompts": prompts, "pretrain.optimizer": "adamw"}).stage("pretrain")
    assert stage.user_functions == ()


@pytest.mark.parametrize("place", ["", "downloads/"])
def test_a_recipe_runs_code_of_its_own_only_when_allowed_wherever_it_lies(recipe, folder, place):
    (folder / "downloads").mkdir()
    (folder / place / "mine.py").write_text("def f(): ...\n", encoding="utf-8")
    Path(recipe("words: [a]\ncount: {function: 'mine.py:f'}\n")).rename(folder / place / "theirs.yaml")
    text = message(f"{place}theirs.yaml")
    assert text.startswith(f"{place}theirs.yaml:4: count: names code of its own (mine.py:f)") and "--allow-code" in text
    assert load_recipe(f"{place}theirs.yaml", allow_code=True).stage("count").user_functions == ("mine.py:f",)


@pytest.mark.parametrize("name", sorted(shipped_recipes()))
def test_every_shipped_recipe_is_valid(name):
    assert load_recipe(name).stages


@pytest.mark.parametrize("stage", ["pretrain", "sft"])
def test_rows_longer_than_the_models_context_are_refused_before_anything_runs(stage):
    text = message("quickstart", [f"{stage}.context_length=1024"])
    assert f"{stage}: context_length 1,024 exceeds model.max_position_embeddings 256" in text


def test_a_missing_file_of_a_late_stage_is_named_before_anything_runs(folder):
    from bessemer.core.errors import SourceError

    with pytest.raises(SourceError, match=r"missing\.jsonl: there is no such file"):
        prepare("quickstart", ["collect=[python_docs]", "sft.data=[missing.jsonl]"])
    assert not (folder / "runs").exists()


def test_a_mixture_that_would_count_copies_is_refused_before_anything_runs():
    mixture = {"weights": {"wheels": 1, "python_docs": 2}}
    with pytest.raises(ConfigError, match="deduplicate: select above it has a mixture"):
        load_recipe("quickstart", {"select.mix": mixture})
    assert load_recipe("quickstart", {"deduplicate.mix": mixture}).stage("deduplicate").config.mix.weights == mixture["weights"]


def test_a_preset_whose_scores_are_not_computed_is_named_before_anything_runs():
    with pytest.raises(ConfigError, match=r"select: keep: fineweb needs the score fineweb; add it to clean\.score"):
        load_recipe("quickstart", {"select": {"keep": ["gopher", "fineweb"]}})
    with pytest.raises(ConfigError, match=r"select: keep: gopher needs the score gopher_repetition; add it to clean\.score"):
        load_recipe("quickstart", {"clean": None, "select": {"keep": "gopher"}})
    with pytest.raises(ConfigError, match=r"keep: secrets needs the edit secrets; add it to clean\.edit"):
        load_recipe("quickstart", {"clean": {"score": []}, "select": {"keep": "secrets", "languages": []}})
    with pytest.raises(ConfigError, match="select: languages needs the score language"):
        load_recipe("quickstart", {"clean": {"score": ["gopher_quality"]}, "select": "gopher_quality"})


def refused(name="quickstart", overrides=(), **options) -> str:
    """The line with which a recipe is refused before anything is written."""
    from bessemer.pipeline.api import run

    with pytest.raises(ConfigError) as caught:
        run(name, overrides, **options)
    assert not Path("runs").exists() and "\n" not in str(caught.value)
    return str(caught.value)


TEXTS = "extends: chat\nformat: 1\nname: mine\ncollect: [{source: files, paths: texts}]\n"


def test_questions_on_documentation_are_refused_where_no_source_gives_any(folder):
    (folder / "texts").mkdir()
    (folder / "texts" / "a.md").write_text("Steel is an alloy.", encoding="utf-8")
    (folder / "mine.yaml").write_text(TEXTS, encoding="utf-8")
    text = refused("mine.yaml")
    assert text.startswith("sft: made/docs_questions is made from documentation") and "sft: null" in text
    (folder / "mine.yaml").write_text(TEXTS + "sft: null\n", encoding="utf-8")
    prepare("mine.yaml")
    (folder / "texts" / "b.jsonl.gz").write_bytes(b"")  # its records may say which function they document
    (folder / "mine.yaml").write_text(TEXTS, encoding="utf-8")
    prepare("mine.yaml")


def test_the_recipe_of_the_readme_is_accepted(folder):
    readme = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
    recipe = next(block.partition("```")[0] for block in readme.split("```yaml\n")[1:] if "extends: chat" in block)
    (folder / "texts").mkdir()
    (folder / "texts" / "a.md").write_text("Steel is an alloy.", encoding="utf-8")
    (folder / "mine.yaml").write_text(recipe, encoding="utf-8")
    assert "sft" not in [one.stage.name for one in prepare("mine.yaml").plan()]


def test_a_model_beside_a_new_vocabulary_is_refused_with_its_own_tokenizer_suggested(folder):
    shape = ModelConfig(vocab_size=VOCAB_SIZE, hidden_size=32, num_hidden_layers=1, max_position_embeddings=256)
    save_model(Decoder(shape), folder / "theirs", tokenizer=write_small_tokenizer(folder / "tokenizer"))
    overrides = {"collect": ["python_docs"], "model": {"init_from": "theirs"}, "tokenize": {"vocab_size": VOCAB_SIZE - 1}}
    text = refused(overrides=overrides | {"quantize": None})
    assert text.startswith(f"model.init_from: theirs reads {VOCAB_SIZE} tokens") and text.endswith(
        "tokenize: {tokenizer: theirs}"
    )


def test_an_existing_model_is_held_beside_the_tokenizer_and_the_rows_that_it_shall_have(folder):
    shape = ModelConfig(vocab_size=VOCAB_SIZE, hidden_size=32, num_hidden_layers=1, max_position_embeddings=128)
    save_model(Decoder(shape), folder / "theirs", tokenizer=write_small_tokenizer(folder / "tokenizer"))
    write_folder(folder / "other", byte_level_bpe([bytes([byte]) for byte in range(256)], "qwen2"))
    model = {"collect": ["python_docs"], "model": {"init_from": "theirs"}, "tokenize": {"tokenizer": "other"}, "quantize": None}
    assert "model.init_from: theirs has another tokenizer than the recipe's" in refused(overrides=model)
    model["tokenize"] = {"tokenizer": "tokenizer"}
    assert "pretrain: context_length 256 exceeds model.max_position_embeddings 128" in refused(overrides=model)
    short = {f"{stage}.context_length": 128 for stage in ("pretrain", "evaluate")}
    assert "sft: context_length 256 exceeds model.max_position_embeddings 128" in refused(overrides=model | short)
    prepare("chat", model | short | {"sft.context_length": 128})


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["pretrain.parallel={tensor: 2}"], "pretrain: parallel: tensor 2 = 2 does not divide the 1 processes"),
        (["launch.processes=2", "pretrain.batch_size=7"], "pretrain: batch_size 7 is not divisible by the 2 ranks"),
        (["launch.processes=3", "pretrain.parallel={tensor: 3}"], "pretrain: parallel: tensor 3 does not divide num_"),
        (["launch.processes=8", "pretrain.parallel={pipeline: 8}"], "pretrain: parallel: pipeline 8 exceeds the model's"),
        (["launch.processes=2", "pretrain.parallel={context: 2}", "pretrain.context_length=250"], "does not divide a row"),
        (["device=cuda"], "pretrain: device 'cuda' is not on this machine"),
        (["pretrain.optimizer_bits=8"], "pretrain: this needs the package 'torchao': pip install torchao"),
        (
            ["collect=[{source: hugging_face, dataset: a/b}]"],
            "collect: this needs the package 'datasets': pip install ",
        ),
    ],
)
def test_what_the_machine_cannot_do_is_said_before_anything_runs(folder, overrides, expected, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)  # as where it is not installed
    monkeypatch.setitem(sys.modules, "torchao", None)
    assert expected in refused(overrides=["collect=[python_docs]", *overrides])


def test_fill_in_the_middle_without_its_tokens_or_in_an_unknown_source_is_refused():
    assert "set tokenize.fim_tokens" in message("quickstart", ["pretrain.fim_rate=0.5"])
    overrides = ["tokenize.fim_tokens=true", "pretrain.fim_rate=0.5", "pretrain.fim_sources=[python_dosc]"]
    assert "no source is named 'python_dosc'; did you mean 'python_docs'?" in message("quickstart", overrides)


def test_users_code_that_does_not_import_is_said_before_anything_runs(folder):
    (folder / "own.py").write_text("import nothing_like_it\n", encoding="utf-8")
    overrides = ["collect=[python_docs]", "pretrain.optimizer=own.py:best"]
    assert "own.py: importing it failed: ModuleNotFoundError" in refused(overrides=overrides)
    prepare("quickstart", overrides, until="tokenize")


def test_a_package_that_only_finished_stages_need_may_be_missing(recipe, calls, monkeypatch):
    from bessemer.pipeline.api import run

    run(recipe())
    for name in ("count", "train"):
        spec = recipe_module.STAGES[name]
        monkeypatch.setitem(recipe_module.STAGES, name, replace(spec, packages=lambda config: ["nothing_like_it"]))
    prepare(recipe())
    with pytest.raises(ConfigError, match=r"count: this needs the package 'nothing_like_it': pip install nothing_like_it"):
        prepare(recipe(), ["count.times=3"])
    with pytest.raises(ConfigError, match="train: this needs"):
        prepare(recipe(), ["seed=3"])
    prepare(recipe(), ["seed=3"], until="count")


def test_documents_that_give_no_question_are_told_before_a_tokenizer_is_made(folder):
    from bessemer.core.store import Store
    from bessemer.pipeline.api import run

    lines = [json.dumps({"id": number, "text": f"Return the number of items in {number}."}) for number in range(30)]
    (folder / "texts.jsonl").write_text("\n".join(lines), encoding="utf-8")
    (folder / "mine.yaml").write_text(
        "format: 1\nname: mine\ncollect: [{source: files, paths: texts.jsonl}]\ntokenize: {algorithm: byte}\n"
        "model: {preset: qwen3-1m}\nsft: {steps: 1, context_length: 64}\n",
        encoding="utf-8",
    )
    with pytest.raises(ConfigError, match=r"sft: made/docs_questions is made from documentation .* none is left"):
        run("mine.yaml")
    assert [key.rpartition("-")[0] for key in Store(folder / "runs" / ".store").folders()] == ["collect"]

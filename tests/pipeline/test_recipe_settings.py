"""`bessemer recipes show NAME --full`: every setting with where it comes from."""

from pathlib import Path

import pytest

from bessemer.pipeline.recipe import load_recipe, shipped_recipes
from bessemer.pipeline.recipe_settings import recipe_settings
from tests.cli.test_main import bessemer


def lines(name, overrides=()):
    return list(recipe_settings(load_recipe(name, overrides, allow_code=True)))


@pytest.mark.parametrize("name", sorted(shipped_recipes()))
def test_what_is_shown_is_a_recipe_that_means_the_same(tmp_path, name):
    (tmp_path / "full.yaml").write_text("\n".join(lines(name)), encoding="utf-8")
    shown, meant = load_recipe(str(tmp_path / "full.yaml")), load_recipe(name)
    assert shown.head == meant.head
    assert {stage.name: stage.config for stage in shown.stages} == {stage.name: stage.config for stage in meant.stages}
    assert [stage.inputs for stage in shown.stages] == [stage.inputs for stage in meant.stages]


def test_each_setting_names_the_place_that_it_comes_from(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("mine.yaml").write_text("extends: chat\nname: mine\npretrain:\n  batch_size: 4\n", encoding="utf-8")
    found = {}
    for line in lines("mine.yaml", ["pretrain.beta2=0.9"]):
        setting, _, origin = line.partition("  # ")
        found[setting.strip()] = origin
    assert found["batch_size: 4"] == "mine.yaml:4"
    assert found["minutes: 4.0"].startswith("recipe chat, line ")
    assert found["optimizer: muon"].startswith("recipe quickstart, line ")
    assert found["beta2: 0.9"] == "override pretrain.beta2=0.9"
    assert found["momentum: 0.95"] == "default"
    assert found["hidden_size: 128"] == "preset qwen3-1m"
    assert found["methods: [exact, minhash]"].startswith("recipe quickstart, line ")


def test_the_command_line_shows_a_recipe_with_overrides_on_top(capsys):
    code, out, _ = bessemer(capsys, "recipes", "show", "quickstart", "pretrain.steps=7", "--full")
    assert code == 0 and "steps: 7" in out and "# override pretrain.steps=7" in out
    assert bessemer(capsys, "recipes", "show", "quickstart", "pretrain.steps=7")[0] == 2

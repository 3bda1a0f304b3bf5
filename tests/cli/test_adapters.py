"""Adapters, from the command line."""

from __future__ import annotations

import pytest

from bessemer.cli.named import named_folders
from bessemer.core.errors import ConfigError
from bessemer.model.adapters.folder import write_adapter
from bessemer.model.storage.folder import load_model, save_model
from bessemer.serving import server
from tests.cli.test_main import bessemer, one_error
from tests.model.random_adapters import random_adapter
from tests.model.randomised import SHAPES, random_decoder
from tests.model.tokenizers import VOCAB_SIZE, write_small_tokenizer


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A model and an adapter of it."""
    folder = tmp_path_factory.mktemp("adapters")
    tokenizer = write_small_tokenizer(folder / "tokenizer")
    save_model(random_decoder(SHAPES["grouped"].with_changes(vocab_size=VOCAB_SIZE)), folder / "model", tokenizer=tokenizer)
    model = load_model(folder / "model")
    write_adapter(random_adapter(model), model, folder / "bent")
    return folder


def test_generate_says_what_the_adapter_says(place, capsys):
    arguments = ["generate", place / "model", "the thin", "--max-tokens", "20"]
    code, plain, _ = bessemer(capsys, *arguments)
    assert code == 0
    code, bent, _ = bessemer(capsys, *arguments, "--adapter", place / "bent")
    assert code == 0 and bent != plain


def test_generate_refuses_what_is_no_adapter(place, capsys):
    _, _, err = bessemer(capsys, "generate", place / "model", "the", "--adapter", place / "tokenizer")
    assert "no such adapter config" in one_error(err)


def test_serve_loads_every_adapter_under_its_name(place, capsys, monkeypatch):
    served = []
    monkeypatch.setattr(server, "serve", lambda engine, name, config, pages, **options: served.append((name, engine.adapters)))
    code, _, _ = bessemer(capsys, "serve", place / "model", "--adapter", f"a={place / 'bent'}", "--adapter", place / "bent")
    assert (code, served) == (0, [("model", ("a", "bent"))])


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["=x"], "--adapter =x: give it as NAME=FOLDER"),
        (["a="], "--adapter a=: give it as NAME=FOLDER"),
        (["a=x", "a=y"], "another adapter has the name 'a' already"),
        (["base=x"], "the model has the name 'base' already"),
    ],
)
def test_a_name_that_means_two_things_or_none_is_refused(given, message):
    with pytest.raises(ConfigError, match=message):
        named_folders(given, taken="base")


def test_several_adapters_are_merged_into_the_model_or_into_one_adapter(place, capsys, tmp_path):
    model = load_model(place / "model")
    write_adapter(random_adapter(model, seed=2), model, tmp_path / "other")
    adapters = ["--adapter", f"{place / 'bent'}=0.5", "--adapter", f"{tmp_path / 'other'}=-1"]
    code, out, err = bessemer(capsys, "merge", place / "model", tmp_path / "whole", *adapters)
    assert code == 0 and "task_arithmetic of" in out, err
    code, out, err = bessemer(capsys, "merge", place / "model", tmp_path / "adapter", *adapters, "--as-adapter")
    assert code == 0 and "2 adapters" in out and "rank 6" in out, err
    code, once, _ = bessemer(capsys, "generate", tmp_path / "whole", "the thin", "--max-tokens", "20")
    code, beside, _ = bessemer(
        capsys, "generate", place / "model", "the thin", "--max-tokens", "20", "--adapter", tmp_path / "adapter"
    )
    assert code == 0 and once == beside
    ties = ["--as-adapter", "--method", "ties", "--density", "0.5", "--rank", "2"]
    code, out, err = bessemer(capsys, "merge", place / "model", tmp_path / "small", *adapters, *ties)
    assert code == 0 and "ties of 2 adapters" in out and "rank 2" in out, err


def test_several_models_are_merged_and_measured_before_and_after(place, capsys, tmp_path):
    other = random_decoder(SHAPES["grouped"].with_changes(vocab_size=VOCAB_SIZE), seed=3)
    save_model(other, tmp_path / "other", tokenizer=place / "tokenizer")
    text = tmp_path / "text.txt"
    text.write_text(
        "\n\n".join("the thin man went with the other one to the river and back " * 8 for _ in range(60)), encoding="utf-8"
    )
    models = [f"{place / 'model'}=2", tmp_path / "other", tmp_path / "out"]
    code, out, err = bessemer(capsys, "merge", *models, "--dtype", "bf16", "--evaluate", text)
    assert code == 0, err
    assert "linear of" in out and out.count("bits per byte") == 3 and out.splitlines()[-1].startswith("merged")
    settings = tmp_path / "merge.yaml"
    content = "merge_method: slerp\nbase_model: {}\nmodels:\n  - model: {}\nparameters: {{t: [0, 1]}}\n"
    settings.write_text(content.format(place / "model", tmp_path / "other"), encoding="utf-8")
    code, out, err = bessemer(capsys, "merge", settings, tmp_path / "by-file")
    assert code == 0 and "slerp of" in out, err


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["{model}", "out", "--density", "0.5"], "--density: of several models or adapters"),
        (["{model}", "{model}", "out", "--method", "tie"], "method: input should be 'linear'"),
        (["{model}", "{model}", "out", "--method", "ties"], "merge: ties merges differences: name in base the model"),
        (["{model}", "{model}", "{model}", "out", "--adapter", "a"], "--adapter: the adapters of one model are merged"),
        (["{model}=x", "{model}", "out"], "=x: 'x' is no number, and no list of numbers with commas"),
        (["{model}", "{model}", "out", "--rank", "3"], "--rank: of an adapter; write one with --as-adapter"),
        (["{model}", "{model}", "out", "--as-adapter"], "is no fine-tuning with an adapter; name adapters with --adapter"),
    ],
)
def test_a_merge_that_cannot_be_is_one_line(place, capsys, monkeypatch, tmp_path, given, message):
    monkeypatch.chdir(tmp_path)
    code, _, err = bessemer(capsys, "merge", *(one.format(model=place / "model") for one in given))
    assert code == 2 and message in one_error(err)
    assert not (tmp_path / "out").exists()

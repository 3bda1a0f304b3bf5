"""A recipe may begin at an existing model and hold nothing but tuning, within a limit of time."""

import json

import pytest
import torch
from safetensors.torch import load_file

import bessemer
from bessemer.core.errors import ConfigError
from bessemer.core.store import MANIFEST, read_json
from bessemer.core.yaml_file import read_yaml
from bessemer.model import device
from bessemer.model.config import ModelConfig
from bessemer.model.initialisation import initial_decoder
from bessemer.model.storage.folder import save_model
from bessemer.model.storage.model_config import read_model_config
from bessemer.pipeline.recipe import load_recipe
from bessemer.pipeline.report import run_report, sentences
from bessemer.pipeline.run_folder import RunFolder
from bessemer.training import autotune
from bessemer.training.autotune import StepTiming
from tests.model.tokenizers import VOCAB_SIZE, write_small_tokenizer

LOOP = "steps: 2, batch_size: 2, context_length: 64, dtype: float32, compile: false, diagnostics_every: 0, threads: 1"


@pytest.fixture
def folder(tmp_path):
    """A model, and conversations beside it."""
    shape = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16}
    config = ModelConfig(vocab_size=VOCAB_SIZE, intermediate_size=48, max_position_embeddings=64, **shape)
    save_model(initial_decoder(config, seed=1), tmp_path / "base", tokenizer=write_small_tokenizer(tmp_path / "tokenizer"))
    rows = [{"prompt": [{"role": "user", "content": str(n)}], "completion": f"{n}!"} for n in range(12)]
    (tmp_path / "chat.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return tmp_path


def write_recipe(folder, tuning):
    path = folder / "recipe.yaml"
    path.write_text(f"format: 1\nname: tuned\nmodel: {{init_from: base}}\n{tuning}\n", encoding="utf-8")
    return str(path)


def test_a_recipe_begins_at_an_existing_model(folder, monkeypatch):
    monkeypatch.chdir(folder)
    run = bessemer.run(write_recipe(folder, f"sft: {{data: [chat.jsonl], adapter: {{rank: 2}}, {LOOP}}}"))
    assert (run.folder / "adapter" / "adapter_config.json").exists() and (run.folder / "model" / "config.json").exists()


def test_a_stage_behind_one_that_merges_nothing_is_refused_before_anything_runs(folder):
    first = f"sft: {{data: [chat.jsonl], adapter: {{rank: 2, merge: false}}, {LOOP}}}"
    second = f"again: {{kind: sft, data: [chat.jsonl], {LOOP}}}"
    with pytest.raises(ConfigError, match=r"again: needs model of sft: it writes an adapter alone; set adapter.merge"):
        load_recipe(write_recipe(folder, f"{first}\n{second}"))


def test_text_cannot_be_mixed_in_where_there_is_none(folder):
    with pytest.raises(ConfigError, match="pretraining_share mixes in text of the run's tokens, and no stage above makes any"):
        load_recipe(write_recipe(folder, f"sft: {{data: [chat.jsonl], pretraining_share: 0.1, {LOOP}}}"))


# a limit of time cuts the stages that train, once, and the outcome is part of what was made

OPEN = LOOP.replace("dtype: float32, compile: false", "dtype: auto, compile: false").replace("steps: 2", "steps: 40")
TUNED = f"sft: {{data: [chat.jsonl], minutes: 0.1, {OPEN}}}"


@pytest.fixture
def machine(monkeypatch):
    """Sets which machine this is: seconds of a step by dtype."""

    def be(**seconds):
        def measure(config, *_):
            return StepTiming(config.dtype, False, (seconds[config.dtype],) * 3, 0.1)

        monkeypatch.setattr(autotune, "measure_steps", measure)
        monkeypatch.setattr(autotune, "is_fast", lambda dtype, device: "bfloat16" in seconds)
        monkeypatch.setattr(device, "product_cost", lambda dtype, device: 1.0)

    return be


def run(folder, monkeypatch, *overrides, name="tuned"):
    monkeypatch.chdir(folder)
    return bessemer.run(write_recipe(folder, TUNED), dict(overrides), name=name)


def manifest(made):
    return read_json(made.folder / "stages" / "sft" / MANIFEST, "manifest")


def test_as_many_steps_as_fit_are_made_and_the_report_says_what_was_left_out(folder, machine, monkeypatch):
    machine(float32=1.0)
    made = run(folder, monkeypatch)
    steps = manifest(made)["metrics"]["steps"]
    assert 3 <= steps <= 6
    entry = read_yaml(made.folder / "recipe.lock.yaml").values["stages"]["sft"]
    assert (entry["settings"]["steps"], entry["settings"]["minutes"]) == (steps, None)
    (said,) = [
        line for line in sentences(run_report(RunFolder(made.folder.parent, made.folder.name))) if line.startswith("sft:")
    ]
    (where,) = [line for line in sentences(run_report(RunFolder(made.folder.parent, made.folder.name))) if "machine (" in line]
    assert "cores, " in where and "trained in float32: sft at " in where
    assert f"{steps} of 40 steps fitted its 0.1 minutes on this machine" in said and "sft.minutes=" in said


def test_what_was_measured_is_kept_and_the_stage_is_reused(folder, machine, monkeypatch):
    machine(float32=1.0)
    first = run(folder, monkeypatch)
    monkeypatch.setattr(autotune, "measure_steps", lambda *_: pytest.fail("measured again"))
    again = run(folder, monkeypatch)
    assert manifest(again)["key"] == manifest(first)["key"]


def test_what_another_machine_makes_in_another_dtype_is_another_artefact(folder, machine, monkeypatch, tmp_path):
    machine(float32=0.001)
    few = ("sft.steps", 8)
    first = manifest(run(folder, monkeypatch, few))
    for kept in (folder / "runs" / ".store").glob("resolved-*.json"):
        kept.unlink()
    (folder / "runs" / "tuned" / "recipe.lock.yaml").unlink()
    machine(float32=0.001, bfloat16=0.0005)
    second = manifest(run(folder, monkeypatch, few))
    assert first["metrics"]["steps"] == second["metrics"]["steps"] == 8
    assert first["key"] != second["key"]
    assert [json.dumps(one["settings"]["dtype"]) for one in (first, second)] == ['"float32"', '"bfloat16"']


def test_a_recipe_merges_models_of_stages_and_folders(folder, monkeypatch):
    monkeypatch.chdir(folder)
    save_model(initial_decoder(read_model_config(folder / "base"), seed=2), folder / "other", tokenizer=folder / "tokenizer")
    tail = "sft: {data: [chat.jsonl], steps: 1, batch_size: 2, context_length: 64, dtype: float32, compile: false, threads: 1}"
    run = bessemer.run(write_recipe(folder, f"{tail}\nmerge: {{models: [model, {{model: ./other, weight: 3}}], base: null}}"))
    merged, *parts = (
        load_file(path / "model.safetensors") for path in (run.folder / "model", folder / "base", folder / "other")
    )
    for name, tensor in merged.items():
        torch.testing.assert_close(tensor, 0.25 * parts[0][name] + 0.75 * parts[1][name])
    with pytest.raises(ConfigError, match="there is no stage 'dpo' above it"):
        load_recipe(write_recipe(folder, f"{tail}\nmerge: [sft, dpo]"))

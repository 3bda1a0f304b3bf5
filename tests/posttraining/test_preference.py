"""The stage `preference` on a small model: it learns what is preferred, resumes bit for bit, and holds its reference."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

from bessemer.core.errors import ConfigError, SourceError
from bessemer.core.metrics import read_metrics
from bessemer.model.initialisation import initial_decoder
from bessemer.model.storage.folder import load_model, save_model
from bessemer.posttraining.preference.config import PreferenceConfig
from bessemer.posttraining.preference.stage import preference
from bessemer.posttraining.rl.config import RLConfig
from tests.posttraining.test_formats import said

SETTINGS = {
    "steps": 12,
    "batch_size": 4,
    "context_length": 128,
    "learning_rate": 2e-3,
    "dtype": "float32",
    "compile": False,
    "validation_share": 0.2,
    "diagnostics_every": 0,
}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Questions of which the answer in capitals is preferred."""
    path = tmp_path_factory.mktemp("pairs") / "pairs.jsonl"
    words = ["stone", "river", "cloud", "apple", "horse", "table", "light", "winter", "bread", "paper", "green", "music"]
    rows = [
        {"prompt": [said("user", f"Say {a} {b}.")], "chosen": f"{a} {b}".upper(), "rejected": f"{a} {b}"}
        for a in words
        for b in words[:4]
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def run(model_folder, data, out, **changes):
    out.mkdir(exist_ok=True)
    config = PreferenceConfig.parse({"data": [str(data)], **SETTINGS, **changes}, "preference")
    return preference(config, model_folder, out, seed=3, device="cpu")


@pytest.mark.usefixtures("one_thread")
def test_a_model_learns_what_is_preferred_and_says_so_of_pairs_held_out(model_folder, data, tmp_path):
    summary = run(model_folder, data, tmp_path)
    lines = read_metrics(tmp_path / "metrics.jsonl")
    # the policy is the reference in the first step
    assert lines[0]["loss"] == pytest.approx(0.6931, abs=1e-4) and lines[0]["margin"] == pytest.approx(0, abs=1e-5)
    assert summary["validation_accuracy"] > 0.9 and summary["validation_loss"] < 0.6
    assert summary["pairs"] + summary["held_out"] == 48 and summary["held_out"] > 0
    kept = load_file(tmp_path / "reference-training.safetensors")["reference_log_probs"]
    assert kept.dtype == torch.float32 and kept.max() <= 0 and kept.min() < -1


@pytest.mark.usefixtures("one_thread")
def test_a_run_goes_on_where_it_stopped_with_the_reference_that_it_began_with(model_folder, data, tmp_path):
    whole = tmp_path / "whole"
    run(model_folder, data, whole, checkpoint_every=6)
    # what an interruption after step 6 leaves
    cut = tmp_path / "cut"
    shutil.copytree(whole, cut)
    shutil.rmtree(cut / "model")
    for path in (cut / "checkpoints").glob("*12*"):
        shutil.rmtree(path)
    run(model_folder, data, cut, checkpoint_every=6)
    first, second = (load_file(place / "model" / "model.safetensors") for place in (whole, cut))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_the_plugins_that_settings_name_are_told_for_the_key():
    config = PreferenceConfig.parse({"data": ["pairs.jsonl"], "loss": "ipo"}, "preference")
    assert ("bessemer.preference_losses", "ipo") in config.plugins()
    named = dict(RLConfig.parse({"data": ["arithmetic"], "algorithm": "cispo"}, "rl").plugins())
    assert named["bessemer.policy_losses"] == "cispo" and "bessemer.corrections" in named


def test_bad_pairs_and_settings_are_told_in_one_line(model_folder, tmp_path):
    path = tmp_path / "pairs.jsonl"
    path.write_text(
        '{"prompt": "a", "chosen": "b", "rejected": "c"}\n{"prompt": "a", "chosen": "b", "rejected": "b"}\n', encoding="utf-8"
    )
    with pytest.raises(SourceError, match=r"pairs.jsonl:2: chosen and rejected are the same"):
        run(model_folder, path, tmp_path / "out")
    with pytest.raises(ConfigError, match=r"there is no preference loss 'simgoid'; did you mean 'sigmoid'"):
        PreferenceConfig.parse({"data": ["pairs.jsonl"], "loss": "simgoid"}, "preference")


@pytest.mark.parametrize(
    "settings",
    [
        {"loss": "kto", "next_token_weight": 0.1},
        {"loss": "hinge", "label_smoothing": 0.1},
        {"loss": "sigmoid", "margin": 1.0},
        {"loss": "ipo", "desirable_weight": 2.0},
        {"loss": "sigmoid", "z_loss": 1e-4},
    ],
    ids=str,
)
def test_a_setting_that_a_loss_has_not_is_refused(settings):
    (name,) = set(settings) - {"loss"}
    with pytest.raises(ConfigError, match=f"{name}.*leave it out"):
        PreferenceConfig.parse({"data": ["pairs.jsonl"], **settings}, "preference")


@pytest.mark.usefixtures("one_thread")
def test_log_probabilities_of_another_reference_are_computed_again(model_folder, data, tmp_path):
    out, settings = tmp_path / "out", {"steps": 1, "validation_share": 0}
    run(model_folder, data, out, **settings)
    kept = (out / "reference-training.safetensors").stat().st_mtime_ns
    shutil.rmtree(out / "checkpoints")
    run(model_folder, data, out, **settings)
    assert (out / "reference-training.safetensors").stat().st_mtime_ns == kept
    other = shutil.copytree(model_folder, tmp_path / "other")
    save_model(initial_decoder(load_model(model_folder).config, seed=9), other, tokenizer=model_folder)
    shutil.rmtree(out / "checkpoints")
    run(other, data, out, **settings)
    # the policy is the reference in the first step
    assert read_metrics(out / "metrics.jsonl")[0]["loss"] == pytest.approx(0.6931, abs=1e-4)

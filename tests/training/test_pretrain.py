import json

import pytest
import torch

from bessemer.core.errors import ArtefactError
from bessemer.core.metrics import read_metrics
from bessemer.core.progress import Silent
from bessemer.model.folder import load_model
from bessemer.tokenization.config import TokenizeConfig
from bessemer.tokenization.stage import tokenize
from bessemer.tokenization.tokenizer import load_tokenizer
from bessemer.training.pretrain import pretrain


def echo(model, tokenizer_folder, prompts):
    assert not model.training and not torch.is_grad_enabled()
    assert load_tokenizer(tokenizer_folder).vocab_size == model.config.vocab_size
    return [prompt + "…" for prompt in prompts]


def test_the_stage_leaves_a_model_and_its_history(settings, model_folder, tokenized, tmp_path):
    config = settings.with_changes(steps=8, evaluate_every=3, evaluate_tokens=200, sample_prompts=["a", "b"], sample_points=2)
    summary = pretrain(config, model_folder, tokenized / "tokens", tmp_path, seed=1, device="cpu", sample=echo)
    assert {path.name for path in tmp_path.iterdir()} == {
        *("model", "checkpoints", "metrics.jsonl", "samples.jsonl", "startup.json")
    }
    before, after = load_model(model_folder), load_model(tmp_path / "model")
    assert after.config == before.config
    assert not torch.equal(before.head_weight, after.head_weight)
    assert load_tokenizer(tmp_path / "model").hash == load_tokenizer(model_folder).hash
    validated = [record["step"] for record in read_metrics(tmp_path / "metrics.jsonl") if "bits_per_byte" in record]
    assert validated == [3, 6, 8]
    samples = [(line["step"], line["prompt"], line["text"]) for line in read_metrics(tmp_path / "samples.jsonl")]
    assert samples == [(2, "a", "a…"), (2, "b", "b…"), (8, "a", "a…"), (8, "b", "b…")]
    assert summary["bits_per_byte"] > 0 and summary["steps"] == 8
    json.dumps(summary, allow_nan=False)


def test_validation_and_samples_change_no_weight(settings, model_folder, tokenized, tmp_path):
    watched = settings.with_changes(evaluate_every=1, evaluate_tokens=100)
    results = []
    for name, config, sample in (("watched", watched, echo), ("alone", settings.with_changes(evaluate_tokens=100), None)):
        (tmp_path / name).mkdir()
        pretrain(config, model_folder, tokenized / "tokens", tmp_path / name, seed=1, device="cpu", sample=sample)
        results.append((tmp_path / name / "model" / "model.safetensors").read_bytes())
    assert results[0] == results[1]


def test_another_seed_gives_another_model(settings, model_folder, tokenized, tmp_path):
    results, quick = [], settings.with_changes(steps=2, evaluate_tokens=100)
    for seed in (1, 2):
        out = tmp_path / str(seed)
        out.mkdir()
        pretrain(quick, model_folder, tokenized / "tokens", out, seed=seed, device="cpu")
        results.append((out / "model" / "model.safetensors").read_bytes())
    assert results[0] != results[1]


def test_tokens_of_another_tokenizer_are_refused(settings, model_folder, documents, tmp_path):
    other = tmp_path / "other"
    tokenize(TokenizeConfig(vocab_size=300), documents, other, seed=0, progress=Silent())
    out = tmp_path / "out"
    out.mkdir()
    with pytest.raises(ArtefactError, match="another tokenizer"):
        pretrain(settings, model_folder, other / "tokens", out, seed=1, device="cpu")
    assert list(out.iterdir()) == []

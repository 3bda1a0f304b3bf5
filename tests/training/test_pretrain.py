import json

import pytest
import torch

from bessemer.core.errors import ArtefactError
from bessemer.core.metrics import read_metrics
from bessemer.core.progress import Silent
from bessemer.model.config import ModelConfig
from bessemer.model.decoder import Decoder
from bessemer.model.storage.folder import load_model, save_model
from bessemer.tokenization.config import TokenizeConfig
from bessemer.tokenization.stage import tokenize
from bessemer.tokenization.tokenizer import load_tokenizer
from bessemer.training.pretrain import _beginning, pretrain
from bessemer.training.pretrain_config import PRETRAIN_VERSION
from tests.golden import checksum, exact_weights
from tests.training.conftest import documentation


def echo(model, tokenizer_folder, prompts):
    assert not model.training and not torch.is_grad_enabled()
    assert load_tokenizer(tokenizer_folder).vocab_size == model.config.vocab_size
    return [prompt + "…" for prompt in prompts]


def test_the_stage_leaves_a_model_and_its_history(settings, model_folder, tokenized, tmp_path):
    config = settings.with_changes(steps=8, evaluate_every=3, evaluate_tokens=200, sample_prompts=["a", "b"], sample_points=2)
    summary = pretrain(config, model_folder, tokenized / "tokens", tmp_path, seed=1, device="cpu", sample=echo)
    assert {path.name for path in tmp_path.iterdir()} == {
        *("model", "checkpoints", "metrics.jsonl", "samples.jsonl", "autotune.json")
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


def test_without_prompts_the_model_goes_on_with_held_out_texts(settings, model_folder, tokenized, tmp_path):
    config = settings.with_changes(steps=1, evaluate_tokens=200, sample_points=1)
    pretrain(config, model_folder, tokenized / "tokens", tmp_path, seed=1, device="cpu", sample=echo)
    held_out = [text for text, package, _ in documentation() if package == "held"]
    samples = read_metrics(tmp_path / "samples.jsonl")
    assert len(samples) == 3 and all(one["held_out"] for one in samples)
    for one in samples:
        assert any(text.startswith(one["prompt"]) for text in held_out), one["prompt"]
        assert 10 < len(one["prompt"]) <= 80


@pytest.mark.parametrize(
    ("text", "prompt"),
    [
        ("Who goes there?", "Who goes there?"),
        ("word " * 40, ("word " * 16).strip()),
        ("\n\nA title\n\n" + "and then " * 20, "A title\n\n" + ("and then " * 7).strip() + " and"),
        ("鋼" * 200, "鋼" * 80),
        ("Größe \N{REPLACEMENT CHARACTER}", "Größe"),
    ],
)
def test_a_prompt_ends_with_a_word_where_words_have_spaces(text, prompt):
    assert _beginning(text) == prompt


GOLDEN_SHAPE = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
}
SPARSE = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "first_k_dense_replace": 1,
    "router_aux_loss_coef": 0.1,
    "router_z_loss_coef": 0.1,
    "router_correction_bias": True,
    "router_bias_update_rate": 0.01,
    "num_nextn_predict_layers": 1,
}


@pytest.mark.parametrize(
    ("shape", "optimizer", "losses", "sums", "tolerance"),
    [
        (
            *({}, "adamw", [6.116412, 6.022569, 5.682033, 5.596289, 3.63198]),
            [0.6136, 2.18254, 1.08108, -0.77304, 0.97155, 0.75055, 0.73873, 0.546, 1.65432, 0.621, -0.06768],
            1e-4,
        ),
        (
            *({}, "muon", [6.116412, 6.111195, 5.83272, 5.766705, 3.737991]),
            [0.58255, 2.55466, 0.94445, -0.58911, 0.93265, 0.74808, 0.75029, 0.5282, 1.91939, 0.85703, -0.48464],
            1e-4,
        ),
        (
            *(SPARSE, "adamw", [8.200196, 8.062729, 7.66317, 7.529167, 3.623887]),
            [0.62478, 2.48853, 1.09613, -0.6384, 0.97655, 0.77234, 0.75436, 0.62708, 0.45344, -3.80474, -1.80185],
            1e-4,
        ),
    ],
    ids=["dense", "muon", "sparse"],
)
def test_golden_output(shape, optimizer, losses, sums, tolerance, settings, tokenized, tmp_path):
    """When this fails because the output was meant to change, raise PRETRAIN_VERSION and renew the figures."""
    config = settings.with_changes(steps=4, optimizer=optimizer, z_loss=1e-2, micro_batch_size=1, evaluate_tokens=200)
    model = exact_weights(Decoder(ModelConfig(**GOLDEN_SHAPE, **shape, vocab_size=320)))
    save_model(model, tmp_path / "start", tokenizer=tokenized / "tokenizer")
    summary = pretrain(config, tmp_path / "start", tokenized / "tokens", tmp_path, seed=1, device="cpu")
    found = [record["loss"] for record in read_metrics(tmp_path / "metrics.jsonl")]
    blocks = load_model(tmp_path / "model").blocks
    assert PRETRAIN_VERSION == 6
    assert [*found, summary["bits_per_byte"]] == pytest.approx(losses, rel=tolerance)
    assert [checksum(weight) for weight in blocks[1].parameters()] == pytest.approx(sums, abs=10 * tolerance)


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

from __future__ import annotations

import math
import shutil
from functools import partial

import pytest
import torch

from bessemer.core.errors import ArtefactError, ConfigError
from bessemer.core.hashing import hash_file
from bessemer.core.progress import Silent
from bessemer.core.store import read_json
from bessemer.evaluation import quantisation
from bessemer.evaluation.quantisation import (
    QUALITY,
    add_speed,
    calibration_rows,
    compare_quality,
    opened_tokens,
    quantise_folder,
)
from bessemer.evaluation.report import quality_sentences
from bessemer.inference.engine import Engine, EngineConfig, SamplingParams
from bessemer.inference.offline import TextScorer
from bessemer.model.cpu_kernels import library
from bessemer.model.quantisation.config import QUANTIZE_VERSION, QuantizeConfig
from bessemer.model.quantisation.quantise import quantise
from bessemer.model.storage.folder import load_model, save_model
from bessemer.tokenization.tokenizer import load_tokenizer
from bessemer.training.pretrain import pretrain
from bessemer.training.pretrain_config import PretrainConfig
from bessemer.training.validation import bits_per_byte
from tests.cases import slow
from tests.golden import exact_weights
from tests.model.randomised import SHAPES, random_decoder
from tests.model.tokenizers import VOCAB_SIZE, write_small_tokenizer

#: Of a context longer than the windows that are compared, so that an engine has room for a token behind each.
LONG = SHAPES["grouped"].with_changes(vocab_size=VOCAB_SIZE, num_hidden_layers=1, max_position_embeddings=2048)
WORDS = ["the", "thin", "inn", "in", "the", "end", "a", "thing", "in", "a", "tin", "the", "then", "an", "and"]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A model with a tokenizer, and a text file of many paragraphs."""
    root = tmp_path_factory.mktemp("model")
    shape = SHAPES["grouped"].with_changes(vocab_size=VOCAB_SIZE, hidden_size=64, intermediate_size=96, num_hidden_layers=1)
    save_model(random_decoder(shape), root / "model", tokenizer=write_small_tokenizer(root / "tokenizer"))
    paragraphs = [" ".join(WORDS[(row * row + place) % len(WORDS)] for place in range(90)) for row in range(300)]
    (root / "text.txt").write_text("\n\n".join(paragraphs), encoding="utf-8")
    return root


@pytest.fixture
def tokens(place):
    with opened_tokens(place / "text.txt", load_tokenizer(place / "model")) as found:
        yield found


def quantised(place, tokens, out, **settings):
    return quantise_folder(
        QuantizeConfig.parse({"quality_tokens": 3000, "calibration_tokens": 1024, "calibration_length": 32} | settings),
        place / "model",
        out,
        calibration=tokens.train,
        held_out=tokens.held_out,
        seed=0,
        device="cpu",
        progress=Silent(),
    )


def test_the_bits_per_byte_are_those_of_validation(place, tokens):
    model = load_model(place / "model")
    compared = compare_quality(model, model, tokens.held_out, max_tokens=3000, progress=Silent())
    expected = bits_per_byte(model, tokens.held_out, context_length=96, batch_size=2, max_tokens=3000)
    assert compared.bits_per_byte == pytest.approx((expected.bits_per_byte,) * 2, rel=1e-5)
    assert compared.tokens == expected.tokens


def test_the_quality_is_that_of_what_is_served(place, tokens):
    tokenizer = load_tokenizer(place / "model")
    original, other = (random_decoder(LONG) for _ in range(2))
    quantise(other, QuantizeConfig(scheme="int4"))
    compared = compare_quality(original, other, tokens.held_out, max_tokens=700, progress=Silent())
    text = tokens.held_out.read(0, compared.tokens + 1).tolist()
    settings = EngineConfig(cpu_kernels="auto" if library() is None else "on")
    for model, score, how in zip((original, other), compared.bits_per_byte, compared.arithmetic, strict=True):
        engine = Engine(model, tokenizer, config=settings)
        windows = [text[start : start + 1025] for start in range(0, compared.tokens, 1024)]
        served = engine.generate(windows, SamplingParams(max_tokens=1, prompt_logprobs=0))
        nats = -sum(one.log_probs.token for window in served for one in window.prompt_log_probs)
        # without kernels a row alone meets weights that are read out in float16
        assert score == pytest.approx(nats / math.log(2) / compared.bytes, rel=1e-6 if library() is not None else 5e-5)
        # which are read out once for a model that is opened to be served, as the comparison's are, and not for this one
        assert library() is None or engine.arithmetic == f"computed by {how}"
    if library() is not None:
        # the weights alone would say something else
        alone = bits_per_byte(other, tokens.held_out, context_length=1024, batch_size=1, max_tokens=700).bits_per_byte
        assert abs(compared.bits_per_byte[1] / alone - 1) > 1e-6
        assert "activations of 8 bits, keys and values in float16" in compared.arithmetic[1]


def test_a_model_compared_with_itself_has_no_divergence(place, tokens):
    model = load_model(place / "model")
    compared = compare_quality(model, model, tokens.held_out, max_tokens=3000, progress=Silent())
    assert abs(compared.kl) < 1e-6 and compared.agreement == 1


def test_the_divergence_is_that_of_the_two_distributions(place, tokens):
    original, other = load_model(place / "model"), load_model(place / "model")
    with torch.no_grad():
        other.norm.weight *= 1.5
    compared = compare_quality(original, other, tokens.held_out, max_tokens=1, progress=Silent())
    ids = torch.from_numpy(tokens.held_out.read(0, compared.tokens).astype("int64"))
    kl, same = [], []
    with torch.no_grad():
        for window in ids.split(96):
            p, q = (torch.distributions.Categorical(logits=model(window[None])[0]) for model in (original, other))
            kl.append(torch.distributions.kl_divergence(p, q))
            same.append(p.probs.argmax(-1) == q.probs.argmax(-1))
    assert compared.kl == pytest.approx(float(torch.cat(kl).mean()), rel=1e-4)
    assert compared.agreement == pytest.approx(float(torch.cat(same).float().mean()))


# what the others make is in the golden output on every run
@pytest.mark.parametrize("method", ["rtn", slow("gptq"), slow("awq")])
def test_a_quantised_folder_holds_its_quality_and_its_tokenizer(method, place, tokens, tmp_path):
    found = quantised(place, tokens, tmp_path / "out", scheme="int4", method=method)
    assert read_json(tmp_path / "out" / QUALITY) == found
    assert found["quantised"]["bytes"] < 0.4 * found["original"]["bytes"]
    assert found["kl_per_token"] > 0 and found["method"] == method
    said = " ".join(quality_sentences(found))
    assert all(found[name]["arithmetic"] in said for name in ("original", "quantised"))
    assert load_tokenizer(tmp_path / "out").hash == load_tokenizer(place / "model").hash


def test_speed_and_cost_are_added_to_the_quality(place, tokens, tmp_path):
    quantised(place, tokens, tmp_path / "out", price_per_hour=0.36)
    found = add_speed(tmp_path / "out", {"original": 50.0, "quantised": 200.0})
    # 0.36 an hour is 0.0001 a second
    assert found["quantised"]["cost_per_million_tokens"] == pytest.approx(0.0001 / 200 * 1e6)
    assert read_json(tmp_path / "out" / QUALITY)["original"]["tokens_per_second"] == 50


def test_without_a_text_the_models_are_compared_on_a_small_one_and_a_large_model_on_less_of_it(place, tmp_path, monkeypatch):
    def compared(out, **options):
        given = {"calibration": None, "held_out": None, "seed": 0, "device": "cpu", "progress": Silent()}
        return quantise_folder(QuantizeConfig(scheme="int4"), place / "model", tmp_path / out, **given, **options)

    whole = compared("whole", sample=True)
    assert whole["compared_on"] == "sample" and whole["kl_per_token"] > 0 and 1000 < whole["compared_tokens"] < 6000
    assert "tokens of a small text that comes with Bessemer: " in " ".join(quality_sentences(whole))
    assert "loss" not in compared("unchecked")
    monkeypatch.setattr(quantisation, "_SAMPLE_FLOPS", 1.0)
    assert 0 < compared("less", sample=True)["compared_tokens"] < whole["compared_tokens"] / 2
    monkeypatch.setattr(quantisation, "free_memory_bytes", lambda: 0)
    assert "loss" not in compared("no memory", sample=True)


def test_a_calibrated_method_without_text_is_refused(place, tokens, tmp_path):
    with pytest.raises(ConfigError, match="gptq reads text to calibrate on"):
        quantised(place, tokens._replace(train=None), tmp_path / "out", method="gptq")


def test_calibration_rows_depend_on_the_seed_alone(tokens):
    rows = [calibration_rows(tokens.train, tokens=640, length=64, seed=seed) for seed in (3, 3, 4)]
    assert rows[0].shape == (10, 64)
    assert torch.equal(rows[0], rows[1]) and not torch.equal(rows[0], rows[2])


def test_a_stream_shorter_than_a_row_is_refused(tokens):
    with pytest.raises(ArtefactError, match="too few to calibrate on"):
        calibration_rows(tokens.held_out, tokens=10**7, length=10**6, seed=0)


def test_a_tenth_of_a_text_file_is_held_out(place, tokens):
    train, held_out = tokens.train.bytes, tokens.held_out.bytes
    assert held_out / (train + held_out) == pytest.approx(0.1, abs=0.04)
    # pieces end where paragraphs do, each with the empty line that followed it
    assert train + held_out == len((place / "text.txt").read_bytes()) + 2


@pytest.mark.parametrize("name", ["nothing", "binary"])
def test_what_holds_no_text_is_refused(name, place, tmp_path):
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00" * 50)
    with (
        pytest.raises(ArtefactError, match=r"no text to read|not a text file"),
        opened_tokens(tmp_path / name, load_tokenizer(place / "model")),
    ):
        pass


def test_training_from_a_quantised_model_is_refused(place, tokens, tmp_path):
    quantised(place, tokens, tmp_path / "out")
    with pytest.raises(ArtefactError, match="this model is quantised, and only whole weights can be trained"):
        pretrain(
            PretrainConfig(steps=1, dtype="float32", compile=False),
            tmp_path / "out",
            tokens.train.folder.parent,
            tmp_path / "trained",
            seed=0,
            progress=Silent(),
        )


def test_the_settings_that_do_not_go_together_are_refused():
    for settings, said in (
        ({"scheme": "w8a8", "group_size": 64}, "w8a8 has one scale"),
        ({"scheme": "int8", "symmetric": False}, "is for int4"),
        ({"method": "gptq", "search_clip": True}, "searches by itself"),
    ):
        with pytest.raises(ConfigError, match=said):
            QuantizeConfig.parse(settings, "quantize")


@pytest.mark.parametrize(
    ("settings", "codes", "figures"),
    [
        ({"scheme": "int8"}, "78e0fec3366a24e9", (66156, 5.430700, 9.22e-6)),
        ({"scheme": "int4", "symmetric": False}, "8e33e61944638d5f", (46028, 5.417425, 2.117e-3)),
        ({"scheme": "int4", "method": "gptq"}, None, (44908, 5.432407, 7.72e-5)),  # codes follow sums, in any order
        slow({"scheme": "int4", "method": "awq"}, None, (44908, 5.450569, 7.105e-4)),
    ],
    ids=["int8", "int4", "gptq", "awq"],
)
def test_golden_output(place, tokens, tmp_path, settings, codes, figures, monkeypatch):
    """When this fails because the output was meant to change, raise QUANTIZE_VERSION and renew the figures. They are measured
    without kernels, whose instructions are the processor's."""
    monkeypatch.setattr(
        "bessemer.evaluation.quantisation.TextScorer", partial(TextScorer, config=EngineConfig(cpu_kernels="off"))
    )
    shutil.copytree(place / "model", tmp_path / "model")
    model = exact_weights(load_model(place / "model"))
    save_model(model, tmp_path / "model", tokenizer=place / "tokenizer")
    found = quantised(tmp_path, tokens, tmp_path / "out", **settings)
    assert QUANTIZE_VERSION == 2
    if codes is not None:
        assert hash_file(tmp_path / "out" / "model.safetensors", bits=64) == codes
    size, bits_per_byte, divergence = figures
    assert found["quantised"]["bytes"] == size
    assert found["quantised"]["bits_per_byte"] == pytest.approx(bits_per_byte, rel=1e-4)
    assert found["kl_per_token"] == pytest.approx(divergence, rel=0.05)

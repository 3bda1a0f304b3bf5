"""Replay: the same prompts in several engines."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from bessemer.core.errors import ArtefactError
from bessemer.core.progress import Silent
from bessemer.evaluation import replay as module
from bessemer.evaluation.replay import (
    REFERENCE_PROMPTS,
    Comparison,
    Difference,
    Thing,
    find_thing,
    read_prompts,
    replay,
    replay_lines,
)
from bessemer.model.cpu_kernels import library, unavailable
from bessemer.model.formats.gguf_export import export_gguf
from bessemer.model.storage.folder import load_model, save_model
from tests.cli.test_main import bessemer
from tests.model.randomised import SHAPES, random_decoder
from tests.model.test_gguf_codes import LLAMA
from tests.model.tokenizers import VOCAB_SIZE, write_small_tokenizer

PROMPTS = [[{"role": "user", "content": text}] for text in ("the thin man", "with the other", "a b")]


class Pretended:
    """An engine that says a fixed answer, with the scores of a token as its distance from another number."""

    def __init__(self, name, answers, favourite, ends=(0,), prompt=(1, 2), rounds=False):
        self.rounds = rounds
        self.name, self.answers, self.favourite, self.ends, self.prompt = name, answers, favourite, list(ends), list(prompt)
        self.asked = iter(answers)

    def encode(self, messages):
        return self.prompt

    def answer(self, prompt, max_tokens):
        return next(self.asked)

    def scores(self, prefix, tokens):
        self.prefix = prefix
        return [-abs(token - self.favourite) / 100 for token in tokens]

    def text(self, token):
        return f"<{token}>"


def compared(monkeypatch, first, second, **options):
    """What a replay of one form in two pretended engines finds."""
    monkeypatch.setattr(module, "engines_of", lambda thing, notes, bits: [lambda: first, lambda: second])
    (comparison,) = replay([Thing("model", Path("model"))], PROMPTS[:1], max_tokens=8, progress=Silent(), **options)
    return comparison


def test_equal_answers_have_no_difference(monkeypatch):
    found = compared(monkeypatch, Pretended("a", [[5, 6]], 5), Pretended("b", [[5, 6]], 5))
    assert found.differences == () and found.reference == "a on model"


def test_a_difference_is_the_first_token_and_the_larger_of_both_gaps(monkeypatch):
    first, second = Pretended("a", [[5, 6, 7]], 6), Pretended("b", [[5, 9, 7]], 10)
    (difference,) = compared(monkeypatch, first, second).differences
    # after 1, 2, 5: of the first 6 is 0.03 above 9; of the second 9 is 0.04 - 0.01 above 6
    assert (difference.prompt, difference.position, difference.tokens) == (1, 2, ("<6>", "<9>"))
    assert difference.gap == pytest.approx(0.03) and first.prefix == [1, 2, 5] == second.prefix
    assert not difference.is_defect(0.1) and difference.is_defect(0.02)


def test_an_answer_that_ends_is_compared_by_its_likeliest_end_token(monkeypatch):
    first, second = Pretended("a", [[5]], 2, ends=(0, 3)), Pretended("b", [[5, 40]], 40, ends=(0, 3))
    (difference,) = compared(monkeypatch, first, second).differences
    assert difference.tokens == ("end", "<40>") and difference.gap == pytest.approx(0.37)


def test_other_ids_of_a_prompt_are_a_defect_whatever_the_answers_are(monkeypatch):
    first, second = Pretended("a", [[5]], 5), Pretended("b", [[5]], 5, prompt=(1, 3, 2))
    found = compared(monkeypatch, first, second)
    assert found.differences == (Difference(1, 0, ("<2>", "<3>"), None),)
    assert len(found.defects(0.1)) == 1


def test_the_report_names_each_difference_and_what_it_is():
    differences = (Difference(3, 17, ("' a'", "' the'"), 0.004), Difference(4, 2, ("' x'", "end"), 0.5))
    lines = replay_lines([Comparison("m.gguf", "llama.cpp", "bessemer on m.gguf", 10, differences)], 0.1)
    assert lines == [
        "m.gguf by llama.cpp, beside bessemer on m.gguf: 8 of 10 answers equal",
        "  prompt 3: token 17 is ' a' there, ' the' here; their logits are 0.004 apart: rounding",
        "  prompt 4: token 2 is ' x' there, end here; their logits are 0.500 apart: a defect",
        "1 difference is more than rounding (a gap above 0.1)",
    ]
    loose = Comparison("q.gguf", "bessemer", "bessemer on m", 10, differences[1:], decides=False)
    assert replay_lines([loose], 0.1)[-1] == "all equal but for rounding (gaps of at most 0.1)"


def test_an_engine_that_rounds_activations_is_named_with_the_gap_by_which_it_left_the_reference(monkeypatch):
    found = compared(monkeypatch, Pretended("floats", [[5]], 5), Pretended("bytes", [[45]], 45, rounds=True))
    assert found.rounds and len(found.defects(0.1)) == 1 and not found.defects(0.5)
    assert replay_lines([found], 0.1) == [
        "model by bytes, beside floats on model: 0 of 1 answers equal; activations are rounded to 8 bits",
        "  prompt 1: token 1 is <5> there, <45> here; their logits are 0.400 apart: a defect; bytes rounds activations",
        "1 difference is more than rounding (a gap above 0.1)",
    ]


def test_of_codes_the_engine_that_decodes_them_into_floats_is_the_reference(monkeypatch):
    monkeypatch.setattr(module, "find_spec", lambda name: name)
    for name in ("OurEngine", "TransformersEngine", "LlamaCppEngine"):
        monkeypatch.setattr(module, name, lambda *_, name=name, **__: name)
    opened = [
        [opener() for opener in module.engines_of(Thing("m", Path("m.gguf"), None, coded), [])] for coded in (False, True)
    ]
    assert opened[0][:2] == ["OurEngine", "TransformersEngine"] and opened[1][:2] == ["TransformersEngine", "OurEngine"]


def test_prompts_are_ten_of_our_own_or_those_of_a_file(tmp_path):
    assert len(read_prompts(None)) == len(REFERENCE_PROMPTS) == 10
    path = tmp_path / "p.jsonl"
    path.write_text(
        '{"prompt": "hello"}\n{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}\n',
        encoding="utf-8",
    )
    assert read_prompts(path) == [[{"role": "user", "content": "hello"}], [{"role": "user", "content": "a"}]]
    path.write_text('{"question": "hello"}\n', encoding="utf-8")
    with pytest.raises(ArtefactError, match="needs prompt"):
        read_prompts(path)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A model, its export, and an export of another model."""
    folder = tmp_path_factory.mktemp("replay")
    tokenizer = write_small_tokenizer(folder / "tokenizer")
    for seed, name in enumerate(("model", "other")):
        config = SHAPES["grouped"].with_changes(vocab_size=VOCAB_SIZE, max_position_embeddings=256)
        save_model(random_decoder(config, seed), folder / name, tokenizer=tokenizer)
    export_gguf(folder / "model", folder / "model.gguf", "f32")
    export_gguf(folder / "other", folder / "other.gguf", "f32")
    return folder


@pytest.fixture(scope="module")
def coded(tmp_path_factory):
    """A file of codes, in three types."""
    folder = tmp_path_factory.mktemp("coded")
    tokenizer = write_small_tokenizer(folder / "tokenizer")
    model = random_decoder(LLAMA.with_changes(vocab_size=VOCAB_SIZE, max_position_embeddings=256))
    save_model(model, folder / "model", tokenizer=tokenizer)
    export_gguf(folder / "model", folder / "coded.gguf", "q4_k_m")
    return folder / "coded.gguf"


def test_an_export_answers_as_its_model_and_that_of_another_does_not(place, capsys):
    pytest.importorskip("transformers")
    code, out, err = bessemer(capsys, "compare", place / "model", place / "model.gguf", "--replay", "--max-tokens", "6")
    assert code == 0, err + out
    assert f"{place / 'model'} by transformers" in out and "all equal but for rounding" in out
    code, out, _ = bessemer(capsys, "compare", place / "model", place / "other.gguf", "--replay", "--max-tokens", "6")
    assert code == 1 and "a defect" in out


def test_our_engine_scores_tokens_by_logits_but_for_a_constant(place):
    runtime = module.OurEngine(place / "model")
    first, second, third = runtime.scores([3, 4, 5], [7, 8, 9])
    with torch.no_grad():
        logits = load_model(place / "model")(torch.tensor([[3, 4, 5]]))[0, -1]
    assert first - second == pytest.approx(float(logits[7] - logits[8]), abs=1e-4)
    assert third - second == pytest.approx(float(logits[9] - logits[8]), abs=1e-4)


def test_by_activations_of_16_bits_a_file_of_codes_answers_as_its_decoded_weights_and_by_8_it_does_not(coded):
    pytest.importorskip("transformers")
    if library() is None:
        pytest.skip(unavailable())
    thing, prompts = find_thing(str(coded), Path), read_prompts(None)[3:7]
    exact, rounded = (replay([thing], prompts, max_tokens=24, progress=Silent(), activation_bits=bits)[0] for bits in (16, 8))
    assert (exact.engine, exact.reference) == ("bessemer", f"transformers on {thing.name}")
    assert not exact.rounds and exact.differences == ()
    assert rounded.rounds and rounded.differences


def test_bits_of_activations_are_8_or_16_and_of_a_replay(place, capsys):
    code, _, err = bessemer(capsys, "compare", place / "model", "--replay", "--activation-bits", "12")
    assert code == 2 and "--activation-bits 12: 8 or 16" in err
    code, _, err = bessemer(capsys, "compare", "one", "other", "--activation-bits", "16")
    assert code == 2 and "--activation-bits: of --replay" in err

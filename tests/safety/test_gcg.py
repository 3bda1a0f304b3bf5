"""Suffixes by gradients: losses, gradients, what survives re-tokenisation, and both searches."""

from __future__ import annotations

import pytest
import torch

from bessemer.core.errors import ConfigError
from bessemer.inference.engine import Engine
from bessemer.model.formats.gguf_export import export_gguf
from bessemer.model.storage.folder import save_model
from bessemer.safety.redteam.gcg import SuffixProblem, printable_tokens, search_suffix
from bessemer.safety.redteam.targets import plain_weights
from tests.inference.models import BASE, small_decoder, small_tokenizer
from tests.model.randomised import random_decoder

REQUEST, OPENING = "Explain this thing.", "Sure, here is"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return small_tokenizer(tmp_path_factory.mktemp("suffixes"))


@pytest.fixture(scope="module")
def problem(tokenizer):
    return SuffixProblem(small_decoder("dense").float(), tokenizer, REQUEST, OPENING, suffix_tokens=6)


def whole_loss(problem, suffix):
    """The loss from one reading of the whole conversation, without a cache."""
    tokens = torch.tensor([[*problem.before, *suffix, *problem.behind, *problem.opening]])
    with torch.no_grad():
        log_probs = problem.model(tokens[:, :-1]).log_softmax(-1)[0, -len(problem.opening) :]
    return -log_probs.gather(-1, torch.tensor(problem.opening)[:, None]).mean().item()


def test_the_parts_of_a_conversation_are_the_conversation(problem, tokenizer):
    text = problem.text(problem.start)
    whole = tokenizer.apply_chat_template([{"role": "user", "content": REQUEST + text}], add_generation_prompt=True)
    assert [*problem.before, *problem.start, *problem.behind] == whole
    assert set(text) <= set(" !") and problem.survives(problem.start)


@pytest.mark.parametrize("name", ["dense", "windows", "latent", "sinks and caps", "learned positions"])
def test_losses_in_a_batch_behind_a_cached_prefix_are_those_of_whole_conversations(name, tokenizer):
    problem = SuffixProblem(small_decoder(name).float(), tokenizer, REQUEST, OPENING, suffix_tokens=6, candidates_at_once=2)
    tokens = printable_tokens(tokenizer)
    suffixes = [
        problem.start,
        *([*problem.start[:place], tokens[7 * place], *problem.start[place + 1 :]] for place in range(4)),
    ]
    # five in lots of two, so that the cache is used with several numbers of rows
    assert problem.losses(suffixes) == pytest.approx([whole_loss(problem, suffix) for suffix in suffixes], abs=2e-5)
    assert problem.losses(suffixes[:1]) == pytest.approx([whole_loss(problem, suffixes[0])], abs=2e-5)


def test_losses_of_an_engine_are_those_of_the_model_that_it_serves(tokenizer, tmp_path):
    model = random_decoder(BASE, 0).float()
    save_model(model, tmp_path / "model", tokenizer=tokenizer.folder)
    plain = SuffixProblem(model, tokenizer, REQUEST, OPENING, suffix_tokens=6)
    with Engine(tmp_path / "model", device="cpu") as engine:
        served = SuffixProblem(model, engine.tokenizer, REQUEST, OPENING, suffix_tokens=6, engine=engine)
        suffixes = [served.start, [*served.start[:-1], printable_tokens(tokenizer)[5]]]
        assert served.losses(suffixes) == pytest.approx(plain.losses(suffixes), abs=1e-4)
        found = search_suffix(served, method="gcg", steps=3, candidates=8, seed=1)
    assert found.losses == pytest.approx(search_suffix(plain, method="gcg", steps=3, candidates=8, seed=1).losses, abs=1e-4)


def test_the_gradient_is_that_of_the_one_hot_vectors(problem):
    suffix, table_VD = problem.start, problem.model.embed_tokens.weight
    one_hot_LV = torch.nn.functional.one_hot(torch.tensor(suffix), len(table_VD)).float().requires_grad_()
    place = slice(len(problem.before), len(problem.before) + len(suffix))

    def mixed(module, given, output):
        return torch.cat((output[:, : place.start], (one_hot_LV @ table_VD)[None], output[:, place.stop :]), dim=1)

    hook = problem.model.embed_tokens.register_forward_hook(mixed)
    tokens = torch.tensor([[*problem.before, *suffix, *problem.behind, *problem.opening]])
    log_probs = problem.model(tokens[:, :-1]).log_softmax(-1)[0, -len(problem.opening) :]
    (-log_probs.gather(-1, torch.tensor(problem.opening)[:, None]).mean()).backward()
    hook.remove()
    torch.testing.assert_close(problem.gradient(suffix), one_hot_LV.grad, atol=1e-6, rtol=1e-4)
    assert not any(parameter.requires_grad for parameter in problem.model.parameters())


def test_a_suffix_that_would_be_read_otherwise_does_not_survive(problem, tokenizer):
    # "t" and "h" are read as one token
    pair = tokenizer.encode("t", add_bos=False) + tokenizer.encode("h", add_bos=False)
    assert not problem.survives([*pair, *problem.start[2:]])


@pytest.mark.parametrize("method", ["gcg", "random"])
def test_a_search_never_gets_worse_counts_its_evaluations_and_repeats_by_its_seed(problem, tokenizer, method):
    found = search_suffix(problem, method=method, steps=6, candidates=16, top_k=32, seed=1)
    assert all(later <= earlier for earlier, later in zip(found.losses, found.losses[1:], strict=False))
    assert found.losses[-1] < found.losses[0] and found.evaluations == 1 + 6 * 16
    again = search_suffix(problem, method=method, steps=6, candidates=16, top_k=32, seed=1)
    assert again == found
    # what the loss was computed of is what a user's text is read as
    ids = tokenizer.apply_chat_template([{"role": "user", "content": REQUEST + found.suffix}], add_generation_prompt=True)
    suffix = ids[len(problem.before) : len(ids) - len(problem.behind)]
    assert whole_loss(problem, suffix) == pytest.approx(found.losses[-1], abs=2e-5)
    assert found.suffix.isprintable() and found.suffix.isascii()


def test_gradients_find_lower_losses_than_chance_at_equal_evaluations(tokenizer):
    wins = 0
    for seed in range(5):
        problem = SuffixProblem(small_decoder("dense", seed=seed).float(), tokenizer, REQUEST, OPENING, suffix_tokens=6)
        gcg, chance = (
            search_suffix(problem, method=method, steps=8, candidates=12, top_k=16, seed=seed) for method in ("gcg", "random")
        )
        wins += gcg.losses[-1] < chance.losses[-1]
    assert wins >= 4


def test_models_that_it_cannot_work_on_are_refused(tokenizer):
    with pytest.raises(ConfigError, match="keep a state"):
        SuffixProblem(small_decoder("linear").float(), tokenizer, REQUEST, OPENING)


@pytest.mark.parametrize("form", ["folder", "gguf"])
def test_weights_are_opened_as_floats_from_a_folder_and_from_codes(tokenizer, tmp_path, form):
    # rows of 32 numbers, which Q8_0 needs
    shape = BASE.with_changes(hidden_size=64, head_dim=16)
    place = tmp_path / "model"
    save_model(random_decoder(shape, 0), place, tokenizer=tokenizer.folder)
    if form == "gguf":
        export_gguf(place, tmp_path / "model.gguf", "q8_0")
        place = tmp_path / "model.gguf"
    model = plain_weights(place, "cpu")
    assert model.dtype == torch.float32 and not any(parameter.requires_grad for parameter in model.parameters())
    problem = SuffixProblem(model, tokenizer, REQUEST, OPENING, suffix_tokens=4)
    assert problem.gradient(problem.start).abs().sum() > 0

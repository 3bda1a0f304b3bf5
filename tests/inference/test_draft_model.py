"""Guesses by a smaller model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from bessemer.core.errors import ConfigError
from bessemer.inference.engine import Engine, EngineConfig, SamplingParams
from bessemer.model.storage.folder import save_model
from tests.cases import slow, slow_but
from tests.inference.models import ARCHITECTURES, BASE, small_decoder, small_tokenizer
from tests.inference.test_identity import engine_of, with_pages
from tests.inference.test_mtp import Watched
from tests.inference.test_rows import chi_square_is_plausible
from tests.inference.test_speculation import COMPANY, GREEDY, PROMPTS, assert_all_is_back, in_company, plainly, speculating
from tests.model.randomised import random_decoder


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return small_tokenizer(tmp_path_factory.mktemp("draft"))


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory, tokenizer):
    """Writes a model's folder."""

    def write(model, its_tokenizer=tokenizer):
        folder = tmp_path_factory.mktemp("models") / "model"
        save_model(model, folder, tokenizer=its_tokenizer.folder)
        return str(folder)

    return write


@pytest.fixture(scope="module")
def dense():
    return small_decoder("dense")


def near(model, noise=0.1):
    """A model that is often of the same mind as another."""
    other = random_decoder(model.config)
    other.load_state_dict(model.state_dict())
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter += noise * parameter.std() * torch.randn(parameter.shape, generator=generator)
    return other


def drafted(folder, tokens=4, **settings):
    return {"method": "draft", "model": folder, "tokens": tokens, "adapt": False, **settings}


@pytest.mark.parametrize("name", slow_but(["dense"], ARCHITECTURES))
def test_a_smaller_model_changes_nothing(tokenizer, folder_of, dense, name):
    model = small_decoder(name)
    expected = plainly(model, tokenizer, PROMPTS, GREEDY, batch_invariant=True)
    engine = speculating(model, tokenizer, speculation=drafted(folder_of(dense)), batch_invariant=True)
    assert in_company(engine) == expected
    assert engine.statistics.draft_tokens_proposed > 100
    assert engine.core.strategy.proposer.pool.free == engine.core.strategy.proposer.pool.total


@pytest.mark.parametrize("name", slow_but(["latent", "experts", "alibi"], [name for name in ARCHITECTURES if name != "linear"]))
def test_a_model_that_guesses_for_itself_is_always_right(tokenizer, folder_of, name):
    model = small_decoder(name)
    engine = speculating(model, tokenizer, speculation=drafted(folder_of(model)), cpu_kernels="off")
    engine.generate(PROMPTS, GREEDY)
    assert engine.statistics.draft_tokens_proposed == engine.statistics.draft_tokens_accepted > 40


@pytest.mark.parametrize("name", slow_but(["dense", "windows"], ["dense", "windows", "latent", "experts", "alibi"]))
def test_guesses_are_those_of_the_smaller_model_that_reads_the_whole_text(tokenizer, folder_of, dense, name):
    smaller = small_decoder(name, seed=3)
    if name == "dense":
        smaller = near(dense, 0.05)  # which is right now and then
    engine = speculating(dense, tokenizer, speculation=drafted(folder_of(smaller)), cpu_kernels="off")
    watched = Watched(engine)
    engine.generate(PROMPTS, GREEDY)
    drafts = [(tokens, guessed) for tokens, guessed in watched.drafts if guessed]
    assert len(drafts) > 10
    texts_BT = torch.zeros(len(drafts), max(len(tokens) + len(guessed) for tokens, guessed in drafts), dtype=torch.int64)
    for row, (tokens, guessed) in enumerate(drafts):
        texts_BT[row, : len(tokens) + len(guessed)] = torch.tensor(tokens + guessed)
    with torch.no_grad():
        likeliest_BT = smaller(texts_BT).argmax(-1)
    for row, (tokens, guessed) in enumerate(drafts):
        assert likeliest_BT[row, len(tokens) - 1 :][: len(guessed)].tolist() == guessed


def test_a_model_of_the_same_mind_guesses_more_often_right_than_another(tokenizer, folder_of, dense):
    shares = []
    for other in (near(dense), small_decoder("dense", seed=9)):
        engine = speculating(dense, tokenizer, speculation=drafted(folder_of(other)))
        engine.generate(PROMPTS, GREEDY)
        shares.append(engine.statistics.draft_tokens_accepted / engine.statistics.draft_tokens_proposed)
    assert shares[0] > 2 * shares[1]


def test_a_smaller_model_changes_nothing_where_pages_run_out(tokenizer, folder_of, dense):
    prompts, params = [[7], [8, 9], [10]], GREEDY.with_changes(max_tokens=36)
    expected = plainly(dense, tokenizer, prompts, params, batch_invariant=True)
    engine = with_pages(dense, tokenizer, 8, speculation=drafted(folder_of(near(dense))), batch_invariant=True)
    assert engine.generate(prompts, params) == expected
    assert engine.core.scheduler.preemptions
    assert_all_is_back(engine)


def test_an_answer_without_pages_in_the_smaller_model_has_no_draft(tokenizer, folder_of, dense):
    expected = plainly(dense, tokenizer, PROMPTS, GREEDY, batch_invariant=True)
    engine = speculating(dense, tokenizer, speculation=drafted(folder_of(near(dense))), batch_invariant=True)
    pool = engine.core.strategy.proposer.pool
    assert engine.generate(PROMPTS, GREEDY) == expected
    before = engine.statistics.draft_tokens_proposed
    taken = [pool.allocate() for _ in range(pool.total - 8)]
    assert engine.generate(PROMPTS, GREEDY) == expected
    assert before < engine.statistics.draft_tokens_proposed < 2 * before
    assert pool.free == pool.total - len(taken)


def test_a_prompt_is_read_in_pieces(tokenizer, folder_of, dense):
    settings = {"max_num_seqs": 2, "max_num_batched_tokens": 9, "batch_invariant": True}
    expected = plainly(dense, tokenizer, PROMPTS, GREEDY, **settings)
    engine = speculating(dense, tokenizer, speculation=drafted(folder_of(near(dense))), **settings)
    assert engine.generate(PROMPTS, GREEDY) == expected
    assert engine.statistics.draft_tokens_proposed > 40


def test_a_seed_gives_the_same_text_whoever_guesses(tokenizer, folder_of, dense):
    params = SamplingParams(seed=4, max_tokens=24, ignore_eos=True)
    expected = plainly(dense, tokenizer, PROMPTS, params, batch_invariant=True)
    engine = speculating(dense, tokenizer, speculation=drafted(folder_of(near(dense))), batch_invariant=True)
    assert engine.generate(PROMPTS, params) == expected
    assert engine.statistics.draft_tokens_accepted > 0


@pytest.mark.parametrize("settings", [slow({"temperature": 0.5}), {"top_k": 12, "temperature": 0.7}])
def test_sampled_tokens_have_the_models_distribution(tokenizer, folder_of, dense, settings):
    params = SamplingParams(max_tokens=3, ignore_eos=True, **settings)
    engine = speculating(dense, tokenizer, speculation=drafted(folder_of(near(dense, 0.3)), tokens=2))
    torch.manual_seed(0)
    completions = engine.generate([PROMPTS[0]] * 1000, params)
    found = engine.statistics
    assert 0.2 < found.draft_tokens_accepted / found.draft_tokens_proposed < 0.95
    for place, expected_V in enumerate(expected_tokens(dense, PROMPTS[0], params)):
        assert chi_square_is_plausible([completion.token_ids[place] for completion in completions], expected_V)


def expected_tokens(model, prompt, params):
    """The model's distribution of the first, second and third token, whatever those before are."""
    texts, chances = torch.tensor([prompt]), torch.ones(1, dtype=torch.float64)
    found = []
    for _ in range(params.max_tokens):
        with torch.no_grad():
            logits_RV = model(texts)[:, -1] / params.temperature
        if params.top_k:
            logits_RV[logits_RV < logits_RV.topk(params.top_k).values[:, -1:]] = -torch.inf
        joint_RV = chances[:, None] * logits_RV.double().softmax(-1)
        found.append(joint_RV.sum(0))
        rows, tokens = (joint_RV > 1e-9).nonzero(as_tuple=True)
        texts, chances = torch.cat((texts[rows], tokens[:, None]), dim=1), joint_RV[rows, tokens]
    return found


def test_another_tokenizer_is_refused(tokenizer, folder_of, dense):
    folder = folder_of(dense)
    file = Path(folder) / "tokenizer.json"
    file.write_text(file.read_text(encoding="utf-8") + "\n", encoding="utf-8")
    with pytest.raises(ConfigError, match="another tokenizer"):
        engine_of(dense, tokenizer, speculation=drafted(folder))


def test_a_model_with_states_is_refused(tokenizer, folder_of, dense):
    with pytest.raises(ConfigError, match="linear attention"):
        engine_of(dense, tokenizer, speculation=drafted(folder_of(small_decoder("linear"))))


def test_a_guess_stays_within_the_smaller_models_context(tokenizer, folder_of, dense):
    short = random_decoder(BASE.with_changes(max_position_embeddings=48))
    expected = plainly(dense, tokenizer, PROMPTS, GREEDY, batch_invariant=True)
    engine = speculating(dense, tokenizer, speculation=drafted(folder_of(short)), batch_invariant=True)
    assert engine.generate(PROMPTS, GREEDY) == expected


def test_answers_of_all_kinds_end(tokenizer, folder_of, dense):
    engine = Engine(dense, tokenizer, config=EngineConfig(speculation={"method": "draft", "model": folder_of(near(dense))}))
    params = [SamplingParams(max_tokens=20 + place, temperature=place % 2) for place in range(len(COMPANY))]
    assert len(engine.generate(COMPANY, params)) == len(COMPANY)
    assert_all_is_back(engine)

"""Draft tokens of the model's own MTP modules."""

from __future__ import annotations

from itertools import product

import pytest
import torch

from bessemer.core.errors import ConfigError
from bessemer.inference.engine import Engine, EngineConfig, SamplingParams
from bessemer.model.decoder_inputs import attention_masks, rotations_of
from tests.cases import slow_but
from tests.inference.models import ARCHITECTURES, BASE, small_decoder, small_tokenizer
from tests.inference.test_identity import with_pages
from tests.inference.test_speculation import COMPANY, GREEDY, PROMPTS, assert_all_is_back, in_company, plainly, speculating
from tests.model.randomised import random_decoder

MIXED = ("full_attention", "linear_attention", "full_attention")
AHEAD = {
    **{name: changes for name, changes in ARCHITECTURES.items() if name != "linear"},
    "linear below": {**ARCHITECTURES["linear"], "layer_types": MIXED},
}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return small_tokenizer(tmp_path_factory.mktemp("ahead"))


def decoder(name, blocks=2):
    return random_decoder(BASE.with_changes(num_nextn_predict_layers=blocks, **AHEAD[name]))


class Watched:
    """Notes what a proposer guesses, and of what."""

    def __init__(self, engine):
        self.drafts, self._propose = [], engine.core.strategy.proposer.propose
        engine.core.strategy.proposer.propose = self.propose

    def propose(self, answers):
        drafts = self._propose(answers)
        for answer, draft in zip(answers, drafts, strict=True):
            self.drafts.append((list(answer.sequence.tokens), list(draft.tokens)))
        return drafts


def chained(model, texts, count):
    """For each text the guesses of the chain of blocks that reads it at once, one block for each guess."""
    lengths = torch.tensor([len(text) for text in texts])
    # behind a text comes anything: what the blocks make of it stands behind the place that is asked
    tokens_BT = torch.zeros(len(texts), max(lengths) + count, dtype=torch.int64)
    for row, text in enumerate(texts):
        tokens_BT[row, : len(text)] = torch.tensor(text)
    rows = torch.arange(len(texts))
    for block in range(count):
        with torch.no_grad():
            _, mtp_hidden = model.hidden_and_mtp(tokens_BT)
            tokens_BT[rows, lengths + block] = model.logits(mtp_hidden[block][rows, lengths - 2]).argmax(-1)
    return [row[length : length + count].tolist() for row, length in zip(tokens_BT, lengths, strict=True)]


#: Tested on every run: each setting, keys of two kinds, and a state below the module.
USUAL = {("dense", "in pieces"), ("windows", ""), ("linear below", "")}
SETTINGS = {"": {}, "in pieces": {"max_num_seqs": 4, "max_num_batched_tokens": 11}, "invariant": {"batch_invariant": True}}


@pytest.mark.parametrize(("name", "settings"), slow_but(USUAL, product(AHEAD, SETTINGS)))
def test_guesses_are_those_of_the_chain_that_reads_the_whole_text(tokenizer, name, settings):
    model = decoder(name, blocks=3)
    speculation = {"method": "mtp", "tokens": 3, "adapt": False}
    engine = speculating(model, tokenizer, speculation=speculation, prefix_cache=False, **SETTINGS[settings])
    watched = Watched(engine)
    engine.generate(PROMPTS, GREEDY)
    drafts = [(tokens, guessed) for tokens, guessed in watched.drafts if guessed]
    assert len(drafts) > 40
    chains = chained(model, [tokens for tokens, _ in drafts], 3)
    same = [guessed == chain[: len(guessed)] for (_, guessed), chain in zip(drafts, chains, strict=True)]
    # keys that a window has just left behind may be gone before a block sees them, and guesses are then others
    is_windowed = model.config.types[-1] == "sliding_attention"
    assert sum(same) > 0.4 * len(same) if is_windowed else all(same)


def test_one_block_goes_on_from_its_own_states(tokenizer):
    model = decoder("dense", blocks=1)
    engine = speculating(model, tokenizer, method="mtp", prefix_cache=False)
    watched = Watched(engine)
    engine.generate(PROMPTS, GREEDY)
    assert max(len(guessed) for _, guessed in watched.drafts) == 5
    for tokens, guessed in watched.drafts:
        if len(guessed) < 2:
            continue
        with torch.no_grad():
            pre_norm_1TD = model._pre_norm_hidden(torch.tensor([tokens]), None, None, None, None)[:, :-1]
            states, text = [pre_norm_1TD], list(tokens)
            for guess in guessed:
                hidden_1TD = torch.cat(states, dim=1)
                made_1TD = block_over(model, text[1:], hidden_1TD)
                assert model.logits(model.mtp[0].norm(made_1TD[:, -1])).argmax().item() == guess
                states.append(made_1TD[:, -1:])
                text.append(guess)


def block_over(model, tokens, hidden_1TD):
    """The first MTP module over a whole text, its own states standing for the model's at the end."""
    length = len(tokens)
    masks = attention_masks(model, length, length, hidden_1TD, None, None, True)["full_attention"]
    rotation = rotations_of(model, None, length, hidden_1TD.dtype)["full_attention"]
    merged_1TD = model.mtp[0].merge(model.embed_tokens(torch.tensor([tokens])), hidden_1TD)
    return model.mtp[0].block(merged_1TD, rotation, masks)


@pytest.mark.parametrize("name", slow_but(["dense"], AHEAD))
def test_mtp_modules_change_nothing(tokenizer, name):
    model = decoder(name)
    expected = plainly(model, tokenizer, PROMPTS, GREEDY, batch_invariant=True)
    engine = speculating(model, tokenizer, method="mtp", batch_invariant=True)
    assert in_company(engine) == expected
    assert in_company(engine) == expected  # from cached pages
    assert engine.statistics.draft_tokens_proposed > 100


@pytest.mark.slow
def test_mtp_modules_change_nothing_where_pages_run_out(tokenizer):
    model = decoder("dense")
    prompts, params = [[7], [8, 9], [10]], GREEDY.with_changes(max_tokens=36)
    expected = plainly(model, tokenizer, prompts, params, batch_invariant=True)
    speculation = {"method": "mtp", "tokens": 3, "adapt": False}
    engine = with_pages(model, tokenizer, 10, speculation=speculation, batch_invariant=True)
    assert engine.generate(prompts, params) == expected
    assert engine.core.scheduler.preemptions
    assert_all_is_back(engine)
    assert not engine.core.strategy.proposer._progress


def test_several_answers_to_a_prompt_guess_each_for_itself(tokenizer):
    model = decoder("dense")
    params = SamplingParams(seed=1, n=3, max_tokens=20, ignore_eos=True)
    prompts = PROMPTS[-1:]
    expected = plainly(model, tokenizer, prompts, params, batch_invariant=True)
    assert speculating(model, tokenizer, method="mtp", batch_invariant=True).generate(prompts, params) == expected


def test_the_pages_of_the_blocks_are_counted(tokenizer):
    model = decoder("dense")
    plain, engine = (with_pages(model, tokenizer, 50, speculation=way) for way in (None, {"method": "mtp"}))
    ((before, _),), ((after, _),) = plain.core.scheduler.groups, engine.core.scheduler.groups
    assert after.total == before.total * 2 // 4  # of four layers' pages two are the model's own


def test_a_model_without_mtp_modules_is_refused(tokenizer):
    with pytest.raises(ConfigError, match="no MTP modules"):
        Engine(small_decoder("dense"), tokenizer, config=EngineConfig(speculation={"method": "mtp"}))


def test_mtp_modules_of_linear_attention_are_refused(tokenizer):
    model = random_decoder(BASE.with_changes(num_nextn_predict_layers=1, **ARCHITECTURES["linear"]))
    with pytest.raises(ConfigError, match="linear attention"):
        Engine(model, tokenizer, config=EngineConfig(speculation={"method": "mtp"}))


def test_sampled_answers_end(tokenizer):
    engine = speculating(decoder("dense"), tokenizer, method="mtp")
    completions = engine.generate(COMPANY, SamplingParams(max_tokens=20, top_k=30, ignore_eos=True))
    assert [len(completion.token_ids) for completion in completions] == [20] * len(COMPANY)
    assert_all_is_back(engine)

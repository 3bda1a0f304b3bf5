from dataclasses import replace

import pytest
import torch
from torch.nn.functional import logsigmoid

from bessemer.core.errors import SourceError
from bessemer.model.storage.folder import load_model, save_model
from bessemer.posttraining.data.encoding import Encoded, encode_answer
from bessemer.posttraining.data.formats import Pair
from bessemer.posttraining.data.packing import can_share_prompts, pack_pairs
from bessemer.posttraining.preference.config import PAIR_LOSSES, PreferenceConfig
from bessemer.posttraining.preference.losses import PairLossSettings
from bessemer.posttraining.preference.objective import REFERENCE_LOG_PROBS, PreferenceObjective
from bessemer.training.data.batch import IGNORE_INDEX
from bessemer.training.objectives import LossContext
from tests.inference.models import small_decoder
from tests.posttraining.test_formats import said


@pytest.fixture
def pairs():
    return [
        Pair(
            (said("user", "Why? " * (n % 3 + 1)),),
            (said("assistant", f"So {n}. " * (n % 2 + 1)),),
            (said("assistant", f"No {n}"),),
        )
        for n in range(7)
    ]


def log_probs_alone(model, pair, answer, tokenizer, whole=False):
    """log p of each token of an answer, or of the whole conversation up to its end token, with the model run on it alone."""
    encoded = encode_answer(pair.prompt, answer, tokenizer)
    ids = torch.from_numpy(encoded.ids)
    log_probs = model(ids[None, :-1])[0].log_softmax(-1).gather(1, ids[1:, None])[:, 0]
    return log_probs[: len(encoded.through_end()) - 1] if whole else log_probs[torch.from_numpy(encoded.is_learnt[1:])]


@pytest.mark.parametrize(
    ("name", "next_token", "shares_prompts"),
    [("sigmoid", 0.0, False), ("sigmoid", 0.0, True), ("ipo", 0.3, False), ("ipo", 0.3, True), ("orpo", 0.0, True)],
)
def test_the_packed_loss_and_gradient_are_those_of_each_pair_alone(
    name, next_token, shares_prompts, pairs, tokenizer, model_folder
):
    model, settings = load_model(model_folder), PairLossSettings(beta=0.5)
    loss = PAIR_LOSSES[name].load()
    packed = pack_pairs(pairs, tokenizer, 128, shares_prompts=shares_prompts)
    assert packed.pairs == 7 and 1 < packed.rows < 7, "several pairs must share a row, and there must be several rows"
    assert (packed.batch.visible_to_BT is not None) == shares_prompts
    reference_BT = torch.randn(packed.batch.tokens_BT.shape, generator=torch.Generator().manual_seed(2))
    batch = packed.batch.with_values(per_token={REFERENCE_LOG_PROBS: reference_BT * (packed.batch.targets_BT >= 0)})
    objective = PreferenceObjective(loss, settings, next_token)
    # whole conversations are learnt where the method says so; the reference is given
    batch = objective.annotate(None, batch)
    # two micro-batches over the step's denominators
    counts = objective.denominators(batch)
    halves = [objective(model, batch.rows(rows), LossContext()) for rows in (slice(0, 1), slice(1, None))]
    total = sum(half.sums[term] / counts[term].value for half in halves for term in half.sums)
    gradient = torch.autograd.grad(total, list(model.parameters()))

    references = {}
    for row, (documents_T, values_T) in enumerate(
        zip(batch.document_ids_BT, batch.per_token[REFERENCE_LOG_PROBS], strict=True)
    ):
        for document in range(1, int(documents_T.max()) + 1):
            here = (documents_T == document) & (batch.targets_BT[row] >= 0)
            key = tuple(batch.targets_BT[row][here].tolist()), int(batch.positions_BT[row][documents_T == document].max()) + 1
            references.setdefault(key, []).append(values_T[here])
    losses, cross_entropies, right = [], [], 0
    for pair in pairs:
        sides = []
        for answer in (pair.chosen, pair.rejected):
            encoded = encode_answer(pair.prompt, answer, tokenizer)
            found = references[tuple(encoded.ids[encoded.is_learnt].tolist()), len(encoded.ids) - 1].pop(0)
            log_probs = log_probs_alone(model, pair, answer, tokenizer)
            ratios = log_probs - found if loss.needs_reference else log_probs
            sides.append(ratios.mean() if loss.per_token else ratios.sum())
            if answer is pair.chosen:
                learnt = log_probs_alone(model, pair, answer, tokenizer, whole=True) if loss.next_token else log_probs
                cross_entropies += learnt.neg().unbind()
        right += bool(sides[0] > sides[1])
        losses.append(loss.function(*(side[None] for side in sides), settings)[0])
    expected = torch.stack(losses).mean() + (next_token + loss.next_token) * torch.stack(cross_entropies).mean()
    torch.testing.assert_close(total, expected)
    torch.testing.assert_close(gradient, torch.autograd.grad(expected, list(model.parameters())), rtol=1e-3, atol=1e-6)
    figures = [half.metrics["accuracy"] for half in halves]
    assert sum(float(one.sum) for one in figures) == right and sum(float(one.count) for one in figures) == 7


def test_a_pair_is_whole_or_left_out_and_one_of_equal_answers_is_none(tokenizer):
    pair = Pair((said("user", "Why?"),), (said("assistant", "So it is. " * 9),), (said("assistant", "So it is. " * 9 + "No."),))
    packed = pack_pairs([pair, pair], tokenizer, 64)
    assert (packed.pairs, packed.counts.too_long, packed.equal) == (0, 2, 0)
    assert pack_pairs([pair], tokenizer, 512).pairs == 1
    packed = pack_pairs([replace(pair, rejected=pair.chosen)], tokenizer, 512)
    assert (packed.pairs, packed.counts.left_out, packed.equal) == (0, 0, 1)
    with pytest.raises(SourceError, match=r"2 pairs have more than 32 tokens, the longest \d+; raise context_length"):
        pack_pairs([pair, pair], tokenizer, 64, "refuse")


def test_of_a_long_prompt_the_beginning_is_cut_off_by_the_rule_and_both_answers_end(tokenizer):
    pair = Pair((said("user", "word " * 100),), (said("assistant", "So."),), (said("assistant", "No."),))
    packed = pack_pairs([pair], tokenizer, 96, "left")
    assert (packed.pairs, packed.counts.cut) == (1, 1)
    learnt = packed.batch.targets_BT[packed.batch.targets_BT != IGNORE_INDEX]
    assert tokenizer.decode(learnt.tolist(), skip_special=False) == "So.<|im_end|>No.<|im_end|>"


def test_of_a_policy_that_is_the_reference_the_loss_is_log_two(pairs, tokenizer, model_folder):
    model = load_model(model_folder).eval()
    batch = pack_pairs(pairs, tokenizer, 128).batch
    objective = PreferenceObjective(PAIR_LOSSES["sigmoid"].load(), PairLossSettings())
    with torch.no_grad():
        hidden = model.hidden(batch.tokens_BT, positions_BT=batch.positions_BT, document_ids_BT=batch.document_ids_BT)
        logits = model.logits(hidden).log_softmax(-1)
        own = logits.gather(2, batch.targets_BT.clamp(min=0)[..., None])[..., 0] * (batch.targets_BT >= 0)
    terms = objective(model, batch.with_values(per_token={REFERENCE_LOG_PROBS: own}), LossContext())
    assert terms.sums["preference"].item() / 7 == pytest.approx(-logsigmoid(torch.zeros(())).item(), abs=1e-5)


def test_what_both_answers_begin_with_is_in_a_row_once(tokenizer):
    pair = Pair((said("user", "Why is it so?"),), (said("assistant", "So it is."),), (said("assistant", "So what?"),))
    sides = [encode_answer(pair.prompt, answer, tokenizer) for answer in (pair.chosen, pair.rejected)]
    first, second = (len(side.ids) - 1 for side in sides)
    # the prompt but for its last token, whose target is the first of an answer
    prompt = int(sides[0].is_learnt.argmax()) - 1
    batch = pack_pairs([pair], tokenizer, 128, shares_prompts=True).batch
    assert int((batch.document_ids_BT > 0).sum()) == first + second - prompt
    assert batch.visible_to_BT[0, :prompt].tolist() == [2] * prompt and batch.visible_to_BT[0, prompt] == 1
    assert batch.positions_BT[0, first : first + second - prompt].tolist() == list(range(prompt, second))
    # a score has one target, at the end, so that answers share their first words, too
    scored = pack_pairs([pair], tokenizer, 128, example=Encoded.scored, shares_prompts=True).batch
    shortest = min(first, second)
    common = int((sides[0].ids[:shortest] != sides[1].ids[:shortest]).argmax())
    assert common > prompt + 1 and int((scored.visible_to_BT == 2)[0, : common + 1].sum()) == common
    # one answer begins as the whole of the other: a token is left of the rejected one
    same = Pair("Why?", "So", "So so")
    for one in (same, Pair("Why?", "So so", "So")):
        both = pack_pairs([one], tokenizer, 128, example=Encoded.scored, shares_prompts=True).batch
        assert int((both.targets_BT >= 0).sum()) == 2 and both.document_ids_BT.max() == 2


def test_prompts_are_shared_where_the_model_reads_them_so_and_no_axis_splits_rows(model_folder, tmp_path):
    config = PreferenceConfig.parse({"data": ["pairs.jsonl"]}, "preference")
    split = PreferenceConfig.parse({"data": ["pairs.jsonl"], "parallel": {"context": 2}}, "preference")
    assert can_share_prompts(config, model_folder) and not can_share_prompts(split, model_folder)
    save_model(small_decoder("alibi"), tmp_path, tokenizer=None)
    assert not can_share_prompts(config, tmp_path)


def test_an_answer_beyond_half_a_row_leaves_the_pair_out(tokenizer):
    long = Pair((said("user", "word " * 100),), (said("assistant", "So."),), (said("assistant", "No."),))
    short = Pair((said("user", "Why?"),), (said("assistant", "So."),), (said("assistant", "No."),))
    packed = pack_pairs([long, short], tokenizer, 96)
    assert (packed.pairs, packed.counts.too_long, packed.rows) == (1, 1, 1)

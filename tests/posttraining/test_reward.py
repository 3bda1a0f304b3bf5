"""Reward models: the loss on packed pairs, the stage, and scores of answers."""

import math
import shutil
from dataclasses import replace

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch.nn.functional import logsigmoid

from bessemer.core.errors import ArtefactError, ConfigError, RequestError
from bessemer.core.hashing import hash_file
from bessemer.core.metrics import read_metrics
from bessemer.core.records import json_lines
from bessemer.core.report import Curves, StageReport, Table
from bessemer.model.quantisation.config import QuantizeConfig
from bessemer.model.quantisation.quantise import quantise
from bessemer.model.storage.folder import load_model, load_scorer, save_model
from bessemer.posttraining.data.encoding import Encoded, encode_answer
from bessemer.posttraining.data.formats import Pair
from bessemer.posttraining.data.packing import pack_pairs
from bessemer.posttraining.rewards.assessment import ScoredPair, assess, assessment_parts, rank_correlation
from bessemer.posttraining.rewards.config import RewardConfig
from bessemer.posttraining.rewards.model_based import RewardModel
from bessemer.posttraining.rewards.specs import report, summary_line
from bessemer.posttraining.rewards.stage import RewardObjective, reward, rewards
from bessemer.training.checkpoint.manager import CHECKPOINTS, checkpoint_weights, newest_checkpoint
from bessemer.training.objectives import LossContext
from bessemer.training.starting_model import head_seed
from tests.cases import slow
from tests.posttraining.test_formats import said
from tests.posttraining.test_preference import SETTINGS, data  # noqa: F401


@pytest.fixture
def pairs():
    return [
        Pair(
            (said("user", "Why? " * (n % 3 + 1)),),
            (said("assistant", f"So {n}. " * (n % 2 + 1)),),
            (said("assistant", f"No {n}"),),
            margin=n / 4,
        )
        for n in range(7)
    ]


@pytest.fixture
def scorer(model_folder):
    return load_scorer(model_folder, seed=5)


def reward_alone(model, prompt, answer, tokenizer):
    """The score at the end token, with the model run on this one answer and nothing behind it."""
    encoded = encode_answer(prompt, answer, tokenizer)
    ids = encoded.ids[: encoded.is_learnt.nonzero()[0][-1] + 1]
    assert ids[-1] == tokenizer.control_id("<|im_end|>") and encoded.ids[-1] != ids[-1], (
        "the template writes a newline behind it"
    )
    return model(torch.from_numpy(ids)[None])[0, -1, 0]


@pytest.mark.parametrize("shares_prompts", [False, True])
def test_the_packed_loss_and_gradient_are_those_of_each_pair_alone(shares_prompts, pairs, scorer, tokenizer):
    batch = pack_pairs(pairs, tokenizer, 128, example=Encoded.scored, shares_prompts=shares_prompts).batch
    assert (batch.visible_to_BT is not None) == shares_prompts
    assert 1 < batch.tokens_BT.shape[0] < 7, "several pairs must share a row, and there must be several rows"
    objective = RewardObjective(centering=0.3)
    counts = objective.denominators(batch)
    halves = [objective(scorer, batch.rows(rows), LossContext()) for rows in (slice(0, 1), slice(1, None))]
    total = sum(half.sums[term] / counts[term].value for half in halves for term in half.sums)
    gradient = torch.autograd.grad(total, list(scorer.parameters()))

    losses, right = [], 0
    for pair in pairs:
        chosen, rejected = (reward_alone(scorer, pair.prompt, side, tokenizer) for side in (pair.chosen, pair.rejected))
        losses.append(-logsigmoid(chosen - rejected - pair.margin) + 0.3 * (chosen + rejected) ** 2)
        right += bool(chosen > rejected)
    expected = torch.stack(losses).mean()
    torch.testing.assert_close(total, expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(gradient, torch.autograd.grad(expected, list(scorer.parameters())), rtol=1e-3, atol=1e-6)
    assert sum(float(half.metrics["accuracy"].sum) for half in halves) == right


def test_no_reward_is_read_at_padding(pairs, scorer, tokenizer):
    """Peers have put rewards at a pad token, or, where padding is the end token, before the end of the answer."""
    batch = pack_pairs(pairs, tokenizer, 128, example=Encoded.scored).batch
    is_padding_BT = batch.document_ids_BT == 0
    assert is_padding_BT.any(1).all()
    other = replace(batch, tokens_BT=batch.tokens_BT.masked_fill(is_padding_BT, 17))
    with torch.no_grad():
        assert torch.equal(rewards(scorer, batch), rewards(scorer, other))
    # one end token for each answer, each in a sequence of its own
    ends_BT = batch.targets_BT >= 0
    assert torch.equal(batch.targets_BT[ends_BT], batch.tokens_BT[ends_BT]) and int(ends_BT.sum()) == 14
    assert (batch.sequence_sums(ends_BT.float())[batch.per_sequence["pair_weight"] > 0] == 1).all()


def test_an_answer_that_does_not_end_within_half_a_row_is_not_scored(tokenizer):
    long = Pair((said("user", "Why?"),), (said("assistant", "word " * 100),), (said("assistant", "No."),))
    packed = pack_pairs([long], tokenizer, 96, example=Encoded.scored)
    assert (packed.pairs, packed.counts.too_long) == (0, 1)


def run(model_folder, data, out, **changes):  # noqa: F811
    out.mkdir(exist_ok=True)
    config = RewardConfig.parse({"data": [str(data)], **SETTINGS, **changes}, "reward")
    return reward(config, model_folder, out, seed=3, device="cpu")


@pytest.fixture(scope="module")
def trained(model_folder, data, tmp_path_factory):  # noqa: F811
    out = tmp_path_factory.mktemp("reward")
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    summary = run(model_folder, data, out, steps=16, centering=0.01)
    torch.set_num_threads(before)
    return out, summary


def test_a_model_learns_to_score_what_is_preferred_higher(trained):
    out, summary = trained
    lines = read_metrics(out / "metrics.jsonl")
    assert lines[0]["loss_ranking"] == pytest.approx(0.69, abs=0.1)
    assert summary["held_out_accuracy"] > 0.9 and summary["validation_accuracy"] == pytest.approx(summary["held_out_accuracy"])
    assert summary["held_out_accuracy_low"] < summary["held_out_accuracy"] <= summary["held_out_accuracy_high"] == 1
    assert summary["pairs"] + summary["held_out"] == 48
    scored = json_lines((out / "held_out.jsonl").read_text(encoding="utf-8"))
    assert len(scored) == summary["held_out"]
    margin = sum(one["chosen"] - one["rejected"] for one in scored) / len(scored)
    assert margin == pytest.approx(summary["validation_margin"], rel=1e-3)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("quantize", [None, slow("int8")])
def test_an_adapter_is_trained_beside_a_whole_head_and_both_make_one_folder(model_folder, data, tmp_path, quantize):  # noqa: F811
    before = hash_file(model_folder / "model.safetensors")
    changes = {"steps": 16, "learning_rate": 5e-3, "checkpoint_every": 8}
    adapter = {"rank": 8, "quantize": quantize}
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    summary = run(model_folder, data, whole, adapter=adapter, **changes)
    assert hash_file(model_folder / "model.safetensors") == before
    assert summary["held_out_accuracy"] > 0.8
    # that of the folder is that of the model in training
    assert summary["validation_accuracy"] == pytest.approx(summary["held_out_accuracy"], abs=1e-4)
    scored = json_lines((whole / "held_out.jsonl").read_text(encoding="utf-8"))
    margin = sum(one["chosen"] - one["rejected"] for one in scored) / len(scored)
    assert margin == pytest.approx(summary["validation_margin"], rel=1e-3)
    start, end = load_scorer(model_folder, seed=head_seed(3)).state_dict(), load_file(whole / "model" / "model.safetensors")
    assert not torch.equal(start["score.weight"], end["score.weight"])
    assert torch.equal(start["embed_tokens.weight"].float(), end["model.embed_tokens.weight"].float())
    held = checkpoint_weights(newest_checkpoint(whole / CHECKPOINTS))
    assert {name for name in held if ".adapter." not in name} == {"score.weight"}
    assert not (whole / "adapter").exists()
    # what an interruption after step 8 leaves
    shutil.copytree(whole, cut)
    shutil.rmtree(cut / "model")
    shutil.rmtree(cut / CHECKPOINTS / "step-000016")
    run(model_folder, data, cut, adapter=adapter, **changes)
    assert hash_file(cut / "model" / "model.safetensors") == hash_file(whole / "model" / "model.safetensors")


def test_what_a_reward_model_cannot_be_adapted_with_is_told_in_one_line(model_folder, data, tmp_path):  # noqa: F811
    assert RewardConfig.parse({"data": ["a.jsonl"], "adapter": 8}).learning_rate == 1e-4
    with pytest.raises(ConfigError, match=r"z_loss is of losses of the next token"):
        RewardConfig.parse({"data": ["pairs.jsonl"], "z_loss": 1e-4}, "reward")
    with pytest.raises(ConfigError, match=r"adapter.merge: false: a reward model is its adapter and its head"):
        RewardConfig.parse({"data": ["a.jsonl"], "adapter": {"rank": 8, "merge": False}})
    start = load_model(model_folder)
    quantise(start, QuantizeConfig(scheme="int8"))
    save_model(start, tmp_path / "int8", tokenizer=model_folder)
    with pytest.raises(ArtefactError, match=r"this model is quantised, and only whole weights"):
        run(tmp_path / "int8", data, tmp_path / "out", adapter=4)


def test_the_report_says_how_right_it_is_and_what_it_makes_of_length(trained):
    out, summary = trained
    stage = StageReport(name="reward", kind="reward", metrics=summary, folder=out, records=read_metrics(out / "metrics.jsonl"))
    parts = report(stage).parts
    table = next(part for part in parts if isinstance(part, Table))
    assert table.rows[0][:2] == ["all", str(summary["held_out"])]
    assert any(isinstance(part, Curves) and "higher reward" in part.title for part in parts)
    assert "held out ranked correctly" in summary_line(summary)


@torch.no_grad()
def test_the_folder_is_a_reward_model_for_transformers_too(trained, tokenizer):
    out, _ = trained
    prompt, answer = "Say stone river.", "STONE RIVER"
    (ours,) = RewardModel.open(out / "model", device="cpu").score([(said("user", prompt),)], [answer])
    ids = tokenizer.apply_chat_template([said("user", prompt)], add_generation_prompt=True)
    ids += [*tokenizer.encode(answer, add_bos=False), tokenizer.control_id("<|im_end|>")]
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(out / "model").eval()
    assert theirs(torch.tensor([ids])).logits.item() == pytest.approx(ours, abs=1e-5)


def test_a_batch_gives_every_answer_the_score_that_it_has_alone(scorer, tokenizer):
    scorer.score.weight.data.mul_(20)
    model = RewardModel(scorer, tokenizer, tokens_at_once=150)
    prompts = [(said("user", "Why? " * (n % 5)),) for n in range(12)]
    answers = [f"Because {n} " * (n * 5 % 7 + 1) for n in range(12)]
    together = model.score(prompts, answers)
    alone = [model.score([prompt], [answer])[0] for prompt, answer in zip(prompts, answers, strict=True)]
    assert together == pytest.approx(alone, abs=1e-5) and len(set(together)) == 12
    with torch.no_grad():
        expected = reward_alone(scorer, prompts[3], (said("assistant", answers[3]),), tokenizer)
    assert together[3] == pytest.approx(expected.item(), abs=1e-5)
    # texts without roles end in the end token
    (plain,) = model.score(["Once upon"], [" a time"])
    ids = [*tokenizer.encode("Once upon"), *tokenizer.encode(" a time", add_bos=False), tokenizer.eos_ids[0]]
    assert plain == pytest.approx(model.score_tokens([ids])[0], abs=1e-6)
    assert model.score([], []) == []


def test_what_cannot_be_scored_is_told_in_one_line(scorer, model_folder, tokenizer):
    with pytest.raises(RequestError, match=r"answer 2 has 303 tokens with its prompt; the model reads 1 to 128"):
        RewardModel(scorer, tokenizer).score(["a", "b"], ["c", "d e f " * 60])
    with pytest.raises(ArtefactError, match="a language model, which gives no scores"):
        RewardModel.open(model_folder)
    with pytest.raises(ConfigError, match="a reward model writes no text, so it can answer no tasks"):
        RewardConfig.parse({"data": ["pairs.jsonl"], "tasks": ["arc_easy"]}, "reward")


def test_a_reward_model_is_trained_further_with_the_head_that_it_has(trained, data, tmp_path):  # noqa: F811
    out, summary = trained
    further = run(out / "model", data, tmp_path, steps=1, learning_rate=1e-12)
    assert further["held_out_accuracy"] == summary["held_out_accuracy"]
    assert further["validation_margin"] == pytest.approx(summary["validation_margin"], rel=1e-3)


def test_length_and_calibration_are_told_of_pairs():
    """Rewards that are lengths: right exactly where the chosen answer is the longer one, and sure in both cases."""
    lengths = [(9, 3), (8, 2), (7, 4), (2, 6), (5, 5)] * 12
    pairs = [ScoredPair(str(n), chosen, rejected, chosen, rejected) for n, (chosen, rejected) in enumerate(lengths)]
    found = assess(pairs)
    assert found["held_out_accuracy"] == 0.6 and found["longer_is_chosen"] == 0.7 and found["length_correlation"] == 1
    low, high = found["held_out_accuracy_low"], found["held_out_accuracy_high"]
    assert low == pytest.approx(0.6 - 2.001 * (0.24 / 59) ** 0.5, abs=2e-3) and low + high == pytest.approx(1.2, abs=1e-3)
    # of each kind of pair the gap between σ(|Δ|) and how often it is right
    sure = [1 / (1 + math.exp(-difference)) for difference in (6, 6, 3, 4, 0)]
    gaps = [1 - sure[0], 1 - sure[1], 1 - sure[2], sure[3], sure[4]]
    assert found["calibration_error"] == pytest.approx(sum(gaps) / 5, abs=1e-4)
    table, *_ = [part for part in assessment_parts(pairs) if isinstance(part, Table)]
    by_name = {row[0]: row[1:] for row in table.rows}
    assert by_name["chosen is longer"][1].startswith("1.000") and by_name["chosen is shorter"][1].startswith("0.000")
    curves = [part for part in assessment_parts(pairs) if isinstance(part, Curves)]
    assert [curve.title for curve in curves] == [
        "Accuracy by how much longer the chosen answer is",
        "Reward by length",
        "accuracy",
    ]
    # equal values share a rank: of 1, 2, 2, 3 those are 1, 2.5, 2.5, 4
    assert rank_correlation([1, 2, 2, 3], [10, 30, 20, 40]) == pytest.approx(4.5 / (4.5 * 5) ** 0.5)
    assert math.isnan(rank_correlation([1, 1], [1, 2])) and assess([]) == {}

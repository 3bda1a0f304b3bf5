"""KTO: single answers that are good or bad, against the divergence that mismatched examples estimate."""

import json
from dataclasses import replace

import pytest
import torch

from bessemer.core.errors import SourceError
from bessemer.core.metrics import read_metrics
from bessemer.distributed.mesh import ALONE
from bessemer.model.initialisation import initial_decoder
from bessemer.model.storage.folder import load_model
from bessemer.posttraining.data.encoding import encode_answer
from bessemer.posttraining.data.formats import Answered, Labelled, as_labelled, as_labelled_answers
from bessemer.posttraining.data.packing import HeldOutBatches, others_before, pack_answers
from bessemer.posttraining.preference.config import PreferenceConfig
from bessemer.posttraining.preference.objective import REFERENCE_LOG_PROBS, KTOObjective
from bessemer.posttraining.preference.stage import preference
from bessemer.training.model_roles import POLICY, REFERENCE, ModelRoles
from bessemer.training.model_setup import PreparedModel
from bessemer.training.objectives import LossContext
from bessemer.training.pretrain_config import PretrainConfig
from bessemer.training.runtime import Runtime
from bessemer.training.trainer import TotalsReducer
from tests.posttraining.test_formats import said
from tests.posttraining.test_preference import SETTINGS


@pytest.fixture
def examples():
    """Two answers to most prompts, as unpaired pairs lie in a file."""
    return [
        Labelled(
            Answered((said("user", "Why? " * (n // 2 % 3 + 1)),), (said("assistant", f"So {n}. " * (n % 3 + 1)),)), n % 2 == 0
        )
        for n in range(9)
    ]


@pytest.fixture
def models(model_folder):
    policy = load_model(model_folder)
    reference = initial_decoder(policy.config, seed=9).eval()
    runtime = Runtime.of(PretrainConfig(steps=1, dtype="float32", compile=False, threads=1), torch.device("cpu"))
    return ModelRoles(
        {POLICY: PreparedModel(policy, None)}, runtime, frozen={REFERENCE: PreparedModel(reference, None)}
    )  # fmt: skip


def log_ratio(models, prompt, answer, tokenizer):
    """Σ log π − Σ log π_ref of an answer, with the models run on it alone."""
    encoded = encode_answer(prompt, answer, tokenizer)
    ids, said_N = torch.from_numpy(encoded.ids), torch.from_numpy(encoded.is_learnt[1:])
    policy, reference = (
        model(ids[None, :-1])[0].log_softmax(-1).gather(1, ids[1:, None])[:, 0][said_N].sum()
        for model in (models.policy.model, models.frozen[REFERENCE].model)
    )
    return policy - reference.detach()


def test_the_packed_loss_and_gradient_are_those_of_each_answer_alone(examples, models, tokenizer):
    packed = pack_answers(examples, tokenizer, 128)
    assert packed.answers == 9 and 1 < packed.rows < 9
    objective = KTOObjective(beta=0.5, desirable_weight=1.5, undesirable_weight=0.7)
    with torch.no_grad():
        batch = objective.annotate(models, packed.batch)
    model = models.policy.model
    halves = [objective(model, batch.rows(rows), LossContext()) for rows in (slice(0, 1), slice(1, None))]
    total = sum(half.sums["preference"] for half in halves) / objective.denominators(batch)["preference"].value
    gradient = torch.autograd.grad(total, list(model.parameters()))

    twins, losses, right = [], [], 0
    for place, example in enumerate(examples):
        before = place - 1
        while examples[before].answered.prompt == example.answered.prompt:
            before -= 1
        twins.append(log_ratio(models, example.answered.prompt, examples[before].answered.answer, tokenizer))
    z = torch.stack(twins).mean().detach()
    assert z > 0.1
    for example in examples:
        ratio = log_ratio(models, example.answered.prompt, example.answered.answer, tokenizer)
        sign, weight = (1, 1.5) if example.is_desirable else (-1, 0.7)
        losses.append(weight * (1 - torch.sigmoid(0.5 * sign * (ratio - z))))
        right += bool(sign * (ratio - z) > 0)
    expected = torch.stack(losses).mean()
    torch.testing.assert_close(total, expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(gradient, torch.autograd.grad(expected, list(model.parameters())), rtol=1e-3, atol=1e-6)
    assert batch.per_sequence["kl"][0, 0].item() == pytest.approx(z.item(), abs=1e-5)
    assert sum(float(half.metrics["accuracy"].sum) for half in halves) == right
    # rows beyond the end of the held-out ones count for nothing
    last = HeldOutBatches(packed.batch, packed.rows + 3).batch(0)
    with torch.no_grad():
        padded = objective.annotate(models, last)
        same = objective(model, padded, LossContext()).sums["preference"] / objective.denominators(padded)["preference"].value
    assert same.item() == pytest.approx(expected.item(), abs=1e-6)


def test_z_is_the_positive_part_of_the_divergence(examples, models, tokenizer):
    model = models.policy.model
    model.load_state_dict(models.frozen[REFERENCE].model.state_dict())
    with torch.no_grad():
        model.norm.weight.mul_(3)
        batch = KTOObjective().annotate(models, pack_answers(examples, tokenizer, 128).batch)
        ratios = [
            log_ratio(models, one.answered.prompt, examples[place].answered.answer, tokenizer)
            for one, place in zip(examples, others_before([str(one.answered.prompt) for one in examples]), strict=True)
        ]
    assert torch.stack(ratios).mean() < 0 and (batch.per_sequence["kl"] == 0).all()


def test_of_a_label_that_there_is_not_nothing_is_told_and_a_tie_is_not_right(examples, models, tokenizer):
    good = [replace(one, is_desirable=True) for one in examples]
    batch = pack_answers(good, tokenizer, 128).batch
    objective = KTOObjective(0.1, 1.0, 1.0)
    batch = objective.annotate(models, batch)
    terms = objective(models.policy.model, batch, LossContext())
    totals = TotalsReducer(ALONE).reduced([terms], {"preference": 9.0})
    assert "reward_undesirable" not in totals.metrics and "reward_desirable" in totals.metrics
    # a policy that is its reference ranks nothing, whatever the labels are
    for label in (True, False):
        labelled = [replace(one, is_desirable=label) for one in examples]
        rows = pack_answers(labelled, tokenizer, 128).batch
        own = models.log_probs(rows, POLICY)
        rows = rows.with_values(
            per_token={REFERENCE_LOG_PROBS: own}, per_sequence={"kl": torch.zeros_like(rows.per_sequence["is_answer"])}
        )
        figures = objective(models.policy.model, rows, LossContext()).metrics["accuracy"]
        assert float(figures.sum) == pytest.approx(0, abs=1e-6)


def test_a_twin_has_an_answer_to_another_prompt():
    assert others_before(list("aabbc")) == [4, 4, 1, 1, 3]
    assert others_before(list("abca")) == [2, 0, 1, 2]
    assert others_before([]) == []
    with pytest.raises(SourceError, match="all of these have the same prompt"):
        others_before(list("aaa"))


def test_texts_beside_messages_are_refused_in_one_line(tokenizer):
    rows = [Labelled(Answered("a", "b"), True), Labelled(Answered((said("user", "c"),), (said("assistant", "d"),)), False)]
    with pytest.raises(SourceError, match="some rows are texts and some messages"):
        pack_answers(rows, tokenizer, 64)


def test_rows_of_pairs_and_of_conversations_are_read_as_single_answers():
    good, bad = as_labelled_answers({"prompt": "a", "chosen": "b", "rejected": "c"})
    assert (good, bad) == (Labelled(Answered("a", "b"), True), Labelled(Answered("a", "c"), False))
    messages = [said("user", "Hi"), said("assistant", "Oh"), said("user", "Why?"), said("assistant", "So.")]
    judged = as_labelled({"messages": messages, "label": False})
    assert judged == Labelled(Answered(tuple(messages[:3]), (messages[3],)), False)
    with pytest.raises(ValueError, match="the last turn is judged, which must be the assistant's, not of 'user'"):
        as_labelled({"messages": messages[:3], "label": True})


@pytest.mark.usefixtures("one_thread")
def test_a_model_learns_which_answers_are_good(model_folder, tmp_path):
    words = ["stone", "river", "cloud", "apple", "horse", "table", "light", "winter", "bread", "paper", "green", "music"]
    path = tmp_path / "answers.jsonl"
    rows = [
        {
            "prompt": [said("user", f"Say {a} {b}.")],
            "completion": f"{a} {b}".upper() if n % 2 else f"{a} {b}",
            "label": n % 2 == 1,
        }
        for n, (a, b) in enumerate((a, b) for a in words for b in words[:4])
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    config = PreferenceConfig.parse({"data": [str(path)], **SETTINGS, "steps": 16, "loss": "kto"}, "preference")
    (tmp_path / "out").mkdir()
    summary = preference(config, model_folder, tmp_path / "out", seed=3, device="cpu")
    first = read_metrics(tmp_path / "out" / "metrics.jsonl")[0]
    # the policy is the reference in the first step
    assert first["loss"] == pytest.approx(0.5, abs=1e-4) and first["kl"] == pytest.approx(0, abs=1e-4)
    assert summary["validation_loss"] < 0.45 and summary["validation_accuracy"] > 0.8
    assert summary["reward_desirable"] > summary["reward_undesirable"]
    assert summary["answers"] + summary["held_out"] == 48
    assert (tmp_path / "out" / "reference-training-mismatched.safetensors").exists()

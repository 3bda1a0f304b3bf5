"""NPO: answers that are forgotten, beside others that are kept."""

import json
import math

import pytest
import torch

from bessemer.core.errors import ConfigError, SourceError
from bessemer.core.metrics import read_metrics
from bessemer.model.initialisation import initial_decoder
from bessemer.model.storage.folder import load_model
from bessemer.posttraining.data.encoding import encode_answer
from bessemer.posttraining.data.formats import Answered, Labelled
from bessemer.posttraining.data.packing import HeldOutBatches, pack_forgetting
from bessemer.posttraining.preference.config import PreferenceConfig
from bessemer.posttraining.preference.losses import npo
from bessemer.posttraining.preference.objective import REFERENCE_LOG_PROBS, UnlearningObjective
from bessemer.posttraining.preference.stage import preference
from bessemer.training.model_roles import POLICY, REFERENCE, ModelRoles
from bessemer.training.model_setup import PreparedModel
from bessemer.training.objectives import LossContext
from bessemer.training.pretrain_config import PretrainConfig
from bessemer.training.runtime import Runtime
from tests.posttraining.test_preference import SETTINGS


def test_the_loss_is_its_formula():
    # (2/β) ln(1 + (π/π_ref)^β): of equal probabilities (2/β) ln 2; with β = 2 and a ratio of 3, ln 10; of a forgotten answer 0
    values = npo(torch.tensor([0.0, math.log(3), -200.0], dtype=torch.float64), 2.0)
    torch.testing.assert_close(values, torch.tensor([math.log(2), math.log(10), 0.0], dtype=torch.float64))


def test_its_gradient_is_that_of_ascent_times_a_weight_that_vanishes_with_the_answer():
    ratios = torch.tensor([0.0, 1.5, -4.0, -400.0], dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(npo(ratios, 0.5).sum(), ratios)
    power = torch.exp(0.5 * ratios.detach())
    torch.testing.assert_close(gradient, 2 * power / (1 + power))
    assert torch.autograd.gradcheck(lambda ratios: npo(ratios, 0.5), ratios)


def test_with_a_small_beta_it_is_ascent_up_to_a_constant():
    ratios = torch.tensor([1.0, -2.0], dtype=torch.float64)
    torch.testing.assert_close(npo(ratios, 1e-6) - 2 / 1e-6 * math.log(2), ratios, rtol=1e-4, atol=1e-4)


@pytest.fixture
def examples():
    """Four texts to forget and six to keep."""
    forget = [Labelled(Answered(f"The code {n} of the", f" lock is {n}{n + 3}{n}."), False) for n in range(4)]
    keep = [Labelled(Answered(f"Furnace {n}", f" is hot and {'very ' * n}old."), True) for n in range(6)]
    return forget, keep


@pytest.fixture
def models(model_folder):
    policy = load_model(model_folder)
    reference = initial_decoder(policy.config, seed=9).eval()
    runtime = Runtime.of(PretrainConfig(steps=1, dtype="float32", compile=False, threads=1), torch.device("cpu"))
    return ModelRoles({POLICY: PreparedModel(policy, None)}, runtime, frozen={REFERENCE: PreparedModel(reference, None)})


def log_probs(model, example, tokenizer, *, end):
    """log p of each token of an answer, with the model run on it alone; end: with the end token."""
    encoded = encode_answer(example.answered.prompt, example.answered.answer, tokenizer)
    ids = torch.from_numpy(encoded.ids)
    of_answer = model(ids[None, :-1])[0].log_softmax(-1).gather(1, ids[1:, None])[:, 0][torch.from_numpy(encoded.is_learnt[1:])]
    return of_answer if end else of_answer[:-1]


def test_the_packed_loss_and_gradient_are_those_of_each_answer_alone(examples, models, tokenizer):
    forget, keep = examples
    packed = pack_forgetting(forget, keep, tokenizer, 64)
    assert packed.answers == 10 and 1 < packed.rows < 10
    objective, model = UnlearningObjective(beta=0.3, retain_weight=1.5), models.policy.model
    with torch.no_grad():
        batch = objective.annotate(models, packed.batch)
    counts = objective.denominators(batch)
    halves = [objective(model, batch.rows(rows), LossContext()) for rows in (slice(0, 1), slice(1, None))]
    total = sum(half.sums[term] / counts[term].value for half in halves for term in half.sums)
    gradient = torch.autograd.grad(total, list(model.parameters()))

    reference = models.frozen[REFERENCE].model
    losses, ratios = [], []
    for example in forget:
        ratio = log_probs(model, example, tokenizer, end=False).sum()
        ratio = ratio - log_probs(reference, example, tokenizer, end=False).sum().detach()
        ratios.append(ratio.item())
        losses.append(2 / 0.3 * torch.log1p(torch.exp(0.3 * ratio)))
    kept = torch.cat([log_probs(model, example, tokenizer, end=True) for example in keep])
    expected = torch.stack(losses).mean() - 1.5 * kept.mean()
    torch.testing.assert_close(total, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(gradient, torch.autograd.grad(expected, list(model.parameters())), rtol=1e-3, atol=1e-5)
    logged = [half.metrics["log_ratio_forget"] for half in halves]
    assert sum(one.sum.item() for one in logged) == pytest.approx(sum(ratios), rel=1e-4)
    assert sum(half.metrics["log_prob_retain"].sum.item() for half in halves) == pytest.approx(kept.sum().item(), rel=1e-4)


def test_every_row_has_its_share_of_what_is_forgotten(tokenizer):
    forget = [Labelled(Answered(f"The code {n} of the", f" lock is {n}{n + 3}{n}."), False) for n in range(8)]
    keep = [Labelled(Answered(f"Furnace {n}", " is hot."), True) for n in range(40)]
    packed = pack_forgetting(forget, keep, tokenizer, 64).batch.per_sequence
    forgotten_R = (packed["is_answer"] - packed["is_desirable"]).sum(1)
    # all rows but the last are full: none has a third of what is forgotten
    assert len(forgotten_R) > 6 and forgotten_R.sum() == 8 and forgotten_R.max() <= 2


def test_what_is_held_out_is_what_is_kept(examples, models, tokenizer):
    batch = pack_forgetting([], examples[1], tokenizer, 64).batch
    objective = UnlearningObjective()
    batch = objective.annotate(models, HeldOutBatches(batch, batch.tokens_BT.shape[0] + 2).batch(0))
    with torch.no_grad():
        terms = objective(models.policy.model, batch, LossContext())
    assert objective.denominators(batch)["forget"].value == 0 and float(terms.sums["forget"]) == 0
    assert float(terms.sums["retain"]) > 0


def test_a_stage_makes_the_texts_unlikely_and_keeps_the_others(tmp_path, model_folder, tokenizer, examples):
    forget, keep = examples
    rows = [
        {"prompt": one.answered.prompt, "completion": one.answered.answer, "label": one.is_desirable}
        for one in [*forget, *keep]
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    settings = settings_with(data=["rows.jsonl"], loss="npo", validation_share=0, steps=24, learning_rate=3e-3)
    out = tmp_path / "out"
    out.mkdir()
    metrics = preference(settings, model_folder, out, folder=tmp_path, seed=1, device="cpu")
    assert metrics["forgotten"] == 4 and metrics["kept"] == 6
    before, after = load_model(model_folder), load_model(out / "model")

    def nats(model, some):
        with torch.no_grad():
            return -sum(float(log_probs(model, one, tokenizer, end=False).sum()) for one in some) / len(some)

    assert nats(after, forget) > nats(before, forget) + 5
    assert nats(after, keep) < nats(before, keep)
    logged = [record for record in read_metrics(out / "metrics.jsonl") if "log_ratio_forget" in record]
    assert logged[-1]["log_ratio_forget"] < -5


def settings_with(**changes):
    return PreferenceConfig.parse({**SETTINGS, **changes}, "preference")


def test_without_anything_to_forget_it_is_refused(tmp_path, model_folder):
    (tmp_path / "rows.jsonl").write_text(
        json.dumps({"prompt": "A", "completion": " b c", "label": True}) + "\n", encoding="utf-8"
    )
    with pytest.raises(SourceError, match="forgets answers whose label is false, and there are none"):
        preference(
            settings_with(data=["rows.jsonl"], loss="npo"),
            model_folder,
            tmp_path / "out",
            folder=tmp_path,
            seed=1,
            device="cpu",
        )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"loss": "sigmoid", "data": ["made/forgetting"]}, "loss sigmoid forgets nothing; take npo"),
        ({"loss": "npo", "data": ["made/mismatched"]}, "npo learns from single answers"),
        ({"loss": "kto", "data": ["a.jsonl"], "retain_weight": 2.0}, "retain_weight: loss kto has none"),
        ({"loss": "npo", "data": ["a.jsonl"], "next_token_weight": 0.5}, "next_token_weight: loss npo has none"),
    ],
)
def test_what_does_not_fit_is_one_line(settings, message):
    with pytest.raises(ConfigError) as error:
        PreferenceConfig.parse(settings, "preference")
    assert message in str(error.value) and "\n" not in str(error.value)


def test_a_reference_that_is_given_is_not_computed(examples, tokenizer):
    batch = pack_forgetting(*examples, tokenizer, 64).batch
    batch = batch.with_values(per_token={REFERENCE_LOG_PROBS: torch.zeros(batch.tokens_BT.shape)})
    assert UnlearningObjective().annotate(None, batch) is batch

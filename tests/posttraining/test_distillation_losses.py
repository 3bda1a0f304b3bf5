"""Losses and objectives of distillation beside plain formulas over whole logits, one token or one sequence at a time."""

import math
from dataclasses import replace
from itertools import pairwise
from unittest.mock import patch

import pytest
import torch

from bessemer.distributed.mesh import ALONE
from bessemer.model.config import ModelConfig
from bessemer.model.initialisation import initial_decoder
from bessemer.posttraining.distillation import losses
from bessemer.posttraining.distillation.config import DISTILLATION_LOSSES, DistillationConfig
from bessemer.posttraining.distillation.losses import DivergenceSettings, HeadStates
from bessemer.posttraining.distillation.objective import (
    LOG_RATIOS,
    TEACHER,
    DistillationObjective,
    OnPolicyObjective,
    TeacherHead,
    mean_reverse_kl,
)
from bessemer.posttraining.sampling.samples import ADVANTAGES, SAMPLER
from bessemer.training import logit_chunks
from bessemer.training.data.batch import IGNORE_INDEX, Batch
from bessemer.training.data.packing import pack_rows
from bessemer.training.logit_chunks import ChunkSize
from bessemer.training.model_roles import POLICY, ModelRoles
from bessemer.training.model_setup import PreparedModel
from bessemer.training.objectives import LossContext
from bessemer.training.runtime import Runtime
from tests.training.conftest import TINY
from tests.training.test_head import Largest, full_logits, made_pair

LOSSES = list(DISTILLATION_LOSSES)
SHAPE = {name: value for name, value in TINY.items() if name != "preset"}


def plain_divergence(name, student_V, teacher_V, beta, k):
    """Of two distributions, by the definitions."""
    if name == "forward_kl":
        return (teacher_V * (teacher_V / student_V).log()).sum()
    if name == "reverse_kl":
        return (student_V * (student_V / teacher_V).log()).sum()
    if name == "jsd":
        mixture_V = (1 - beta) * student_V + beta * teacher_V
        of_teacher = (teacher_V * (teacher_V / mixture_V).log()).sum()
        return beta * of_teacher + (1 - beta) * (student_V * (student_V / mixture_V).log()).sum()
    likeliest = sorted(range(len(teacher_V)), key=lambda token: -teacher_V[token].item())[:k]
    total = sum(teacher_V[token] * (teacher_V[token] / student_V[token]).log() for token in likeliest)
    others = [token for token in range(len(teacher_V)) if token not in likeliest]
    if not others:
        return total
    rest = teacher_V[others].sum()
    return total + rest * (rest / student_V[others].sum()).log()


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize(("temperature", "softcap"), [(1.0, None), (0.6, 1.5)])
def test_a_loss_and_its_gradients_are_those_of_the_whole_distributions(name, temperature, softcap):
    hidden, weight, teacher, teacher_weight, mask = made_pair(9, (4, 3), 11)
    loss = DISTILLATION_LOSSES[name].load()
    settings = DivergenceSettings(temperature, beta=0.3, top_k=4)
    size = ChunkSize(1 << 20, 44, 22)
    with patch.dict(logit_chunks._CHUNK_SIZES, {"cpu": size}):
        found = loss(HeadStates(hidden, weight, softcap), HeadStates(teacher, teacher_weight, 2.0), mask, settings)
        weights = torch.linspace(0.5, 1.5, len(found), dtype=torch.float64)
        gradients = torch.autograd.grad((found * weights).sum(), (hidden, weight))
    student_NV = full_logits(hidden, weight, softcap, temperature).softmax(-1)
    teacher_NV = full_logits(teacher, teacher_weight, 2.0, temperature).softmax(-1).detach()
    expected = torch.stack(
        [
            plain_divergence(name, *pair, 0.3, 4) if counts else pair[0].new_zeros(())
            for *pair, counts in zip(student_NV, teacher_NV, mask, strict=True)
        ]
    )
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-9)
    expected_gradients = torch.autograd.grad((expected * weights).sum(), (hidden, weight))
    torch.testing.assert_close(gradients, expected_gradients, rtol=1e-6, atol=1e-9)
    assert mask.any() and not mask.all() and teacher.grad is None


@pytest.mark.parametrize("name", LOSSES)
def test_a_gradient_is_of_what_is_trained_alone(name):
    hidden, weight, teacher, teacher_weight, mask = made_pair(6, (4, 3), 11)
    settings = DivergenceSettings(top_k=4)

    def gradients(*trained):
        student = [one.detach().requires_grad_(index in trained) for index, one in enumerate((hidden, weight))]
        loss = DISTILLATION_LOSSES[name].load()(HeadStates(*student), HeadStates(teacher, teacher_weight), mask, settings)
        loss.sum().backward()
        return [one.grad for one in student]

    both = gradients(0, 1)
    for trained in (0, 1):
        found = gradients(trained)
        assert found[1 - trained] is None
        torch.testing.assert_close(found[trained], both[trained])


def test_the_likeliest_tokens_and_the_rest_bound_the_divergence_from_below():
    hidden, weight, teacher, teacher_weight, _ = made_pair(20, (4, 3), 13)
    everywhere = torch.ones(20, dtype=torch.bool)
    pair = HeadStates(hidden, weight), HeadStates(teacher, teacher_weight)
    top_k, forward = (DISTILLATION_LOSSES[name].load() for name in ("top_k", "forward_kl"))
    whole = forward(*pair, everywhere, DivergenceSettings())
    bounds = [top_k(*pair, everywhere, DivergenceSettings(top_k=k)) for k in (1, 4, 13, 99)]
    assert all((lower <= upper + 1e-12).all() for lower, upper in pairwise(bounds))
    assert (bounds[1] < whole).all()
    torch.testing.assert_close(bounds[2:], [whole, whole])


def test_a_rest_of_no_probability_costs_nothing_and_has_no_gradient_that_is_not_finite():
    weight = torch.tensor([[400.0], [0.0], [-400.0]], requires_grad=True)
    hidden, settings = torch.ones(1, 1), DivergenceSettings(top_k=1)
    certain = HeadStates(hidden, weight.detach())
    loss = DISTILLATION_LOSSES["top_k"].load()(HeadStates(hidden, weight), certain, torch.tensor([True]), settings)
    (gradient,) = torch.autograd.grad(loss.sum(), weight)
    assert loss.item() == 0 and gradient.abs().max() == 0


def test_as_many_likeliest_tokens_as_there_are_leave_no_rest_and_what_makes_no_sense_is_refused(monkeypatch):
    hidden, weight, teacher, teacher_weight, mask = made_pair(6, (4, 4), 10)
    mask = torch.ones(6, dtype=torch.bool)
    arguments = (hidden, weight, teacher, teacher_weight)
    whole = [losses.top_k_divergence(*arguments, k, mask_N=mask) for k in (10, 11)]
    torch.testing.assert_close(*whole)
    forward = DISTILLATION_LOSSES["forward_kl"].load()(
        HeadStates(hidden, weight), HeadStates(teacher, teacher_weight), mask, DivergenceSettings()
    )
    torch.testing.assert_close(whole[0], forward)
    assert losses.top_k_divergence(*arguments, 1, mask_N=mask).isfinite().all()
    with pytest.raises(ValueError, match="k must be at least 1, got 0"):
        losses.top_k_divergence(*arguments, 0, mask_N=mask)
    with pytest.raises(ValueError, match="the student has 10 tokens and the teacher 9"):
        losses.top_k_divergence(hidden, weight, teacher, teacher_weight[:9], 1, mask_N=mask)
    of = losses.Head.of
    for sharded in (0, 1):
        made = []

        def with_group(*given, sharded=sharded, made=made):
            head, *others = of(*given)
            made.append(head)
            return replace(head, group="shards" if len(made) - 1 == sharded else None), *others

        monkeypatch.setattr(losses.Head, "of", with_group)
        with pytest.raises(ValueError, match="not in shards of it"):
            losses.top_k_divergence(*arguments, 1, mask_N=mask)


def test_heads_of_one_tokenizer_are_compared_over_the_ids_that_both_have():
    short, long = (HeadStates(torch.ones(1, 2), torch.ones(size, 2)) for size in (3, 5))
    for pair in ((short, long), (long, short)):
        assert [len(one.weight_VD) for one in losses.of_one_vocabulary(*pair)] == [3, 3]


def test_the_likeliest_tokens_are_found_without_the_logits_of_a_whole_batch():
    hidden, weight, teacher, teacher_weight, _ = made_pair(512, (8, 8), 128)
    size = ChunkSize(1 << 20, 8192, 8192)
    with patch.dict(logit_chunks._CHUNK_SIZES, {"cpu": size}), Largest() as largest:
        pair = HeadStates(hidden, weight), HeadStates(teacher, teacher_weight)
        loss = DISTILLATION_LOSSES["top_k"].load()(*pair, torch.ones(512, dtype=torch.bool), DivergenceSettings(top_k=8))
        loss.sum().backward()
    assert largest.elements == 8192 < 512 * 128


@pytest.fixture(scope="module")
def models():
    """A student, and a teacher of another width, whose head of the same tokenizer has four more rows."""
    student = initial_decoder(ModelConfig(**SHAPE, vocab_size=97), seed=2).double()
    shape = {**SHAPE, "hidden_size": 48}
    teacher = initial_decoder(ModelConfig(**shape, vocab_size=101), seed=5).double()
    with torch.no_grad():
        teacher.norm.weight.mul_(5.0)
    return student, teacher


@pytest.fixture(scope="module")
def trainee(models):
    config = DistillationConfig(steps=1, dtype="float32", compile=False, threads=1)
    runtime = Runtime.of(config, torch.device("cpu"))
    student, teacher = (PreparedModel(model, None) for model in models)
    return ModelRoles({POLICY: student}, runtime, frozen={TEACHER: teacher}, micro_batch_size=1)


def examples():
    generator = torch.Generator().manual_seed(3)
    found = []
    for prompt, answer in ((3, 5), (6, 2), (2, 9), (4, 4)):
        ids = torch.randint(4, 97, (prompt + answer,), generator=generator).numpy()
        targets = ids[1:].copy()
        targets[: prompt - 1] = IGNORE_INDEX
        found.append((ids[:-1], targets))
    return found


@pytest.mark.parametrize(("name", "next_token_weight"), [("forward_kl", 0.25), ("top_k", 0.0)])
def test_the_packed_objective_is_that_of_each_answer_alone_in_any_micro_batches(models, trainee, name, next_token_weight):
    student, teacher = models
    rows = examples()
    batch = pack_rows([rows[:2], rows[2:]], 24, 0)
    settings = DivergenceSettings(temperature=0.8, top_k=5)
    loss = DISTILLATION_LOSSES[name].load()
    objective = DistillationObjective(loss, TeacherHead.of(teacher, ALONE), settings, next_token_weight)
    annotated = objective.annotate(trainee, batch)
    counts = objective.denominators(annotated)
    assert all(count.value == batch.targets for count in counts.values())
    parts = [objective(student, annotated.rows(slice(row, row + 1)), LossContext()) for row in range(2)]
    total = sum(part.sums[term] / counts[term].value for part in parts for term in part.sums)
    gradients = torch.autograd.grad(total, list(student.parameters()))

    expected, targets = 0.0, 0
    for tokens, answer in rows:
        student_TV = student(torch.from_numpy(tokens)[None])[0]
        teacher_TV = teacher(torch.from_numpy(tokens)[None])[0].detach()[:, :97]
        for place in (answer >= 0).nonzero()[0]:
            both = ((logits[place] / 0.8).softmax(-1) for logits in (student_TV, teacher_TV))
            expected = expected + plain_divergence(name, *both, 0.5, 5)
            expected = expected - next_token_weight * student_TV[place].log_softmax(-1)[answer[place]]
            targets += 1
    expected = expected / targets
    torch.testing.assert_close(total, expected, rtol=1e-6, atol=1e-9)
    expected_gradients = torch.autograd.grad(expected, list(student.parameters()))
    torch.testing.assert_close(gradients, expected_gradients, rtol=1e-6, atol=1e-9)
    assert not any(parameter.requires_grad for parameter in teacher.parameters())


@pytest.mark.parametrize("baseline", [True, False])
def test_the_policy_gradient_is_on_average_that_of_the_reverse_divergence(models, trainee, baseline):
    """Over all tokens that the student may say next, each with its probability."""
    student, _ = models
    temperature, vocabulary = 0.7, 97
    prompt = torch.randint(4, 97, (5,), generator=torch.Generator().manual_seed(1))
    targets_BT = torch.full((vocabulary, 5), IGNORE_INDEX)
    targets_BT[:, -1] = torch.arange(vocabulary)
    log_probs_V = (student(prompt[None])[0, -1] / temperature).log_softmax(-1).detach()
    sampled_BT = torch.zeros(vocabulary, 5, dtype=torch.float64)
    sampled_BT[:, -1] = log_probs_V
    batch = Batch(prompt.expand(vocabulary, 5), targets_BT, per_token={SAMPLER: sampled_BT})
    objective = OnPolicyObjective(temperature, vocabulary, 1, baseline=baseline)
    annotated = objective.annotate(trainee, batch)
    teacher = trainee.frozen[TEACHER].model
    teacher_V = (teacher(prompt[None])[0, -1] / temperature).log_softmax(-1)[:vocabulary].detach()
    differences_V = teacher_V - log_probs_V
    expected_V = differences_V - differences_V.mean() if baseline else differences_V
    torch.testing.assert_close(annotated.per_token[ADVANTAGES][:, -1], expected_V)

    weighted = {name: annotated.per_token[name] * log_probs_V.exp()[:, None] for name in (ADVANTAGES, LOG_RATIOS)}
    terms = objective(student, annotated.with_values(per_token=weighted), LossContext())
    gradients = torch.autograd.grad(terms.sums["policy"], list(student.parameters()))
    now_V = (student(prompt[None])[0, -1] / temperature).log_softmax(-1)
    divergence = (now_V.exp() * (now_V - teacher_V)).sum()
    torch.testing.assert_close(gradients, torch.autograd.grad(divergence, list(student.parameters())), rtol=1e-6, atol=1e-9)
    assert terms.metrics["reverse_kl"].sum.item() == pytest.approx(divergence.item())


def test_the_held_out_divergence_is_the_mean_over_the_answers_tokens(models, trainee):
    student, teacher = models
    rows = examples()
    found = mean_reverse_kl(trainee, pack_rows([rows[:2], rows[2:]], 24, 0), TeacherHead.of(teacher, ALONE), 1.3)
    values = []
    for tokens, answer in rows:
        both = [(model(torch.from_numpy(tokens)[None])[0, :, :97] / 1.3).softmax(-1) for model in (student, teacher)]
        values += [plain_divergence("reverse_kl", *(one[place] for one in both), 0, 0) for place in (answer >= 0).nonzero()[0]]
    assert found == pytest.approx(torch.stack(values).mean().item(), rel=1e-9)
    assert math.isfinite(found) and found > 0

"""Losses of the head, computed chunk by chunk, are those of the full logits."""

import math
from contextlib import ExitStack, contextmanager
from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import cross_entropy, kl_div
from torch.utils._python_dispatch import TorchDispatchMode

from bessemer.training import chunked_head, logit_chunks
from bessemer.training.data.batch import IGNORE_INDEX
from bessemer.training.head import head_divergence, linear_cross_entropy, token_log_probs
from bessemer.training.logit_chunks import ChunkSize, chunk_size

DIVERGENCES = ("forward_kl", "reverse_kl", "jsd")


def made(count, width, vocab_size, dtype=torch.float64, seed=0, ignored=0.3):
    draw = torch.Generator().manual_seed(seed)
    hidden = torch.randn(count, width, generator=draw, dtype=dtype).requires_grad_()
    weight = torch.randn(vocab_size, width, generator=draw, dtype=dtype).requires_grad_()
    targets = torch.randint(0, vocab_size, (count,), generator=draw)
    targets[torch.rand(count, generator=draw) < ignored] = IGNORE_INDEX
    return hidden, weight, targets


def chunks_of(max_logits, max_block_logits=None, kept=0):
    """Chunks and blocks of so many logits on a CPU, and so many probabilities that are kept."""
    size = ChunkSize(1 << 20, max_logits, max_block_logits or max_logits, kept)
    return patch.dict(logit_chunks._CHUNK_SIZES, {"cpu": size})


@contextmanager
def as_on_a_gpu():
    """Masked tokens are computed with the others, and no kernels of the processor are used."""
    with (
        patch.object(chunked_head, "_DROPPING", frozenset()),
        patch.object(chunked_head.Head, "is_compiled", property(lambda head: False)),
    ):
        yield


@contextmanager
def cut(max_logits, max_block_logits, dropping):
    with ExitStack() as stack:
        stack.enter_context(chunks_of(max_logits, max_block_logits))
        if not dropping:
            stack.enter_context(as_on_a_gpu())
        yield


#: Logits of a chunk and of a block, and whether masked tokens are dropped.
CUTS = st.tuples(st.integers(1, 300), st.integers(1, 100), st.booleans())


class Largest(TorchDispatchMode):
    """Remembers the most elements that a result had."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor):
            self.elements = max(self.elements, result.numel())
        return result


class Seen(TorchDispatchMode):
    """Counts matmuls, and remembers the shapes of results."""

    def __init__(self):
        super().__init__()
        self.matmuls, self.shapes = 0, set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        self.matmuls += function.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.addmm_)
        if isinstance(result, torch.Tensor):
            self.shapes.add(tuple(result.shape))
        return result


def relative_error(found, expected):
    return ((found.double() - expected).norm() / expected.norm()).item()


def full_logits(hidden, weight, softcap=None, temperature=1.0):
    logits = hidden @ weight.T
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    return logits / temperature


def full_logits_loss(hidden, weight, targets, softcap=None, z_loss=0.0):
    """The definition, with every logit in memory."""
    logits = full_logits(hidden, weight, softcap)
    log_sums = logits[targets != IGNORE_INDEX].logsumexp(-1)
    return cross_entropy(logits, targets, ignore_index=IGNORE_INDEX, reduction="sum") + z_loss * log_sums.square().sum()


@settings(deadline=None)
@given(
    st.integers(1, 40),
    st.integers(1, 9),
    st.integers(1, 50),
    CUTS,
    st.integers(0, 1000),
    st.sampled_from([None, 1.5]),
    st.sampled_from([0.0, 0.1]),
)
def test_it_equals_torch_in_value_and_gradient(count, width, vocab_size, sizes, seed, softcap, z_loss):
    hidden, weight, targets = made(count, width, vocab_size, seed=seed)
    with cut(*sizes):
        ours = linear_cross_entropy(hidden, weight, targets, softcap, z_loss)
        gradients = torch.autograd.grad(3 * ours, (hidden, weight))
    theirs = full_logits_loss(hidden, weight, targets, softcap, z_loss)
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(gradients, torch.autograd.grad(3 * theirs, (hidden, weight)))


def test_large_logits_neither_overflow_nor_vanish():
    hidden, weight, targets = made(6, 4, 10, torch.float32, ignored=0)
    ours = linear_cross_entropy(hidden * 1e3, weight, targets)
    torch.testing.assert_close(ours, cross_entropy(hidden * 1e3 @ weight.T, targets, reduction="sum"))


@pytest.mark.parametrize("dropping", [True, False])
def test_without_a_target_it_is_zero_with_zero_gradients(dropping):
    hidden, weight, targets = made(5, 4, 10, ignored=1)
    with cut(100, 50, dropping):
        value = linear_cross_entropy(hidden, weight, targets, z_loss=0.1)
        gradients = torch.autograd.grad(value, (hidden, weight))
    assert value.item() == 0
    assert all(torch.count_nonzero(gradient) == 0 for gradient in gradients)


@pytest.mark.parametrize(
    "loss",
    [
        lambda *inputs: linear_cross_entropy(*inputs),
        lambda *inputs: sum(token_log_probs(*inputs)).sum(),
        lambda hidden, weight, targets: head_divergence(
            hidden, weight, 2 * hidden, weight, "jsd", mask_N=targets != IGNORE_INDEX
        ).sum(),
    ],
    ids=["cross-entropy", "log-probabilities", "divergence"],
)
@pytest.mark.parametrize("dropping", [True, False])
def test_tokens_without_a_target_may_hold_anything(dropping, loss):
    hidden, weight, targets = made(12, 4, 10)
    expected = torch.autograd.grad(loss(hidden, weight, targets), (hidden, weight))
    spoilt = hidden.detach().masked_fill((targets == IGNORE_INDEX)[:, None], math.nan).requires_grad_()
    with cut(100, 50, dropping):
        found = torch.autograd.grad(loss(spoilt, weight, targets), (spoilt, weight))
    torch.testing.assert_close(found, expected)


def test_under_autocast_it_stays_near_float32_and_sums_in_it():
    hidden, weight, targets = made(64, 16, 50, torch.float32)
    exact = linear_cross_entropy(hidden, weight, targets)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = linear_cross_entropy(hidden, weight, targets)
    gradients = [torch.autograd.grad(value, weight)[0] for value in (exact, rounded)]
    assert rounded.dtype == torch.float32 and gradients[1].dtype == torch.float32
    torch.testing.assert_close(rounded, exact, rtol=0.01, atol=0)
    assert torch.linalg.norm(gradients[1] - gradients[0]) < 0.02 * torch.linalg.norm(gradients[0])


def confident(probability, others=100):
    """A hidden state of one channel and the weight of a head, of which bfloat16 loses nothing; token 0 is about so likely."""
    logits = torch.randn(others + 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64).bfloat16().double()
    logits[0] = logits[1:].logsumexp(0) + math.log(probability / (1 - probability))
    return torch.ones(1, 1), logits.bfloat16().float()[:, None].requires_grad_()


@pytest.mark.parametrize("probability", [0.5, 0.99, 0.999, 0.9999])
def test_a_confident_token_keeps_its_loss_and_gradient_in_bfloat16(probability):
    hidden, weight = confident(probability)
    exact = cross_entropy(hidden.double() @ weight.double().T, torch.tensor([0]))
    (expected,) = torch.autograd.grad(exact, weight)
    with torch.autocast("cpu", torch.bfloat16):
        loss = linear_cross_entropy(hidden, weight, torch.tensor([0]))
    (found,) = torch.autograd.grad(loss, weight)
    assert loss.item() == pytest.approx(exact.item(), rel=1e-4)
    assert ((found - expected).abs() <= 0.005 * expected.abs()).all()


def test_a_softcap_near_its_limit_keeps_its_slope_in_bfloat16():
    hidden, weight = torch.ones(1, 1), torch.tensor([[4.0], [3.0], [-2.0]]).requires_grad_()
    expected, found = [], []
    for gradients, autocast, dtype in ((expected, False, torch.float64), (found, True, torch.float32)):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = linear_cross_entropy(hidden.to(dtype), weight.to(dtype), torch.tensor([1]), softcap=1.0)
        gradients += torch.autograd.grad(loss, weight)
    assert relative_error(found[0], expected[0].double()) < 0.005


def test_the_logits_of_a_whole_batch_are_never_there():
    hidden, weight, targets = made(512, 8, 128)
    with chunks_of(4096), Largest() as largest:
        linear_cross_entropy(hidden, weight, targets).backward()
    assert largest.elements == 4096 < 512 * 128


def test_without_gradients_each_chunk_takes_one_matmul():
    hidden, weight, targets = made(64, 8, 16, ignored=0)
    with chunks_of(512), torch.no_grad(), Seen() as seen:
        linear_cross_entropy(hidden, weight, targets)
    assert seen.matmuls == 2 and not seen.shapes & {(64, 8), (16, 8)}


@pytest.mark.parametrize(
    ("loss", "forward"),
    [(lambda *inputs: linear_cross_entropy(*inputs), 2), (lambda *inputs: token_log_probs(*inputs)[0].sum(), 3)],
    ids=["cross-entropy", "log-probabilities"],
)
@pytest.mark.parametrize("frozen", ["hidden", "weight"])
def test_a_frozen_input_costs_neither_a_matmul_nor_memory(loss, forward, frozen):
    hidden, weight, targets = made(64, 8, 16, ignored=0)
    (hidden if frozen == "hidden" else weight).requires_grad_(False)
    trained = weight if frozen == "hidden" else hidden
    with chunks_of(512), Seen() as seen:
        value = loss(hidden, weight, targets)
        value.backward()
    assert seen.matmuls == forward * 2
    assert tuple(hidden.shape if frozen == "hidden" else weight.shape) not in seen.shapes
    assert trained.grad is not None and (hidden if frozen == "hidden" else weight).grad is None


@pytest.mark.parametrize(("vocab_size", "tokens"), [(4096, 8192), (32_768, 8192), (131_072, 2048), (262_144, 1024)])
def test_chunks_on_a_gpu_have_thousands_of_tokens_and_at_most_a_gibibyte_in_float32(vocab_size, tokens):
    assert chunk_size("cuda").tokens(vocab_size) == tokens
    assert 4 * tokens * vocab_size <= 1 << 30


@pytest.mark.parametrize(
    "loss",
    [
        lambda *inputs: linear_cross_entropy(*inputs, softcap=2.0, z_loss=0.1),
        lambda *inputs: sum(token_log_probs(*inputs, temperature=0.7, softcap=2.0)).sum(),
        lambda hidden, weight, targets: head_divergence(hidden, weight, hidden, weight, "jsd", mask_N=targets >= 0).sum(),
    ],
    ids=["cross-entropy", "log-probabilities", "divergence"],
)
def test_off_the_cpu_no_number_is_waited_for(loss, monkeypatch):
    """Tensors on the device `meta` have no values: to read one raises. Autocast does not know it."""
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda kind: False)
    hidden, weight, targets = (tensor.detach().to("meta") for tensor in made(9000, 8, 64, torch.float32))
    loss(hidden.requires_grad_(), weight.requires_grad_(), targets).backward()
    assert hidden.grad.shape == hidden.shape and weight.grad.shape == weight.shape


def full_token_scores(hidden, weight, targets, temperature, softcap):
    log_probs = full_logits(hidden, weight, softcap, temperature).log_softmax(-1)
    counted = targets != IGNORE_INDEX
    entropy = -(log_probs.exp() * log_probs).sum(-1)
    chosen = log_probs.gather(1, targets.clamp(0)[:, None])[:, 0]
    return chosen.where(counted, 0), entropy.where(counted, 0)


def weighed(outputs, seed=1):
    """A scalar in which every element of the outputs has a weight of its own."""
    draw = torch.Generator().manual_seed(seed)
    return sum((torch.randn(len(values), generator=draw, dtype=torch.float64) * values).sum() for values in outputs)


@settings(deadline=None, max_examples=50)
@given(
    st.integers(1, 30),
    st.integers(1, 9),
    st.integers(1, 40),
    CUTS,
    st.integers(0, 1000),
    st.sampled_from([None, 1.5]),
    st.sampled_from([0.3, 1.0, 2.5]),
    st.sampled_from([(0,), (1,), (0, 1)]),
)
def test_log_probs_and_entropies_are_those_of_the_full_logits(
    count, width, vocab_size, sizes, seed, softcap, temperature, used
):
    hidden, weight, targets = made(count, width, vocab_size, seed=seed)
    with cut(*sizes):
        ours = token_log_probs(hidden, weight, targets, temperature=temperature, softcap=softcap)
        gradients = torch.autograd.grad(weighed([ours[output] for output in used]), (hidden, weight))
    theirs = full_token_scores(hidden, weight, targets, temperature, softcap)
    torch.testing.assert_close(ours, theirs)
    expected = torch.autograd.grad(weighed([theirs[output] for output in used]), (hidden, weight))
    torch.testing.assert_close(gradients, expected)


def test_gradients_of_log_probs_and_entropies_are_those_of_finite_differences():
    hidden, weight, targets = made(5, 3, 7)
    with chunks_of(14, 7):
        assert torch.autograd.gradcheck(
            lambda hidden, weight: token_log_probs(hidden, weight, targets, temperature=0.7, softcap=2.0), (hidden, weight)
        )


def test_a_head_that_knows_nothing_has_the_entropy_of_its_vocabulary():
    log_probs, entropy = token_log_probs(torch.zeros(3, 4), torch.randn(50, 4), torch.tensor([1, IGNORE_INDEX, 7]))
    assert log_probs.tolist() == pytest.approx([-math.log(50), 0, -math.log(50)])
    assert entropy.tolist() == pytest.approx([math.log(50), 0, math.log(50)])


@pytest.mark.parametrize("probability", [0.5, 0.99, 0.9999])
def test_a_confident_token_keeps_its_log_prob_entropy_and_gradients_in_bfloat16(probability):
    hidden, weight = confident(probability)
    exact = full_token_scores(hidden.double(), weight.double(), torch.tensor([0]), 1.0, None)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = token_log_probs(hidden, weight, torch.tensor([0]))
    for found, expected in zip(rounded, exact, strict=True):
        assert found.dtype == torch.float32
        torch.testing.assert_close(found.double(), expected, rtol=1e-3, atol=0)
        (found_grad,), (expected_grad,) = (
            torch.autograd.grad(value.sum(), weight, retain_graph=True) for value in (found, expected)
        )
        assert relative_error(found_grad, expected_grad.double()) < 0.005


@pytest.mark.parametrize("within", [True, False])
def test_autocast_at_the_backward_pass_changes_nothing(within):
    hidden, weight, targets = made(64, 16, 50, torch.float32)
    found = []
    for enabled in (False, within):
        value = token_log_probs(hidden, weight, targets)[0].sum()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            found.append(torch.autograd.grad(value, (hidden, weight)))
    torch.testing.assert_close(*found, rtol=0, atol=0)


def test_log_probs_and_entropies_of_large_logits_neither_overflow_nor_vanish():
    hidden, weight, targets = made(6, 4, 10, torch.float32)
    ours = token_log_probs(hidden * 1e3, weight, targets)
    torch.testing.assert_close(ours, full_token_scores(hidden * 1e3, weight, targets, 1.0, None))


def test_log_probs_and_entropies_never_need_the_logits_of_a_whole_batch():
    hidden, weight, targets = made(512, 8, 128)
    with chunks_of(4096, 2048), Largest() as largest:
        weighed(token_log_probs(hidden, weight, targets)).backward()
    assert largest.elements == 4096 < 512 * 128


@pytest.mark.parametrize("used", [(0,), (0, 1)])
def test_probabilities_that_are_kept_save_the_second_matmul(used):
    hidden, weight, targets = made(64, 8, 32, ignored=0)
    expected = torch.autograd.grad(
        weighed([full_token_scores(hidden, weight, targets, 0.7, None)[output] for output in used]), (hidden, weight)
    )
    with chunks_of(512, kept=64 * 32), Seen() as seen:
        ours = token_log_probs(hidden, weight, targets, temperature=0.7)
        gradients = torch.autograd.grad(weighed([ours[output] for output in used]), (hidden, weight))
    torch.testing.assert_close(gradients, expected)
    # of four chunks: logits and two gradients, and the logits again for the gradient of the entropy
    assert seen.matmuls == 4 * (3 if used == (0,) else 4)


def test_a_temperature_of_zero_is_refused():
    with pytest.raises(ValueError, match="temperature must be positive, got 0"):
        token_log_probs(*made(3, 2, 5), temperature=0.0)


def made_pair(count, widths, vocab_size, seed=0):
    student, teacher = (made(count, width, vocab_size, seed=seed + place) for place, width in enumerate(widths))
    return *student[:2], *teacher[:2], student[2] != IGNORE_INDEX


def full_divergence(student, student_weight, teacher, teacher_weight, kind, mask, beta, temperature, softcaps):
    """As TRL's `GKDTrainer.generalized_jsd_loss` writes it, for every token."""
    student_log_probs = full_logits(student, student_weight, softcaps[0], temperature).log_softmax(-1)
    teacher_log_probs = full_logits(teacher, teacher_weight, softcaps[1], temperature).log_softmax(-1).detach()

    def kl(of, by):
        return kl_div(by, of, reduction="none", log_target=True).sum(-1)

    if kind == "forward_kl":
        divergence = kl(teacher_log_probs, student_log_probs)
    elif kind == "reverse_kl":
        divergence = kl(student_log_probs, teacher_log_probs)
    else:
        mixture = torch.logsumexp(
            torch.stack((student_log_probs + math.log(1 - beta), teacher_log_probs + math.log(beta))), dim=0
        )
        divergence = beta * kl(teacher_log_probs, mixture) + (1 - beta) * kl(student_log_probs, mixture)
    return divergence.where(mask, 0)


@settings(deadline=None, max_examples=60)
@given(
    st.sampled_from(DIVERGENCES),
    st.integers(1, 30),
    st.tuples(st.integers(1, 9), st.integers(1, 9)),
    st.integers(1, 40),
    CUTS,
    st.integers(0, 1000),
    st.sampled_from([0.1, 0.5, 0.8]),
    st.sampled_from([0.5, 1.0, 2.0]),
    st.tuples(st.sampled_from([None, 1.5]), st.sampled_from([None, 3.0])),
)
def test_divergences_are_those_of_the_full_logits(kind, count, widths, vocab_size, sizes, seed, beta, temperature, softcaps):
    *pair, mask = made_pair(count, widths, vocab_size, seed)
    with cut(*sizes):
        ours = head_divergence(
            *pair,
            kind,
            mask_N=mask,
            beta=beta,
            temperature=temperature,
            student_softcap=softcaps[0],
            teacher_softcap=softcaps[1],
        )
        gradients = torch.autograd.grad(weighed([ours]), pair[:2])
    theirs = full_divergence(*pair, kind, mask, beta, temperature, softcaps)
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(gradients, torch.autograd.grad(weighed([theirs]), pair[:2]))


@pytest.mark.parametrize("kind", DIVERGENCES)
def test_gradients_of_divergences_are_those_of_finite_differences(kind):
    *student, teacher, teacher_weight, mask = made_pair(5, (3, 2), 7)
    with chunks_of(14, 7):
        assert torch.autograd.gradcheck(
            lambda hidden, weight: head_divergence(
                hidden, weight, teacher, teacher_weight, kind, mask_N=mask, beta=0.3, temperature=0.7, student_softcap=2.0
            ),
            student,
        )


@pytest.mark.parametrize("kind", DIVERGENCES)
def test_a_student_that_is_its_teacher_has_nothing_to_learn(kind):
    hidden, weight, _ = made(20, 4, 10)
    divergence = head_divergence(hidden, weight, hidden, weight, kind)
    gradients = torch.autograd.grad(divergence.sum(), (hidden, weight))
    for value in (divergence, *gradients):
        torch.testing.assert_close(value, torch.zeros_like(value), rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", DIVERGENCES)
def test_divergences_of_large_logits_neither_overflow_nor_vanish(kind):
    hidden, weight, teacher, teacher_weight, mask = made_pair(6, (4, 3), 10)
    pair = (hidden * 1e3, weight, teacher * 1e3, teacher_weight)
    expected = full_divergence(*pair, kind, mask, 0.3, 1.0, (None, None))
    torch.testing.assert_close(head_divergence(*pair, kind, mask_N=mask, beta=0.3), expected)


@pytest.mark.parametrize(("beta", "kind"), [(0.0, "forward_kl"), (1.0, "reverse_kl")])
def test_at_its_ends_the_jensen_shannon_divergence_is_taken_for_a_kl(beta, kind):
    *pair, _ = made_pair(20, (4, 3), 10)
    torch.testing.assert_close(head_divergence(*pair, "jsd", beta=beta), head_divergence(*pair, kind), rtol=0, atol=0)


def test_the_teacher_gets_no_gradient():
    *pair, _ = made_pair(20, (4, 3), 10)
    head_divergence(*pair, "jsd").sum().backward()
    assert [tensor.grad is not None for tensor in pair] == [True, True, False, False]


@pytest.mark.parametrize("kind", DIVERGENCES)
def test_divergences_of_confident_models_are_kept_in_bfloat16(kind):
    (hidden, weight), (_, teacher_weight) = confident(0.999), confident(0.9)
    exact = full_divergence(
        hidden.double(),
        weight.double(),
        hidden.double(),
        teacher_weight.double(),
        kind,
        torch.tensor([True]),
        0.5,
        1.0,
        (None,) * 2,
    )
    (expected,) = torch.autograd.grad(exact.sum(), weight)
    with torch.autocast("cpu", torch.bfloat16):
        divergence = head_divergence(hidden, weight, hidden, teacher_weight, kind)
    (found,) = torch.autograd.grad(divergence.sum(), weight)
    assert divergence.dtype == torch.float32 and divergence.item() == pytest.approx(exact.item(), rel=1e-3)
    assert relative_error(found, expected.double()) < 0.005


def test_divergences_never_need_the_logits_of_a_whole_batch():
    *pair, mask = made_pair(512, (8, 6), 128)
    with chunks_of(4096, 2048), Largest() as largest:
        head_divergence(*pair, "jsd", mask_N=mask).sum().backward()
    assert largest.elements == 4096 < 512 * 128


def test_divergences_of_a_frozen_head_take_no_matmul_for_its_gradient():
    *pair, _ = made_pair(64, (8, 6), 16)
    pair[1].requires_grad_(False)
    with chunks_of(512), Seen() as seen:
        head_divergence(*pair, "reverse_kl").sum().backward()
    # logits of both, twice, and the gradient of the hidden states, in two chunks
    assert seen.matmuls == 2 * 5
    assert pair[0].grad is not None and pair[1].grad is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kind": "kl"}, "kind must be one of forward_kl, reverse_kl, jsd, got kl"),
        ({"beta": 1.5}, "beta must lie between 0 and 1, got 1.5"),
        ({"temperature": -1.0}, "temperature must be positive, got -1.0"),
        ({"teacher_weight_VD": torch.zeros(9, 3)}, "the student has 10 tokens and the teacher 9"),
    ],
    ids=lambda value: "" if isinstance(value, str) else next(iter(value)),
)
def test_a_divergence_that_is_not_defined_is_refused(changes, message):
    *pair, _ = made_pair(3, (4, 3), 10)
    names = ("student_ND", "student_weight_VD", "teacher_ND", "teacher_weight_VD")
    with pytest.raises(ValueError, match=message):
        head_divergence(**dict(zip(names, pair, strict=True)) | {"kind": "jsd"} | changes)

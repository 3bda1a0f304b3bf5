import pytest
import torch

from bessemer.training.config import LoopConfig
from bessemer.training.optim.muon import Muon, orthogonalised
from bessemer.training.optim.optimizers import _orthogonalisation_dtype, muon


def steps(optimizer, parameter, count=3):
    for step in range(count):
        parameter.grad = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(step))
        optimizer.step()
    return parameter.detach()


def parameter(*shape):
    return torch.nn.Parameter(torch.randn(*shape, generator=torch.Generator().manual_seed(99)))


@pytest.mark.parametrize("shape", [(12, 12), (8, 20), (20, 8)])
@pytest.mark.parametrize("nesterov", [True, False])
def test_a_matrix_moves_as_torchs_muon_moves_it_to_the_bit(shape, nesterov):
    options = {"lr": 0.1, "weight_decay": 0.2, "momentum": 0.9, "nesterov": nesterov}
    here, there = parameter(*shape), parameter(*shape)
    torchs = torch.optim.Muon([there], adjust_lr_fn="match_rms_adamw", **options)
    assert torch.equal(steps(Muon([here], **options), here), steps(torchs, there))


@pytest.mark.parametrize("parts", [1, 2])
def test_every_matrix_of_a_stack_moves_as_if_it_stood_alone(parts):
    stack = parameter(3, 4 * parts, 6)
    alone = [torch.nn.Parameter(matrix.clone()) for matrix in stack.detach().unflatten(1, (parts, 4)).flatten(0, 1)]
    optimizer = Muon([{"params": [stack], "parts": parts}], lr=0.1)
    singles = Muon(alone, lr=0.1)
    for step in range(3):
        stack.grad = torch.randn(stack.shape, generator=torch.Generator().manual_seed(step))
        for matrix, gradient in zip(alone, stack.grad.unflatten(1, (parts, 4)).flatten(0, 1), strict=True):
            matrix.grad = gradient.clone()
        optimizer.step()
        singles.step()
    found = stack.detach().unflatten(1, (parts, 4)).flatten(0, 1)
    torch.testing.assert_close(found, torch.stack([matrix.detach() for matrix in alone]), atol=2e-3, rtol=0)  # bfloat16


@pytest.mark.parametrize("shape", [(16, 48), (48, 16), (5, 16, 16)])
def test_singular_vectors_stay_and_singular_values_come_near_one(shape):
    matrices = torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    left, _, right = torch.linalg.svd(matrices, full_matrices=False)
    inner = left.mT @ orthogonalised(matrices) @ right.mT
    values = inner.diagonal(dim1=-2, dim2=-1)
    torch.testing.assert_close(inner, torch.diag_embed(values), atol=1e-6, rtol=0)
    assert values.min() > 0.6 and values.max() < 1.3


def test_float32_is_nearer_to_float64_than_bfloat16_is():
    matrices = torch.randn(3, 24, 40, generator=torch.Generator().manual_seed(1))
    exact = orthogonalised(matrices.double())
    errors = {
        dtype: (orthogonalised(matrices, dtype).double() - exact).abs().max() for dtype in (torch.float32, torch.bfloat16)
    }
    assert errors[torch.float32] < 1e-4 < errors[torch.bfloat16] < 0.1


@pytest.mark.parametrize(
    ("device", "dtype", "products"),
    [
        ("cpu", "float32", torch.float32),
        ("cpu", "bfloat16", torch.bfloat16),
        ("cuda", "float32", torch.bfloat16),  # as published
    ],
)
def test_on_a_processor_products_are_in_the_dtype_of_the_run(device, dtype, products):
    assert _orthogonalisation_dtype(LoopConfig(dtype=dtype), torch.device(device)) == products


def test_the_optimizer_of_a_run_is_given_that_dtype():
    group = {"params": [parameter(4, 4)], "role": "matrices", "lr": 0.1, "weight_decay": 0.0}
    for dtype in ("float32", "bfloat16"):
        (optimizer,) = muon([group], LoopConfig(dtype=dtype))
        assert optimizer._dtype == getattr(torch, dtype)


def test_an_update_is_as_large_as_one_of_adamw():
    weight = parameter(64, 256)
    before = weight.detach().clone()
    after = steps(Muon([weight], lr=1.0, weight_decay=0.0), weight, count=1)
    assert (after - before).square().mean().sqrt() == pytest.approx(0.2, rel=0.15)


def test_a_vector_is_refused():
    with pytest.raises(ValueError, match=r"not a tensor of shape \(4,\)"):
        Muon([parameter(4)])

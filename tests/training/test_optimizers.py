import pytest
import torch

from bessemer.distributed.gradients import clip_gradients
from bessemer.distributed.mesh import ALONE
from bessemer.training.optimizers import build_optimizers, scale_learning_rates, split_parameters


@pytest.mark.parametrize("kind", ["muon", "adamw"])
def test_every_parameter_is_moved_by_one_group(decoder, settings, kind):
    optimizers = build_optimizers(decoder, settings.with_changes(optimizer=kind))
    grouped = [id(parameter) for optimizer in optimizers for group in optimizer.param_groups for parameter in group["params"]]
    assert sorted(grouped) == sorted(id(parameter) for parameter in decoder.parameters())


@pytest.mark.parametrize("kind", ["muon", "adamw"])
def test_matrices_of_blocks_decay_and_nothing_else(decoder, settings, kind):
    before = {name: parameter.detach().clone() for name, parameter in decoder.named_parameters()}
    for parameter in decoder.parameters():
        parameter.grad = torch.zeros_like(parameter)
    for optimizer in build_optimizers(decoder, settings.with_changes(optimizer=kind, weight_decay=1.0, learning_rate=0.5)):
        optimizer.step()
    for name, parameter in decoder.named_parameters():
        decays = name.startswith("layers.") and parameter.ndim == 2
        torch.testing.assert_close(parameter.detach(), before[name] * (0.5 if decays else 1.0), msg=name)


def test_embedding_and_norms_are_not_muons(decoder):
    matrices, others = split_parameters(decoder)
    names = {id(parameter): name for name, parameter in decoder.named_parameters()}
    assert {names[id(parameter)].split(".")[-2] for parameter in matrices} == {
        *("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    }
    assert all("norm" in names[id(parameter)] or "embed" in names[id(parameter)] for parameter in others)


def test_rates_are_scaled_from_their_peaks(decoder, settings):
    optimizers = build_optimizers(decoder, settings.with_changes(learning_rate=0.1, matrix_learning_rate=0.2))
    for factor in (0.5, 0.25):
        scale_learning_rates(optimizers, factor)
        rates = [group["lr"] for optimizer in optimizers for group in optimizer.param_groups]
        assert rates == pytest.approx([0.2 * factor, 0.1 * factor])


def test_a_long_gradient_is_cut_to_its_limit_and_a_short_one_kept(decoder):
    for size, expected in ((1.0, 0.5), (1e-6, None)):
        for parameter in decoder.parameters():
            parameter.grad = torch.full_like(parameter, size)
        before = torch.linalg.vector_norm(torch.cat([parameter.grad.flatten() for parameter in decoder.parameters()]))
        assert clip_gradients(decoder.parameters(), 0.5, ALONE) == pytest.approx(float(before), rel=1e-5)
        after = torch.linalg.vector_norm(torch.cat([parameter.grad.flatten() for parameter in decoder.parameters()]))
        assert float(after) == pytest.approx(expected or float(before), rel=1e-4)

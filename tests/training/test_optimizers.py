import pytest
import torch

from bessemer.core.errors import ConfigError
from bessemer.distributed.collectives import clip_gradients
from bessemer.distributed.mesh import ALONE
from bessemer.model.config import ModelConfig
from bessemer.model.initialisation import initial_decoder
from bessemer.training.checkpoint.state import HostCopies, TrainingState
from bessemer.training.optim.optimizers import (
    Adafactor,
    Lion,
    build_optimizers,
    parameter_groups,
    scale_learning_rates,
    step_optimizers,
)
from bessemer.training.optim.registry import OPTIMIZERS
from bessemer.training.pretrain_config import PretrainConfig

EVERY_PART = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "intermediate_size": 24,
    "max_position_embeddings": 32,
    "vocab_size": 64,
    "tie_word_embeddings": False,
    "num_experts": 4,
    "moe_intermediate_size": 8,
    "expert_bias": True,
    "first_k_dense_replace": 1,
    "layer_types": ("linear_attention", "full_attention"),
    "num_nextn_predict_layers": 1,
}


@pytest.fixture
def everything():
    """A decoder with a part of every kind: dense and sparse, softmax and linear attention, tokens further ahead."""
    return initial_decoder(ModelConfig(**EVERY_PART), seed=2).train()


def fill_gradients(model, seed=0):
    for number, parameter in enumerate(model.parameters()):
        generator = torch.Generator().manual_seed(1000 * seed + number)
        parameter.grad = torch.randn(parameter.shape, generator=generator)


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_every_parameter_is_moved_by_one_group(everything, settings, kind):
    optimizers = build_optimizers(everything, settings.with_changes(optimizer=kind))
    grouped = [id(parameter) for optimizer in optimizers for group in optimizer.param_groups for parameter in group["params"]]
    assert sorted(grouped) == sorted(id(parameter) for parameter in everything.parameters())


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_weights_of_blocks_decay_and_tables_norms_and_biases_do_not(everything, settings, kind):
    before = {name: parameter.detach().clone() for name, parameter in everything.named_parameters()}
    for parameter in everything.parameters():
        parameter.grad = torch.zeros_like(parameter)
    config = settings.with_changes(optimizer=kind, weight_decay=1.0, learning_rate=0.5, nesterov=False)
    for optimizer in build_optimizers(everything, config):
        optimizer.step()
    for name, parameter in everything.named_parameters():
        decays = name.startswith(("layers.", "mtp.")) and parameter.ndim >= 2 and not name.endswith("bias")
        torch.testing.assert_close(parameter.detach(), before[name] * (0.5 if decays else 1.0), msg=name)


def test_parameters_have_the_roles_that_their_names_say(everything, settings):
    names = {id(parameter): name for name, parameter in everything.named_parameters()}
    groups = {group["role"]: group["params"] for group in parameter_groups(everything, settings)}
    ends = {
        role: {".".join(names[id(parameter)].split(".")[-2:]) for parameter in parameters}
        for role, parameters in groups.items()
    }
    assert ends["gated_experts"] == {"experts.gate_up_proj"} and ends["experts"] == {"experts.down_proj"}
    assert ends["kernels"] == {"conv1d.weight"}
    assert {"q_proj.weight", "down_proj.weight", "in_proj_qkvz.weight", "router.weight"} <= ends["matrices"]
    assert {"embed_tokens.weight", "lm_head.weight", "experts.gate_up_bias"} <= ends["others"]
    assert not any("norm" in name or "bias" in name for name in ends["matrices"])


def test_matrices_have_a_learning_rate_of_their_own(everything, settings):
    config = settings.with_changes(learning_rate=0.1, matrix_learning_rate=0.2)
    rates = {group["role"]: group["lr"] for group in parameter_groups(everything, config)}
    assert rates == {"others": 0.1, "kernels": 0.1, "matrices": 0.2, "experts": 0.2, "gated_experts": 0.2}


def test_lions_step_is_that_of_the_paper():
    weight = torch.nn.Parameter(torch.tensor([1.0, 1.0, 1.0]))
    lion = Lion([weight], lr=0.1, betas=(0.9, 0.5), weight_decay=0.5)
    weight.grad = torch.tensor([2.0, -4.0, 0.0])
    lion.step()  # m = 0, so c is a tenth of the gradient; m becomes half of it
    assert weight.tolist() == pytest.approx([0.95 - 0.1, 0.95 + 0.1, 0.95])
    assert lion.state[weight]["exp_avg"].tolist() == [1.0, -2.0, 0.0]
    weight.grad = torch.tensor([-8.0, -1.0, 0.5])
    lion.step()  # c = 0.9 m + 0.1 g = 0.1, -1.9, 0.05
    assert weight.tolist() == pytest.approx([0.85 * 0.95 - 0.1, 1.05 * 0.95 + 0.1, 0.95 * 0.95 - 0.1])
    assert lion.state[weight]["exp_avg"].tolist() == [-3.5, -1.5, 0.25]


def test_sgd_adds_momentum_and_looks_ahead():
    moved = {}
    for nesterov in (False, True):
        config = PretrainConfig(steps=1, optimizer="sgd", learning_rate=0.1, momentum=0.5, nesterov=nesterov, weight_decay=0)
        model = torch.nn.Linear(1, 1, bias=False)
        torch.nn.init.zeros_(model.weight)
        optimizers = build_optimizers(model, config)
        for gradient in (1.0, 2.0):
            model.weight.grad = torch.tensor([[gradient]])
            step_optimizers(optimizers)
        moved[nesterov] = model.weight.item()
    assert moved[False] == pytest.approx(-0.1 * (1.0 + 2.5))  # velocities 1, 0.5 + 2
    assert moved[True] == pytest.approx(-0.1 * (1.0 + 0.5 + 2.0 + 0.5 * 2.5))


def test_adafactors_second_moment_is_a_product_of_means(settings):
    model = torch.nn.Linear(3, 2, bias=False)
    weight, gradient = model.weight.detach().clone(), torch.tensor([[1.0, 2.0, -3.0], [0.5, -1.0, 4.0]])
    model.weight.grad = gradient.clone()
    build_optimizers(model, settings.with_changes(optimizer="adafactor", learning_rate=0.1))[0].step()
    squares = gradient**2  # β₂ is 0 at the first step (Shazeer and Stern 2018, section 7.1)
    rows, columns = squares.mean(1, keepdim=True), squares.mean(0, keepdim=True)
    update = gradient / (rows * columns / rows.mean()).sqrt()
    update = update / update.square().mean().sqrt().clamp(min=1.0)  # clipped (algorithm 5)
    expected = weight - 0.1 * weight.square().mean().sqrt() * update
    torch.testing.assert_close(model.weight.detach(), expected)


@pytest.mark.parametrize("shape", [(6, 4), (3, 5, 4), (7,)])
def test_adafactor_steps_as_torchs(shape):
    here, there = (torch.nn.Parameter(torch.randn(shape, generator=torch.Generator().manual_seed(1))) for _ in range(2))
    options = {"lr": 0.3, "weight_decay": 0.1}
    for step in range(20):  # until 1 / √t is the smaller rate
        here.grad = torch.randn(shape, generator=torch.Generator().manual_seed(step))
        there.grad = here.grad.clone()
        if step == 0:
            optimizers = Adafactor([here], **options), torch.optim.Adafactor([there], **options)
        for optimizer in optimizers:
            optimizer.step()
    torch.testing.assert_close(here, there)


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_states_put_back_give_the_same_next_steps(everything, settings, kind):
    config = settings.with_changes(optimizer=kind)
    optimizers = build_optimizers(everything, config)
    for step in range(2):
        fill_gradients(everything, step)
        step_optimizers(optimizers)
    saved = HostCopies().copy(TrainingState(everything, optimizers).read())
    other = initial_decoder(everything.config, seed=9).train()
    others = build_optimizers(other, config)
    fresh = TrainingState(other, others)
    assert fresh.read()["optimizer"].keys() == saved["optimizer"].keys()  # what a restore fills
    fresh.write(saved)
    for model, own in ((everything, optimizers), (other, others)):
        fill_gradients(model, 2)
        scale_learning_rates(own, 0.5)
        step_optimizers(own)
    for (name, here), there in zip(everything.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(here, there), name


OWN = """
import torch

def plain(groups):
    return torch.optim.SGD(groups, lr=0.5)

def two(groups):
    matrices = [group for group in groups if group["role"] == "matrices"]
    return [torch.optim.SGD(matrices), torch.optim.AdamW([group for group in groups if group["role"] != "matrices"])]

def forgetful(groups):
    return torch.optim.SGD(groups[:1])

def nothing(groups):
    return None
"""


def test_an_optimizer_of_the_users_own_moves_the_weights(decoder, settings, tmp_path):
    (tmp_path / "own.py").write_text(OWN, encoding="utf-8")
    before = {name: parameter.detach().clone() for name, parameter in decoder.named_parameters()}
    config = settings.with_changes(optimizer="own.py:plain", learning_rate=0.25, weight_decay=0)
    optimizers = build_optimizers(decoder, config, tmp_path)
    fill_gradients(decoder)
    gradients = {name: parameter.grad.clone() for name, parameter in decoder.named_parameters()}
    step_optimizers(optimizers)
    for name, parameter in decoder.named_parameters():
        torch.testing.assert_close(parameter.detach(), before[name] - 0.25 * gradients[name])
    assert len(build_optimizers(decoder, config.with_changes(optimizer="own.py:two"), tmp_path)) == 2


@pytest.mark.parametrize(
    ("function", "complaint"),
    [
        ("forgetful", "each must be moved by one"),
        ("nothing", "must return a torch.optim.Optimizer, .* not NoneType"),
        ("absent", "has no function"),
    ],
)
def test_an_own_optimizer_that_is_none_is_refused(decoder, settings, tmp_path, function, complaint):
    (tmp_path / "own.py").write_text(OWN, encoding="utf-8")
    with pytest.raises(ConfigError, match=complaint):
        build_optimizers(decoder, settings.with_changes(optimizer=f"own.py:{function}"), tmp_path)


@pytest.mark.parametrize(
    ("section", "complaint"),
    [
        ({"optimizer": "moun"}, "there is no optimizer 'moun'; did you mean 'muon'"),
        ({"optimizer": "lion", "optimizer_bits": 8}, "optimizer_bits: 8 is for AdamW's states, and lion has none"),
    ],
)
def test_settings_that_name_no_optimizer_are_refused(section, complaint):
    with pytest.raises(ConfigError, match=complaint):
        PretrainConfig.parse({"steps": 1} | section, "pretrain")


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

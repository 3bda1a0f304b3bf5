"""What holds at one width holds at another (muP)."""

import pytest
import torch

from bessemer.core.errors import ConfigError
from bessemer.model.config import ModelConfig
from bessemer.model.initialisation import initial_decoder
from bessemer.model.storage.folder import load_model
from bessemer.training.data.batch import Batch
from bessemer.training.head import linear_cross_entropy
from bessemer.training.monitoring.coordinate_check import coordinate_check, growth, widened
from bessemer.training.objectives import next_token_loss
from bessemer.training.optim.mup import scale_initial_weights
from bessemer.training.optim.optimizers import build_optimizers, parameter_groups, step_optimizers
from bessemer.training.pretrain import pretrain
from bessemer.training.pretrain_config import PretrainConfig
from tests.cases import slow

from .conftest import RecordedProgress
from .test_optimizers import EVERY_PART

NARROW = ModelConfig(
    vocab_size=128,
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=1,
    num_key_value_heads=1,
    head_dim=32,
    intermediate_size=64,
    max_position_embeddings=32,
)
WIDTHS = (32, 64, 128, 256)
EXPERTS = NARROW.with_changes(
    num_experts=4, moe_intermediate_size=32, shared_expert_intermediate_size=32, shared_expert_gate=True
)


def growths(model, optimizer, rate, base):
    config = PretrainConfig(
        steps=1,
        batch_size=4,
        context_length=16,
        dtype="float32",
        compile=False,
        threads=1,
        optimizer=optimizer,
        learning_rate=rate,
        mup_base_width=base,
    )
    return growth(WIDTHS, coordinate_check(model, config, WIDTHS, seeds=(0, 1)))


@pytest.mark.parametrize(
    ("model", "optimizer", "rate"),
    [
        (NARROW, "adamw", 3e-3),
        slow(NARROW.with_changes(tie_word_embeddings=False), "muon", 1e-2),
        slow(NARROW.with_changes(norm_offset=True), "lion", 1e-3),
        slow(EXPERTS, "muon", 1e-2),
    ],
    ids=["adamw", "muon untied", "lion offset norms", "muon experts"],
)
def test_a_few_steps_move_activations_as_far_at_every_width(model, optimizer, rate):
    flat = growths(model, optimizer, rate, base=32)
    assert max(map(abs, flat.values())) < 0.3, flat
    growing = growths(model, optimizer, rate, base=None)
    assert min(slope for name, slope in growing.items() if name != "embedding") > 0.4, growing


def test_growth_is_the_exponent():
    assert growth([1, 2, 4], {"flat": [3.0, 3.0, 3.0], "square": [1.0, 4.0, 16.0]}) == pytest.approx({"flat": 0, "square": 2})


def test_the_last_norm_stands_for_a_factor_on_the_logits():
    ratio, config = 4.0, PretrainConfig(steps=1, optimizer="adamw", learning_rate=1e-3)
    tokens_BT = torch.randint(0, NARROW.vocab_size, (4, 17), generator=torch.Generator().manual_seed(1))
    batch = Batch(tokens_BT[:, :-1], tokens_BT[:, 1:])

    def trained(decoder, loss, *, last_norm_at):
        scale_initial_weights(decoder, ratio)
        torch.nn.init.constant_(decoder.norm.weight, last_norm_at)
        optimizers = build_optimizers(decoder.double().train(), config, width=ratio)
        groups = {id(group["params"][0]): group for group in optimizers[0].param_groups}
        groups[id(decoder.norm.weight)]["lr"] = config.learning_rate * last_norm_at
        for _ in range(3):
            loss(decoder, batch).backward()
            step_optimizers(optimizers)
        return decoder.eval()(batch.tokens_BT).detach()

    def divided(decoder, batch):
        hidden_ND = decoder.hidden(batch.tokens_BT).flatten(0, 1) / ratio
        targets_N = batch.targets_BT.flatten()
        return linear_cross_entropy(hidden_ND, decoder.head_weight, targets_N) / len(targets_N)

    folded = trained(initial_decoder(NARROW, 1), next_token_loss, last_norm_at=1 / ratio)
    multiplied = trained(initial_decoder(NARROW, 1), divided, last_norm_at=1.0)
    torch.testing.assert_close(folded, multiplied / ratio, rtol=1e-4, atol=1e-6)


def test_at_the_base_nothing_changes():
    config = PretrainConfig(steps=1, weight_decay=0.3)
    model, same = (initial_decoder(ModelConfig(**EVERY_PART), seed=2) for _ in range(2))
    assert scale_initial_weights(model, 1.0)
    for (name, here), there in zip(model.named_parameters(), same.parameters(), strict=True):
        assert torch.equal(here, there), name
    assert parameter_groups(model, config, 1.0) == parameter_groups(model, config)


@pytest.mark.parametrize(("optimizer", "of_matrices"), [("adamw", 1 / 4), ("lion", 1 / 4), ("muon", 1 / 2)])
def test_each_kind_of_weight_has_its_rate_and_decays_as_before(optimizer, of_matrices):
    config = PretrainConfig(steps=1, optimizer=optimizer, learning_rate=0.1, weight_decay=0.3)
    model = initial_decoder(ModelConfig(**EVERY_PART), seed=2)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    rates = {}
    for group in parameter_groups(model, config, 4.0):
        for parameter in group["params"]:
            rates[names[id(parameter)]] = group["lr"] / 0.1
            assert group["lr"] * group["weight_decay"] == pytest.approx(0.0 if group["role"] == "others" else 0.03)
    for name, rate in rates.items():
        if name in ("norm.weight", "mtp.0.norm.weight") or "router.weight" in name:
            expected = 1 / 4
        elif (
            model.get_parameter(name).ndim == 1
            or name.endswith("bias")
            or "conv1d" in name
            or "embed" in name
            or "head" in name
        ):
            expected = 1.0
        else:
            expected = of_matrices
        assert rate == pytest.approx(expected), name


def test_initial_matrices_shrink_with_the_root_of_the_width_and_tables_do_not():
    model, before = (initial_decoder(ModelConfig(**EVERY_PART), seed=2) for _ in range(2))
    assert scale_initial_weights(model, 4.0)
    ratios = {
        name: float(parameter.detach().norm() / before.get_parameter(name).detach().norm().clamp(min=1e-9))
        for name, parameter in model.named_parameters()
        if float(parameter.detach().norm()) > 0
    }
    assert ratios["embed_tokens.weight"] == ratios["lm_head.weight"] == ratios["layers.0.linear_attn.conv1d.weight"] == 1
    assert ratios["norm.weight"] == ratios["mtp.0.norm.weight"] == ratios["layers.1.mlp.router.weight"] == pytest.approx(1 / 4)
    for name in ("layers.1.self_attn.q_proj.weight", "layers.1.mlp.experts.gate_up_proj", "mtp.0.proj.weight"):
        assert ratios[name] == pytest.approx(1 / 2)


def test_a_trained_model_keeps_its_weights(decoder):
    with torch.no_grad():
        decoder.norm.weight.mul_(1.01)
    before = {name: parameter.detach().clone() for name, parameter in decoder.named_parameters()}
    assert not scale_initial_weights(decoder, 4.0)
    for name, parameter in decoder.named_parameters():
        assert torch.equal(parameter, before[name])


def test_pretraining_scales_a_new_model_and_saves_the_same_architecture(settings, model_folder, tokenized, tmp_path):
    progress = RecordedProgress()
    config = settings.with_changes(steps=1, learning_rate=1e-9, mup_base_width=8, sample_points=0, evaluate_tokens=100)
    pretrain(config, model_folder, tokenized / "tokens", tmp_path, seed=1, device="cpu", progress=progress)
    before, after = load_model(model_folder), load_model(tmp_path / "model")
    assert after.config == before.config and "from a width of 8" in " ".join(progress.lines)
    torch.testing.assert_close(after.norm.weight, before.norm.weight / 4)
    query = "layers.0.self_attn.q_proj.weight"
    torch.testing.assert_close(after.get_parameter(query), before.get_parameter(query) / 2, rtol=1e-4, atol=1e-7)


def test_a_wider_model_has_more_heads_of_the_same_size():
    wide = widened(NARROW, 128)
    assert (wide.num_attention_heads, wide.head_dim, wide.intermediate_size) == (4, 32, 256)
    with pytest.raises(ValueError, match="num_attention_heads 1 cannot grow"):
        widened(NARROW, 48)


@pytest.mark.parametrize("optimizer", ["sgd", "adafactor"])
def test_optimizers_without_a_size_of_step_are_refused(optimizer):
    with pytest.raises(ConfigError, match="mup_base_width is for muon, adamw, lion and your own"):
        PretrainConfig.parse({"steps": 1, "optimizer": optimizer, "mup_base_width": 64}, "pretrain")

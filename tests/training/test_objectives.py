from dataclasses import replace

import pytest
import torch
from torch.nn.functional import cross_entropy

from bessemer.core.errors import ConfigError
from bessemer.model.config import ModelConfig
from bessemer.model.initialisation import initial_decoder
from bessemer.training import objectives
from bessemer.training.data.batch import IGNORE_INDEX, Batch
from bessemer.training.objectives import (
    MTP_LOSS_WEIGHT,
    LossContext,
    NextTokenObjective,
    as_objective,
    build_objective,
    mean_by_source,
    mtp_targets,
    next_token_loss,
    sums_by_source,
    token_losses,
)
from bessemer.training.pretrain_config import PretrainConfig
from bessemer.training.validation import summed_loss


def test_the_loss_of_a_model_is_that_of_its_logits(decoder):
    tokens = torch.randint(0, 97, (2, 17), generator=torch.Generator().manual_seed(0))
    batch = Batch(tokens[:, :-1], tokens[:, 1:])
    expected = cross_entropy(decoder(batch.tokens_BT).flatten(0, 1), batch.targets_BT.flatten())
    torch.testing.assert_close(next_token_loss(decoder, batch), expected)


def test_a_z_loss_is_asked_for_in_the_settings_and_no_part_of_validation(decoder):
    tokens = torch.randint(0, 97, (2, 17), generator=torch.Generator().manual_seed(0))
    batch = Batch(tokens[:, :-1], tokens[:, 1:])
    context, configs = LossContext(), [PretrainConfig(steps=1, z_loss=z_loss) for z_loss in (0.0, 0.5)]
    objectives = [build_objective(config, decoder.config) for config in configs]
    decoder.train()
    plain, with_z = (objective(decoder, batch, context).sums["next_token"] / 32 for objective in objectives)
    decoder.eval()
    assert objectives[1](decoder, batch, context).sums["next_token"].item() / 32 == pytest.approx(plain.item())
    log_sums = decoder(batch.tokens_BT).logsumexp(-1)
    torch.testing.assert_close(with_z - plain, 0.5 * log_sums.square().mean())
    with torch.no_grad():
        assert summed_loss(decoder, batch.tokens_BT, batch.targets_BT) / 32 == pytest.approx(plain.item())


def test_a_z_loss_beside_a_loss_of_your_own_is_refused():
    with pytest.raises(ConfigError, match="add it there"):
        PretrainConfig.parse({"steps": 1, "z_loss": 1e-4, "loss": "mine.py:loss"}, "pretrain")


def test_validation_caps_logits_as_the_model_does():
    model = initial_decoder(ModelConfig(vocab_size=50, final_logit_softcapping=0.1, initializer_range=0.5), seed=1)
    tokens = torch.randint(0, 50, (2, 9), generator=torch.Generator().manual_seed(0))
    expected = cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten(), reduction="sum")
    with torch.no_grad():
        assert summed_loss(model, tokens[:, :-1], tokens[:, 1:]) == pytest.approx(expected.item())


@pytest.fixture
def sourced():
    draw = torch.Generator().manual_seed(1)
    tokens = torch.randint(0, 97, (4, 17), generator=draw)
    targets = tokens[:, 1:].masked_fill(torch.rand(4, 16, generator=draw) < 0.3, IGNORE_INDEX)
    sources = torch.randint(0, 2, (4, 16), generator=draw, dtype=torch.int16)
    return Batch(tokens[:, :-1], targets, sources_BT=sources, source_names=("code", "web", "nothing"))


def test_means_weighed_by_their_tokens_are_the_loss(decoder, sourced):
    decoder.eval()
    sums, counts = sums_by_source(token_losses(decoder, sourced), sourced)
    assert counts.tolist()[2] == 0 and int(counts.sum()) == int((sourced.targets_BT != IGNORE_INDEX).sum())
    torch.testing.assert_close(sums.sum() / counts.sum(), next_token_loss(decoder, sourced).double(), rtol=1e-5, atol=0)
    assert set(mean_by_source(sums, counts, sourced.source_names)) == {"code", "web"}


def test_each_source_has_the_loss_of_its_own_targets(decoder, sourced):
    decoder.eval()
    means = mean_by_source(*sums_by_source(token_losses(decoder, sourced), sourced), sourced.source_names)
    for number, name in enumerate(("code", "web")):
        alone = replace(
            sourced,
            targets_BT=sourced.targets_BT.masked_fill(sourced.sources_BT != number, IGNORE_INDEX),
        )
        assert means[name] == pytest.approx(next_token_loss(decoder, alone).item(), rel=1e-5)


def test_sums_of_parts_add_up(sourced):
    losses = torch.rand(4, 16, dtype=torch.float64)
    whole = sums_by_source(losses, sourced)
    parts = [sums_by_source(losses[rows], sourced.rows(rows)) for rows in (slice(0, 1), slice(1, 4))]
    for number in range(2):
        torch.testing.assert_close(parts[0][number] + parts[1][number], whole[number])


def test_a_batch_without_targets_has_no_losses(sourced):
    silent = replace(sourced, targets_BT=torch.full_like(sourced.targets_BT, IGNORE_INDEX))
    assert mean_by_source(*sums_by_source(torch.zeros(4, 16), silent), silent.source_names) == {}


def test_module_k_of_multi_token_prediction_is_asked_for_the_token_k_further():
    shape = {"hidden_size": 32, "num_hidden_layers": 1, "intermediate_size": 40, "num_nextn_predict_layers": 2}
    model = initial_decoder(ModelConfig(vocab_size=50, **shape), seed=1).train()
    tokens = torch.randint(0, 50, (2, 9), generator=torch.Generator().manual_seed(0))
    batch = Batch(tokens[:, :-1], tokens[:, 1:])
    sums = build_objective(PretrainConfig(steps=1), model.config)(model, batch, LossContext()).sums
    _, further = model.hidden_and_mtp(batch.tokens_BT)
    expected = 0.0
    for step, hidden_BTD in enumerate(further, start=1):
        logits = (hidden_BTD @ model.head_weight.T)[:, : 8 - step]
        expected += cross_entropy(logits.flatten(0, 1), tokens[:, 1 + step :].flatten(), reduction="sum")
    # the mean over the modules, weighed
    assert sums["mtp"].item() == pytest.approx(expected.item() * MTP_LOSS_WEIGHT / 2, rel=1e-5)


def test_of_a_model_that_predicts_more_tokens_validation_is_the_next_ones_loss_alone():
    shape = {"hidden_size": 32, "num_hidden_layers": 1, "intermediate_size": 40, "num_nextn_predict_layers": 2}
    model = initial_decoder(ModelConfig(vocab_size=50, **shape), seed=1)
    batch = Batch(torch.zeros(2, 8, dtype=torch.int64), torch.ones(2, 8, dtype=torch.int64))
    objective = build_objective(PretrainConfig(steps=1), model.config)
    assert {mode: set(objective(model.train(mode), batch, LossContext()).sums) for mode in (True, False)} == {
        True: {"next_token", "mtp"},
        False: {"next_token"},
    }


def test_targets_further_on_are_of_the_same_document_and_of_tokens_with_a_target():
    targets_BT = torch.tensor([[1, 2, 3, 4, IGNORE_INDEX, 6]])
    documents_BT = torch.tensor([[1, 1, 1, 2, 2, 2]])
    none = IGNORE_INDEX
    assert mtp_targets(targets_BT, documents_BT, 1).tolist() == [[2, 3, none, none, none, none]]
    assert mtp_targets(targets_BT, documents_BT, 2).tolist() == [[3, none, none, 6, none, none]]
    assert mtp_targets(targets_BT, None, 2).tolist() == [[3, 4, none, 6, none, none]]


def test_a_loss_of_ones_own_is_minimised_and_validation_is_the_cross_entropy(decoder, sourced):
    def constant(model, hidden_BTD, targets_BT, z_loss):
        return hidden_BTD.sum() * 0 + 7

    objective = NextTokenObjective(decoder.config, training_loss=constant)
    assert objective(decoder.train(), sourced, LossContext()).sums["next_token"].item() == 7
    validated = objective(decoder.eval(), sourced, LossContext()).sums["next_token"]
    assert validated.item() == pytest.approx(token_losses(decoder, sourced).sum().item(), rel=1e-5)
    assert objective.denominators(sourced)["next_token"].value == sourced.targets
    own = as_objective(lambda model, batch: torch.tensor(0.5))
    assert own(decoder, sourced, LossContext()).sums["loss"].item() == 0.5 * sourced.targets
    assert own.denominators(sourced)["loss"].value == sourced.targets and as_objective(own) is own


def test_losses_of_tokens_are_the_same_however_few_logits_are_held_and_zero_without_a_target(decoder, sourced, monkeypatch):
    whole = token_losses(decoder.eval(), sourced)
    assert (whole == 0).tolist() == (sourced.targets_BT == IGNORE_INDEX).tolist()
    logits, rows = decoder.logits, set()
    monkeypatch.setattr(decoder, "logits", lambda hidden_ND: rows.add(len(hidden_ND)) or logits(hidden_ND))
    for elements, most in ((1, 1), (97 * 3, 3)):
        monkeypatch.setattr(objectives, "_SCORING_CHUNK_ELEMENTS", elements)
        torch.testing.assert_close(token_losses(decoder, sourced), whole)
        assert max(rows) == most
    silent = replace(sourced, targets_BT=torch.full_like(sourced.targets_BT, IGNORE_INDEX))
    assert next_token_loss(decoder, silent).item() == 0

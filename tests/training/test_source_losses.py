from dataclasses import replace

import pytest
import torch

from bessemer.training.data.batches import IGNORED, Batch
from bessemer.training.objectives import next_token_loss
from bessemer.training.source_losses import mean_by_source, sums_by_source, token_losses


@pytest.fixture
def batch():
    draw = torch.Generator().manual_seed(1)
    tokens = torch.randint(0, 97, (4, 17), generator=draw)
    targets = tokens[:, 1:].masked_fill(torch.rand(4, 16, generator=draw) < 0.3, IGNORED)
    sources = torch.randint(0, 2, (4, 16), generator=draw, dtype=torch.int16)
    return Batch(tokens[:, :-1], targets, sources_BT=sources, source_names=("code", "web", "nothing"))


def test_means_weighed_by_their_tokens_are_the_loss(decoder, batch):
    decoder.eval()
    sums, counts = sums_by_source(token_losses(decoder, batch), batch)
    assert counts.tolist()[2] == 0 and int(counts.sum()) == int((batch.targets_BT != IGNORED).sum())
    torch.testing.assert_close(sums.sum() / counts.sum(), next_token_loss(decoder, batch).double(), rtol=1e-5, atol=0)
    assert set(mean_by_source(sums, counts, batch.source_names)) == {"code", "web"}


def test_each_source_has_the_loss_of_its_own_targets(decoder, batch):
    decoder.eval()
    means = mean_by_source(*sums_by_source(token_losses(decoder, batch), batch), batch.source_names)
    for number, name in enumerate(("code", "web")):
        alone = replace(batch, targets_BT=batch.targets_BT.masked_fill(batch.sources_BT != number, IGNORED))
        assert means[name] == pytest.approx(next_token_loss(decoder, alone).item(), rel=1e-5)


def test_sums_of_parts_add_up(batch):
    losses = torch.rand(4, 16, dtype=torch.float64)
    whole = sums_by_source(losses, batch)
    parts = [sums_by_source(losses[rows], batch.rows(rows)) for rows in (slice(0, 1), slice(1, 4))]
    for number in range(2):
        torch.testing.assert_close(parts[0][number] + parts[1][number], whole[number])


def test_a_batch_without_targets_has_no_losses(batch):
    silent = replace(batch, targets_BT=torch.full_like(batch.targets_BT, IGNORED))
    assert mean_by_source(*sums_by_source(torch.zeros(4, 16), silent), silent.source_names) == {}

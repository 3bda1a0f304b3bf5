import torch

from bessemer.distributed.mesh import ALONE
from bessemer.training.objectives import Count, Metric, Terms
from bessemer.training.trainer import Figure, LossTotals, TotalsReducer, whole_denominators


def test_the_loss_is_the_sum_of_terms_over_their_own_denominators():
    counts = {"policy": Count(8), "value": Count(2, "sequence"), "size": Count(4.0, "constant")}
    terms = [
        Terms(
            {"policy": torch.tensor(6.0), "value": torch.tensor(1.0)},
            {"ratio": Metric(torch.tensor(3.0), 2, torch.tensor(2.0))},
        ),
        Terms(
            {"policy": torch.tensor(2.0), "value": torch.tensor(3.0)},
            {"ratio": Metric(torch.tensor(1.0), 2, torch.tensor(5.0))},
        ),
    ]
    totals = TotalsReducer(ALONE).reduced(terms, whole_denominators(counts, ALONE))
    assert totals.loss == 8 / 8 + 4 / 2 + 0 / 4
    assert totals.metrics == {"loss_policy": 1.0, "loss_value": 2.0, "loss_size": 0.0, "ratio": 1.0, "ratio_max": 5.0}


def test_totals_of_batches_add_up():
    first = LossTotals({"loss": 6.0}, {"loss": 3.0}, {"margin": Figure(2.0, 2.0, 1.5)})
    second = LossTotals({"loss": 1.0}, {"loss": 1.0}, {"margin": Figure(4.0, 1.0, 4.0)})
    both = first + second
    assert both.loss == 7 / 4
    assert both.metrics == {"margin": 2.0, "margin_max": 4.0}
    assert (LossTotals() + first) == first


def test_without_tokens_the_loss_is_zero_and_no_mean_is_told():
    totals = TotalsReducer(ALONE).reduced(
        [Terms({"loss": torch.tensor(0.0)}, {"ratio": Metric(torch.tensor(0.0), 0)})], {"loss": 0.0}
    )
    assert totals.loss == 0
    assert totals.metrics == {}, "which JSON could not hold"

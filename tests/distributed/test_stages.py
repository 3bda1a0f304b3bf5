"""How a model and a batch are cut for a pipeline; no process is needed."""

import pytest
import torch

from bessemer.core.errors import ConfigError
from bessemer.distributed.layout import Layout, ParallelConfig
from bessemer.distributed.stages import split_into_stages
from bessemer.model.config import ModelConfig
from bessemer.model.initialisation import initial_decoder
from bessemer.training.pretrain_config import PretrainConfig

from .parity import DENSE, SETTINGS, RandomBatches

DEEP = DENSE | {"num_hidden_layers": 6}


def parts(layout, in_a_v=False, **changes):
    """For every rank the model that is left, and its stages."""
    found = []
    for rank in range(layout.pipeline):
        model = initial_decoder(ModelConfig(**DEEP | changes), seed=3)
        found.append((model, split_into_stages(model, layout, rank, in_a_v=in_a_v)))
    return found


@pytest.mark.parametrize("changes", [{}, {"tie_word_embeddings": True}, {"position_type": "learned"}], ids=str)
@pytest.mark.parametrize("layout, in_a_v", [(Layout(pipeline=3), False), (Layout(pipeline=3, stages_per_rank=2), True)])
def test_every_weight_is_trained_on_one_rank_under_its_name(layout, in_a_v, changes):
    whole = initial_decoder(ModelConfig(**DEEP | changes), seed=3).state_dict()
    held = [name for model, _ in parts(layout, in_a_v, **changes) for name in model.state_dict()]
    assert sorted(held) == sorted(whole)


def test_stages_are_dealt_out_in_turn_or_in_a_v():
    dealt = Layout(pipeline=3, stages_per_rank=2)
    assert [[stage.number for stage in stages] for _, stages in parts(dealt)] == [[0, 3], [1, 4], [2, 5]]
    assert [[stage.number for stage in stages] for _, stages in parts(dealt, in_a_v=True)] == [[0, 5], [1, 4], [2, 3]]


def test_the_stages_one_after_the_other_compute_what_the_model_does():
    whole = initial_decoder(ModelConfig(**DEEP), seed=3)
    rows = RandomBatches(2, 16, DEEP["vocab_size"], packed=True).batch(0)
    received = ()
    for _, (stage,) in parts(Layout(pipeline=3)):
        stage.begin(rows, received)
        if not stage.is_last:
            received = (stage.hidden_states(),)
    asked = (rows.tokens_BT, rows.positions_BT, rows.document_ids_BT)
    found, expected = (model.hidden(asked[0], positions_BT=asked[1], document_ids_BT=asked[2]) for model in (stage, whole))
    assert torch.equal(found, expected)


def test_a_loss_that_asks_for_other_states_is_told_that_it_cannot():
    (_, (first,)), (_, (last,)) = parts(Layout(pipeline=2))
    rows = RandomBatches(2, 16, DEEP["vocab_size"]).batch(0)
    first.begin(rows, ())
    received = (first.hidden_states(),)
    last.begin(rows, received)
    with pytest.raises(ConfigError, match="must ask the model for its states once a batch"):
        last.hidden(rows.tokens_BT + 0)
    last.begin(rows, received)
    last.hidden(rows.tokens_BT)
    with pytest.raises(ConfigError, match="set pipeline: 1"):
        last.hidden(rows.tokens_BT)


@pytest.mark.parametrize(
    "ranks, rows, size, schedule, count",
    [
        (2, 8, None, "1f1b", 8),
        (2, 64, None, "gpipe", 8),
        (4, 12, None, "1f1b", 12),
        (4, 12, None, "interleaved", 12),
        (3, 4, None, "zbv", 4),
        (2, 8, 2, "zero_bubble", 4),
        (2, 6, 3, "1f1b", 2),
    ],
)
def test_micro_batches_keep_the_bubble_small(ranks, rows, size, schedule, count):
    assert Layout(pipeline=ranks).micro_batches(rows, size, schedule) == count


@pytest.mark.parametrize(
    "rows, size, schedule, message",
    [
        (2, None, "1f1b", "needs at least 4 micro-batches, of one size, and the 2 rows of a rank cannot be cut so"),
        (6, None, "interleaved", "needs 4 micro-batches or a multiple of that, of one size, and the 6 rows"),
        (8, 3, "1f1b", "micro_batch_size 3 does not divide the 8 rows of a rank"),
        (8, 4, "gpipe", "micro_batch_size 4 cuts the 8 rows of a rank into 2; change micro_batch_size or batch_size"),
    ],
)
def test_rows_that_cannot_be_cut_are_refused(rows, size, schedule, message):
    with pytest.raises(ConfigError, match=message):
        Layout(pipeline=4).micro_batches(rows, size, schedule)


def test_more_stages_than_layers_are_refused():
    layout = Layout.of(ParallelConfig(pipeline=2, pipeline_schedule="interleaved", stages_per_rank=3), 2)
    with pytest.raises(ConfigError, match="pipeline 2 × stages_per_rank 3 = 6 exceeds the model's 4 layers"):
        layout.check(ModelConfig(**DENSE), 16)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"parallel": {"pipeline_schedule": "1f1b", "stages_per_rank": 2}}, "a rank of 1f1b holds 1; interleaved and"),
        ({"parallel": {"pipeline": 2, "pipeline_schedule": "zbv"}, "compile": True}, "set compile: false"),
        (
            {"parallel": {"pipeline": 2, "pipeline_schedule": "zero_bubble"}, "activation_checkpointing": "selective"},
            "zero_bubble needs it twice; set none or full",
        ),
    ],
)
def test_settings_that_do_not_go_together_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        PretrainConfig.parse(SETTINGS | settings)

"""Batch-size warm-up: batches grow, and rows are read in the order in which they are read without it."""

import numpy as np
import pytest
import torch

from bessemer.core.errors import ConfigError
from bessemer.core.metrics import read_metrics
from bessemer.distributed.layout import Layout
from bessemer.model.config import ModelConfig
from bessemer.model.initialisation import initial_decoder
from bessemer.tokenization.shards import TokenShards
from bessemer.training import autotune
from bessemer.training.autotune import StepTiming, resolve
from bessemer.training.checkpoint.manager import CHECKPOINTS, checkpoint_weights, newest_checkpoint
from bessemer.training.config import LoopConfig
from bessemer.training.config_parts import BatchSizes, growing_sizes, stages_by_rows, stages_by_steps
from bessemer.training.data.batch import Batch, concatenated
from bessemer.training.data.batches import StatelessBatches, TokenBatches, WarmedUpBatches
from bessemer.training.loop import train
from bessemer.training.pretrain import AnnealedBatches
from bessemer.training.pretrain_config import PretrainConfig
from bessemer.training.runtime import Runtime
from tests.cases import slow

from .conftest import TINY

GROWING = {"start": 2, "steps": 3}


def test_sizes_double_or_grow_by_an_increment_as_megatrons_do():
    assert growing_sizes(2, 16, None) == [2, 4, 8]
    # --rampup-batch-size 16 8 … with a global batch of 48
    assert growing_sizes(16, 48, 8) == [16, 24, 32, 40]
    assert stages_by_steps([2, 4, 8], 7) == ((2, 2), (4, 3), (8, 2))
    assert stages_by_rows([2, 4, 8], 48) == ((2, 8), (4, 4), (8, 2))


def test_counts_agree_with_the_sizes_one_by_one():
    sizes = BatchSizes(16, stages_by_steps([2, 4, 8], 7))
    each = [sizes.of_step(step) for step in range(12)]
    assert each == [2, 2, 4, 4, 4, 8, 8, 16, 16, 16, 16, 16]
    assert [sizes.rows_before(step) for step in range(13)] == [0, *np.cumsum(each)]
    assert (sizes.warmup_steps, sizes.rows_before(7)) == (7, 32)
    for rows in range(1, 112):
        assert sizes.steps_for(rows) == next(step for step in range(13) if sizes.rows_before(step) >= rows)
    assert sizes.steps_to(10) == 3.5 and sizes.steps_to(40) == 7.5


class Numbered(StatelessBatches):
    """Row r holds the number r."""

    fingerprint = "numbered"

    def __init__(self, batch_size, first=0):
        self.batch_size, self._first = batch_size, first

    def batch(self, step, rows=slice(None), mesh=None):
        numbers = torch.arange(step * self.batch_size, (step + 1) * self.batch_size)[rows, None] + self._first
        return Batch(numbers, numbers)


def read(source, steps, ranks=1):
    """The rows that all ranks read."""
    layout = Layout(data_shard=ranks)
    slices = [[layout.rows(rank, source.batch_size_at(step)) for rank in range(layout.world_size)] for step in range(steps)]
    return [source.batch(step, rows).tokens_BT.flatten().tolist() for step, each in enumerate(slices) for rows in each]


@pytest.mark.parametrize("ranks", [1, 2])
def test_every_row_is_read_once_and_in_order(ranks):
    source = WarmedUpBatches(Numbered(12), BatchSizes(12, stages_by_steps([4, 8], 5)))
    batches = read(source, 8, ranks)
    assert [row for batch in batches for row in batch] == list(range(2 * 4 + 3 * 8 + 3 * 12))


def test_a_second_mixture_begins_behind_the_first_wherever_that_is_in_a_batch():
    source = WarmedUpBatches(
        AnnealedBatches(Numbered(8), Numbered(8, first=100), 13), BatchSizes(8, stages_by_steps([2, 4], 4))
    )
    rows = [row for batch in read(source, 6) for row in batch]
    assert rows == [*range(13), *range(100, 100 + 28 - 13)]


def test_joined_batches_keep_values_of_tokens_and_sequences():
    first, second = (Batch(torch.full((1, 3), value), torch.full((1, 3), value), sequences=value) for value in (1, 2))
    first = first.with_values(per_token={"mask": torch.ones(1, 3)}, per_sequence={"reward": torch.ones(1, 1)})
    second = second.with_values(per_token={"mask": torch.zeros(1, 3)}, per_sequence={"reward": torch.full((1, 2), 2.0)})
    joined = concatenated([first, second])
    assert joined.tokens_BT.tolist() == [[1, 1, 1], [2, 2, 2]] and joined.sequences == 2
    assert joined.per_token["mask"].tolist() == [[1, 1, 1], [0, 0, 0]]
    assert joined.per_sequence["reward"].tolist() == [[1, 0], [2, 2]]


@pytest.fixture
def run(tokenized, settings):
    """Trains with batches of 2, 4 and 8 rows."""
    shards = TokenShards(tokenized / "tokens" / "train")
    growing = settings.with_changes(batch_size=8, batch_size_warmup=GROWING)

    def run(out, stop_after=None, **changes):
        config = growing.with_changes(**changes)
        shape = {name: value for name, value in TINY.items() if name != "preset"}
        model = initial_decoder(ModelConfig(**shape, vocab_size=shards.vocab_size), seed=2)
        batches = TokenBatches(shards, batch_size=8, context_length=32, seed=1)

        def stop(finished, trainer):
            if finished == stop_after:
                raise InterruptedError
            return {}

        train(model, batches, config, out, runtime=Runtime.of(config, torch.device("cpu")), seed=1, on_step_end=stop)
        return checkpoint_weights(newest_checkpoint(out / CHECKPOINTS))

    return run


@pytest.mark.parametrize("stop_after", [slow(1), 3])
def test_stopped_in_the_warm_up_and_resumed_every_bit_is_the_same(run, tmp_path, stop_after):
    with pytest.raises(InterruptedError):
        run(tmp_path / "stopped", stop_after, checkpoint_minutes=1e-9)
    resumed, whole = run(tmp_path / "stopped"), run(tmp_path / "whole")
    assert all(torch.equal(resumed[name], whole[name]) for name in whole)
    records = [read_metrics(tmp_path / name / "metrics.jsonl") for name in ("stopped", "whole")]
    assert [record["loss"] for record in records[0]] == [record["loss"] for record in records[1]]
    # 2 + 2 + 4 rows of 32 tokens, then 8 a step
    assert [record["tokens"] for record in records[1]] == [64, 128, 256, 512, 768, 1024]


def test_micro_batches_change_it_by_rounding_alone(run, tmp_path):
    whole, cut = run(tmp_path / "whole"), run(tmp_path / "cut", micro_batch_size=2)
    for name, weights in whole.items():
        torch.testing.assert_close(cut[name], weights, rtol=1e-3, atol=1e-5)


def test_lengths_in_tokens_count_the_small_batches():
    growing = {"batch_size": 8, "context_length": 16, "batch_size_warmup": {"start": 2, "tokens": 128}}
    config = LoopConfig(steps=20, **growing, warmup_tokens=160, decay_tokens=256)
    # two rows in two steps, four in one, eight in the other 17: 64 tokens each, then 128 a step
    assert config.batch_sizes.stages == ((2, 2), (4, 1))
    assert config.tokens_before(20) == 128 + 17 * 128
    assert config.warmup_length(20) == 3.25 and config.decay_length(20) == 2
    assert config.batch_sizes.steps_for(129 // 16 + 1) == 4


def test_the_rate_grows_with_the_root_of_the_batch_where_asked():
    growing = {"batch_size": 8, "batch_size_warmup": {"start": 2, "steps": 4}, "warmup_fraction": 0.0}
    plain, scaled = LoopConfig(steps=10, **growing), LoopConfig(steps=10, **growing)
    scaled = scaled.with_changes(batch_size_warmup=growing["batch_size_warmup"] | {"scale_learning_rate": True})
    ratios = [scaled.learning_rates.factor(step) / plain.learning_rates.factor(step) for step in range(6)]
    assert ratios == pytest.approx([0.5, 0.5, 0.5**0.5, 0.5**0.5, 1, 1])


def test_minutes_hold_more_of_the_small_steps(model_folder, monkeypatch):
    def measured(config, *given):
        # a second for each row, and one besides
        return StepTiming(config.dtype, False, (config.batch_size + 1.0,) * 3, 1.0)

    monkeypatch.setattr(autotune, "measure_steps", measured)
    settings = {"minutes": 10, "batch_size": 8, "context_length": 32, "evaluate_every": 10**9, "diagnostics_every": 0}
    config = PretrainConfig(**settings, dtype="float32", compile=False, batch_size_warmup={"start": 2, "steps": 40})
    # 20 steps of 3 s and 20 of 5 s leave 440 s for steps of 9
    assert resolve(config, model_folder, device="cpu")[0].steps == 40 + 48
    assert resolve(config.with_changes(batch_size_warmup=None), model_folder, device="cpu")[0].steps == 66


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"start": 8}, "starts at 8 rows, which is no less than batch_size 8"),
        ({"start": 3}, "doublings of 3 rows lead from 6 to 12, past batch_size 8"),
        ({"start": 2, "increment": 4}, "increments of 4 from 2 rows lead from 6 to 10, past batch_size 8"),
        ({"start": 1, "steps": 2}, "2 steps are fewer than the 3 sizes before batch_size: 1, 2, 4"),
        ({"tokens": 5}, "give steps or tokens, one of them"),
        ({"steps": 11}, "its 11 steps exceed the run's 10"),
    ],
)
def test_a_warm_up_that_does_not_lead_to_the_batch_is_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        LoopConfig.parse({"steps": 10, "batch_size": 8, "batch_size_warmup": GROWING | changes}, "sft")


def test_batches_that_ranks_and_micro_batches_do_not_divide_are_refused():
    config = LoopConfig(steps=10, batch_size=8, batch_size_warmup=GROWING)
    assert config.rows_conflict(2, None) is None
    assert config.rows_conflict(4, None) == "batch_size_warmup: a batch of 2 rows is no multiple of 4 ranks"
    assert "a batch of 2 rows is no multiple of 2 ranks × micro_batch_size 2" in config.rows_conflict(2, 2)
    with pytest.raises(ConfigError, match="a batch of 2 rows is no multiple of micro_batch_size 4"):
        config.with_changes(micro_batch_size=4)
    with pytest.raises(ConfigError, match="a pipeline has a fixed number"):
        config.with_changes(parallel={"pipeline": 2})


def test_a_source_that_makes_its_own_batches_is_refused():
    class SelfMade(Numbered):
        lookahead = 0

    with pytest.raises(ConfigError, match="this method makes its own"):
        WarmedUpBatches(SelfMade(8), BatchSizes(8, stages_by_steps([4], 1)))

"""Every kind of objective gives the same run on any layout, in micro-batches, and after `kill -9`."""

import time
from itertools import product

import pytest
import torch

from bessemer.core.errors import CheckpointError, ConfigError
from bessemer.training.checkpoint.manager import CHECKPOINTS, checkpoint_weights, newest_checkpoint
from tests.cases import slow, slow_but

from .methods import METHODS, PREFERENCES, gathered, run
from .parity import shallowest
from .pool import Pool

EXACT = 1e-9

TWO = [{"data_shard": 2}, {"tensor": 2}, {"context": 2}, {"pipeline": 2}]
FOUR = [
    {"data_shard": 2, "context": 2},
    {"pipeline": 2, "tensor": 2},
    {"data_replicate": 2, "tensor": 2},
    {"context": 2, "tensor": 2},
    {"pipeline": 2, "context": 2},
    {"pipeline": 2, "data_shard": 2, "pipeline_schedule": "zbv"},
    {"data_replicate": 2, "data_shard": 2},
    {"context": 4, "context_method": "ring"},
    {"pipeline": 2, "data_shard": 2, "pipeline_schedule": "zero_bubble"},
]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Runs on one process, each made once: what was logged, and the folder."""
    made = {}

    def whole(method, layers=2):
        if (method, layers) not in made:
            folder = tmp_path_factory.mktemp(method)
            made[method, layers] = run(folder, method, layers=layers, micro_batch_size=None), folder
        return made[method, layers]

    return whole


def assert_same(method, records, folder, expected):
    expected_records, expected_folder = expected
    assert len(records) == len(expected_records)
    for record, wanted in zip(records, expected_records, strict=True):
        assert record.keys() == wanted.keys()
        assert record == pytest.approx(wanted, rel=EXACT, abs=1e-12)
    last = [newest_checkpoint(place / CHECKPOINTS) for place in (folder, expected_folder)]
    _, _, beside, _ = (METHODS | PREFERENCES)[method]
    for section in ("model", *(f"others.{role}.model" for role in beside)):
        found, wanted = (checkpoint_weights(checkpoint, section) for checkpoint in last)
        assert found.keys() == wanted.keys() and wanted
        for name, tensor in wanted.items():
            torch.testing.assert_close(found[name], tensor, rtol=EXACT, atol=1e-12, msg=f"{section} {name}")


#: On every run one layout of each kind, and distillation; sums over the parts of a sequence in "pairs", whose killed run
#: is of two shards.
USUAL = [
    ("pairs", {"context": 2}),
    ("teacher", {"context": 2}),
    ("critic", {"pipeline": 2}),
    ("self-made", {"data_shard": 2}),
]


# those of the others are in what several ranks compute too
@pytest.mark.parametrize("method", slow_but(["critic"], METHODS))
def test_micro_batches_are_one_batch(whole, tmp_path, method):
    assert_same(method, run(tmp_path, method), tmp_path, whole(method))


@pytest.mark.parametrize(("method", "parallel"), slow_but(USUAL, product(METHODS, TWO)), ids=str)
def test_two_ranks_are_one(two, whole, tmp_path, method, parallel):
    records = two.run(run, out=tmp_path, method=method, parallel=parallel)[0]
    assert_same(method, records, tmp_path, whole(method))


@pytest.mark.parametrize(
    ("method", "parallel"),
    slow_but(
        [("reward", {"tensor": 2}), ("dpo", {"pipeline": 2})],
        # prompts are not shared where an axis splits rows
        [(method, parallel) for method in PREFERENCES for parallel in TWO if method != "dpo" or "context" not in parallel],
    ),
    ids=str,
)
def test_preferences_of_two_ranks_are_those_of_one(two, whole, tmp_path, method, parallel):
    records = two.run(run, out=tmp_path, method=method, parallel=parallel)[0]
    assert_same(method, records, tmp_path, whole(method))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "parallel"),
    [
        *product(("reward", "kto"), ({"data_shard": 2, "context": 2}, {"pipeline": 2, "tensor": 2})),
        *product(("dpo",), ({"data_shard": 2, "tensor": 2}, {"pipeline": 2, "tensor": 2})),
    ],
    ids=str,
)
def test_preferences_of_four_ranks_are_those_of_one(four, whole, tmp_path, method, parallel):
    records = four.run(run, out=tmp_path, method=method, parallel=parallel)[0]
    assert_same(method, records, tmp_path, whole(method))


@pytest.mark.slow
@pytest.mark.parametrize(("method", "parallel"), list(product(METHODS, FOUR)), ids=str)
def test_four_ranks_are_one(four, whole, tmp_path, method, parallel):
    layers = shallowest(parallel)["num_hidden_layers"]
    records = four.run(run, out=tmp_path, method=method, parallel=parallel, layers=layers)[0]
    assert_same(method, records, tmp_path, whole(method, layers))


@pytest.mark.parametrize("method", ["pairs", *map(slow, ("self-made", "critic", "packed", "teacher"))])
def test_killed_ranks_go_on_where_they_were(two, tmp_path, method):
    steps = 6
    expected = run(tmp_path / "whole", method, steps=steps, layers=1), tmp_path / "whole"
    out, pool = tmp_path / "killed", Pool(2)
    options = {"out": out, "method": method, "parallel": {"data_shard": 2}, "steps": steps, "layers": 1}
    pool.start(run, checkpoint_minutes=1e-9, **options)
    while (done := newest_checkpoint(out / CHECKPOINTS)) is None or done.name < "step-000002":
        time.sleep(0.01)
    pool.close()  # kill -9, in the midst of whatever the two were doing
    assert int(newest_checkpoint(out / CHECKPOINTS).name.removeprefix("step-")) < steps
    assert_same(method, two.run(run, **options)[0], out, expected)


@pytest.mark.parametrize("parallel", TWO, ids=str)
def test_the_whole_weights_are_on_every_rank(two, parallel):
    assert two.run(gathered, parallel=parallel) == [True, True]


def test_batches_under_way_of_other_ranks_are_refused(two, tmp_path):
    two.run(run, out=tmp_path, method="self-made", parallel={"data_shard": 2}, stop_after=1)
    with pytest.raises(CheckpointError, match="of 2 data-parallel ranks, and this run has 1"):
        run(tmp_path, "self-made")


def test_a_pair_is_not_separated(two, tmp_path):
    with pytest.raises(ConfigError, match="micro_batch_size 1 would separate"):
        run(tmp_path / "micro-batches", "pairs", micro_batch_size=1)
    with pytest.raises(AssertionError, match="gives each rank 3 rows, which would separate"):
        two.run(run, out=tmp_path / "ranks", method="pairs", parallel={"data_shard": 2}, batch_size=6)

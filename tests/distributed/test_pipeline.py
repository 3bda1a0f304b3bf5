"""A model cut into stages learns as a whole one does, in every order in which its micro-batches may pass."""

import pytest

from .parity import DENSE, assert_equal, trained

EXACT = 1e-9
SCHEDULES = ["gpipe", "1f1b", "interleaved", "zero_bubble", "zbv"]
TIED = DENSE | {"tie_word_embeddings": True}
MIXTURE = TIED | {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "router_aux_loss_coef": 0.1,
    "router_z_loss_coef": 0.01,
}


@pytest.fixture(scope="module")
def alone():
    """Runs on one process, each made once."""
    made = {}

    def alone(**options):
        key = repr(sorted(options.items()))
        if key not in made:
            made[key] = trained(**options)
        return made[key]

    return alone


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_two_stages_of_packed_documents_are_one_model(two, alone, schedule):
    options = {"model": DENSE, "packed": True}
    parallel = {"pipeline": 2, "pipeline_schedule": schedule}
    assert_equal(two.run(trained, parallel=parallel, **options)[0], alone(**options), EXACT)


@pytest.mark.parametrize("schedule", ["1f1b", "zbv"])
def test_tied_embeddings_learn_at_both_ends(two, alone, schedule):
    parallel = {"pipeline": 2, "pipeline_schedule": schedule}
    assert_equal(two.run(trained, parallel=parallel, model=TIED)[0], alone(model=TIED), EXACT)


@pytest.mark.parametrize("schedule", ["1f1b", *(pytest.param(name, marks=pytest.mark.slow) for name in SCHEDULES[2:])])
def test_routers_of_every_stage_learn_from_their_losses(two, alone, schedule):
    options = {"model": MIXTURE, "settings": {"micro_batch_size": 2}}  # a router's loss is not the sum of its micro-batches'
    parallel = {"pipeline": 2, "pipeline_schedule": schedule}
    assert_equal(two.run(trained, parallel=parallel, **options)[0], alone(**options), EXACT)


@pytest.mark.parametrize(
    "parallel",
    [
        {"pipeline": 4},
        {"pipeline": 2, "data_shard": 2, "pipeline_schedule": "zero_bubble"},
        {"pipeline": 2, "data_replicate": 2, "pipeline_schedule": "zbv"},
        *(
            pytest.param({"pipeline": 2, axis: 2, "pipeline_schedule": schedule}, marks=pytest.mark.slow)
            for axis in ("data_shard", "data_replicate")
            for schedule in SCHEDULES
        ),
        *(
            pytest.param({"pipeline": 4, "pipeline_schedule": schedule, "stages_per_rank": 1}, marks=pytest.mark.slow)
            for schedule in ("gpipe", "interleaved", "zero_bubble")
        ),
    ],
    ids=lambda parallel: " ".join(map(str, parallel.values())),
)
def test_four_ranks_are_one(four, alone, parallel):
    assert_equal(four.run(trained, parallel=parallel, model=TIED)[0], alone(model=TIED), EXACT)

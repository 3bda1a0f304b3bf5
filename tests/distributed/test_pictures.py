"""A model that sees gives the same losses, gradients and logits on several processes as on one."""

import pytest
import torch
import torch.distributed as dist

from bessemer.distributed.layout import Layout, ParallelConfig
from bessemer.distributed.mesh import ALONE, Mesh
from bessemer.distributed.parallelize import parallelize
from bessemer.model.vision.trained import load_trained_decoder
from bessemer.posttraining.data.packing import PackedBatches
from bessemer.training.adapter_config import TuningConfig
from bessemer.training.model_setup import prepare_model
from bessemer.training.pretrain_config import PretrainConfig
from bessemer.training.runtime import Runtime
from bessemer.training.starting_model import StartingModel
from tests.cases import slow_but
from tests.model.picture_files import write_gemma3_model, write_llava_model, write_picture_model, write_qwen_model

from ..posttraining.test_picture_training import packed_rows, write_rows
from .parity import SETTINGS, assert_equal, full, trained_on

EXACT = 1e-9
FORMS = {
    "smolvlm": write_picture_model,
    "llava": write_llava_model,
    "gemma3": write_gemma3_model,
    "qwen2_5_vl": write_qwen_model,
}
TWO = [
    {"data_shard": 2},
    {"data_replicate": 2},
    {"tensor": 2},
    {"context": 2},
    {"context": 2, "context_method": "ring"},
    {"pipeline": 2},
]
FOUR = [
    {"data_shard": 2, "tensor": 2},
    {"data_shard": 2, "context": 2},
    {"pipeline": 2, "tensor": 2},
    {"pipeline": 2, "data_shard": 2, "pipeline_schedule": "zero_bubble", "stages_per_rank": 1},
]


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory):
    """Tiny models of a form, and rows of one to two pictures and of none."""
    made = {}

    def folder_of(form):
        if form not in made:
            made[form] = write_rows(tmp_path_factory.mktemp(form) / "rows", FORMS[form])
        return made[form]

    return folder_of


def mesh_of(parallel):
    return ALONE if parallel is None else Mesh.of(Layout.of(ParallelConfig(**parallel), dist.get_world_size()), "cpu")


def trained(folder, out, parallel=None, **changes):
    """Some steps on the rows, in float64."""
    mesh = mesh_of(parallel)
    settings = {"batch_size": 4, "context_length": 256, "micro_batch_size": 1} | changes
    config = PretrainConfig(**(SETTINGS | settings | {"parallel": parallel or {}}))
    (out / str(mesh.rank)).mkdir(exist_ok=True)
    *_, batch = packed_rows(folder, out / str(mesh.rank))
    batches = PackedBatches(batch, batch_size=config.batch_size, seed=3)
    return trained_on(load_trained_decoder(folder / "model").double(), batches, config, mesh)


@pytest.fixture(scope="module")
def alone(folder_of, tmp_path_factory):
    made = {}

    def alone(form):
        if form not in made:
            made[form] = trained(folder_of(form), tmp_path_factory.mktemp("alone"), micro_batch_size=None)
        return made[form]

    return alone


CASES = [(form, parallel) for form in FORMS for parallel in TWO if form != "gemma3" or "context" not in parallel]


@pytest.mark.parametrize(("form", "parallel"), slow_but([("smolvlm", {"tensor": 2})], CASES), ids=str)
def test_two_ranks_train_as_one(two, folder_of, alone, tmp_path, form, parallel):
    found = two.run(trained, folder=folder_of(form), out=tmp_path, parallel=parallel)[0]
    assert any(name.startswith("vision.encoder") for name in found.gradients)
    assert_equal(found, alone(form), EXACT)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("form", "parallel"), [(form, parallel) for form in ("smolvlm", "qwen2_5_vl") for parallel in FOUR], ids=str
)
def test_four_ranks_train_as_one(four, folder_of, alone, tmp_path, form, parallel):
    found = four.run(trained, folder=folder_of(form), out=tmp_path, parallel=parallel)[0]
    assert_equal(found, alone(form), EXACT)


def logits(folder, out, parallel=None):
    """Of the first row, on every rank."""
    mesh = mesh_of(parallel)
    (out / str(mesh.rank)).mkdir(exist_ok=True)
    *_, batch = packed_rows(folder, out / str(mesh.rank))
    model = load_trained_decoder(folder / "model").double()
    if parallel is not None:
        model, _ = parallelize(model, mesh, ParallelConfig(**parallel))
    with torch.no_grad():
        return model.logits(model.hidden(**batch.rows(slice(0, 1)).inputs))


@pytest.mark.parametrize("form", slow_but(["smolvlm", "qwen2_5_vl"], FORMS))
def test_logits_of_a_model_cut_by_tensor_parallelism_are_those_of_the_whole(two, folder_of, tmp_path, form):
    expected = logits(folder_of(form), tmp_path)
    for found in two.run(logits, folder=folder_of(form), out=tmp_path, parallel={"tensor": 2}):
        torch.testing.assert_close(found, expected, rtol=0, atol=EXACT)


def encoded(folder, out, parallel):
    """How many pictures this rank encodes of one row, and how many are in its part of it."""
    mesh = mesh_of(parallel)
    (out / str(mesh.rank)).mkdir(exist_ok=True)
    *_, batch = packed_rows(folder, out / str(mesh.rank))
    model = load_trained_decoder(folder / "model").double()
    row = batch.rows(slice(0, 1))
    own_T = row.vector_of_token_BT[0].chunk(2)[mesh.rank]
    needed = len(torch.unique(own_T[own_T >= 0] // row.pictures.tokens_per_tile)) or 1
    seen = []
    parallelize(model, mesh, ParallelConfig(**parallel))
    model.vision.register_forward_pre_hook(lambda vision, inputs: seen.append(len(inputs[0].values)))
    with torch.no_grad():
        model.hidden(**row.inputs)
    whole = len(torch.unique(row.vector_of_token_BT[row.vector_of_token_BT >= 0] // row.pictures.tokens_per_tile))
    return seen, needed, whole


@pytest.mark.slow
def test_a_rank_encodes_the_pictures_of_its_own_tokens(two, folder_of, tmp_path):
    found = two.run(encoded, folder=folder_of("smolvlm"), out=tmp_path, parallel={"tensor": 2})
    assert all(seen == [needed] for seen, needed, _ in found)
    assert max(needed for _, needed, _ in found) < found[0][2]


def opened(folder, parallel):
    """Whether the shards that a process reads of a folder are those of the whole model."""
    mesh = mesh_of(parallel)
    config = TuningConfig.parse(SETTINGS | {"parallel": parallel, "context_length": 256})
    start = StartingModel.of(folder / "model", config, seed=1)
    start.check(mesh)
    decoder, load = start.open("cpu", mesh)
    prepared = prepare_model(decoder, config, Runtime.of(config, torch.device("cpu")), mesh)
    load(prepared)
    weights = load_trained_decoder(folder / "model").state_dict()
    found = full(dict(prepared.model.named_parameters()), mesh)
    return {name for name in weights if not torch.equal(found[name], weights[name])}


@pytest.mark.parametrize(
    ("form", "parallel"),
    slow_but(
        [("llava", {"tensor": 2})], [(form, one) for form in FORMS for one in ({"data_shard": 2}, {"tensor": 2}, TWO[-1])]
    ),
    ids=str,
)
def test_a_process_reads_its_shards_of_encoder_and_decoder(two, folder_of, form, parallel):
    assert two.run(opened, folder=folder_of(form), parallel=parallel) == [set(), set()]


def test_rows_with_pictures_that_see_each_other_are_not_cut(two, folder_of):
    with pytest.raises(AssertionError, match="ConfigError: parallel: context cuts rows, and the tokens of a picture see each"):
        two.run(opened, folder=folder_of("gemma3"), parallel={"context": 2})

"""A model that is sharded before it has weights reads its shards: they are those of one that was loaded whole."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from bessemer.core.errors import ArtefactError
from bessemer.distributed.layout import ParallelConfig
from bessemer.distributed.mesh import ALONE, Mesh, local
from bessemer.distributed.parallelize import load_shards
from bessemer.model.config import ModelConfig
from bessemer.model.initialisation import empty_decoder, initial_decoder
from bessemer.model.storage.folder import load_model, save_model
from bessemer.model.storage.model_config import read_model_config
from bessemer.model.storage.weights import find_tensors
from bessemer.training.checkpoint.export import save_trained
from bessemer.training.job import RunContext, TrainingHooks, TrainingJob
from bessemer.training.loop import train
from bessemer.training.model_setup import prepare_model
from bessemer.training.optim.mup import scale_initial_weights, width_ratio
from bessemer.training.optim.optimizers import freeze_parameters
from bessemer.training.pretrain_config import PretrainConfig
from bessemer.training.runtime import Runtime
from tests.cases import slow, slow_but

from ..model.randomised import random_decoder
from .parity import DENSE, SETTINGS, TWO_LAYERS, RandomBatches, full
from .test_expert import GPT_OSS, SPARSE
from .test_tensor import CASES, ODD

TIED = DENSE | {"tie_word_embeddings": True}
LINEAR = CASES["linear attention"][0]
#: By name: the layout of two processes, the model, and settings of the run.
LAYOUTS = {
    "data_shard": ({"data_shard": 2}, DENSE, {}),
    "data_replicate": ({"data_replicate": 2}, DENSE, {}),
    "tensor": ({"tensor": 2}, TIED, {}),
    "tensor, linear attention": ({"tensor": 2}, LINEAR, {}),
    "tensor, experts": ({"tensor": 2}, CASES["experts"][0], {}),
    "tensor, fused matrices": ({"tensor": 2}, CASES["gpt2"][0], {"activation_checkpointing": "full"}),
    "pipeline, tied": ({"pipeline": 2}, TIED, {}),
    "pipeline in a V, tied": ({"pipeline": 2, "pipeline_schedule": "zbv"}, TIED, {}),
    "expert": ({"expert": 2}, SPARSE, {}),
    "expert, biases": ({"expert": 2}, GPT_OSS, {"freeze": ["embed_tokens.*"]}),
    "context": ({"context": 2}, DENSE, {}),
}
#: Tested on every run, one of each kind of axis; the others with the slow ones.
USUAL = {"data_shard", "tensor, experts", "pipeline in a V, tied", "expert, biases"}
#: Likewise of four.
FOUR = {
    "tensor, data_shard": ({"tensor": 2, "data_shard": 2}, TIED, {}),
    "tensor, uneven shards": ({"tensor": 2, "data_shard": 2}, ODD, {}),
    "expert, tensor": ({"expert": 2, "tensor": 2}, SPARSE, {}),
    "expert, shards of an expert": ({"expert": 2}, SPARSE, {}),
    "pipeline, data_shard": ({"pipeline": 2, "data_shard": 2}, TIED | {"num_nextn_predict_layers": 1}, {}),
}


def prepared(decoder, parallel, settings, mesh):
    config = PretrainConfig(**(SETTINGS | settings | {"parallel": parallel}))
    freeze_parameters(decoder, config)
    return prepare_model(decoder, config, Runtime.of(config, torch.device("cpu")), mesh)


def loaded(folder, parallel, settings, mesh):
    """What this process holds of the folder's model, read by shards."""
    stored = find_tensors(folder, read_model_config(folder))
    model = prepared(empty_decoder(stored.config), parallel, settings, mesh)
    load_shards(model.parts, stored, "cpu")
    return model


def assert_loaded(folder, parallel, settings):
    """On this process every tensor, tables of positions included, is that of the model which was loaded whole and then
    sharded; and together they are the folder's."""
    mesh = Mesh.here(ParallelConfig(**parallel), "cpu")
    shards = loaded(folder, parallel, settings, mesh)
    cut = prepared(load_model(folder, dtype=torch.float32), parallel, settings, mesh)
    everything = load_model(folder, dtype=torch.float32).state_dict()
    names = set()
    for here, there in zip(shards.parts, cut.parts, strict=True):
        for kind in ("named_parameters", "named_buffers"):
            found, wanted = dict(getattr(here, kind)()), dict(getattr(there, kind)())
            assert found.keys() == wanted.keys()
            for name, tensor in wanted.items():
                assert found[name].dtype == tensor.dtype and found[name].requires_grad == tensor.requires_grad, name
                assert getattr(found[name], "placements", None) == getattr(tensor, "placements", None), name
                assert torch.equal(local(found[name].detach()), local(tensor.detach())), name
        weights = {name: tensor for name, tensor in here.named_buffers() if name in everything}
        for name, tensor in full(dict(here.named_parameters()) | weights, mesh).items():
            assert torch.equal(tensor, everything[name]), name
            names.add(name)
    assert names == everything.keys()


@pytest.fixture
def folder_of(tmp_path):
    """Writes the folder of a model with random weights, in bfloat16, as published ones are."""

    def folder_of(model, dtype=torch.bfloat16):
        decoder = random_decoder(ModelConfig(**model)).to(dtype)
        draw = torch.Generator().manual_seed(1)
        for name, buffer in decoder.named_buffers():
            if name in decoder.state_dict():
                buffer.normal_(generator=draw)
        save_model(decoder, tmp_path / "model", tokenizer=None, shard_bytes=40_000)
        return tmp_path / "model"

    return folder_of


@pytest.mark.parametrize("name", slow_but(USUAL, LAYOUTS))
def test_shards_are_those_of_the_whole_model(two, folder_of, name):
    parallel, model, settings = LAYOUTS[name]
    two.run(assert_loaded, folder=folder_of(model), parallel=parallel, settings=settings)


@pytest.mark.slow
@pytest.mark.parametrize("name", FOUR)
def test_shards_of_shards_too(four, folder_of, name):
    parallel, model, settings = FOUR[name]
    four.run(assert_loaded, folder=folder_of(model), parallel=parallel, settings=settings)


def bytes_held(folder, parallel):
    """Bytes of this process's memory for parameters after they were read by shards."""
    shards = loaded(folder, parallel, {}, Mesh.here(ParallelConfig(**parallel), "cpu"))
    storages = [local(parameter.detach()).untyped_storage() for part in shards.parts for parameter in part.parameters()]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


@pytest.mark.parametrize(
    ("parallel", "most"), [({"data_shard": 2}, 0.5), ({"tensor": 2}, 0.52), ({"pipeline": 2}, 0.6)], ids=str
)
def test_a_process_has_memory_for_its_share(two, folder_of, parallel, most):
    folder = folder_of(DENSE)
    whole = sum(4 * parameter.numel() for parameter in load_model(folder).parameters())
    held = two.run(bytes_held, folder=folder, parallel=parallel)
    assert max(held) <= most * whole and sum(held) >= whole


def trained(folder, out, parallel, model, whole):
    """Train the folder's model, scaled by muP, for some steps: loaded whole and then sharded, or as a stage does it."""
    config = PretrainConfig(**(SETTINGS | {"steps": 2, "mup_base_width": 16, "parallel": parallel}))
    source = RandomBatches(config.batch_size, config.context_length, model["vocab_size"])

    def initialise(decoder, mesh):
        assert scale_initial_weights(decoder, width_ratio(config, decoder.config), mesh)

    if not whole:
        job = TrainingJob.open(config, folder, RunContext(out, seed=1, device="cpu"), description="train")
        job.train(source, hooks=TrainingHooks(initialise=lambda decoder: initialise(decoder, job.mesh)))
        return
    mesh = Mesh.here(config.parallel, "cpu")
    decoder = load_model(folder, dtype=torch.float32)
    initialise(decoder, ALONE)
    train(decoder, source, config, out, runtime=Runtime.of(config, torch.device("cpu")), seed=1, mesh=mesh)
    save_trained(decoder, out, tokenizer=folder, mesh=mesh)


@pytest.mark.parametrize(
    ("parallel", "model"),
    [
        pytest.param({"data_shard": 2}, TWO_LAYERS, id="data_shard"),
        slow({"tensor": 2}, LINEAR, id="tensor"),
        slow({"pipeline": 2}, TIED | {"num_hidden_layers": 2}, id="pipeline"),
        slow({"expert": 2}, SPARSE, id="expert"),
    ],
)
def test_training_from_shards_is_training_from_the_whole(two, tmp_path, parallel, model):
    folder = tmp_path / "start"
    save_model(initial_decoder(ModelConfig(**model), seed=3), folder, tokenizer=None)
    for name in ("whole", "shards"):
        (tmp_path / name).mkdir()
        two.run(trained, folder=folder, out=tmp_path / name, parallel=parallel, model=model, whole=name == "whole")
    found, wanted = (tmp_path / name / "model" / "model.safetensors" for name in ("shards", "whole"))
    assert found.read_bytes() == wanted.read_bytes() != (folder / "model.safetensors").read_bytes()


def test_a_tied_head_that_differs_is_refused(folder_of):
    folder = folder_of(TIED | {"num_hidden_layers": 1})
    path = next(path for path in folder.glob("*.safetensors") if "model.embed_tokens.weight" in load_file(path))
    table = load_file(path)["model.embed_tokens.weight"]
    save_file(load_file(path) | {"lm_head.weight": table.clone()}, path)
    loaded(folder, {}, {}, ALONE)
    save_file(load_file(path) | {"lm_head.weight": table + 1}, path)
    with pytest.raises(ArtefactError, match=r"'lm_head.weight' differs from the embedding"):
        loaded(folder, {}, {}, ALONE)

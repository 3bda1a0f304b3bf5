"""An adapter that is trained on two processes is that of one, and its base is the reference there too."""

import pytest
import torch
from safetensors.torch import load_file

from bessemer.core.errors import ConfigError
from bessemer.core.metrics import read_metrics
from bessemer.distributed.sharding import product_matrices
from bessemer.model.config import ModelConfig
from bessemer.model.initialisation import initial_decoder
from bessemer.model.storage.folder import save_model
from bessemer.training import autotune
from bessemer.training import loop as training_loop
from bessemer.training.adapter_config import TuningConfig
from bessemer.training.checkpoint.manager import CHECKPOINTS, checkpoint_weights, newest_checkpoint
from bessemer.training.job import RunContext, TrainingHooks, TrainingJob
from bessemer.training.starting_model import StartingModel
from tests.cases import slow

from .parity import SETTINGS, TWO_LAYERS, RandomBatches


def trained(folder, out, parallel, *, in_half=False, **adapter):
    """Train an adapter of the folder's model, and log what its base says of each batch."""
    given = {"rank": 4, "alpha": 16, **adapter}
    half = {"dtype": "bfloat16"} if in_half else {}
    settings = SETTINGS | {"steps": 3, "learning_rate": 1e-2, "parallel": parallel, "adapter": given} | half
    config = TuningConfig.parse(settings)
    source = RandomBatches(config.batch_size, config.context_length, TWO_LAYERS["vocab_size"])

    job = TrainingJob.open(config, folder, RunContext(out, seed=1, device="cpu"), description="train")

    def of_reference(finished, trainer):
        log_probs_BT = trainer.models.log_probs(trainer.read(source, 0))
        return {"reference": float(job.mesh.sum(log_probs_BT.sum(), job.mesh.layout.tensor))}

    job.train(source, hooks=TrainingHooks(lambda decoder: of_reference))


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    folder = tmp_path_factory.mktemp("start") / "model"
    save_model(initial_decoder(ModelConfig(**TWO_LAYERS), seed=3), folder, tokenizer=None)
    return folder


@pytest.fixture(scope="module")
def alone(start, tmp_path_factory):
    out = tmp_path_factory.mktemp("alone")
    trained(start, out, {})
    return out


@pytest.mark.parametrize("parallel", [slow({"data_shard": 2}), slow({"data_replicate": 2})], ids=str)
def test_two_ranks_train_the_adapter_of_one(two, start, alone, tmp_path, parallel):
    two.run(trained, folder=start, out=tmp_path, parallel=parallel)
    for name in ("adapter/adapter_model.safetensors", "model/model.safetensors"):
        found, wanted = load_file(tmp_path / name), load_file(alone / name)
        for key, tensor in wanted.items():
            torch.testing.assert_close(found[key], tensor, rtol=1e-4, atol=1e-5, msg=key)
    for found, wanted in zip(read_metrics(tmp_path / "metrics.jsonl"), read_metrics(alone / "metrics.jsonl"), strict=True):
        assert found["loss"] == pytest.approx(wanted["loss"], rel=1e-5)
        assert found["reference"] == pytest.approx(wanted["reference"], rel=1e-5)
    held = checkpoint_weights(newest_checkpoint(tmp_path / CHECKPOINTS))
    assert held and all(".adapter." in name for name in held)


@pytest.mark.parametrize(
    ("adapter", "message"),
    [
        ({"quantize": "int8"}, "a quantised model is trained beside in one process, and this job has 2"),
        ({"dora": True}, "adapter.dora: in one process"),
    ],
    ids=["codes", "dora"],
)
def test_what_is_of_one_process_is_refused_on_several(two, start, tmp_path, adapter, message):
    answers = two.run(refusal, folder=start, out=tmp_path, adapter=adapter)
    assert all(message in answer for answer in answers)


def refusal(folder, out, adapter):
    with pytest.raises(ConfigError) as raised:
        trained(folder, out, {"data_shard": 2}, **adapter)
    return str(raised.value)


def trained_in_half(folder, out, held):
    """Train in bfloat16; held: whether what is frozen lies so too. The dtypes of the matrices that were sharded."""
    found = set()
    prepare, frozen_dtype, check_dtype = training_loop.prepare_model, StartingModel.frozen_dtype, autotune.check_dtype

    def prepared(model, *others):
        found.update(parameter.dtype for parameter in product_matrices(model))
        return prepare(model, *others)

    training_loop.prepare_model = prepared
    # a machine where bfloat16 is slow refuses it, and computes the same
    autotune.check_dtype = lambda dtype, device: None
    if not held:
        StartingModel.frozen_dtype = torch.float32
    try:
        trained(folder, out, {"data_shard": 2}, in_half=True)
    finally:
        training_loop.prepare_model, StartingModel.frozen_dtype, autotune.check_dtype = prepare, frozen_dtype, check_dtype
    return found


@pytest.mark.slow
def test_two_ranks_hold_frozen_shards_in_the_dtype_of_products(two, start, tmp_path):
    dtypes = []
    for place in ("held", "float32"):
        (tmp_path / place).mkdir()
        dtypes.append(two.run(trained_in_half, folder=start, out=tmp_path / place, held=place == "held"))
    assert dtypes == [[{torch.bfloat16}] * 2, [{torch.float32}] * 2]
    for name in ("adapter/adapter_model.safetensors", "model/model.safetensors"):
        found, wanted = (load_file(tmp_path / place / name) for place in ("held", "float32"))
        assert all(torch.equal(found[key], tensor) for key, tensor in wanted.items()) and found.keys() == wanted.keys()

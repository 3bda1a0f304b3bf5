"""A run goes on under another layout where it was left, and ends as if nothing had happened."""

import shutil
import signal
import time

import pytest
import torch

from bessemer.core.metrics import METRICS, read_metrics
from bessemer.core.progress import Silent
from bessemer.distributed.layout import ParallelConfig
from bessemer.distributed.mesh import ALONE, Mesh
from bessemer.model.config import ModelConfig
from bessemer.model.initialisation import initial_decoder
from bessemer.training.checkpoint.export import save_trained
from bessemer.training.checkpoint.manager import CHECKPOINTS, CheckpointManager, checkpoint_weights, newest_checkpoint
from bessemer.training.checkpoint.state import TrainingState
from bessemer.training.loop import train
from bessemer.training.model_setup import prepare_model
from bessemer.training.optim.optimizers import build_optimizers
from bessemer.training.pretrain_config import PretrainConfig
from bessemer.training.runtime import Runtime

from .parity import DENSE, SETTINGS, RandomBatches
from .pool import Pool

EXACT = 1e-9
SHALLOW = DENSE | {"num_hidden_layers": 1}


class StoppedError(Exception):
    pass


def run(out, parallel=None, stop_after=None, dtype=torch.float64, on_step_end=None, model=SHALLOW, **changes):
    """Train four steps in a folder; stopped after one of them where that is asked. Gives the losses that it logged."""
    config = PretrainConfig(**(SETTINGS | {"steps": 4, "checkpoint_minutes": 1e9} | changes | {"parallel": parallel or {}}))
    mesh = ALONE if parallel is None else Mesh.here(ParallelConfig(**parallel), "cpu")
    decoder = initial_decoder(ModelConfig(**model), seed=3).to(dtype)
    batches = RandomBatches(config.batch_size, config.context_length, model["vocab_size"])

    def stop(number, frame):
        raise StoppedError

    def stopping(finished, trainer):
        if finished == stop_after and (mesh.leads or mesh.rank == mesh.layout.world_size - 1):
            signal.raise_signal(signal.SIGTERM)  # two of the processes are told, all must stop
        return {}

    before = signal.signal(signal.SIGTERM, stop)
    try:
        runtime = Runtime.of(config, torch.device("cpu"))
        train(decoder, batches, config, out, runtime=runtime, seed=1, on_step_end=on_step_end or stopping, mesh=mesh)
        if dtype is torch.float32:
            save_trained(decoder, out, tokenizer=out, mesh=mesh)
    except StoppedError:
        return "stopped"
    finally:
        signal.signal(signal.SIGTERM, before)
    return [record["loss"] for record in read_metrics(out / METRICS)]


def assert_same_end(*runs):
    """The last weights of two runs, and their averages, are the same."""
    last = [newest_checkpoint(folder / CHECKPOINTS) for folder in runs]
    for section in ("model", "others.average.weights"):
        found, wanted = (checkpoint_weights(checkpoint, section) for checkpoint in last)
        assert found.keys() == wanted.keys() and wanted
        for name, tensor in wanted.items():
            torch.testing.assert_close(found[name], tensor, rtol=EXACT, atol=1e-12, msg=name)


def test_four_ranks_stopped_two_go_on_and_one_ends_it(two, four, tmp_path):
    expected = run(tmp_path / "whole", ema=0.9)
    out = tmp_path / "moved"
    stopped = four.run(run, out=out, parallel={"data_replicate": 2, "data_shard": 2}, stop_after=1, ema=0.9)
    assert stopped[0] == "stopped"
    assert newest_checkpoint(out / CHECKPOINTS).name == "step-000001"
    assert two.run(run, out=out, parallel={}, stop_after=3, ema=0.9)[0] == "stopped"
    losses = run(out, ema=0.9)
    assert losses == pytest.approx(expected, rel=EXACT)
    assert_same_end(out, tmp_path / "whole")


@pytest.mark.slow
def test_four_ranks_killed_two_go_on_and_so_does_one(two, tmp_path):
    expected = run(tmp_path / "whole", steps=12)
    four = Pool(4)
    four_ranks = {"data_replicate": 2, "data_shard": 2}
    four.start(run, out=tmp_path / "two", parallel=four_ranks, steps=12, checkpoint_minutes=1e-9)
    while (done := newest_checkpoint(tmp_path / "two" / CHECKPOINTS)) is None or done.name < "step-000002":
        time.sleep(0.01)
    four.close()  # kill -9, in the midst of whatever the four were doing
    shutil.copytree(tmp_path / "two", tmp_path / "one")
    left = int(newest_checkpoint(tmp_path / "one" / CHECKPOINTS).name.removeprefix("step-"))
    assert 2 <= left < 12
    assert two.run(run, out=tmp_path / "two", parallel={}, steps=12)[0] == pytest.approx(expected, rel=EXACT)
    assert run(tmp_path / "one", steps=12) == pytest.approx(expected, rel=EXACT)


@pytest.mark.slow
def test_a_pipeline_stopped_goes_on_whole_and_is_cut_again(two, four, tmp_path):
    options = {"model": DENSE | {"tie_word_embeddings": True}, "ema": 0.9}
    expected = run(tmp_path / "whole", **options)
    out = tmp_path / "moved"
    assert two.run(run, out=out, parallel={"pipeline": 2, "pipeline_schedule": "zbv"}, stop_after=1, **options)[1] == "stopped"
    assert run(out, stop_after=2, parallel={}, **options) == "stopped"
    losses = four.run(run, out=out, parallel={"pipeline": 2, "data_shard": 2}, **options)[0]
    assert losses == pytest.approx(expected, rel=EXACT)
    assert_same_end(out, tmp_path / "whole")


@pytest.mark.slow
def test_growing_batches_stopped_on_two_ranks_are_ended_by_one(two, tmp_path):
    options = {"batch_size": 8, "batch_size_warmup": {"start": 2, "steps": 3}, "ema": 0.9}
    expected = run(tmp_path / "whole", **options)
    assert two.run(run, out=tmp_path / "moved", parallel={}, stop_after=2, **options)[0] == "stopped"
    assert run(tmp_path / "moved", **options) == pytest.approx(expected, rel=EXACT)
    assert_same_end(tmp_path / "moved", tmp_path / "whole")


def test_on_the_same_number_of_ranks_every_bit_is_the_same(two, tmp_path):
    options = {"parallel": {}, "dtype": torch.float32, "optimizer": "muon"}
    two.run(run, out=tmp_path / "whole", **options)
    two.run(run, out=tmp_path / "stopped", stop_after=2, **options)
    two.run(run, out=tmp_path / "stopped", **options)
    weights = [(tmp_path / name / "model" / "model.safetensors").read_bytes() for name in ("whole", "stopped")]
    assert weights[0] == weights[1]


@pytest.mark.slow
def test_checkpoints_written_in_the_background_are_the_same(two, tmp_path):
    for name, background in (("now", False), ("later", True)):
        two.run(run, out=tmp_path / name, parallel={}, steps=2, checkpoint_background=background, checkpoint_every=1)
    for step in (1, 2):
        folders = (tmp_path / name / CHECKPOINTS / f"step-{step:06d}" for name in ("now", "later"))
        now, later = map(checkpoint_weights, folders)
        assert all(torch.equal(now[name], later[name]) for name in now)


def random_numbers(out):
    """Numbers that this rank draws after saving a checkpoint, and after going back to it."""
    config = PretrainConfig(**SETTINGS)
    mesh = Mesh.here(config.parallel, "cpu")
    runtime = Runtime.of(config, torch.device("cpu"))
    model, _ = prepare_model(initial_decoder(ModelConfig(**SHALLOW), seed=3), config, runtime, mesh)
    state = TrainingState(model, build_optimizers(model, config))
    checkpoints = CheckpointManager(out, {}, Silent(), mesh=mesh)
    torch.manual_seed(mesh.rank)
    checkpoints.save(state)
    expected = torch.rand(3).tolist()
    torch.manual_seed(99)
    assert checkpoints.restore(state)
    return expected, torch.rand(3).tolist()


def test_every_rank_goes_on_with_its_own_random_numbers(two, tmp_path):
    (first, found_first), (second, found_second) = two.run(random_numbers, out=tmp_path)
    assert first != second
    assert (found_first, found_second) == (first, second)


def test_a_first_and_every_nth_checkpoint_stay(tmp_path):
    run(tmp_path, steps=6, checkpoint_every=2, checkpoint_minutes=1e-9)
    kept = {path.name for path in (tmp_path / CHECKPOINTS).iterdir()}
    assert kept == {f"step-{step:06d}" for step in (1, 2, 4, 5, 6)}


def scored(out, parallel=None):
    """The likelihood after three steps of the weights, of their average put in place, and of the weights again."""
    scores = []

    def score(trainer):
        tokens_BT = torch.arange(8 * 16).reshape(8, 16) % DENSE["vocab_size"]
        with trainer.runtime.evaluating(trainer.model):
            scores.append(trainer.negative_log_likelihood(tokens_BT, tokens_BT.roll(-1, 1)))

    def on_step_end(finished, trainer):
        if finished == 3:
            score(trainer)
            with trainer.averaged():
                score(trainer)
            score(trainer)
        return {}

    tied = DENSE | {"num_hidden_layers": 2, "tie_word_embeddings": True}  # the last stage of a pipeline has a copy then
    run(out, parallel, steps=3, on_step_end=on_step_end, diagnostics_every=3, ema=0.9, model=tied)
    return scores


def test_an_average_put_in_place_of_pieces_scores_as_that_of_the_whole(two, tmp_path):
    alone = scored(tmp_path / "alone")
    assert alone[0] == alone[2] != alone[1]
    for name, parallel in (("sharded", {}), ("pipeline", {"pipeline": 2})):
        for scores in two.run(scored, out=tmp_path / name, parallel=parallel):
            assert scores == pytest.approx(alone, rel=EXACT)

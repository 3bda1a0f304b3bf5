"""Diagnostics report what happens and do not change it."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from bessemer.core.metrics import METRICS, read_metrics
from bessemer.distributed.mesh import ALONE
from bessemer.inspection.recording import record
from bessemer.model.config import ModelConfig
from bessemer.model.initialisation import initial_decoder
from bessemer.training.data.batch import IGNORE_INDEX, Batch
from bessemer.training.data.batches import StatelessBatches
from bessemer.training.loop import train
from bessemer.training.monitoring.diagnostics import place_of
from bessemer.training.runtime import Runtime
from tests.cases import slow

from .conftest import TINY

SPARSE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "router_correction_bias": True}
SPARSE |= {"router_bias_update_rate": 0.01, "scoring_func": "sigmoid"}


class TwoSources(StatelessBatches):
    """Random rows, of which some tokens are code and the others web, and some have no target."""

    fingerprint, batch_size = "two sources", 4

    def batch(self, step, rows=slice(None), mesh=ALONE):
        draw = torch.Generator().manual_seed(step)
        tokens = torch.randint(0, 97, (4, 17), generator=draw)
        targets = tokens[:, 1:].masked_fill(torch.rand(4, 16, generator=draw) < 0.2, IGNORE_INDEX)
        sources = (torch.rand(4, 16, generator=draw) < 0.3).to(torch.int16)
        batch = Batch(tokens[:, :-1], targets, sources_BT=sources, source_names=("code", "web"))
        return batch.rows(rows)


@pytest.fixture
def run(settings, tmp_path):
    """Trains a tiny model; returns it, and gives the lines of its metrics as `lines`, its weights after each step as `path`."""

    def run(name="run", model=(), batches=None, **changes):
        config = settings.with_changes(batch_size=4, context_length=16, **changes)
        shape = {key: value for key, value in TINY.items() if key != "preset"}
        decoder = initial_decoder(ModelConfig(**shape | dict(model), vocab_size=97), seed=2)
        decoder.path = [weights(decoder)]

        def on_step_end(step, _):
            decoder.path.append(weights(decoder))
            return {}

        runtime = Runtime.of(config, torch.device("cpu"))
        train(decoder, batches or TwoSources(), config, tmp_path / name, runtime=runtime, seed=1, on_step_end=on_step_end)
        decoder.lines = read_metrics(tmp_path / name / METRICS)
        return decoder

    return run


def weights(model):
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def of(line, kind):
    return {key.removeprefix(kind): value for key, value in line.items() if key.startswith(kind)}


def norm(tensors):
    return torch.stack([tensor.double().square().sum() for tensor in tensors]).sum().sqrt().item()


def test_the_steps_that_the_settings_name_and_the_last_have_diagnostics(run):
    watched = [line["step"] for line in run(steps=5, diagnostics_every=2, log_every=100).lines]
    assert watched == [2, 4, 5]
    assert not of(run("never", steps=2, diagnostics_every=0).lines[-1], "gradient_norm/")


@pytest.mark.parametrize("clip", [1e9, 0.05])
def test_the_norms_of_all_places_are_the_norm_before_clipping(run, clip):
    for line in run(diagnostics_every=1, gradient_clip=clip).lines:
        parts = of(line, "gradient_norm/")
        assert {"embedding", "final_norm", "layers.0/attention", "layers.1/feed_forward", "layers.1/norms"} <= set(parts)
        assert sum(part**2 for part in parts.values()) ** 0.5 == pytest.approx(line["gradient_norm"], rel=1e-5)


def test_updates_are_what_the_step_did_to_the_weights(run):
    model = run(diagnostics_every=1, steps=3)
    for before, after, line in zip(model.path, model.path[1:], model.lines, strict=False):
        for place, ratio in of(line, "update_ratio/").items():
            names = [name for name in before if place_of(name) == place]
            moved, whole = norm([after[name] - before[name] for name in names]), norm([after[name] for name in names])
            assert ratio == pytest.approx(moved / whole, rel=1e-4), place
            assert line[f"weight_norm/{place}"] == pytest.approx(whole, rel=1e-5)


@pytest.mark.parametrize("size", [None, 3])
def test_losses_by_source_weighed_by_their_targets_are_the_loss_of_the_step(run, size):
    for line in run(diagnostics_every=1, micro_batch_size=size).lines:
        batch = TwoSources().batch(line["step"] - 1)
        learned = batch.targets_BT != IGNORE_INDEX
        counts = [int((learned & (batch.sources_BT == source)).sum()) for source in (0, 1)]
        mean = (line["loss/code"] * counts[0] + line["loss/web"] * counts[1]) / sum(counts)
        assert mean == pytest.approx(line["loss"], rel=1e-5)


def test_batches_of_one_source_have_no_losses_by_source(run):
    class OneSource(TwoSources):
        def batch(self, step, rows=slice(None), mesh=ALONE):
            return replace(super().batch(step, rows), sources_BT=None, source_names=())

    line = run(diagnostics_every=1, batches=OneSource(), steps=1).lines[0]
    assert not of(line, "loss/") and of(line, "activation_outlier/")


def test_outliers_are_those_of_the_residual_stream(run, settings):
    line = run(diagnostics_every=1, steps=1, micro_batch_size=3).lines[0]
    shape = {key: value for key, value in TINY.items() if key != "preset"}
    model = initial_decoder(ModelConfig(**shape, vocab_size=97), seed=2)
    residual = record(model, TwoSources().batch(0).tokens_BT.numpy()).residual
    for layer in (0, 1):
        hidden = residual[layer + 1].astype(np.float64)
        square = (hidden**2).mean()
        assert line[f"activation_outlier/layers.{layer}"] == pytest.approx(np.abs(hidden).max() / square**0.5, rel=1e-4)
        assert line[f"activation_kurtosis/layers.{layer}"] == pytest.approx((hidden**4).mean() / square**2, rel=1e-4)


@pytest.mark.parametrize("model", [slow({}), SPARSE], ids=["dense", "sparse"])
def test_diagnostics_change_no_weight(run, model):
    watched, unwatched = (run(str(every), model=model, diagnostics_every=every) for every in (1, 0))
    assert all(torch.equal(watched.path[-1][name], unwatched.path[-1][name]) for name in unwatched.path[-1])
    buffers = dict(unwatched.named_buffers())
    assert all(torch.equal(value, buffers[name]) for name, value in watched.named_buffers())
    assert [line["loss"] for line in watched.lines] == [line["loss"] for line in unwatched.lines]


def test_a_step_that_is_left_out_moved_nothing(run, monkeypatch):
    monkeypatch.setattr("bessemer.training.loop.OutlierDetector.accepts", lambda self, loss, norm, guarded: False)
    line = run(diagnostics_every=1, steps=1).lines[0]
    assert line["skipped"] and of(line, "gradient_norm/") and not of(line, "update_ratio/")


def test_memory_is_reported(run):
    assert run(diagnostics_every=1, steps=1).lines[0]["peak_memory_bytes"] > 10_000_000


@pytest.mark.slow
def test_diagnostics_change_no_weight_of_compiled_blocks_and_compile_nothing(run):
    import torch._dynamo.utils

    ends = []
    for every in (0, 1):
        torch._dynamo.utils.counters.clear()
        ends.append(run(str(every), diagnostics_every=every, compile=True).path[-1])
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 2
    assert all(torch.equal(ends[1][name], weight) for name, weight in ends[0].items())

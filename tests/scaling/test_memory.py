"""The memory of real steps, counted tensor by tensor, beside the formulas."""

import gc
from contextlib import nullcontext
from dataclasses import replace
from itertools import product
from unittest.mock import patch

import pytest
import torch

from bessemer.distributed.layout import Layout
from bessemer.model.cpu_kernels import library, unavailable
from bessemer.model.initialisation import initial_decoder
from bessemer.scaling.hardware import find_card
from bessemer.scaling.job import Candidate, PlannedJob
from bessemer.scaling.memory import assumed_states, memory
from bessemer.scaling.planner import plan_summary, plans
from bessemer.training import logit_chunks
from bessemer.training.head import linear_cross_entropy
from bessemer.training.logit_chunks import ChunkSize
from bessemer.training.model_setup import recompute_activations
from bessemer.training.objectives import next_token_loss
from bessemer.training.optim.optimizers import build_optimizers
from bessemer.training.optim.weight_averaging import MovingAverage
from bessemer.training.pretrain_config import PretrainConfig
from bessemer.training.runtime import Runtime
from bessemer.training.trainer import Trainer
from tests.cases import slow, slow_but
from tests.distributed.parity import RandomBatches
from tests.training.test_head import as_on_a_gpu

from .live_memory import LiveMemory, storage_bytes
from .models import MODELS

ROWS, LENGTH = 8, 64
CPU = find_card("cpu")
SETTINGS = {
    "batch_size": ROWS,
    "context_length": LENGTH,
    "steps": 1,
    "compile": False,
    "threads": 1,
    "optimizer": "adamw",
    "dtype": "bfloat16",
}


def measured(config, settings):
    """(weights, optimizer states, peak) of the second step, in bytes."""
    model = initial_decoder(config, seed=1).train()
    recompute_activations(model, settings.activation_checkpointing)
    optimizers = build_optimizers(model, settings)
    runtime = Runtime.of(settings, torch.device("cpu"))
    trainer = Trainer(
        model, optimizers, next_token_loss, runtime, gradient_clip=1.0, micro_batch_size=settings.micro_batch_size
    )
    batches = [RandomBatches(ROWS, LENGTH, config.vocab_size).batch(number) for number in range(2)]
    batches = [replace(batch, targets_BT=batch.tokens_BT) for batch in batches]  # every target is learned
    trainer.step(batches[0])
    states = [
        tensor
        for optimizer in optimizers
        for state in optimizer.state.values()
        for tensor in state.values()
        if isinstance(tensor, torch.Tensor) and tensor.ndim
    ]
    gc.collect()
    with LiveMemory([*model.parameters(), *model.buffers(), *states]) as live:
        trainer.step(batches[1])
    weights = storage_bytes(model.parameters())
    return weights, storage_bytes(states), weights + storage_bytes(states) + live.peak


@pytest.mark.parametrize(
    "name, micro_batch_size, recompute",
    slow_but(
        [("qwen3", 2, "none"), ("gpt2", None, "full"), ("experts", None, "selective")],
        product(("qwen3", "gpt2", "experts"), (None, 2), ("none", "selective", "full")),
    ),
)
def test_the_peak_of_a_step_is_within_a_tenth_of_what_is_planned(name, micro_batch_size, recompute):
    settings = PretrainConfig(**SETTINGS, activation_checkpointing=recompute, micro_batch_size=micro_batch_size)
    weights, states, peak = measured(MODELS[name], settings)
    planned = memory(PlannedJob(MODELS[name], settings, CPU), Candidate(Layout(), micro_batch_size or ROWS, recompute))
    assert planned.weights == weights
    assert planned.optimizer_states == states
    assert planned.peak == pytest.approx(peak, rel=0.1)


@pytest.mark.parametrize("name", ["latent attention", "linear attention", slow("gemma3")])
def test_the_peak_of_other_architectures_is_within_a_tenth_too(name):
    settings = PretrainConfig(**SETTINGS | {"dtype": "float32"})
    peak = measured(MODELS[name], settings)[-1]
    assert memory(PlannedJob(MODELS[name], settings, CPU), Candidate(Layout(), ROWS)).peak == pytest.approx(peak, rel=0.1)


@pytest.mark.parametrize("optimizer", ["muon", slow("adamw")])
def test_the_states_of_an_optimizer_have_the_planned_size(optimizer):
    settings = PretrainConfig(**SETTINGS | {"optimizer": optimizer})
    states = measured(MODELS["qwen3"], settings)[1]
    planned = memory(PlannedJob(MODELS["qwen3"], settings, CPU), Candidate(Layout(), ROWS)).optimizer_states
    assert planned == pytest.approx(states, rel=0.01)


def test_states_of_an_optimizer_that_does_not_say_are_assumed_and_the_plan_says_so():
    known, unknown = (
        PlannedJob(MODELS["qwen3"], PretrainConfig(**SETTINGS | {"optimizer": name}), CPU) for name in ("adamw", "own.py:build")
    )
    states = [memory(job, Candidate(Layout(), ROWS)).optimizer_states for job in (known, unknown)]
    assert states[0] == states[1]
    assert assumed_states(known) is None
    assert assumed_states(unknown) == "assumed: 8 bytes a weight for the states of own.py:build, which does not say"
    summaries = [plan_summary(plans(job, 1, count=1), tokens=1e6, price=1) for job in (known, unknown)]
    assert [summary.get("assumed_states") for summary in summaries] == [None, assumed_states(unknown)]


def test_an_average_of_the_weights_is_planned_as_large_as_it_is():
    model, settings = MODELS["qwen3"], PretrainConfig(**SETTINGS)
    plain, averaged = (
        memory(PlannedJob(model, chosen, CPU), Candidate(Layout(), ROWS))
        for chosen in (settings, settings.with_changes(ema=0.999))
    )
    kept = MovingAverage(initial_decoder(model, 0), 0.999).state_dict()["weights"].values()
    assert averaged.peak - plain.peak == averaged.kinds["average of the weights"] == storage_bytes(kept)


@pytest.mark.parametrize("softcap", [slow(None), 30.0])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("card", ["cpu", "h100"])
def test_the_head_takes_the_memory_that_is_planned_for_its_device(card, dtype, softcap):
    if (card, dtype) == ("cpu", "bfloat16") and library() is None:
        pytest.skip(f"the plan is that of the compiled kernels: {unavailable()}")
    settings = PretrainConfig(**SETTINGS | {"dtype": dtype})
    model, tokens = MODELS["llama"].with_changes(final_logit_softcapping=softcap), ROWS * LENGTH
    job = PlannedJob(model, settings, find_card(card))
    hidden_ND = torch.randn(tokens, model.hidden_size).requires_grad_()
    weight_VD = torch.randn(model.vocab_size, model.hidden_size).requires_grad_()
    targets_N = torch.arange(tokens) % model.vocab_size
    with patch.dict(logit_chunks._CHUNK_SIZES, cpu=ChunkSize(200, 1 << 16, 1 << 16), cuda=ChunkSize(200, 1 << 20, 1 << 15)):
        planned = memory(job, Candidate(Layout(), ROWS)).kinds["logits and their gradients"]
        # the processor takes the place of the card
        with patch.dict(logit_chunks._CHUNK_SIZES, cpu=job.chunk_size), nullcontext() if card == "cpu" else as_on_a_gpu():
            gc.collect()
            with (
                LiveMemory([hidden_ND, weight_VD, targets_N]) as live,
                torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16"),
            ):
                linear_cross_entropy(hidden_ND, weight_VD, targets_N, softcap).backward()
    assert planned == pytest.approx(live.peak, rel=0.03)


def test_fully_sharded_adamw_takes_sixteen_bytes_a_parameter_over_the_ranks():
    """Rajbhandari et al. 2020, section 3.1, with gradients in float32."""
    settings = PretrainConfig(**SETTINGS | {"batch_size": 64})
    job = PlannedJob(MODELS["llama"], settings, find_card("h100"))
    planned = memory(job, Candidate(Layout(data_shard=64), 1))
    assert planned.weights + planned.gradients + planned.optimizer_states == 16 * MODELS["llama"].parameters() / 64


def test_a_pipeline_s_first_rank_holds_as_many_micro_batches_as_there_are_ranks():
    settings = PretrainConfig(**SETTINGS | {"batch_size": 64})
    model = MODELS["llama"].with_changes(num_hidden_layers=8, vocab_size=8)
    job = PlannedJob(model, settings, find_card("h100"))
    shorter = PlannedJob(model.with_changes(num_hidden_layers=4), settings, job.card)
    eight, four = (memory(of_one, Candidate(Layout(), 1)).activations for of_one in (job, shorter))
    first = memory(job, Candidate(Layout(pipeline=4), 1))
    assert first.activations == pytest.approx(4 * 2 * (eight - four) / 4, rel=0.01)

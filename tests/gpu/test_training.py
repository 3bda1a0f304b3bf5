"""Runs of training on a card: they learn, go on where they were left, and leave what the processor can read."""

from __future__ import annotations

import json
import signal
import subprocess
import sys

import pytest
import torch

from bessemer.core.metrics import METRICS, read_metrics
from bessemer.model.config import ModelConfig
from bessemer.model.initialisation import initial_decoder
from bessemer.model.storage.folder import load_model
from bessemer.scaling.hardware import card_of_device
from bessemer.tokenization.shards import TokenShards
from bessemer.training import step_timing
from bessemer.training.autotune import AUTOTUNE, prepare_run
from bessemer.training.checkpoint.manager import CHECKPOINTS, CheckpointManager, checkpoint_weights, newest_checkpoint
from bessemer.training.checkpoint.state import TrainingState
from bessemer.training.data.batches import TokenBatches
from bessemer.training.loop import train
from bessemer.training.optim.optimizers import build_optimizers
from bessemer.training.pretrain import pretrain
from bessemer.training.runtime import Runtime
from tests.gpu.comparison import relative_difference
from tests.pipeline.test_memory_advice import RECIPE
from tests.training.conftest import TINY, RecordedProgress

pytestmark = pytest.mark.gpu


class StoppedError(Exception):
    pass


@pytest.fixture
def run(tokenized, settings, device):
    """Trains a new tiny model in a folder, on the card or elsewhere, and returns it; stopped by SIGTERM after a step where that
    is asked for."""
    shards = TokenShards(tokenized / "tokens" / "train")

    def run(out, on=device, stop_after=None, on_step_end=lambda finished, trainer: {}, model=(), **changes):
        config = settings.with_changes(optimizer="adamw", learning_rate=0.01, **changes)
        decoder = new_decoder(shards.vocab_size, model).to(on)
        batches = TokenBatches(shards, batch_size=config.batch_size, context_length=config.context_length, seed=1)

        def stopping(finished, trainer):
            if finished == stop_after:
                signal.raise_signal(signal.SIGTERM)
            return on_step_end(finished, trainer)

        before = signal.signal(signal.SIGTERM, _stop)
        try:
            runtime = Runtime.of(config, torch.device(on))
            train(decoder, batches, config, out, runtime=runtime, seed=1, on_step_end=stopping)
        except StoppedError:
            pass
        finally:
            signal.signal(signal.SIGTERM, before)
        return decoder

    return run


def new_decoder(vocab_size=320, model=()):
    shape = {name: value for name, value in TINY.items() if name != "preset"} | dict(model)
    return initial_decoder(ModelConfig(**shape, vocab_size=vocab_size), seed=2)


def _stop(number, frame):
    raise StoppedError


def losses(out):
    return [record["loss"] for record in read_metrics(out / METRICS)]


def weights(model):
    return torch.cat([parameter.detach().cpu().flatten() for parameter in model.parameters()])


SPARSE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("model", [{}, SPARSE], ids=["dense", "experts"])
def test_the_loss_falls(model, dtype, run, tmp_path):
    run(tmp_path, steps=60, dtype=dtype, model=model)
    first, *_, last = losses(tmp_path)
    assert last < first - 1.5


def test_losses_are_those_of_the_processor(run, tmp_path):
    run(tmp_path / "here", steps=8)
    run(tmp_path / "there", on="cpu", steps=8)
    assert losses(tmp_path / "here") == pytest.approx(losses(tmp_path / "there"), rel=1e-3)


def test_a_run_goes_on_where_it_was_left(run, tmp_path):
    options = {"steps": 8, "ema": 0.9}
    whole = run(tmp_path / "whole", **options)
    run(tmp_path / "left", stop_after=4, **options)
    assert [path.name for path in (tmp_path / "left" / CHECKPOINTS).iterdir()] == ["step-000004"]
    resumed = run(tmp_path / "left", **options)
    start = new_decoder()
    # with other batches they would be apart by 0.2 of the way from the start, without the optimizer's states by 0.4
    assert relative_difference(weights(resumed), weights(whole), weights(start)) < 0.01
    found, expected = (average_of(tmp_path / out) for out in ("left", "whole"))
    for name, parameter in start.named_parameters():
        assert relative_difference(found[name], expected[name], parameter) < 0.01, name


def average_of(out):
    return checkpoint_weights(newest_checkpoint(out / CHECKPOINTS), "others.average.weights")


@pytest.mark.parametrize("background", [False, True])
def test_a_checkpoint_holds_the_weights_of_its_step_and_opens_on_the_processor(background, run, tmp_path):
    after = {}

    def keep(finished, trainer):
        after[finished] = {name: tensor.cpu().clone() for name, tensor in trainer.model.state_dict().items()}
        return {}

    run(tmp_path, steps=4, checkpoint_every=1, checkpoint_background=background, on_step_end=keep)
    for number, expected in after.items():
        found = checkpoint_weights(tmp_path / CHECKPOINTS / f"step-{number:06d}")
        assert found.keys() == expected.keys()
        assert all(found[name].device.type == "cpu" and torch.equal(found[name], expected[name]) for name in expected)


def test_a_run_goes_on_on_the_processor(run, tmp_path):
    whole = run(tmp_path / "whole", steps=8)
    run(tmp_path / "left", stop_after=4, steps=8)
    moved = run(tmp_path / "left", on="cpu", steps=8)
    assert relative_difference(weights(moved), weights(whole), weights(new_decoder())) < 0.01


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_compiled_blocks_learn_the_same(dtype, run, tmp_path):
    run(tmp_path / "eager", steps=6, dtype=dtype)
    run(tmp_path / "compiled", steps=6, dtype=dtype, compile=True)
    tolerance = {"float32": 1e-3, "bfloat16": 1e-2}[dtype]
    assert losses(tmp_path / "compiled") == pytest.approx(losses(tmp_path / "eager"), rel=tolerance)


def test_the_memory_that_is_told_is_the_cards(run, tmp_path, device):
    run(tmp_path, steps=2, diagnostics_every=1)
    told = [record["peak_memory_bytes"] for record in read_metrics(tmp_path / METRICS)]
    assert 0 < told[0] <= told[1] <= torch.cuda.max_memory_allocated(device)


def test_a_profile_tells_the_cards_time_and_memory(run, tmp_path):
    run(tmp_path, steps=3, profile={"steps": "2-3"})
    text = (tmp_path / "profile" / "rank-0.operators.md").read_text(encoding="utf-8")
    assert "## Time on the GPU" in text and "## Memory, allocated less freed" in text
    assert (tmp_path / "profile" / "rank-0.trace.json.gz").stat().st_size > 0
    assert (tmp_path / "profile" / "rank-0.memory.pickle").stat().st_size > 0


@pytest.fixture
def stage(settings, model_folder, tokenized, tmp_path, device):
    """Runs the stage `pretrain` on the card; its summary, and the lines of its metrics."""

    def stage(card_flops=lambda name: None, **changes):
        config = settings.with_changes(steps=4, evaluate_every=2, evaluate_tokens=500, **changes)
        arguments = {"seed": 1, "device": device.type, "card_flops": card_flops}
        summary = pretrain(config, model_folder, tokenized / "tokens", tmp_path, **arguments)
        return summary, read_metrics(tmp_path / METRICS)

    return stage


@pytest.mark.parametrize("changes", [{}, {"dtype": "bfloat16", "packing": "documents"}], ids=["", "packed"])
def test_the_stage_leaves_a_model_that_opens_on_the_processor(changes, stage, model_folder, tmp_path, device):
    summary, _ = stage(**changes)
    before, after = load_model(model_folder), load_model(tmp_path / "model")
    assert after.config == before.config and after.dtype == torch.float32
    assert 0 < relative_difference(weights(after), weights(before)) < 1
    assert 0 < summary["bits_per_byte"] < 10
    assert json.loads((tmp_path / AUTOTUNE).read_text(encoding="utf-8"))["device"] == device.type


def test_utilisation_is_told_where_the_cards_peak_is_known(stage, device):
    asked = []
    summary, lines = stage(lambda name: asked.append(name) or 1e9)
    assert asked == [torch.cuda.get_device_name(device)]
    for record in lines:
        assert record["mfu"] == pytest.approx(record["gflops"], abs=0.051)
    assert summary["mfu"] > 0


def test_nothing_is_told_of_utilisation_where_nobody_knows_the_cards_peak(stage):
    summary, lines = stage()
    assert not any("mfu" in record for record in (summary, *lines))


def test_a_card_that_is_known_has_the_memory_that_is_said(device):
    card = card_of_device(torch.cuda.get_device_name(device))
    if card is None:
        pytest.skip(f"{torch.cuda.get_device_name(device)} is none of the cards that plans may name")
    assert torch.cuda.get_device_properties(device).total_memory == pytest.approx(card.memory, rel=0.1)


def test_what_is_open_is_measured_on_the_card(model_folder, settings, tmp_path, device, monkeypatch):
    monkeypatch.setattr(step_timing, "_GROUP_SECONDS", 0.01)
    config = settings.with_changes(steps=None, minutes=0.05, dtype="auto", compile="auto", evaluate_tokens=64)
    resolved, runtime, _ = prepare_run(config, model_folder, tmp_path, device=device.type, progress=RecordedProgress())
    assert resolved.resolved and resolved.steps > 1
    written = json.loads((tmp_path / AUTOTUNE).read_text(encoding="utf-8"))
    assert (written["device"], written["processor"]) == (device.type, torch.cuda.get_device_name(device))
    tried = {candidate["dtype"] for candidate in written["measured"]["candidates"]}
    assert runtime.dtype in tried and ("bfloat16" in tried) == torch.cuda.is_bf16_supported(including_emulation=False)


#: A user's loss that wants a petabyte of the card in the second step.
GREEDY = """
import torch
from bessemer.training.objectives import next_token_loss

calls = []

def loss(model, batch):
    calls.append(1)
    if len(calls) == 2:
        torch.empty(1 << 50, dtype=torch.uint8, device=batch.tokens_BT.device)
    return next_token_loss(model, batch)
"""


def test_out_of_memory_is_one_line_with_what_would_fit_and_the_checkpoint_stays(device, tmp_path):
    lines = [
        {"id": n, "text": f"Number {n}: {'the cat sat on the mat and ' * (n % 7)} counted {n * 7}. " * 6} for n in range(300)
    ]
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    (tmp_path / "mine.py").write_text(GREEDY, encoding="utf-8")
    recipe = RECIPE.replace("pretrain: {", "pretrain: {checkpoint_background: false, ") + f"device: {device.type}\n"
    (tmp_path / "recipe.yaml").write_text(recipe, encoding="utf-8")
    command = [sys.executable, "-m", "bessemer", "run", "recipe.yaml"]
    done = subprocess.run(command, capture_output=True, encoding="utf-8", timeout=280, cwd=tmp_path)
    assert done.returncode == 2, done.stderr
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("error: out of memory while it asked for 1126 TB more; micro_batch_size: ")
    assert "with activation_checkpointing: " in last and "the checkpoint of step 1 is kept" in last
    assert "Traceback" not in done.stderr


def test_a_restored_state_draws_the_next_random_numbers_of_the_card(device, settings, tmp_path):
    model = new_decoder().to(device)
    state = TrainingState(model, build_optimizers(model, settings))
    checkpoints = CheckpointManager(tmp_path, {}, RecordedProgress())
    checkpoints.save(state)
    expected = torch.rand(3, device=device)
    torch.cuda.manual_seed(99)
    assert checkpoints.restore(state)
    assert torch.equal(torch.rand(3, device=device), expected)

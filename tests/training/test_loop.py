import math
import os
import re
import signal

import pytest
import torch

from bessemer.core.errors import CheckpointError, ConfigError
from bessemer.core.metrics import read_metrics
from bessemer.distributed.mesh import ALONE
from bessemer.model.config import ModelConfig
from bessemer.model.initialisation import initial_decoder
from bessemer.model.storage.folder import load_model
from bessemer.tokenization.shards import TokenShards
from bessemer.training.checkpoint.export import save_trained
from bessemer.training.checkpoint.manager import CHECKPOINTS, checkpoint_weights, newest_checkpoint
from bessemer.training.checkpoint.storage import CheckpointReader
from bessemer.training.data.batches import Prefetcher, TokenBatches
from bessemer.training.loop import DivergenceError, train
from bessemer.training.objectives import next_token_loss
from bessemer.training.optim.registry import OPTIMIZERS
from bessemer.training.pretrain import pretrain
from bessemer.training.runtime import Runtime
from tests.cases import slow, slow_but
from tests.distributed.pool import quick_processes

from .conftest import TINY, RecordedProgress, fast_dtype
from .killed import pretrain_and_die


@pytest.fixture
def run(tokenized, settings):
    """Trains a new tiny model in a folder and returns it, with its headline metrics as `summary`."""
    shards = TokenShards(tokenized / "tokens" / "train")

    def run(out, config=settings, **options):
        shape = {name: value for name, value in TINY.items() if name != "preset"}
        model = initial_decoder(ModelConfig(**shape, vocab_size=shards.vocab_size), seed=2)
        batches = TokenBatches(shards, batch_size=config.batch_size, context_length=config.context_length, seed=1)
        runtime = Runtime.of(config, torch.device("cpu"))
        model.summary = train(model, batches, config, out, runtime=runtime, seed=1, **options)
        return model

    return run


def weights(model):
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


def test_it_learns(run, settings, tmp_path):
    run(tmp_path, settings.with_changes(steps=60, learning_rate=0.01))
    losses = [record["loss"] for record in read_metrics(tmp_path / "metrics.jsonl")]
    assert losses[0] == pytest.approx(math.log(320), rel=0.02)
    assert losses[-1] < losses[0] - 1.5


def test_every_step_has_a_line_with_stable_keys(run, settings, tmp_path):
    config = settings.with_changes(diagnostics_every=0)
    run(tmp_path, config, on_step_end=lambda step, _: {"bits_per_byte": 3.0} if step == 4 else {})
    records = read_metrics(tmp_path / "metrics.jsonl")
    assert [record["step"] for record in records] == [1, 2, 3, 4, 5, 6]
    keys = {"step", "loss", "learning_rate", "gradient_norm", "tokens", "tokens_per_second", "gflops", "data_wait", "seconds"}
    assert [set(record) - keys for record in records] == [set(), set(), set(), {"bits_per_byte"}, set(), set()]
    assert all(keys <= set(record) for record in records)
    assert records[-1]["tokens"] == 6 * 2 * 32


def test_fewer_lines_keep_validations_and_the_end(run, settings, tmp_path):
    run(tmp_path, settings.with_changes(log_every=5), on_step_end=lambda step, _: {"bits_per_byte": 3.0} if step == 2 else {})
    assert [record["step"] for record in read_metrics(tmp_path / "metrics.jsonl")] == [2, 5, 6]


def test_how_often_it_saves_and_logs_changes_no_weight(run, settings, tmp_path):
    often = settings.with_changes(checkpoint_minutes=1e-9, log_every=1)
    rarely = settings.with_changes(checkpoint_minutes=1e9, log_every=100)
    assert torch.equal(weights(run(tmp_path / "often", often)), weights(run(tmp_path / "rarely", rarely)))


def test_each_step_reads_its_own_batch_after_a_resume_too(run, settings, tmp_path, monkeypatch):
    asked = []
    whole = Prefetcher.batch
    monkeypatch.setattr(Prefetcher, "batch", lambda self, step: asked.append(step) or whole(self, step))
    with pytest.raises(InterruptedError):
        run(tmp_path, settings.with_changes(checkpoint_minutes=1e-9), on_step_end=_interrupt_at(4))
    run(tmp_path)
    assert asked == [0, 1, 2, 3, 3, 4, 5]


def _interrupt_at(last):
    def on_step_end(step, _):
        if step == last:
            raise InterruptedError
        return {}

    return on_step_end


@pytest.mark.parametrize("kind", slow_but(["muon"], [*OPTIMIZERS, "own.py:plain"]))
def test_a_resumed_run_ends_with_the_same_bits_under_every_optimizer(run, settings, tmp_path, kind):
    (tmp_path / "own.py").write_text(
        "import torch\ndef plain(groups):\n    return torch.optim.RMSprop(groups)\n", encoding="utf-8"
    )
    config = settings.with_changes(optimizer=kind)
    saving = config.with_changes(checkpoint_minutes=1e-9)
    with pytest.raises(InterruptedError):
        run(tmp_path / "stopped", saving, on_step_end=_interrupt_at(3), folder=tmp_path)
    resumed = run(tmp_path / "stopped", config, folder=tmp_path)
    assert torch.equal(weights(resumed), weights(run(tmp_path / "whole", config, folder=tmp_path)))


@pytest.mark.parametrize("number", [signal.SIGTERM, slow(signal.SIGINT)])
def test_a_signal_saves_at_the_end_of_the_step_then_acts(run, tmp_path, number):
    class StoppedError(Exception):
        pass

    def stop(number, frame):
        raise StoppedError

    def interrupt(step, _):
        if step == 3:
            signal.raise_signal(number)
        return {}

    before = signal.signal(number, stop)
    try:
        with pytest.raises(StoppedError):
            run(tmp_path / "stopped", on_step_end=interrupt)
        assert signal.getsignal(number) is stop
    finally:
        signal.signal(number, before)
    assert [path.name for path in (tmp_path / "stopped" / "checkpoints").iterdir()] == ["step-000003"]
    progress = RecordedProgress()
    resumed = run(tmp_path / "stopped", progress=progress)
    assert "resuming from step 3 of 6" in progress.lines[0]
    assert torch.equal(weights(resumed), weights(run(tmp_path / "whole")))


def test_a_finished_run_is_not_trained_again_and_reports_the_same(run, tmp_path):
    first = run(tmp_path, on_step_end=lambda step, _: {"bits_per_byte": 2.0} if step == 6 else {})
    again = run(tmp_path, on_step_end=lambda step, _: pytest.fail("trained again"))
    assert torch.equal(weights(first), weights(again))
    assert first.summary == again.summary
    assert first.summary["bits_per_byte"] == 2.0


def test_a_gradient_that_is_no_number_stops_the_run_and_moves_nothing(run, settings, tmp_path):
    calls = []

    def breaks(model, batch):
        calls.append(weights(model))
        return next_token_loss(model, batch) * (float("nan") if len(calls) == 4 else 1.0)

    with pytest.raises(DivergenceError, match=r"step 4: .* nan; the last good checkpoint is .*step-000003"):
        run(tmp_path, settings.with_changes(checkpoint_minutes=1e-9), objective=breaks)
    assert torch.equal(weights(run(tmp_path)), weights(run(tmp_path / "whole")))


@pytest.mark.parametrize("change", [{"learning_rate": 0.5}, {"weight_decay": 0.5}, {"steps": 7}])
def test_checkpoints_of_another_config_are_refused(run, settings, tmp_path, change):
    run(tmp_path)
    with pytest.raises(CheckpointError, match="made with another configuration"):
        run(tmp_path, settings.with_changes(**change))


def test_what_pytorch_was_set_to_is_set_back(run, tmp_path):
    assert not torch.are_deterministic_algorithms_enabled()
    torch.set_num_threads(2)
    run(tmp_path, on_step_end=lambda step, _: pytest.fail() if torch.get_num_threads() != 1 else {})
    assert torch.get_num_threads() == 2
    assert not torch.are_deterministic_algorithms_enabled()


def pretrain_apart(place, config, model_folder, tokenized, out):
    out.mkdir(exist_ok=True)
    arguments = (place, config, model_folder, tokenized / "tokens", out)
    process = quick_processes().Process(target=pretrain_and_die, args=arguments)
    process.start()
    process.join()
    assert process.exitcode == (-signal.SIGKILL if place else 0)
    return (out / "model" / "model.safetensors").read_bytes() if not place else b""


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="Windows has no kill -9")
def test_killed_and_run_again_ends_with_the_same_bits(settings, model_folder, tokenized, tmp_path):
    config = settings.with_changes(checkpoint_minutes=1e-9, dtype=fast_dtype(), evaluate_tokens=200)
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    for place in ("after the optimizer", "inside a checkpoint"):
        pretrain_apart(place, config, model_folder, tokenized, killed)
    left = {path.name for path in (killed / "checkpoints").iterdir()}
    assert left == {"step-000004", "step-000005", ".step-000006.partial"}
    whole.mkdir()
    for out in (whole, killed):
        pretrain(config, model_folder, tokenized / "tokens", out, seed=3, device="cpu")
    assert (killed / "model" / "model.safetensors").read_bytes() == (whole / "model" / "model.safetensors").read_bytes()
    assert [record["step"] for record in read_metrics(killed / "metrics.jsonl")] == [1, 2, 3, 4, 5, 6]


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="Windows has no kill -9")
def test_compiled_killed_and_run_again_ends_with_the_same_bits(settings, model_folder, tokenized, tmp_path):
    config = settings.with_changes(checkpoint_minutes=1e-9, dtype=fast_dtype(), compile=True, threads=os.cpu_count() or 1)
    whole = pretrain_apart(None, config, model_folder, tokenized, tmp_path / "whole")
    killed = tmp_path / "killed"
    for place in ("before the first step", "after the optimizer", "inside a checkpoint"):
        pretrain_apart(place, config, model_folder, tokenized, killed)
    assert pretrain_apart(None, config, model_folder, tokenized, killed) == whole


def test_a_run_that_changes_its_threads_resumes_to_the_bit(run, settings, tmp_path, monkeypatch):
    """The second thread is taken away after the second step, and given back after the fourth."""
    config = settings.with_changes(threads="auto", evaluate_every=2, checkpoint_minutes=1e-9)
    monkeypatch.setattr("bessemer.training.runtime.usable_cores", lambda: 2)
    monkeypatch.setattr("bessemer.training.runtime.faster_threads", lambda current, candidates: 3 - current)
    seen = []
    whole = run(tmp_path / "whole", config, on_step_end=lambda step, _: seen.append(torch.get_num_threads()) or {})
    assert seen == [2, 2, 1, 1, 2, 2]
    seen.clear()
    with pytest.raises(InterruptedError):
        run(tmp_path / "stopped", config, on_step_end=_interrupt_at(5))
    # measured now, the second thread would never be given back
    monkeypatch.setattr("bessemer.training.runtime.faster_threads", lambda current, candidates: 1)
    resumed = run(tmp_path / "stopped", config, on_step_end=lambda step, _: seen.append(torch.get_num_threads()) or {})
    assert seen and seen == [2] * len(seen)
    assert torch.equal(weights(resumed), weights(whole))


def test_frozen_parameters_do_not_move_and_are_not_in_checkpoints(run, settings, tmp_path):
    start = run(tmp_path / "untrained", settings.with_changes(steps=1, learning_rate=1e-30, weight_decay=0))
    model = run(tmp_path / "run", settings.with_changes(freeze=["layers.0.*", "embed_tokens.*"]))
    moved = {
        name: not torch.equal(after, before)
        for (name, after), before in zip(model.named_parameters(), start.parameters(), strict=True)
    }
    assert {name for name, has in moved.items() if not has} == {
        name for name in moved if name.startswith(("layers.0.", "embed_tokens."))
    }
    held = checkpoint_weights(newest_checkpoint(tmp_path / "run" / CHECKPOINTS))
    assert held.keys() == {name for name, has in moved.items() if has}
    states = CheckpointReader(newest_checkpoint(tmp_path / "run" / CHECKPOINTS)).read_metadata().state_dict_metadata
    assert not any("layers.0." in name for name in states)


def test_a_run_with_frozen_parameters_resumes_to_the_bit(run, settings, tmp_path):
    config = settings.with_changes(freeze=["layers.0.*"], checkpoint_minutes=1e-9)
    with pytest.raises(InterruptedError):
        run(tmp_path / "stopped", config, on_step_end=_interrupt_at(3))
    assert torch.equal(weights(run(tmp_path / "stopped", config)), weights(run(tmp_path / "whole", config)))


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"freeze": ["layer.0.*"]}, "freeze: no parameter is called 'layer.0.*'; known: embed_tokens.weight, "),
        ({"learning_rate_factors": {"head": 0.5}}, "learning_rate_factors: no parameter is called 'head'"),
        ({"freeze": ["*"]}, "leaves no parameter to train"),
    ],
)
def test_patterns_that_match_no_or_every_parameter_are_refused(run, settings, tmp_path, changes, said):
    with pytest.raises(ConfigError, match=re.escape(said)):
        run(tmp_path, settings.with_changes(**changes))


def test_a_factor_scales_the_learning_rate_of_the_parameters_that_match(run, settings, tmp_path):
    """AdamW's first update is the learning rate times the sign of the gradient."""
    config = settings.with_changes(optimizer="adamw", steps=1, warmup_fraction=0, decay_fraction=0, weight_decay=0)
    before = dict(run(tmp_path / "start", config.with_changes(learning_rate=1e-30)).named_parameters())
    factors = {"layers.0.self_attn.*": 0.25, "layers.0.*": 0.5}
    after = run(tmp_path / "run", config.with_changes(learning_rate_factors=factors))
    for name, weight in after.named_parameters():
        factor = 0.25 if name.startswith("layers.0.self_attn.") else 0.5 if name.startswith("layers.0.") else 1.0
        largest = (weight - before[name]).abs().max().item()
        assert largest == pytest.approx(config.learning_rate * factor, rel=1e-3), name


def _validating(losses):
    return lambda step, _: {"validation_loss": losses[step - 1]} if losses[step - 1] else {}


def test_a_run_without_a_better_validation_ends_early_and_stays_ended(run, settings, tmp_path):
    config = settings.with_changes(steps=8, early_stopping_patience=2)
    losses = [3.0, 2.0, None, 2.5, None, 2.1, 1.0, 0.5]
    model = run(tmp_path, config, on_step_end=_validating(losses))
    assert model.summary["steps"] == 6
    assert newest_checkpoint(tmp_path / CHECKPOINTS).name == "step-000006"
    again = run(tmp_path, config, on_step_end=_validating(losses))
    assert again.summary["steps"] == 6 and torch.equal(weights(again), weights(model))


def test_the_best_checkpoint_is_kept_and_saved(run, settings, tokenized, tmp_path):
    config = settings.with_changes(save="best", checkpoint_minutes=1e-9)
    at = {}

    def on_step_end(step, trainer):
        at[step] = weights(trainer.model)
        return _validating([3.0, 2.0, 2.5, 2.4, 2.3, 2.2])(step, trainer)

    model = run(tmp_path, config, on_step_end=on_step_end)
    kept = {path.name for path in (tmp_path / CHECKPOINTS).iterdir()}
    assert kept == {"step-000002", "step-000005", "step-000006"} and model.summary["best_step"] == 2
    tokenizer = tokenized / "tokenizer"
    save_trained(model, tmp_path, tokenizer=tokenizer, mesh=ALONE, config=config, best=model.summary["best_step"])
    assert torch.equal(weights(load_model(tmp_path / "model")), at[2])
    assert not torch.equal(at[2], at[6])

import json
import shutil

import pytest
import torch
from torch import nn

from bessemer.core.errors import ConfigError
from bessemer.core.metrics import read_metrics
from bessemer.model.storage.folder import load_model
from bessemer.tokenization.tokenizer import load_tokenizer
from bessemer.training.checkpoint.export import averaged_model, find_checkpoint
from bessemer.training.checkpoint.manager import CHECKPOINTS, checkpoint_weights, newest_checkpoint
from bessemer.training.optim.weight_averaging import MovingAverage, mean_weights
from bessemer.training.pretrain import pretrain
from bessemer.training.pretrain_config import PretrainConfig
from tests.cli.test_main import bessemer, one_error


def averaged(decay, path):
    """The average of one weight that takes the values of a path, the first of them before training."""
    model = nn.Linear(1, 1, bias=False)
    nn.init.constant_(model.weight, path[0])
    average = MovingAverage(model, decay)
    for value in path[1:]:
        nn.init.constant_(model.weight, value)
        average.update()
    return average.state_dict()["weights"]["weight"].item()


def test_an_old_average_is_the_recurrence_of_its_name():
    path = [1.0] + [2.0, -1.0, 4.0] * 100
    expected = path[0]
    for step, value in enumerate(path[1:], start=1):
        beta = min(0.5, step / (9 + step))
        expected = beta * expected + (1 - beta) * value
    assert averaged(0.5, path) == pytest.approx(expected, rel=1e-5)


def test_a_young_average_forgets_where_training_began():
    assert averaged(0.9999, [1000.0] + [0.0] * 20) < 1e-3  # a fixed decay would still be at 998
    assert averaged(0.9999, list(range(101))) == pytest.approx(90, abs=1)  # over the last ninth


def test_it_is_kept_in_float32_and_leaves_the_weights_alone():
    model = nn.Linear(8, 8, dtype=torch.bfloat16)
    before = model.weight.detach().clone()
    average = MovingAverage(model, 0.999)
    average.update()
    assert {tensor.dtype for tensor in average.state_dict()["weights"].values()} == {torch.float32}
    assert torch.equal(model.weight, before)


def test_in_place_the_model_is_the_average_and_afterwards_itself_to_the_bit(decoder):
    average = MovingAverage(decoder, 0.9)
    with torch.no_grad():
        for parameter in decoder.parameters():
            parameter.mul_(1.1)
    average.update()
    own = {name: parameter.detach().clone() for name, parameter in decoder.named_parameters()}
    kept = {name: tensor.clone() for name, tensor in average.state_dict()["weights"].items()}
    with average.in_place():
        for name, parameter in decoder.named_parameters():
            assert torch.equal(parameter, kept[name]) and not torch.equal(parameter, own[name])
    for name, parameter in decoder.named_parameters():
        assert torch.equal(parameter, own[name])
        assert torch.equal(average.state_dict()["weights"][name], kept[name])


@pytest.fixture
def run(model_folder, tokenized, tmp_path):
    def run(name, config):
        (tmp_path / name).mkdir(exist_ok=True)
        pretrain(config, model_folder, tokenized / "tokens", tmp_path / name, seed=3, device="cpu", folder=tmp_path)
        return tmp_path / name

    return run


def stored(folder):
    return (folder / "model.safetensors").read_bytes()


def test_a_run_saves_both_says_which_is_the_model_and_validates_both(run, settings):
    without = settings.with_changes(evaluate_tokens=200, sample_points=0)
    config = without.with_changes(ema=0.9)
    weights, ema = run("weights", config), run("ema", config.with_changes(save="ema"))
    assert stored(weights / "model") == stored(ema / "model-weights") == stored(run("none", without) / "model")
    assert stored(weights / "model-ema") == stored(ema / "model") != stored(ema / "model-weights")
    last = read_metrics(ema / "metrics.jsonl")[-1]
    assert last["ema_bits_per_byte"] != last["bits_per_byte"]
    model, average = (
        load_model(ema / "model"),
        checkpoint_weights(newest_checkpoint(ema / CHECKPOINTS), "others.average.weights"),
    )
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, average[name])


def test_an_average_goes_on_where_it_was_to_the_bit(run, settings):
    config = settings.with_changes(ema=0.9, checkpoint_every=3, sample_points=0, evaluate_tokens=200)
    whole = run("whole", config)
    part = shutil.copytree(whole, whole.parent / "part")
    for model in part.glob("model*"):
        shutil.rmtree(model)
    shutil.rmtree(part / CHECKPOINTS / "step-000006")
    assert newest_checkpoint(part / CHECKPOINTS).name == "step-000003"
    assert stored(run("part", config) / "model-ema") == stored(whole / "model-ema")


def test_a_run_that_goes_on_from_one_without_an_average_begins_one_there(run, settings):
    stable = settings.with_changes(steps=2, warmup_fraction=0.0, decay_fraction=0.0, sample_points=0, evaluate_tokens=200)
    run("stable", stable)
    averaged = run("averaged", stable.with_changes(steps=3, init_from="stable@last", ema=0.9))
    before = checkpoint_weights(newest_checkpoint(averaged.parent / "stable" / CHECKPOINTS))
    after, average = load_model(averaged / "model"), load_model(averaged / "model-ema")
    for (name, parameter), mean in zip(after.named_parameters(), average.parameters(), strict=True):
        torch.testing.assert_close(mean, 0.1 * before[name] + 0.9 * parameter)


def test_saving_an_average_needs_one():
    with pytest.raises(ConfigError, match="save: ema needs an average: set ema"):
        PretrainConfig.parse({"steps": 1, "save": "ema"}, "pretrain")


def test_the_mean_of_checkpoints_is_that_of_each_tensor():
    draw = torch.Generator().manual_seed(1)
    checkpoints = [{"w": torch.randn(3, 4, generator=draw).bfloat16(), "count": torch.tensor(n)} for n in range(5)]
    mean = mean_weights(iter(checkpoints))
    exact = torch.stack([weights["w"].double() for weights in checkpoints]).mean(0)
    assert mean["w"].dtype == torch.bfloat16 and torch.equal(mean["w"], exact.bfloat16())
    assert mean["count"] == 4


@pytest.mark.parametrize("others", [[], [{"w": torch.zeros(2)}, {"w": torch.zeros(3)}], [{"w": torch.zeros(2)}, {}]])
def test_checkpoints_that_do_not_agree_have_no_mean(others):
    with pytest.raises(ValueError, match=r"there is no checkpoint|differ in names or shapes"):
        mean_weights(others)


def test_the_command_writes_the_mean_of_checkpoints(capsys, monkeypatch, run, settings, tmp_path):
    monkeypatch.chdir(tmp_path)
    run("run", settings.with_changes(checkpoint_every=2, sample_points=0, evaluate_tokens=200))
    code, said, _ = bessemer(capsys, "average", "run@2", "run@4", "run@6", "mean")
    assert code == 0 and said.startswith("mean: the mean of 3 checkpoints")
    weights = [checkpoint_weights(tmp_path / "run" / CHECKPOINTS / f"step-{step:06d}") for step in (2, 4, 6)]
    for name, parameter in load_model(tmp_path / "mean").named_parameters():
        torch.testing.assert_close(parameter.detach(), sum(found[name] for found in weights) / 3)
    assert load_tokenizer(tmp_path / "mean").hash == load_tokenizer(tmp_path / "run" / "model").hash
    for arguments, complaint in (
        (("run@2", "run@4", "mean"), "mean: exists already"),
        (("run@2", "other"), "give at least two checkpoints"),
        (("run@2", "run@3", "other"), "kept no checkpoint of step 3"),
    ):
        code, _, said = bessemer(capsys, "average", *arguments)
        assert code == 2 and complaint in one_error(said)


def test_checkpoints_of_different_models_have_no_mean(run, settings, tmp_path):
    folder = run("run", settings.with_changes(sample_points=0, evaluate_tokens=200))
    shutil.copytree(folder, tmp_path / "other")
    config = json.loads((folder / "model" / "config.json").read_text(encoding="utf-8"))
    (tmp_path / "other" / "model" / "config.json").write_text(
        json.dumps(config | {"rope_theta": 5.0, "rope_parameters": None}), encoding="utf-8"
    )
    with pytest.raises(ConfigError, match="is of another model than"):
        averaged_model([find_checkpoint(f"{name}@last", tmp_path) for name in ("run", "other")])

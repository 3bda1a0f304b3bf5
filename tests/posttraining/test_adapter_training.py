"""The stages `sft` and `preference` by an adapter: what they write, resume, and leave as it was."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

from bessemer.core.errors import ConfigError
from bessemer.core.hashing import hash_file
from bessemer.core.metrics import read_metrics
from bessemer.distributed.sharding import product_matrices
from bessemer.model.adapters import adapted
from bessemer.model.adapters.folder import read_adapter
from bessemer.model.adapters.trained import adapter_of, adapters_of, merged
from bessemer.model.quantisation.config import QuantizeConfig
from bessemer.model.quantisation.quantise import quantise
from bessemer.model.quantisation.quantised_layers import is_quantised
from bessemer.model.storage.folder import load_model, save_model
from bessemer.posttraining.data.examples import Conversation
from bessemer.posttraining.preference.config import PreferenceConfig
from bessemer.posttraining.preference.stage import preference
from bessemer.posttraining.sft.config import SFTConfig
from bessemer.posttraining.sft.finetune import _Questions, _Samples
from bessemer.posttraining.sft.stage import sft
from bessemer.tokenization.tokenizer import load_tokenizer
from bessemer.training.checkpoint.manager import CHECKPOINTS, checkpoint_of_step, checkpoint_weights, newest_checkpoint
from bessemer.training.starting_model import StartingModel
from tests.cases import slow
from tests.posttraining.test_formats import said
from tests.training.conftest import RecordedProgress

pytestmark = pytest.mark.usefixtures("one_thread")

TOKENS = torch.randint(0, 320, (2, 24), generator=torch.Generator().manual_seed(0))
SETTINGS = {
    "steps": 6,
    "batch_size": 4,
    "context_length": 96,
    "dtype": "float32",
    "compile": False,
    "validation_share": 0.2,
    "diagnostics_every": 0,
    "learning_rate": 5e-3,
}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    path = tmp_path_factory.mktemp("chat") / "chat.jsonl"
    rows = [{"messages": [said("user", f"Say {n}."), said("assistant", f"{n} it is.")]} for n in range(40)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def test_modules_are_trained_whole_beside_an_adapter(model_folder, data, tmp_path):
    settings = SETTINGS | {"data": [str(data)], "steps": 4}
    adapter = {"rank": 4, "modules": ["q_proj"], "modules_to_save": ["norm", "embed_tokens"]}
    config = SFTConfig.parse(settings | {"adapter": adapter}, "sft")
    for name in ("whole", "clash"):
        (tmp_path / name).mkdir()
    sft(config, model_folder, None, tmp_path / "whole", seed=1, device="cpu")
    base, tuned = load_model(model_folder), load_model(tmp_path / "whole" / "model")
    found = read_adapter(tmp_path / "whole" / "adapter", base)
    assert set(found.whole) == {"norm.weight", "embed_tokens.weight"}
    for name, tensor in found.whole.items():
        assert not torch.equal(tensor, base.get_parameter(name)) and torch.equal(tensor, tuned.get_parameter(name))
    untouched = "layers.0.mlp.down_proj.weight"
    assert torch.equal(tuned.get_parameter(untouched), base.get_parameter(untouched))
    # its checkpoints hold what is trained, and nothing of what is frozen
    held = checkpoint_weights(newest_checkpoint(tmp_path / "whole" / CHECKPOINTS))
    assert {name for name in held if ".adapter." not in name} == {"norm.weight", "embed_tokens.weight"}
    with pytest.raises(ConfigError, match="q_proj has a low-rank update already"):
        sft(
            SFTConfig.parse(settings | {"adapter": adapter | {"modules_to_save": ["q_proj"]}}, "sft"),
            model_folder,
            None,
            tmp_path / "clash",
            seed=1,
            device="cpu",
        )
    with pytest.raises(ConfigError, match="modules_to_save: in sft alone"):
        PreferenceConfig.parse({"data": ["a.jsonl"], "adapter": adapter}, "preference")


@pytest.fixture(scope="module")
def int4_folder(model_folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("int4") / "model"
    model = load_model(model_folder)
    quantise(model, QuantizeConfig(scheme="int4", group_size=32))
    save_model(model, out, tokenizer=model_folder)
    return out


def run(folder, data, out, adapter=4, on_validation=None, **changes):
    out.mkdir(exist_ok=True)
    config = SFTConfig.parse({"data": [str(data)], "adapter": adapter, **SETTINGS, **changes}, "sft")
    return sft(config, folder, None, out, seed=3, device="cpu", on_validation=on_validation)


def contents(folder):
    return {path.name: hash_file(path) for path in folder.iterdir()}


@pytest.mark.parametrize("quantised", [False, slow(True)], ids=["float", "int4"])
def test_an_adapter_is_trained_written_and_merged_and_its_base_stays(request, model_folder, data, tmp_path, quantised):
    start = request.getfixturevalue("int4_folder") if quantised else model_folder
    before = contents(start)
    summary = run(start, data, tmp_path)
    assert contents(start) == before
    lines = [line["validation_loss"] for line in read_metrics(tmp_path / "metrics.jsonl") if "validation_loss" in line]
    assert lines[-1] < lines[0] - 0.05
    weights = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert summary["adapter_parameters"] == sum(tensor.numel() for tensor in weights.values())
    base = load_model(start).requires_grad_(False)
    with adapted(base, [(read_adapter(tmp_path / "adapter", base), None)]):
        served = base(TOKENS)
    torch.testing.assert_close(load_model(tmp_path / "model")(TOKENS), served, rtol=1e-5, atol=1e-5)
    assert (served - base(TOKENS)).abs().max() > 0.01
    held = checkpoint_weights(newest_checkpoint(tmp_path / CHECKPOINTS))
    assert held and all(".adapter." in name for name in held)


def test_a_killed_run_goes_on_bit_for_bit(model_folder, data, tmp_path):
    adapter = {"rank": 4, "dropout": 0.1, "quantize": "int8", "merge": False}
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    run(model_folder, data, whole, adapter, checkpoint_every=3)
    # what an interruption after step 3 leaves
    shutil.copytree(whole, cut)
    for path in (cut / CHECKPOINTS).glob("*6*"):
        shutil.rmtree(path)
    shutil.rmtree(cut / "adapter")
    run(model_folder, data, cut, adapter, checkpoint_every=3)
    assert contents(whole / "adapter") == contents(cut / "adapter")
    assert not (whole / "model").exists()


@pytest.mark.parametrize("quantize", [slow(None), "int4"])
def test_validations_show_the_model_in_training_and_no_copy_of_it(model_folder, data, tmp_path, quantize):
    tokenizer, progress, shown = load_tokenizer(model_folder), RecordedProgress(), []
    asked = [Conversation.of([said("user", "Say 7."), said("assistant", "7 it is.")], "a.jsonl")]
    context = load_model(model_folder).config.max_position_embeddings
    samples = _Samples(_Questions(asked, tokenizer, context), 7, progress)

    def show(finished, model):
        shown.append((model, is_quantised(model), len(adapters_of(model)), torch.is_grad_enabled()))
        samples.show(finished, model)

    adapter = {"rank": 4, "quantize": quantize, "merge": False}
    run(model_folder, data, tmp_path / "shown", adapter, show, evaluate_every=3)
    model = shown[0][0]
    assert [(one is model, *rest) for one, *rest in shown] == [(True, quantize is not None, 14, False)] * 2
    assert len(progress.lines) == 2 and len({line.partition(" → ")[2] for line in progress.lines}) == 2
    # and training goes on as if nothing had been shown
    run(model_folder, data, tmp_path / "plain", adapter, evaluate_every=3)
    assert contents(tmp_path / "shown" / "adapter") == contents(tmp_path / "plain" / "adapter")


@pytest.mark.slow
def test_an_adapter_of_weights_that_were_quantised_for_training_fits_the_folder_that_it_began_with(
    model_folder, int4_folder, data, tmp_path
):
    run(model_folder, data, tmp_path, {"rank": 4, "quantize": "int4"})
    for folder in (model_folder, int4_folder):
        assert read_adapter(tmp_path / "adapter", load_model(folder)).updates


@pytest.mark.slow
def test_averages_and_the_best_weights_are_of_the_adapter(model_folder, data, tmp_path):
    run(model_folder, data, tmp_path, ema=0.5, save="ema", evaluate_every=3)
    average, last = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("adapter", "adapter-weights"))
    assert any(not torch.equal(average[name], last[name]) for name in last)
    assert (tmp_path / "model-weights").is_dir()
    best = tmp_path / "best"
    run(model_folder, data, best, save="best", evaluate_every=3, learning_rate=0.5)
    step = min(
        (line["validation_loss"], line["step"]) for line in read_metrics(best / "metrics.jsonl") if "validation_loss" in line
    )[1]
    held = checkpoint_weights(checkpoint_of_step(best / CHECKPOINTS, step))
    written = load_file(best / "adapter" / "adapter_model.safetensors")
    name = "layers.0.mlp.down_proj"
    assert torch.equal(written[f"base_model.model.model.{name}.lora_B.weight"], held[f"{name}.adapter.up"])


@pytest.mark.parametrize(
    ("changes", "folders"),
    [
        slow({"save": "best"}, ["adapter"]),
        slow({"ema": 0.5}, ["adapter", "adapter-ema"]),
        ({"ema": 0.5, "save": "ema"}, ["adapter", "adapter-weights"]),
    ],
)
def test_frozen_updates_are_written_beside_the_best_and_the_averaged(model_folder, data, tmp_path, changes, folders):
    run(model_folder, data, tmp_path, freeze=["*.mlp.*"], steps=2, evaluate_every=1, **changes)
    assert sorted(path.name for path in tmp_path.glob("adapter*")) == folders
    for folder in folders:
        written = load_file(tmp_path / folder / "adapter_model.safetensors")
        ups = {name: tensor.abs().max() for name, tensor in written.items() if "lora_B" in name}
        assert all((largest > 0) == ("mlp" not in name) for name, largest in ups.items()), ups
        assert any("mlp" in name for name in ups)


def test_the_defaults_are_those_of_an_adapter_where_nothing_else_is_said():
    config = SFTConfig.parse({"data": ["a.jsonl"], "adapter": {"rank": 8}})
    assert (config.learning_rate, config.optimizer, config.adapter.scale) == (2e-4, "adamw", 4.0)
    given = SFTConfig.parse({"data": ["a.jsonl"], "adapter": 8, "learning_rate": 1e-3, "optimizer": "lion"})
    assert (given.learning_rate, given.optimizer, given.with_changes(steps=3).learning_rate) == (1e-3, "lion", 1e-3)
    assert SFTConfig.parse({"data": ["a.jsonl"], "adapter": {"rank": 16, "rslora": True}}).adapter.scale == 8.0


def test_what_an_adapter_cannot_be_trained_with_is_told_in_one_line(int4_folder, model_folder, data, tmp_path):
    with pytest.raises(ConfigError, match=r"parallel.tensor: an adapter is trained under data_replicate and data_shard alone"):
        SFTConfig.parse({"data": ["a.jsonl"], "adapter": 8, "parallel": {"tensor": 2}})
    model = load_model(model_folder)
    quantise(model, QuantizeConfig(scheme="w8a8"))
    save_model(model, tmp_path / "w8a8", tokenizer=model_folder)
    with pytest.raises(ConfigError, match=r"its activations are quantised too \(w8a8\)"):
        run(tmp_path / "w8a8", data, tmp_path / "out")


@pytest.mark.slow
def test_a_preference_run_begins_at_its_reference(model_folder, tmp_path):
    path = tmp_path / "pairs.jsonl"
    rows = [{"prompt": [said("user", f"Say {n}.")], "chosen": f"YES {n}", "rejected": f"no {n}"} for n in range(24)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    settings = SETTINGS | {"data": [str(path)], "adapter": {"rank": 4, "quantize": "int8"}, "learning_rate": 2e-2, "steps": 12}
    summary = preference(PreferenceConfig.parse(settings), model_folder, tmp_path, seed=3, device="cpu")
    first = read_metrics(tmp_path / "metrics.jsonl")[0]
    assert first["loss"] == pytest.approx(0.6931, abs=1e-4) and first["margin"] == pytest.approx(0, abs=1e-5)
    assert summary["validation_accuracy"] == 1.0


HALF = {"adapter": 4, "dtype": "bfloat16", "save": "best", "evaluate_every": 3, "ema": 0.9}


def test_what_is_frozen_lies_in_the_dtype_of_products_and_no_number_changes(model_folder, data, tmp_path, monkeypatch):
    """Beside a run whose frozen weights are in float32 and are cast in every product."""
    held = {}
    # a machine where bfloat16 is slow refuses it, and computes the same
    monkeypatch.setattr("bessemer.training.autotune.check_dtype", lambda dtype, device: None)

    def noted(finished, model):
        held.setdefault("weights", {name: weight.dtype for name, weight in model.named_parameters()})

    for place in ("half", "float32"):
        if place == "float32":
            monkeypatch.setattr("bessemer.training.starting_model.StartingModel.frozen_dtype", torch.float32)
        run(model_folder, data, tmp_path / place, **HALF, on_validation=noted if place == "half" else None)
    kinds = held["weights"]
    matrices = [name for name in kinds if name.startswith("layers.") and name.endswith("_proj.weight")]
    assert len(matrices) >= 7 and all(kinds[name] == torch.bfloat16 for name in matrices)
    assert all(kind == torch.float32 for name, kind in kinds.items() if name not in matrices)
    for written in ("adapter/adapter_model.safetensors", "model/model.safetensors"):
        found, wanted = (load_file(tmp_path / place / written) for place in ("half", "float32"))
        assert found.keys() == wanted.keys()
        assert all(torch.equal(found[name], weight) and found[name].dtype == torch.float32 for name, weight in wanted.items())


def test_no_half_copy_of_a_frozen_matrix_is_kept_for_the_backward_pass(model_folder):
    """What a step holds of the weights: of all that autograd keeps, nothing has a frozen matrix's shape and is not that."""
    config = SFTConfig.parse({"data": ["chat.jsonl"], **SETTINGS, "adapter": 4, "dtype": "bfloat16", "steps": 1}, "sft")
    model = StartingModel.of(model_folder, config, seed=1).whole("cpu").train()
    matrices = product_matrices(model)
    frozen = {weight.untyped_storage().data_ptr() for weight in matrices if not weight.requires_grad}
    shapes = {tuple(weight.shape) for weight in matrices} | {tuple(weight.shape)[::-1] for weight in matrices}
    kept = []
    hooks = torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor)
    with hooks, torch.autocast("cpu", torch.bfloat16):
        model.hidden(TOKENS[:, :23]).square().sum().backward()
    of_weights = [tensor for tensor in kept if tensor.dim() == 2 and tuple(tensor.shape) in shapes]
    assert len(of_weights) >= 7 and all(tensor.untyped_storage().data_ptr() in frozen for tensor in of_weights)


def test_what_lies_in_half_precision_in_training_is_merged_in_the_models_dtype(model_folder):
    config = SFTConfig.parse({"data": ["chat.jsonl"], **SETTINGS, "adapter": 4, "dtype": "bfloat16", "steps": 1}, "sft")
    model = StartingModel.of(model_folder, config, seed=1).whole("cpu")
    found = merged(model, adapter_of(model))
    assert {weight.dtype for weight in found.parameters()} == {torch.float32}
    wanted = load_model(model_folder).state_dict()
    name = "layers.0.self_attn.q_proj.weight"
    assert torch.equal(found.state_dict()[name], wanted[name].bfloat16().float())

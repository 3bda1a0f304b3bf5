"""The stage `rl` by an adapter: it learns, agrees with what samples, leaves its base as it was, and resumes bit for bit."""

import shutil
from itertools import product

import pytest
import torch
from safetensors.torch import load_file

from bessemer.core.errors import ConfigError
from bessemer.core.hashing import hash_file
from bessemer.core.metrics import read_metrics
from bessemer.model.adapters import adapted
from bessemer.model.adapters.folder import read_adapter
from bessemer.model.adapters.trained import adapters_of, add_adapters, merged_in_place
from bessemer.model.quantisation.config import QuantizeConfig
from bessemer.model.quantisation.quantise import quantise
from bessemer.model.storage.folder import load_model, save_model
from bessemer.posttraining.rl.config import RLConfig
from bessemer.posttraining.rl.objective import PolicyObjective
from bessemer.posttraining.sampling.samples import Prompt
from bessemer.training.checkpoint.manager import CHECKPOINTS, checkpoint_weights, newest_checkpoint
from bessemer.training.objectives import LossContext
from tests.cases import slow, slow_but
from tests.inference.models import small_decoder

from .test_episodes import ENVIRONMENT
from .test_rl import SETTINGS, bytes_tokenizer, data, run, source_of  # noqa: F401

pytestmark = pytest.mark.usefixtures("one_thread")

#: Architectures whose sampler has a way of its own.
KINDS = ("dense", "experts", "latent", "linear")
TOKENS = torch.randint(0, 320, (2, 24), generator=torch.Generator().manual_seed(0))


def contents(folder):
    return {path.name: hash_file(path) for path in folder.iterdir()}


def adapting(model, seed=0):
    """A model with an adapter that has learnt something."""
    generator = torch.Generator().manual_seed(seed)
    for update in add_adapters(model, rank=4, scale=2.0).values():
        for parameter in (update.down, update.up):
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.1
    return model


@pytest.fixture(scope="module")
def sure_folder(model_folder, tmp_path_factory):
    """A model of which an adapter can change what it writes: its logits are eight times those of a new one."""
    model = load_model(model_folder).float()
    model.norm.weight.data.mul_(8)
    folder = tmp_path_factory.mktemp("sure") / "model"
    save_model(model, folder, tokenizer=model_folder)
    return folder


@pytest.mark.parametrize("settings", [{}, slow({"rslora": True}), slow({"dora": True})], ids=["lora", "rslora", "dora"])
def test_an_adapter_learns_what_is_rewarded_and_its_base_stays(sure_folder, data, tmp_path, settings):  # noqa: F811
    before = contents(sure_folder)
    adapter = {"rank": 4, "alpha": 16, **settings}
    summary = run(sure_folder, data, tmp_path, steps=40, batch_size=32, learning_rate=1e-2, adapter=adapter)
    assert contents(sure_folder) == before
    lines = read_metrics(tmp_path / "metrics.jsonl")
    assert lines[-1]["reward"] > lines[0]["reward"] + 0.2
    assert summary["validation_reward"] > summary["validation_reward_before"] + 0.2
    assert max(line["log_ratio_max"] for line in lines) < 1e-4
    base = load_model(sure_folder).requires_grad_(False)
    with adapted(base, [(read_adapter(tmp_path / "adapter", base), None)]):
        served = base(TOKENS)
    torch.testing.assert_close(load_model(tmp_path / "model")(TOKENS), served, rtol=1e-4, atol=1e-4)
    assert (served - base(TOKENS)).abs().max() > 0.01
    held = checkpoint_weights(newest_checkpoint(tmp_path / CHECKPOINTS))
    assert held and all(".adapter." in name for name in held)


@pytest.mark.parametrize(
    ("architecture", "kernels"),
    slow_but(
        {("experts", "auto"), ("linear", "auto"), ("dense", "off")},
        product(KINDS, ["auto", "off"]),
    ),
)
def test_sampler_and_trainer_agree_on_every_token_of_an_adapter(architecture, kernels, bytes_tokenizer, data, tmp_path):  # noqa: F811
    model = adapting(small_decoder(architecture)).train()
    base = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    prompts = [Prompt(f"{'ab ' * number}c", {"number": number}) for number in range(1, 5)]
    changes = {"temperature": 0.7, "max_tokens": 24, "cpu_kernels": kernels}
    source, config = source_of(model, bytes_tokenizer, tmp_path, prompts, folder=data, **changes)
    for step in range(2):
        terms = PolicyObjective.of(config)(model, source.batch(step, slice(None)), LossContext())
        assert float(terms.metrics["log_ratio"].max) < 1e-4
        assert all(torch.equal(base[name], tensor) for name, tensor in model.state_dict().items() if ".adapter." not in name)
        # where a trainer makes its step; what samples then must follow
        for update in adapters_of(model).values():
            update.up.data += 0.05
    assert float(PolicyObjective.of(config)(model, source.batch(1, slice(None)), LossContext()).metrics["log_ratio"].max) > 1e-2
    source.close()


@pytest.mark.parametrize("scheme", ["int4", slow("int8")])
def test_a_quantised_base_samples_what_is_trained(scheme, model_folder, data, tmp_path):  # noqa: F811
    adapter = {"rank": 4, "quantize": scheme}
    run(model_folder, data, tmp_path, steps=2, adapter=adapter, beta=0.05, validation_share=0, learning_rate=0.05)
    lines = read_metrics(tmp_path / "metrics.jsonl")
    assert max(line["log_ratio_max"] for line in lines) < 1e-4
    # at the first step the policy is its own reference
    assert lines[0]["kl"] == pytest.approx(0, abs=1e-6) and abs(lines[1]["kl"]) > 1e-5
    learnt = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert all(tensor.any() for name, tensor in learnt.items() if "lora_B" in name)


def test_the_base_is_the_reference_and_no_second_model_is_loaded(model_folder, data, tmp_path, monkeypatch):  # noqa: F811
    full = tmp_path / "full"
    run(model_folder, data, full, steps=1, beta=0.1, validation_share=0, learning_rate=1e-9)
    monkeypatch.setattr("bessemer.training.job.open_beside", None)
    run(model_folder, data, tmp_path / "adapter", steps=3, beta=0.1, validation_share=0, adapter=4)
    lines = read_metrics(tmp_path / "adapter" / "metrics.jsonl")
    assert lines[0]["reward"] == read_metrics(full / "metrics.jsonl")[0]["reward"], "the first rollout is the base's"
    assert lines[0]["kl"] == pytest.approx(0, abs=1e-6) and lines[-1]["kl"] > 1e-4


# by default one of all weights does (`test_rl.py`), and an adapter of a supervised run
@pytest.mark.slow
@pytest.mark.parametrize("kernels", ["auto", "off"])
def test_a_killed_run_goes_on_bit_for_bit(model_folder, data, tmp_path, kernels):  # noqa: F811
    changes = {"mini_batches": 2, "batch_size": 8, "checkpoint_every": 3, "beta": 0.1, "kl": "reward", "cpu_kernels": kernels}
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    run(model_folder, data, whole, adapter={"rank": 4, "merge": False}, **changes)
    # what an interruption after step 3, within a rollout, leaves
    shutil.copytree(whole, cut)
    for path in (cut / CHECKPOINTS).glob("*4*"):
        shutil.rmtree(path)
    shutil.rmtree(cut / "adapter")
    run(model_folder, data, cut, adapter={"rank": 4, "merge": False}, **changes)
    assert contents(whole / "adapter") == contents(cut / "adapter")
    assert (whole / "completions.jsonl").read_text(encoding="utf-8") == (cut / "completions.jsonl").read_text(encoding="utf-8")
    assert not (whole / "model").exists()


def test_a_critic_is_a_model_of_its_own(model_folder, data, tmp_path):  # noqa: F811
    changes = {"algorithm": "ppo", "rollout_epochs": 2, "group_size": 1, "steps": 4, "validation_share": 0}
    run(model_folder, data, tmp_path, adapter=4, **changes)
    lines = read_metrics(tmp_path / "metrics.jsonl")
    assert all("explained_variance" in line for line in lines[::2]) and "value_error" in lines[-1]
    newest = newest_checkpoint(tmp_path / CHECKPOINTS)
    assert any("score" in name for name in checkpoint_weights(newest, "others.critic"))
    start = load_model(model_folder)
    quantise(start, QuantizeConfig(scheme="int8"))
    save_model(start, tmp_path / "int8", tokenizer=model_folder)
    with pytest.raises(ConfigError, match=r"critic: all its weights are trained, and .*int8 is quantised"):
        run(tmp_path / "int8", data, tmp_path / "out", adapter=4, **changes)


@pytest.mark.slow
@pytest.mark.parametrize("kernels", ["auto", "off"])
def test_pairs_and_episodes_are_sampled_by_the_adapter_too(model_folder, data, tmp_path, kernels):  # noqa: F811
    changes = {"steps": 2, "adapter": 4, "cpu_kernels": kernels, "validation_share": 0}
    pairs, episodes = tmp_path / "pairs", tmp_path / "episodes"
    run(model_folder, data, pairs, algorithm="online_dpo", group_size=4, **changes)
    assert read_metrics(pairs / "metrics.jsonl")[0]["loss"] == pytest.approx(0.6931, abs=1e-4)
    (data / "world.py").write_text(ENVIRONMENT, encoding="utf-8")
    played = {"environment": "world.py:Letters", "max_turns": 2, "rewards": ["environment"], "max_tokens": 6}
    run(model_folder, data, episodes, learning_rate=0.05, **played, **changes)
    assert max(line["log_ratio_max"] for line in read_metrics(episodes / "metrics.jsonl")) < 1e-4


def test_a_weight_that_is_merged_for_a_time_is_what_it_was_also_after_an_error():
    model = adapting(small_decoder("dense"))
    weights = dict(model.named_parameters())
    before = {name: (weight.data_ptr(), weight.detach().clone()) for name, weight in weights.items()}
    wanted = model(TOKENS % 200)
    with pytest.raises(KeyboardInterrupt), merged_in_place(model):
        torch.testing.assert_close(model(TOKENS % 200), wanted, rtol=1e-5, atol=1e-5)
        raise KeyboardInterrupt
    for name, weight in model.named_parameters():
        assert weight is weights[name] and weight.data_ptr() == before[name][0] and torch.equal(weight, before[name][1])
    assert torch.equal(model(TOKENS % 200), wanted)


def test_the_defaults_are_those_of_an_adapter_where_nothing_else_is_said():
    given = {"data": ["p.jsonl"], "adapter": 8}
    assert RLConfig.parse(given, "rl").learning_rate == 1e-5
    assert RLConfig.parse({**given, "learning_rate": 1e-3}, "rl").learning_rate == 1e-3
    ppo = RLConfig.parse({**given, "algorithm": "ppo"}, "rl")
    assert ppo.critic.learning_rate_factor == 1 and ppo.with_changes(steps=3).critic.learning_rate_factor == 1
    assert RLConfig.parse({"data": ["p.jsonl"], "algorithm": "ppo"}, "rl").critic.learning_rate_factor == 10


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"parallel": {"tensor": 2}}, r"parallel.tensor: an adapter is trained under data_replicate and data_shard alone"),
        ({"adapter": {"rank": 4, "dropout": 0.1}}, r"adapter.dropout: the model samples without it"),
        ({"adapter": {"rank": 4, "quantize": "int8"}, "cpu_kernels": "on"}, r"the kernels round activations to 8 bits"),
    ],
)
def test_what_an_adapter_cannot_be_sampled_with_is_told_in_one_line(settings, message):
    with pytest.raises(ConfigError, match=message):
        RLConfig.parse({"data": ["prompts.jsonl"], **SETTINGS, "adapter": 4, **settings}, "rl")

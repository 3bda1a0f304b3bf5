"""PyTorch's runtime: how blocks are compiled, which algorithms and dtypes a run takes, which attention."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

import pytest
import torch

from bessemer.core.errors import ConfigError
from bessemer.distributed.mesh import ALONE
from bessemer.training.model_setup import prepare_model
from bessemer.training.objectives import build_objective
from bessemer.training.optim.optimizers import build_optimizers
from bessemer.training.pretrain_config import PretrainConfig
from bessemer.training.runtime import _DETERMINISTIC_OPTIONS, Runtime, fix_cublas_workspaces
from bessemer.training.step_timing import _random_batch
from bessemer.training.trainer import Trainer
from tests.inference.models import ARCHITECTURES, BASE, small_decoder
from tests.model.randomised import random_decoder


def trained(name: str, alone: bool) -> list[torch.Tensor]:
    """The weights of a small model after three compiled steps."""
    config = PretrainConfig(steps=3, dtype="bfloat16", compile=True, batch_size=2, context_length=32, optimizer="adamw")
    runtime = Runtime.of(config, torch.device("cpu"), threads=2)
    with runtime.running():
        torch.manual_seed(0)
        model = small_decoder(name).train()
        runtime.compile_blocks(model, alone=alone)
        optimizers = build_optimizers(model, config, Path())
        trainer = Trainer(model, optimizers, build_objective(config, model.config), runtime, gradient_clip=1.0)
        batch = _random_batch(config, model.config.vocab_size)
        for _ in range(3):
            trainer.step(batch)
    return [parameter.detach().clone() for parameter in model.parameters()]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["dense", "experts", "latent", "linear"])
def test_one_file_a_pass_gives_the_weights_of_a_file_a_kernel(name):
    assert all(torch.equal(one, other) for one, other in zip(trained(name, True), trained(name, False), strict=True))


def runtime_of(device="cuda", dtype="bfloat16", deterministic=False):
    """As on a machine with that device."""
    return Runtime(device, dtype, False, 1, "a card", torch.__version__, deterministic)


@pytest.fixture
def environment(monkeypatch):
    """Without a setting of cuBLAS, and before CUDA is initialised."""
    # set first, so that whatever the test sets is undone
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "")
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)
    return monkeypatch


@pytest.mark.parametrize("deterministic", [True, False])
def test_on_a_card_algorithms_are_deterministic_where_asked_for(deterministic):
    with runtime_of(deterministic=deterministic).running():
        assert torch.are_deterministic_algorithms_enabled() == deterministic
    assert not torch.are_deterministic_algorithms_enabled()


def test_on_a_processor_algorithms_are_always_deterministic(settings):
    for asked in (True, False):
        runtime = Runtime.of(settings.with_changes(deterministic=asked), torch.device("cpu"))
        with runtime.running():
            assert torch.are_deterministic_algorithms_enabled()


def test_determinism_gives_cublas_workspaces_of_a_fixed_size(environment):
    fix_cublas_workspaces()
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"


def test_workspaces_that_the_user_has_chosen_stay(environment):
    environment.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")
    environment.setattr(torch.cuda, "is_initialized", lambda: True)
    fix_cublas_workspaces()
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":16:8"


def test_determinism_that_comes_too_late_is_refused_in_one_line(environment, settings):
    environment.setattr(torch.cuda, "is_initialized", lambda: True)
    with pytest.raises(ConfigError, match=r"needs CUBLAS_WORKSPACE_CONFIG=:4096:8 in the environment before CUDA") as raised:
        Runtime.of(settings.with_changes(deterministic=True), torch.device("cuda"))
    assert "\n" not in str(raised.value)


def test_what_is_asked_of_the_compiler_for_determinism_is_known_to_it():
    assert set(_DETERMINISTIC_OPTIONS) <= set(torch._inductor.list_options())


def test_determinism_is_no_part_of_a_stages_key(settings):
    assert settings.with_changes(deterministic=True).output_settings() == settings.output_settings()


@pytest.mark.parametrize(("dtype", "gathered"), [("bfloat16", torch.bfloat16), ("float16", None), ("float32", None)])
@pytest.mark.parametrize("device", ["cuda:1", "cpu"])
def test_in_bfloat16_matrices_are_gathered_in_it(device, dtype, gathered):
    assert runtime_of(device, dtype).gathered_dtype == gathered


@pytest.fixture
def triton(monkeypatch):
    """As if Triton were installed."""
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: True if name == "triton" else found(name))


@pytest.mark.parametrize(
    ("device", "shape", "backend"),
    [
        ("cuda", {"head_dim": 16}, "flex"),
        ("cuda", {"head_dim": 8}, "sdpa"),
        ("cuda", ARCHITECTURES["latent"] | {"v_head_dim": 16}, "flex"),
        ("cuda", ARCHITECTURES["latent"] | {"v_head_dim": 8}, "sdpa"),
        ("cpu", {"head_dim": 16}, "sdpa"),
    ],
)
def test_packed_documents_on_a_card_are_attended_to_in_blocks_where_heads_are_wide_enough(device, shape, backend, triton):
    model = random_decoder(BASE.with_changes(**shape))
    runtime_of(device).skip_masked_blocks(model)
    assert model.attention_backend == backend


def test_validation_and_old_log_probabilities_are_by_the_attention_of_training():
    model = small_decoder("dense")
    model.set_attention_backend("flex")
    with runtime_of("cpu").evaluating(model):
        assert model.attention_backend == "flex" and not model.training
    assert model.attention_backend == "flex"


@pytest.mark.parametrize(
    ("device", "dtype", "precision"),
    [("cuda", "bfloat16", "high"), ("cuda", "float32", "highest"), ("cpu", "bfloat16", "highest")],
)
def test_what_autocast_leaves_in_float32_is_multiplied_in_tf32_on_a_card(device, dtype, precision):
    with runtime_of(device, dtype).running():
        assert torch.get_float32_matmul_precision() == precision
    assert torch.get_float32_matmul_precision() == "highest"


@pytest.mark.parametrize(
    "changes", [{}, {"packing": "documents"}, {"packing": "documents", "activation_checkpointing": "selective"}], ids=str
)
def test_only_packed_documents_are_attended_to_in_blocks(changes, settings, monkeypatch):
    asked = []
    monkeypatch.setattr(Runtime, "skip_masked_blocks", lambda runtime, model: asked.append(model))
    config = settings.with_changes(**changes)
    model = small_decoder("dense")
    prepare_model(model, config, Runtime.of(config, torch.device("cpu")), ALONE)
    assert asked == ([model] if changes == {"packing": "documents"} else [])

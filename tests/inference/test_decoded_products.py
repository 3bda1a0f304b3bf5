"""Quantised models whose weights are read out of their codes once, where no kernels multiply by them."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from bessemer.inference import executors
from bessemer.inference.engine import Engine, EngineConfig, SamplingParams
from bessemer.inference.executors import AdaptingExecutor
from bessemer.inference.module_executor import ModuleExecutor
from bessemer.model.folder import save_model
from bessemer.model.kernels import build, choice
from bessemer.model.kernels.build import library, unavailable
from bessemer.model.quantisation.config import QuantizeConfig
from bessemer.model.quantisation.quantise import quantise
from tests.inference.models import BASE, small_tokenizer
from tests.inference.steps import Steps
from tests.model.randomised import random_decoder, random_tokens

WIDE = BASE.with_changes(hidden_size=64, intermediate_size=128, head_dim=16)
SCHEMES = {"int8": {"scheme": "int8"}, "int4": {"scheme": "int4", "group_size": 32}, "w8a8": {"scheme": "w8a8"}}
MODELS = {"dense": {}, "experts": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64, "expert_bias": True}}


def quantised_model(name="dense", scheme="int8", **changes):
    decoder = random_decoder(WIDE.with_changes(**MODELS[name], **changes))
    quantise(decoder, QuantizeConfig(**SCHEMES[scheme]))
    return decoder


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize(("name", "scheme"), [("dense", "int8"), ("experts", "int4"), ("dense", "w8a8")])
def test_weights_read_out_once_give_the_bits_of_those_read_out_each_time(name, scheme, tied):
    decoder = quantised_model(name, scheme, tie_word_embeddings=tied)
    rows = random_tokens(WIDE, 1, 20)
    found, expected = (
        Steps(decoder, partial(ModuleExecutor, decoded=decoded))((0, rows[0], 0, 20))[0] for decoded in (True, False)
    )
    assert torch.equal(found, expected)


@pytest.fixture
def folder(tmp_path):
    """A quantised model with a tokenizer."""
    small_tokenizer(tmp_path)
    save_model(quantised_model(), tmp_path / "model", tokenizer=tmp_path / "tokenizer")
    return tmp_path / "model"


def executor_of(folder, **config):
    engine = Engine(folder, device="cpu", config=EngineConfig(threads=1, **config))
    engine.generate([[1, 2, 3]], SamplingParams(max_tokens=2))
    return engine.loop.executor


@pytest.fixture
def measured():
    """What was measured is forgotten before and after."""
    choice.decoded_is_faster.cache_clear()
    yield
    choice.decoded_is_faster.cache_clear()


def test_an_engine_without_kernels_reads_weights_out_once_where_memory_holds_them(folder, measured, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setenv("CXX", "no-such-compiler")
        build._outcome.cache_clear()
        assert executor_of(folder)._lent.products
        patch.setattr(executors, "free_memory_bytes", lambda: 1000)
        assert not executor_of(folder)._lent.products
    build._outcome.cache_clear()


def test_kernels_of_plain_cpp_are_left_where_pytorch_is_faster(folder, measured, monkeypatch):
    if library() is None:
        pytest.skip(unavailable())
    monkeypatch.setattr(choice, "arithmetic", lambda: "portable")
    monkeypatch.setattr(choice, "_SIZE", 64)
    for seconds, kind in (([1.0, 2.0], ModuleExecutor), ([2.0, 1.0], AdaptingExecutor)):
        taken = iter(seconds)
        monkeypatch.setattr(choice, "_seconds", lambda product, taken=taken: product() is not None and next(taken))
        choice.decoded_is_faster.cache_clear()
        executor = executor_of(folder)
        assert isinstance(executor, kind)
    assert isinstance(executor_of(folder, kernels="off"), ModuleExecutor)

"""Attention over pages by FlashAttention and FlashInfer: what the engine asks of them, and when it asks which."""

from __future__ import annotations

import pytest
import torch

from bessemer.core.errors import ConfigError
from bessemer.inference.engine import Engine, EngineConfig
from bessemer.inference.execution import build as execution_build
from bessemer.inference.execution import flash_attention
from bessemer.inference.execution.build import PageLayout, gpu_share, memory_budget, page_layout, paged_way, resolved_for
from bessemer.inference.execution.flash_attention import KernelPagesAttention, page_kernel
from tests.inference.models import ARCHITECTURES, BASE, small_decoder, small_tokenizer
from tests.inference.pretended_flash import pretend
from tests.inference.steps import Steps, mixed_steps
from tests.inference.test_cuda_graphs import Repeated
from tests.inference.test_identity import WAYS, alone, assert_same_but_for_ties
from tests.model.randomised import random_tokens

CUDA = torch.device("cuda")
#: Heads that all kernels have.
WIDE = BASE.with_changes(head_dim=64)
#: Latent attention has values that are narrower than keys, and linear attention is beside layers with pages.
READ = {
    "flash": [name for name in ARCHITECTURES if name != "latent"],
    "flashinfer": [name for name in ARCHITECTURES if name not in ("latent", "alibi")],
}
CASES = [(library, name) for library, names in READ.items() for name in names]
#: One of each library by default: windows with freed blocks, and sinks with caps.
CHEAP = [("flash", "windows"), ("flash", "sinks and caps"), ("flash", "alibi"), ("flashinfer", "sinks and caps")]


def cases(cheap):
    return [pytest.param(*case, marks=[] if case in cheap else pytest.mark.slow) for case in CASES]


def kernel_runner(library):
    def make(decoder, memory):
        from bessemer.inference.execution.backend import Backend
        from bessemer.inference.execution.linear import OwnWeights
        from bessemer.inference.execution.runner import Runner

        return Runner(
            decoder, memory, Backend(OwnWeights(), KernelPagesAttention(memory, page_kernel(library, memory), decoder.dtype))
        )

    return make


@pytest.mark.parametrize(("library", "name"), cases(CHEAP))
def test_pages_read_by_a_librarys_kernels_give_the_logits_of_gathered_ones(library, name, monkeypatch):
    module = pretend(monkeypatch, library)
    decoder = small_decoder(name)
    rows = random_tokens(decoder.config, 3, 60)
    gathered = mixed_steps(Steps(decoder), rows)
    for text, logits in mixed_steps(Steps(decoder, kernel_runner(library)), rows).items():
        assert (logits - gathered[text]).abs().max() < 2e-5
    if library == "flash":
        assert {"flash_attn_with_kvcache", "flash_attn_varlen_func"} == set(module.called)


def test_flashinfer_plans_a_step_once_for_all_layers_of_a_group(monkeypatch):
    wrapper = pretend(monkeypatch, "flashinfer").BatchPrefillWithPagedKVCacheWrapper
    decoder = small_decoder("windows")
    Steps(decoder, kernel_runner("flashinfer"))((0, random_tokens(decoder.config, 1, 20)[0], 0, 20))
    assert decoder.config.num_hidden_layers == 3 and wrapper.plans == 2


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return small_tokenizer(tmp_path_factory.mktemp("flash"))


@pytest.mark.parametrize(
    ("library", "way"),
    [
        pytest.param(library, way, marks=[] if (library, way) == ("flash", "preempted for want of pages") else pytest.mark.slow)
        for library in READ
        for way in WAYS
    ],
)
def test_an_engine_on_them_makes_the_tokens_of_gathered_pages_but_for_ties(library, way, tokenizer, monkeypatch):
    model = small_decoder("windows")
    expected = alone(model, tokenizer)
    pretend(monkeypatch, library)
    for one, other in zip(WAYS[way](model, tokenizer, paged_attention=library), expected, strict=True):
        assert_same_but_for_ties(one, other)


def test_steps_on_static_tensors_read_pages_by_flash_attention(tokenizer, monkeypatch):
    model = small_decoder("windows")
    expected, capture = alone(model, tokenizer), Repeated()
    module = pretend(monkeypatch, "flash")
    monkeypatch.setattr(execution_build, "CudaGraphs", lambda: capture)
    monkeypatch.setattr(execution_build, "page_layout", lambda *_: PageLayout(False, True))
    found = alone(model, tokenizer, paged_attention="flash")
    assert capture.rows and "flash_attn_with_kvcache" in module.called
    for one, other in zip(found, expected, strict=True):
        assert_same_but_for_ties(one, other)


# -- which one is taken


def way(monkeypatch, installed=(), device=CUDA, dtype=torch.bfloat16, model=WIDE, **settings):
    monkeypatch.setattr(flash_attention, "is_installed", lambda library: library in installed)
    monkeypatch.setattr(execution_build.importlib.util, "find_spec", lambda name: object())
    config = resolved_for(EngineConfig(**settings), model, dtype, device)
    return paged_way(model, config, dtype, device), config.block_size


def test_on_a_gpu_the_first_library_that_is_installed_and_can_reads_pages(monkeypatch):
    assert way(monkeypatch, ("flash", "flashinfer")) == ("flash", 256)
    assert way(monkeypatch, ("flash", "flashinfer"), block_size=16) == ("flashinfer", 16)
    assert way(monkeypatch, ("flash",), block_size=16) == ("flex", 16)
    assert way(monkeypatch) == ("flex", 16)
    assert way(monkeypatch, ("flash", "flashinfer"), dtype=torch.float32) == ("flex", 16)
    latent = BASE.with_changes(**ARCHITECTURES["latent"])
    assert way(monkeypatch, ("flash", "flashinfer"), model=latent)[0] == "flex"
    assert way(monkeypatch, model=BASE) == ("gather", 16)  # heads of 12 channels
    assert way(monkeypatch, ("flash",), paged_attention="gather") == ("gather", 16)
    assert way(monkeypatch, ("flash",), device=torch.device("cpu")) == ("gather", 16)


def test_pages_of_codes_are_gathered_on_a_gpu_since_no_kernel_reads_them(monkeypatch):
    assert way(monkeypatch, ("flash", "flashinfer"), dtype=torch.uint8)[0] == "gather"


def test_a_library_that_is_asked_for_and_cannot_is_refused_with_the_reason(tokenizer):
    with pytest.raises(ConfigError, match=r"paged_attention: flash: FlashAttention is for cuda, not for cpu; use auto"):
        Engine(small_decoder("dense"), tokenizer, config=EngineConfig(paged_attention="flash"))
    assert page_layout(small_decoder("dense"), EngineConfig(), torch.float32) == (False, False)


def test_steps_on_a_gpu_have_more_tokens_where_nothing_is_said():
    assert resolved_for(EngineConfig(), BASE, torch.float32, CUDA).max_num_batched_tokens == 8192
    assert resolved_for(EngineConfig(max_num_batched_tokens=512), BASE, torch.float32, CUDA).max_num_batched_tokens == 512
    assert resolved_for(EngineConfig(), BASE, torch.float32, torch.device("cpu")).max_num_batched_tokens == 512


def test_the_cache_gets_what_the_utilisation_leaves_of_a_gpus_memory(monkeypatch):
    free, total = 50 << 30, 80 << 30
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, total))
    settings = EngineConfig()
    share = gpu_share(settings, CUDA, opened=True)
    assert memory_budget(settings, CUDA, share=share, reserved=2 << 30) == pytest.approx((50 - 8 - 2) * 2**30)
    half = EngineConfig(gpu_memory_utilization=0.5)
    assert memory_budget(half, CUDA, share=gpu_share(half, CUDA, opened=False)) == 10 << 30
    # a model in training, and one beside a draft model, which is opened afterwards
    assert gpu_share(settings, CUDA, opened=False) is None
    drafted = EngineConfig(speculation={"method": "draft", "model": "small"})
    assert memory_budget(drafted, CUDA, share=gpu_share(drafted, CUDA, opened=True)) == free // 4
    assert gpu_share(half, torch.device("cpu"), opened=True) is None

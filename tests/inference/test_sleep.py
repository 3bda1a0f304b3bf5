"""An engine that sleeps has given its cache's memory back, and is the same when it wakes."""

import sys

import pytest

from bessemer.core.errors import RequestError
from bessemer.inference.engine import Engine, EngineConfig, SamplingParams
from bessemer.model.cpu_kernels import library, unavailable
from tests.inference.models import small_decoder, small_tokenizer

PROMPTS = [[1, 2, 3] * 8, [4, 5, 6, 7] * 6]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return small_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.mark.parametrize("kernels", ["on", "off"])
@pytest.mark.parametrize("architecture", ["dense", "linear"])
def test_it_generates_after_waking_as_before_it_slept(architecture, kernels, tokenizer):
    if architecture == "linear" and kernels == "on":
        pytest.skip("linear attention has no compiled kernels")
    if kernels == "on" and library() is None:
        pytest.skip(str(unavailable()))
    engine = Engine(small_decoder(architecture), tokenizer, config=EngineConfig(cpu_kernels=kernels))
    params = SamplingParams(max_tokens=12, temperature=0)
    before = engine.generate(PROMPTS, params)
    memory = engine.core.runner.memory
    assert any(pages.keys.any() for pages in memory.layers.values())
    engine.sleep()
    if sys.platform == "linux":
        assert not any(pages.keys[1:].any() for pages in memory.layers.values()), "the system took the pages"
    with pytest.raises(RequestError, match="the engine sleeps"):
        engine.generate(PROMPTS, params)
    engine.sleep()
    engine.wake()
    assert engine.generate(PROMPTS, params) == before and not engine.is_asleep


def test_it_does_not_sleep_while_a_request_is_in_flight(tokenizer):
    engine = Engine(small_decoder("dense"), tokenizer)
    stream = engine.stream(PROMPTS[0], SamplingParams(max_tokens=8, temperature=0, ignore_eos=True))
    next(stream)
    with pytest.raises(RequestError, match="requests in flight"):
        engine.sleep()
    stream.close()
    engine.sleep()
    assert engine.is_asleep

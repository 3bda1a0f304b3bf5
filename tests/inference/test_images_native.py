"""Generation by a model whose pictures have positions of three numbers (Qwen2.5-VL): the engine answers as the model itself."""

import numpy as np
import pytest
import torch

from bessemer.core.errors import RequestError
from bessemer.inference.engine import Engine, EngineConfig, SamplingParams
from bessemer.inference.images import chat_prompt
from bessemer.model.layers.embedding import EmbeddedRows
from bessemer.model.vision.native import rope_positions
from tests.inference.picture_requests import KERNELS, agrees, asked, picture
from tests.model.picture_files import write_qwen_model

GREEDY = SamplingParams(max_tokens=8, temperature=0.0, logprobs=0, ignore_eos=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("qwen")
    write_qwen_model(folder)
    return folder


@pytest.fixture(scope="module", params=KERNELS)
def open_engine(folder, request):
    return lambda **settings: Engine(
        folder, device="cpu", config=EngineConfig(cpu_kernels=request.param, kv_memory=0.01, **settings)
    )


@torch.no_grad()
def expected(engine, prompt, count=8, flat=False):
    """Greedy tokens, and their log-probabilities, by the decoder itself without a cache. flat: with places as positions."""
    reader = engine.pictures
    expanded = reader.expand(prompt.prompt, prompt.pictures)
    tokens, vectors = list(expanded.ids), torch.cat([reader.vectors(span.prepared) for span in expanded.spans])
    rows = torch.tensor([place for span in expanded.spans for place in span.places])
    log_probs = []
    for _ in range(count):
        turns = list(rope_positions([] if flat else [span.grid for span in expanded.spans], 0, len(tokens)))
        rope_3BT = torch.tensor([turns]).permute(2, 0, 1)
        logits = engine.model(torch.tensor([tokens]), embedded=EmbeddedRows(rows, vectors), rope_3BT=rope_3BT)[0, -1]
        log_probs.append(float(logits.log_softmax(-1).max()))
        tokens.append(int(logits.argmax()))
    return tokens[len(expanded.ids) :], log_probs


def test_answers_are_the_models_own_alone_and_in_a_batch_with_text(open_engine):
    engine = open_engine()
    prompts = [asked(engine, picture(1)), asked(engine, picture(2, 60, 20), picture(3, 16, 16))]
    text = chat_prompt(engine.tokenizer, [{"role": "user", "content": "hello"}])
    *with_pictures, without = engine.generate([*prompts, text], GREEDY)
    for completion, prompt in zip(with_pictures, prompts, strict=True):
        agrees(completion, expected(engine, prompt))
        agrees(engine.generate([prompt], GREEDY.with_changes(logprobs=0))[0], expected(engine, prompt))
    assert without.token_ids == engine.generate([text], GREEDY)[0].token_ids
    flat, whole = expected(engine, prompts[0], flat=True), expected(engine, prompts[0])
    assert np.abs(np.array(flat[1]) - whole[1]).max() > 1e-2


def test_a_prompt_that_is_read_in_chunks_gives_the_same(open_engine):
    engine = open_engine(max_num_batched_tokens=7, max_num_seqs=3, block_size=4, prefix_cache=False)
    prompts = [asked(engine, picture(1), picture(2, 20, 50)), asked(engine, picture(3))]
    for completion, prompt in zip(engine.generate(prompts, GREEDY), prompts, strict=True):
        agrees(completion, expected(engine, prompt))


def test_the_prefix_cache_and_draft_tokens_change_nothing(open_engine):
    engine = open_engine(block_size=4, speculation={"method": "ngram", "tokens": 3})
    prompt = asked(engine, picture(1))
    long = GREEDY.with_changes(max_tokens=24)
    first, again = engine.generate([prompt], long)[0], engine.generate([prompt], long)[0]
    assert first.cached_tokens == 0 and again.cached_tokens > again.prompt_tokens - 8
    agrees(first, expected(engine, prompt, 24))
    agrees(again, expected(engine, prompt, 24))
    # the same tokens of a picture of another shape are others
    other = asked(engine, picture(1, 30, 40))
    agrees(engine.generate([other], GREEDY)[0], expected(engine, other))


def test_several_answers_without_log_probabilities_are_the_plain_ones(open_engine):
    """No step computes several tokens at once of a request whose positions are no places."""
    engine = open_engine()
    prompt = asked(engine, picture(1))
    assert (
        engine.generate([prompt], SamplingParams(max_tokens=8, temperature=0.0, ignore_eos=True))[0].token_ids
        == (expected(engine, prompt)[0])
    )


def test_films_are_refused(open_engine):
    engine = open_engine()
    with pytest.raises(RequestError, match="video"):
        chat_prompt(engine.tokenizer, [{"role": "user", "content": [{"type": "video", "video": "a.mp4"}]}])

"""Generation by a model whose pictures' tokens see each other (Gemma 3): the engine's answers are the model's own."""

import numpy as np
import pytest
import torch

from bessemer.core.errors import ConfigError
from bessemer.inference.engine import Engine, EngineConfig, SamplingParams
from bessemer.inference.images import GivenRows, PicturePrompt, chat_prompt
from bessemer.inference.scheduling.sequence import ImageMark, before_whole
from bessemer.model.layers.embedding import EmbeddedRows
from bessemer.model.vision.model import ends_of_runs
from tests.inference.picture_requests import KERNELS, agrees, asked, picture
from tests.model.picture_files import write_gemma3_model

GREEDY = SamplingParams(max_tokens=6, temperature=0.0, logprobs=0, ignore_eos=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gemma3")
    write_gemma3_model(folder)
    return folder


@pytest.fixture(scope="module", params=KERNELS)
def open_engine(folder, request):
    return lambda **settings: Engine(
        folder, device="cpu", config=EngineConfig(cpu_kernels=request.param, kv_memory=0.01, **settings)
    )


@torch.no_grad()
def expected(engine, prompt, count=6, causal=False):
    """Greedy tokens, and their log-probabilities, by the decoder itself without a cache."""
    reader = engine.pictures
    expanded = reader.expand(prompt.prompt, prompt.pictures)
    tokens, vectors = list(expanded.ids), torch.cat([reader.vectors(span.prepared) for span in expanded.spans])
    rows = torch.tensor([place for span in expanded.spans for place in span.places])
    log_probs = []
    for _ in range(count):
        tokens_BT = torch.tensor([tokens])
        seen_until_BT = None if causal else ends_of_runs(tokens_BT == reader.image_token_id)
        logits = engine.model(tokens_BT, embedded=EmbeddedRows(rows, vectors), seen_until_BT=seen_until_BT)[0, -1]
        log_probs.append(float(logits.log_softmax(-1).max()))
        tokens.append(int(logits.argmax()))
    return tokens[len(expanded.ids) :], log_probs


def test_answers_are_the_models_own_alone_and_in_a_batch_with_text(open_engine):
    engine = open_engine()
    prompts = [asked(engine, picture(1)), asked(engine, picture(2), picture(3, 16, 16))]
    text = chat_prompt(engine.tokenizer, [{"role": "user", "content": "hello"}])
    *with_pictures, without = engine.generate([*prompts, text], GREEDY)
    for completion, prompt in zip(with_pictures, prompts, strict=True):
        agrees(completion, expected(engine, prompt))
    assert without.token_ids == engine.generate([text], GREEDY)[0].token_ids
    # what a causal mask would give is another answer
    causal, whole = expected(engine, prompts[0], causal=True), expected(engine, prompts[0])
    assert np.abs(np.array(causal[1]) - whole[1]).max() > 1e-2


def test_no_chunk_cuts_a_picture(open_engine):
    engine = open_engine(max_num_batched_tokens=19, max_num_seqs=3, block_size=4, prefix_cache=False)
    prompts = [asked(engine, picture(1), picture(2)), asked(engine, picture(3))]
    for completion, prompt in zip(engine.generate(prompts, GREEDY), prompts, strict=True):
        agrees(completion, expected(engine, prompt))


def test_a_prefix_that_ends_within_a_picture_is_found(open_engine):
    engine = open_engine(block_size=4)
    # the prompt ends with the picture, so that its last block is computed again
    ids = [3, engine.pictures.placeholder_id]
    prompt = PicturePrompt(ids, [picture(1)])
    began, again = engine.generate([prompt], GREEDY)[0], engine.generate([prompt], GREEDY)[0]
    assert began.cached_tokens == 0 and again.cached_tokens >= 8
    agrees(again, expected(engine, prompt))
    other = PicturePrompt(ids, [picture(2)])
    assert engine.generate([other], GREEDY)[0].cached_tokens < 4
    agrees(engine.generate([other], GREEDY)[0], expected(engine, other))


def test_a_picture_whose_request_lost_its_blocks_is_read_again(open_engine):
    roomy = open_engine()
    prompts = [asked(roomy, picture(seed)) for seed in (1, 2)]
    long = GREEDY.with_changes(max_tokens=60)
    wanted = [completion.token_ids for completion in roomy.generate(prompts, long)]
    tight = open_engine(block_size=4, prefix_cache=False, max_model_len=230)
    for group in tight.core.scheduler.tables.groups:
        for _ in range(group.pool.free - 36):
            group.pool.allocate()
    made = tight.generate(prompts, long)
    assert tight.statistics.preemptions > 0
    assert [completion.token_ids for completion in made] == wanted


def test_log_probabilities_of_a_prompt_with_a_picture(open_engine):
    engine = open_engine()
    prompt = asked(engine, picture(1))
    made = engine.generate([prompt], GREEDY.with_changes(prompt_logprobs=0))[0]
    assert made.token_ids == expected(engine, prompt)[0]


def test_settings_under_which_pictures_would_be_cut_are_refused(open_engine):
    with pytest.raises(ConfigError, match="chunks of 16 tokens: raise max_num_batched_tokens to at least 18"):
        open_engine(max_num_batched_tokens=17, max_num_seqs=3)
    with pytest.raises(ConfigError, match=r"batch_invariant: .* reads pictures whole"):
        open_engine(batch_invariant=True)


def test_chunks_end_before_what_is_computed_in_one():
    marks = [ImageMark(4, 20, b"", ((5, 9), (12, 18)))]
    assert [before_whole(marks, end) for end in (4, 5, 6, 8, 9, 10, 12, 13, 18, 30)] == [4, 5, 5, 5, 9, 10, 12, 12, 18, 30]
    rows = GivenRows([2, 3, 4, 7, 9, 10], torch.zeros(6, 1))
    assert list(rows.runs()) == [(2, 4), (7, 7), (9, 10)]

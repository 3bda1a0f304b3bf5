"""Generation with pictures: an engine's answers are the model's own, however prompts are cut, batched or found in the cache."""

import pytest
import torch

from bessemer.core.errors import RequestError
from bessemer.inference.build import new_memory
from bessemer.inference.engine import Engine, EngineConfig, SamplingParams
from bessemer.inference.images import PicturePrompt, chat_prompt
from bessemer.inference.scheduling.sequence import ImageMark, image_key
from bessemer.model.layers.embedding import EmbeddedRows
from tests.inference.models import small_decoder, small_tokenizer
from tests.inference.picture_requests import KERNELS, agrees, asked, picture
from tests.model.picture_files import drawn, encoded, write_picture_model

GREEDY = SamplingParams(max_tokens=8, temperature=0.0, logprobs=0, ignore_eos=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("smolvlm")
    write_picture_model(folder)
    return folder


@pytest.fixture(scope="module", params=KERNELS)
def kernels(request):
    return request.param


@pytest.fixture(scope="module")
def open_engine(folder, kernels):
    return lambda **settings: Engine(folder, device="cpu", config=EngineConfig(cpu_kernels=kernels, kv_memory=0.01, **settings))


@pytest.fixture(scope="module")
def engine(open_engine):
    return open_engine()


@torch.no_grad()
def expected(engine, prompt, count=8):
    """Greedy tokens, and their log-probabilities, by the decoder itself without a cache."""
    reader = engine.pictures
    expanded = reader.expand(prompt.prompt, prompt.pictures)
    tokens, vectors = list(expanded.ids), torch.cat([reader.vectors(span.prepared) for span in expanded.spans])
    rows = torch.tensor([place for span in expanded.spans for place in span.places])
    log_probs = []
    for _ in range(count):
        logits = engine.model(torch.tensor([tokens]), embedded=EmbeddedRows(rows, vectors))[0, -1].log_softmax(-1)
        tokens.append(int(logits.argmax()))
        log_probs.append(float(logits.max()))
    return tokens[len(expanded.ids) :], log_probs


def test_an_engine_says_what_its_encoder_takes_and_leaves_room_for_a_picture(engine, folder, monkeypatch):
    reader, memory = engine.pictures, engine.pictures.memory
    # a picture is 4 · 4 tiles of 16 patches at most, and the whole
    assert (reader.largest.patches, reader.largest.vectors) == (17 * 16, 17 * 4)
    assert memory.weights == sum(one.nbytes for one in reader.vision.parameters())
    assert engine.describe().endswith(f"; {memory.described(17 * 16)}")
    prepared = [reader.preprocessor.prepare(picture(1, *size)) for size in ((64, 64), (16, 64), (200, 90), (1, 150))]
    assert max(len(one.tiles) for one in prepared) == 17
    free = 4 * (memory.passing + memory.kept) + 4 * 20_000
    monkeypatch.setattr("bessemer.inference.execution.build.free_bytes", lambda device: free)
    blocks = [new_memory(engine.model, engine.config.with_changes(kv_memory=None), reserved=count)[1] for count in (0, 20_000)]
    assert blocks[0] > blocks[1]


def test_answers_are_the_models_own_and_depend_on_the_picture(engine):
    prompts = [asked(engine, picture(1)), asked(engine, picture(2)), asked(engine, picture(1), picture(2, 16, 16))]
    answers = [expected(engine, prompt) for prompt in prompts]
    assert answers[0] != answers[1]
    # together: a batch of prompts with pictures, and one without
    text = chat_prompt(engine.tokenizer, [{"role": "user", "content": "hello"}])
    *with_pictures, without = engine.generate([*prompts, text], GREEDY)
    for completion, wanted in zip(with_pictures, answers, strict=True):
        agrees(completion, wanted)
    assert without.token_ids == engine.generate([text], GREEDY)[0].token_ids


def test_a_prompt_that_is_read_in_chunks_gives_the_same(open_engine):
    engine = open_engine(max_num_batched_tokens=7, max_num_seqs=4, block_size=4, prefix_cache=False)
    prompt = asked(engine, picture(1))
    agrees(engine.generate([prompt], GREEDY)[0], expected(engine, prompt))


def test_the_prefix_cache_tells_pictures_apart_and_encodes_none_twice(open_engine):
    engine = open_engine(block_size=4)
    first, other = asked(engine, picture(1)), asked(engine, picture(2))
    encoded_before = []
    vectors = engine.pictures.vectors
    engine.pictures.vectors = lambda prepared: encoded_before.append(prepared.digest) or vectors(prepared)
    began = engine.generate([first], GREEDY)[0]
    again = engine.generate([first], GREEDY)[0]
    # all but the last block of the prompt, which is never looked up whole
    assert again.cached_tokens > began.prompt_tokens - 8 and began.cached_tokens == 0
    assert again.token_ids == began.token_ids and len(encoded_before) == 1
    another = engine.generate([other], GREEDY)[0]
    before_picture = other.prompt.index(engine.pictures.image_token_id)
    assert another.cached_tokens <= before_picture and len(encoded_before) == 2
    engine.pictures.vectors = vectors
    agrees(another, expected(engine, other))


def test_several_answers_share_one_encoding(engine):
    prompt = asked(engine, picture(5))
    request = engine.prepare(prompt, GREEDY.with_changes(n=3, temperature=1.0, seed=3))
    assert request.images is request.siblings[0].images and request.images.encoded == 0
    engine.begin(request)
    while not request.done or not all(each.done for each in request.siblings):
        engine.step()
    assert request.images.encoded == 1


def test_a_picture_whose_request_lost_its_blocks_is_read_again(open_engine):
    """Two long answers in a cache that holds little more than one: one is preempted and computed again."""
    roomy = open_engine()
    prompts = [asked(roomy, picture(seed)) for seed in (1, 2)]
    long = GREEDY.with_changes(max_tokens=60)
    wanted = [completion.token_ids for completion in roomy.generate(prompts, long)]
    tight = open_engine(block_size=4, prefix_cache=False, max_model_len=230)
    pool = tight.core.scheduler.tables.groups[0].pool
    for _ in range(pool.free - 70):
        pool.allocate()
    made = tight.generate(prompts, long)
    assert tight.statistics.preemptions > 0
    assert [completion.token_ids for completion in made] == wanted


def test_streams_and_chats_take_pictures_as_files(engine, tmp_path):
    path = tmp_path / "drawn.png"
    path.write_bytes(encoded(drawn(40, 30, seed=1)))
    messages = [{"role": "user", "content": [{"type": "image", "image": path}, {"type": "text", "text": "what is in these?"}]}]
    whole = engine.chat(messages, GREEDY)
    assert whole.token_ids == engine.generate([asked(engine, picture(1))], GREEDY)[0].token_ids
    assert "".join(chunk.text for chunk in engine.stream_chat(messages, GREEDY)) == whole.text


def test_an_image_token_that_somebody_typed_is_text(engine):
    prompt = chat_prompt(engine.tokenizer, [{"role": "user", "content": "an <image> that I typed"}])
    assert engine.pictures.image_token_id not in prompt
    with_picture = asked(engine, picture(1), text="an <image> that I typed")
    assert with_picture.prompt.count(engine.pictures.image_token_id) == 1


def test_what_takes_no_pictures_says_so(engine, tmp_path):
    prompt = asked(engine, picture(1))
    with pytest.raises(RequestError, match="pictures are answered alone"):
        engine.generate([prompt], SamplingParams(max_tokens=4, beam_width=2))
    with pytest.raises(RequestError, match="the prompt has places for 1 pictures, and 2 are given"):
        engine.generate([PicturePrompt(prompt.prompt, [picture(1), picture(2)])], GREEDY)
    with pytest.raises(RequestError, match=r"the prompt has [\d,]+ tokens and the model's context is 512"):
        engine.generate([asked(engine, *[picture(seed, 64, 64) for seed in range(6)])], GREEDY)
    with pytest.raises(RequestError, match="picture 1: a path, the bytes of a file or a Picture is needed, got int"):
        asked(engine, 7)
    with pytest.raises(RequestError, match="picture 1 is no picture"):
        asked(engine, b"text")
    with pytest.raises(RequestError, match="pictures are of the user's messages"):
        chat_prompt(engine.tokenizer, [{"role": "system", "content": [{"type": "image", "image": picture(1)}]}])


def test_a_model_of_text_reads_no_pictures(tmp_path):
    tokenizer = small_tokenizer(tmp_path)
    engine = Engine(small_decoder("dense"), tokenizer, config=EngineConfig(kv_memory=0.01))
    with pytest.raises(RequestError, match="this model reads no pictures"):
        engine.generate([PicturePrompt([5, 6], [picture(1)])], GREEDY)


def test_a_block_is_named_by_its_tokens_pictures_and_where_these_begin():
    mark, other = ImageMark(6, 12, b"a" * 32), ImageMark(6, 12, b"b" * 32)
    assert image_key([mark], 0, 4) == b"" and image_key([mark], 12, 16) == b""
    keys = {image_key([one], start, start + 4) for one in (mark, other) for start in (4, 8)}
    assert len(keys) == 4

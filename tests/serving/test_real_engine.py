"""The server on the real engine, with a model that has learned nothing."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import openai
import pytest

from bessemer.inference.engine import Engine
from bessemer.inference.sampling import SamplingParams
from bessemer.model.folder import save_model
from tests.model.randomised import SHAPES, random_decoder
from tests.model.tokenizers import VOCAB_SIZE, write_small_tokenizer


@pytest.fixture(scope="module")
def engine(tmp_path_factory) -> Engine:
    path = tmp_path_factory.mktemp("model")
    tokenizer = write_small_tokenizer(path / "tokenizer")
    save_model(random_decoder(SHAPES["grouped"].with_changes(vocab_size=VOCAB_SIZE)), path / "model", tokenizer=tokenizer)
    return Engine(path / "model", device="cpu")


def test_four_streams_at_once_give_what_the_engine_gives_alone(engine, start):
    conversations = [[{"role": "user", "content": f"{number} in the end"}] for number in range(4)]
    url = start(engine) + "/v1"

    def stream(number: int) -> tuple[str, int, str]:
        with openai.OpenAI(base_url=url, api_key="any", max_retries=0) as client:
            chunks = list(
                client.chat.completions.create(
                    model="tiny",
                    messages=conversations[number],
                    max_tokens=20,
                    temperature=0.9,
                    seed=number,
                    stream=True,
                    stream_options={"include_usage": True},
                )
            )
            text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1])
            return text, chunks[-1].usage.completion_tokens, chunks[-2].choices[0].finish_reason

    with ThreadPoolExecutor(4) as clients:
        streamed = list(clients.map(stream, range(4)))
    for number, found in enumerate(streamed):
        alone = engine.chat(conversations[number], SamplingParams(max_tokens=20, temperature=0.9, seed=number))
        assert found == (alone.text, alone.completion_tokens, alone.finish_reason)


def test_prompt_over_the_context_is_refused_before_the_stream_begins(engine, start):
    with openai.OpenAI(base_url=start(engine) + "/v1", api_key="any", max_retries=0) as client:
        with pytest.raises(openai.BadRequestError, match=str(engine.context_length)):
            client.completions.create(model="tiny", prompt="x" * 4 * engine.context_length, stream=True)

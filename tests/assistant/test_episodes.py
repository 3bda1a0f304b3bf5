"""Turns and episodes with a real engine: tokens and log-probabilities are what a policy is trained on."""

import math

import pytest
import torch

from bessemer.assistant.assistant import Assistant, EngineModel
from bessemer.assistant.conversation import AssistantConfig, Conversation
from bessemer.assistant.episodes import StepResult, play
from bessemer.assistant.messages import Message
from bessemer.assistant.tools import Tool
from bessemer.inference.engine import Engine, SamplingParams
from tests.assistant.scripted import WEATHER, call_text
from tests.inference.models import BASE
from tests.model.randomised import random_decoder

QUESTIONS = ("Who?", "When was the thing in there?", "Why?")


@pytest.fixture(scope="module")
def decoder():
    return random_decoder(BASE.with_changes(max_position_embeddings=1024), 0)


@pytest.fixture
def engine(decoder, tokenizer):
    return Engine(decoder, tokenizer)


class Echoes:
    """Asks a question, asks again as many times as the task says, and rewards every turn by its number."""

    tools = ()

    def __init__(self):
        self.turns = 0

    def reset(self, task, seed):
        self.times = task["times"]
        return [Message.user(task["question"])]

    def step(self, conversation, end):
        self.turns += 1
        if self.times < 0:
            raise ValueError("no such\ntime")
        return StepResult(self.turns, [Message.user("And then?")] if self.turns < self.times else [])


def played(engine, tasks, environment=Echoes, **options):
    assistant = Assistant(EngineModel(engine))
    params = SamplingParams(max_tokens=12, temperature=0.7)
    return play(assistant, [environment() for _ in tasks], tasks, params, **options)


def test_every_own_token_has_the_log_probability_that_the_model_gives_it(engine, decoder, tokenizer):
    tasks = [{"question": question, "times": times} for times, question in enumerate(QUESTIONS, start=1)]
    episodes = played(engine, tasks, max_turns=3)
    for times, episode in enumerate(episodes, start=1):
        transcript = episode.transcript
        assert len(episode.rewards) == times and episode.total == sum(range(1, times + 1)) and not episode.failure
        assert [reward.end for reward in episode.rewards][-1] == len(transcript)
        assert all(transcript.is_own[reward.end - 1] for reward in episode.rewards)
        with torch.no_grad():
            logits_TV = decoder(torch.tensor([transcript.ids]))[0]
        expected_T = (logits_TV / 0.7).log_softmax(-1)[:-1].gather(1, torch.tensor(transcript.ids[1:])[:, None])[:, 0]
        own_T = torch.tensor(transcript.is_own)[1:]
        found_T = torch.tensor(transcript.log_probs)[1:]
        assert (found_T - expected_T)[own_T].abs().max() < 1e-4 and not found_T[~own_T].any()
        assert transcript.own_tokens <= 12 * times and own_T.sum() == transcript.own_tokens


def test_an_episode_is_the_same_alone_and_among_others(engine):
    tasks = [{"question": question, "times": 2} for question in QUESTIONS]
    together = played(engine, tasks, max_turns=2, seeds=[5, 6, 7])
    alone = [played(engine, [task], max_turns=2, seeds=[seed])[0] for seed, task in zip((5, 6, 7), tasks, strict=True)]
    assert [one.transcript.ids for one in together] == [one.transcript.ids for one in alone]
    assert len({tuple(one.transcript.ids) for one in played(engine, [tasks[0]] * 3, seeds=[1, 2, 1])}) == 2


def test_an_environment_that_fails_ends_its_own_episode(engine):
    tasks = [{"question": "Who?", "times": -1}, {"question": "Who?", "times": 1}, {"question": "x" * 2000, "times": 1}, {}]
    failed, well, too_long, wrong = played(engine, tasks)
    assert failed.failure == "ValueError: no such time" and math.isnan(failed.total)
    assert well.total == 1 and not well.failure
    assert "the model's context is 1,024" in too_long.failure and wrong.failure == "KeyError: 'times'"
    assert not engine.core.busy


class Scripted:
    """Makes the engine write a call of the tool first, and then an answer."""

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer

    def __call__(self, prompt, answer, logits):
        is_answered = "<tool_response>" in self.tokenizer.decode(prompt[-80:])
        text = "It is warm." if is_answered else call_text("weather", '{"city": "Graz"}')
        ids = [*self.tokenizer.encode(text, add_bos=False), self.tokenizer.control_id("<|im_end|>")]
        forced = torch.full_like(logits, -math.inf)
        forced[ids[len(answer)]] = 0
        return forced


class Weather:
    """Rewards an answer that is behind a call of its tool."""

    def __init__(self):
        self.calls = []
        self.tools = [Tool("weather", WEATHER.description, WEATHER.parameters, lambda city: self.calls.append(city) or "warm")]

    def reset(self, task, seed):
        return [Message.user("How warm is it in Graz?")]

    def step(self, conversation, end):
        return StepResult(float(self.calls == ["Graz"] and conversation.messages[-1].text == "It is warm."))


def test_an_episode_calls_tools_and_its_mask_leaves_out_what_they_say(engine, tokenizer):
    params = SamplingParams(max_tokens=100, logits_processor=Scripted(tokenizer))
    (episode,) = play(Assistant(EngineModel(engine)), [Weather()], [{}], params)
    assert episode.total == 1 and episode.end == "answer"
    transcript = episode.transcript
    own = [id for id, is_own in zip(transcript.ids, transcript.is_own, strict=True) if is_own]
    call = call_text("weather", '{"city": "Graz"}')
    assert tokenizer.decode(own, skip_special=False) == f"{call}<|im_end|>It is warm.<|im_end|>"


GREEDY = {"max_tokens": 20, "temperature": 0}


def spoken(engine, **changes):
    """What is said greedily to a question, and its tokens."""
    budget = changes.pop("thinking_budget", None)
    params = SamplingParams(**GREEDY | changes)
    assistant = Assistant(EngineModel(engine), params, config=AssistantConfig(thinking_budget=budget))
    conversation = Conversation([Message.user("Who?")])
    text = assistant.answer(conversation).text
    transcript = conversation.transcript
    return text, transcript.ids[transcript.is_own.index(True) :]


def test_an_answer_is_what_the_engine_gives_however_it_ends(engine):
    question = [{"role": "user", "content": "Who?"}]
    plain = engine.chat(question, SamplingParams(**GREEDY))
    assert len(set(plain.token_ids)) > 8
    for changes in ({}, {"stop_token_ids": [plain.token_ids[7]]}, {"stop": [plain.text[5:7]]}):
        expected = engine.chat(question, SamplingParams(**GREEDY | changes))
        assert spoken(engine, **changes) == (expected.text, expected.token_ids)
    assert spoken(engine, thinking_budget=3) == (plain.text, plain.token_ids), "nothing thinks, so the budget ends nothing"

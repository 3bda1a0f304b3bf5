"""Answers under a thinking budget: the thinking ends there, the tag that closes it is put in as tokens, an answer follows."""

import pytest

from bessemer.assistant.grammar import ThinkingTokens
from bessemer.core.errors import ConfigError, RequestError
from bessemer.core.progress import Silent
from bessemer.core.records import json_lines
from bessemer.evaluation.task_answerers import answers_after_thinking
from bessemer.evaluation.tasks import evaluate_tasks
from bessemer.inference.engine import Engine, SamplingParams
from bessemer.tasks.config import TaskOptions
from bessemer.tokenization.folder import CHAT_TEMPLATE_FILE
from bessemer.tokenization.tokenizer import load_tokenizer
from tests.cases import slow
from tests.evaluation.test_tasks import MODEL, SUMS
from tests.inference.models import small_decoder
from tests.model.tokenizers import write_small_tokenizer
from tests.tasks.written import task_of

#: A prompt of a model that always thinks.
OPENED = (
    "{% for message in messages %}{{ '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n<think>\\n' }}{% endif %}"
)
CONTEXTS = [({"role": "user", "content": f"{number} + 1?"},) for number in range(4)]
GREEDY = SamplingParams(max_tokens=24, temperature=0)


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    folder = write_small_tokenizer(tmp_path_factory.mktemp("thinking"))
    (folder / CHAT_TEMPLATE_FILE).write_text(OPENED, encoding="utf-8")
    return Engine(small_decoder("dense"), load_tokenizer(folder))


@pytest.mark.parametrize("budget", [0, slow(1), 7, slow(20)])
def test_an_answer_is_what_follows_thinking_of_at_most_the_budget_and_its_closing_tag(engine, budget):
    closing = ThinkingTokens(engine.tokenizer).closing
    answers = answers_after_thinking(engine, CONTEXTS, GREEDY, budget, range(4))
    for context, answer in zip(CONTEXTS, answers, strict=True):
        prompt = engine.tokenizer.apply_chat_template(context, add_generation_prompt=True)
        thought = engine.generate([prompt], GREEDY.with_changes(max_tokens=budget))[0] if budget else None
        ids = [] if thought is None else thought.token_ids
        assert len(ids) == budget, "the random model does not stop by itself"
        (plain,) = engine.generate([[*prompt, *ids, *closing]], GREEDY.with_changes(max_tokens=24 - budget))
        assert answer.text == plain.text and plain.text
        assert answer.thinking == ("" if thought is None else thought.text.strip())
        assert answer.tokens == 24 and answer.is_closed == (budget > 0)
        assert answer.finish_reason == plain.finish_reason


def test_a_budget_beyond_the_longest_answer_closes_nothing(engine):
    (answer,) = answers_after_thinking(engine, CONTEXTS[:1], GREEDY, 100, [0])
    assert (answer.text, answer.tokens, answer.is_closed, answer.finish_reason) == ("", 24, False, "length")


def test_a_conversation_that_does_not_fit_is_refused(engine):
    with pytest.raises(RequestError, match="160"):
        answers_after_thinking(engine, [({"role": "user", "content": "a b " * 200},)], GREEDY, 4, [0])


def test_a_task_is_judged_by_what_follows_the_thinking(engine, tmp_path):
    settings = {"kind": "generate", "chat": True, "max_tokens": 12, "samples": 2, "temperature": 1.0}
    task = task_of(tmp_path, SUMS, TaskOptions(thinking_budget=5), **settings)
    results = evaluate_tasks(engine, [task], tmp_path / "out", model=MODEL, progress=Silent())
    assert results["tasks"]["task"]["n"] == 3
    again = evaluate_tasks(engine, [task], tmp_path / "again", model=MODEL, progress=Silent())
    assert (tmp_path / "out" / "items.jsonl").read_text(encoding="utf-8") == (tmp_path / "again" / "items.jsonl").read_text(
        encoding="utf-8"
    )
    assert again == results
    for line in json_lines((tmp_path / "out" / "items.jsonl").read_text(encoding="utf-8")):
        assert len(line["texts"]) == len(line["thinking"]) == 2 and line["texts"][0] != line["texts"][1]
        assert all(tokens <= 12 for tokens in line["completion_tokens"])


def test_a_budget_needs_a_conversation_and_is_part_of_what_identifies_an_evaluation(engine, tmp_path):
    with pytest.raises(ConfigError, match="thinking_budget needs chat: true"):
        task_of(tmp_path, SUMS, TaskOptions(thinking_budget=5), kind="generate")
    task = task_of(tmp_path, SUMS, kind="generate", chat=True, max_tokens=8, thinking_budget=4)
    evaluate_tasks(engine, [task], tmp_path / "out", model=MODEL, progress=Silent())
    other = task_of(tmp_path, SUMS, TaskOptions(thinking_budget=2), kind="generate", chat=True, max_tokens=8, thinking_budget=4)
    with pytest.raises(ConfigError, match="holds task with thinking_budget 4, not 2"):
        evaluate_tasks(engine, [other], tmp_path / "out", model=MODEL, progress=Silent())

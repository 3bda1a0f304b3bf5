"""Rewards beside tables of right and wrong completions, TRL's functions as they are, and rewards that fail."""

import math
import time

import pytest

from bessemer.core.errors import ConfigError
from bessemer.posttraining.rewards.config import REWARDS, RewardContext, RewardTask, named
from bessemer.posttraining.rewards.judge import Completed, Judge
from bessemer.posttraining.rl.config import RLConfig
from bessemer.tasks.config import TaskOptions
from bessemer.tasks.registry import find_tasks


def settings(*rewards):
    return RLConfig.parse({"data": ["prompts.jsonl"], "rewards": list(rewards)}, "rl").rewards


def completed(texts, prompts=None, **columns):
    return Completed(prompts or ["?"] * len(texts), texts, [list(range(len(text.split()))) for text in texts], columns)


def judged(reward, texts, folder=None, **columns):
    judge = Judge(settings(reward), RewardContext(*([folder] if folder else [])))
    return judge.judge(completed(texts, **columns))


JSON = {"reward": "json_schema", "json_schema": {"type": "object", "required": ["a"], "properties": {"a": {"type": "integer"}}}}
TABLE = {
    "a pattern": ({"reward": "regex", "pattern": r"\d+ km"}, {"far: 12\n34 km off": 1, "far": 0}),
    "a whole pattern": ({"reward": "regex", "pattern": r"\d+", "whole": True}, {"12": 1, "12 km": 0, "": 0}),
    "parts in tags": (
        {"reward": "format"},
        {
            "<think>so\n</think>\n<answer>4</answer>": 1,
            "<answer>4</answer><think>so</think>": 0,
            "<think>a</think><think>b</think><answer>4</answer>": 0,
            "well <think>a</think><answer>4</answer>": 0,
            "<think>a</think><answer>4": 0,
        },
    ),
    "thinking before an answer without tags": (
        {"reward": "format", "tags": ["think"], "text_after": True},
        {
            "<think>so\n</think>\n\n4": 1,
            "<think></think>4": 1,
            "<think>so</think>\n": 0,
            "so</think>4": 0,
            "<think>so 4": 0,
            "<think>a</think><think>b</think>4": 0,
            "<think>a</think>4<think>b": 0,
        },
    ),
    "json of a schema": (JSON, {'{"a": 1}': 1, 'see\n```json\n{"a": 2}\n```\n': 1, '{"a": "1"}': 0, '{"a": 1': 0, "[1]": 0}),
    "a length": (
        {"reward": "length", "at_least": 2, "at_most": 4, "falloff": 4},
        {"a": 0.75, "a b": 1, "a b c d": 1, "a b c d e f": 0.5, "a b c d e f g h i": 0},
    ),
    # Yu et al. 2025, eq. 13, with Lmax 6 and Lc 4
    "a punishment of length": (
        {"reward": "overlong", "longest": 6, "band": 4},
        {"a b": 0, "a b c": -0.25, "a b c d e f": -1, "a b c d e f g h": -1},
    ),
}


@pytest.mark.parametrize("name", list(TABLE))
def test_a_reward_of_form_tells_right_from_wrong(name):
    reward, expected = TABLE[name]
    assert judged(reward, list(expected)).totals == pytest.approx(list(expected.values()))


def test_an_answer_is_that_of_the_data_as_a_number_or_a_text():
    reasons = ["So it is 1,200. #### 1,200", "The answer is 12", "12 and then 13", "I do not know"]
    assert judged("answer", reasons, answer=["#### 1200", "12", "12", "12"]).totals == [1, 1, 0, 0]
    exact = {"reward": "answer", "column": "capital", "verifier": "exact"}
    assert judged(exact, ["the Paris!", "Lyon"], capital=[["Paris", "Lutetia"], "Paris"]).totals == [1, 0]


def test_repeated_runs_of_tokens_are_punished_by_their_share():
    reward = REWARDS["repetition"].load()(*settings({"reward": "repetition", "run": 2}), RewardContext())
    # of 5 runs of [1, 2, 1, 2, 1, 2] two are different
    assert reward(completion_ids=[[1, 2, 1, 2, 1, 2], [1, 2, 3], [1]]) == pytest.approx([-0.6, 0, 0])


def test_a_task_gives_the_scores_that_its_evaluation_gives():
    (task,) = find_tasks(["arithmetic"], TaskOptions(limit=8))
    questions = list(task.questions())
    texts = [f" {n}" for n in range(7)] + [task.judge(questions[7], ["?"]).gold[0]]
    context = RewardContext(tasks={task.name: RewardTask(task, {question.item: question for question in questions})})
    found = Judge(settings("task"), context).judge(
        completed([*texts, "12"], task=[task.name] * 8 + [None], item=[question.item for question in questions] + [None])
    )
    expected = [task.judge(question, [text]).scores["accuracy"] for question, text in zip(questions, texts, strict=True)]
    assert found.totals[:8] == expected and expected[7] == 1 and math.isnan(found.totals[8])


def test_code_is_worth_whether_it_passes_its_tests():
    columns = {"entry_point": ["add"] * 2, "test": ["def check(f):\n    assert f(2, 3) == 5"] * 2}
    prompts = ["def add(a, b):\n"] * 2
    judge = Judge(settings("program"), RewardContext())
    assert judge.judge(completed(["    return a + b", "    return a - b"], prompts, **columns)).totals == [1, 0]


# as they stand in TRL's documentation of GRPO (grpo_trainer.md, "Using a custom reward function")
TRL = '''
import re

def reward_func(completion_ids, **kwargs):
    """Reward function that assigns higher scores to longer completions (in terms of token count)."""
    return [float(len(ids)) for ids in completion_ids]

def format_reward_func(completions, **kwargs):
    """Reward function that checks if the completion has a specific format."""
    pattern = r"^<think>.*?</think><answer>.*?</answer>$"
    completion_contents = [completion[0]["content"] for completion in completions]
    matches = [re.match(pattern, content) for content in completion_contents]
    return [1.0 if match else 0.0 for match in matches]

def ground_truth(completions, ground_truth, **kwargs):
    # Regular expression to capture content inside \\\\boxed{}
    matches = [re.search(r"\\\\boxed\\{(.*?)\\}", completion) for completion in completions]
    contents = [match.group(1) if match else "" for match in matches]
    # Reward 1 if the content is the same as the ground truth, 0 otherwise
    return [1.0 if c == gt else 0.0 for c, gt in zip(contents, ground_truth)]

def math_reward_func(prompts, completions, task, **kwargs):
    return [1.0 if t == "math" else None for t in task]

async def waits(completions, trainer_state=None, log_extra=None, **kwargs):
    log_extra("step", [trainer_state.global_step] * len(completions))
    return [0.5 for _ in completions]

def plain(completions):
    return [1.0] * len(completions)
'''


def test_reward_functions_of_trl_run_unchanged(tmp_path):
    (tmp_path / "trl.py").write_text(TRL, encoding="utf-8")
    assert judged("trl.py:reward_func", ["a b", "a"], tmp_path).totals == [2, 1]
    said = [[{"role": "assistant", "content": text}] for text in ("<think>a</think><answer>b</answer>", "b")]
    judge = Judge(settings("trl.py:format_reward_func"), RewardContext(tmp_path))
    assert judge.judge(Completed([[]] * 2, said, [[1]] * 2)).totals == [1, 0]
    boxed = [r"so \boxed{2}.", r"\boxed{3}"]
    assert judged("trl.py:ground_truth", boxed, tmp_path, ground_truth=["2", "4"]).totals == [1, 0]
    found = Judge(settings("trl.py:waits", "trl.py:plain"), RewardContext(tmp_path)).judge(completed(["a"]), step=3)
    assert found.totals == [1.5] and found.extra == {"step": [3]}
    # None is of another task than the function's, and not a failure
    both = Judge(settings("trl.py:math_reward_func", {"reward": "trl.py:plain", "weight": 0.25}), RewardContext(tmp_path))
    found = both.judge(completed(["a", "b"], task=["math", "coding"]))
    assert found.totals == [1.25, 0.25] and not found.failures and both.names == ["math_reward_func", "plain"]


FAILING = """
import math, re, time

def fails(completions, **kwargs):
    return [one(text) for text in completions]

def one(text):
    if text == "hang":
        while True:
            try:
                time.sleep(10)
            except Exception:
                pass
    if text == "slow pattern":
        re.match(r"(a+)+$", "a" * 40 + "b")
    if text == "raise":
        raise RuntimeError("no such page\\nmore")
    return {"nan": math.nan, "infinite": math.inf}.get(text, float(len(text)))

def short(completions, **kwargs):
    return [1.0]
"""


COMPARING = """
def best(prompts, completions, log_extra, log_metric, **kwargs):
    if "raise" in completions:
        raise RuntimeError("no such page")
    longest = max(map(len, completions))
    for text in completions:
        log_extra("length", [len(text)])
    log_metric("longest", longest)
    return [len(text) / longest for text in completions]
"""


def test_a_function_that_compares_completions_sees_those_of_a_prompt_where_another_fails(tmp_path):
    (tmp_path / "own.py").write_text(COMPARING, encoding="utf-8")
    judge = Judge(settings("own.py:best"), RewardContext(tmp_path))
    texts = ["a", "bb", "raise", "bb"]
    found = judge.judge(Completed(["1", "1", "2", "2"], texts, [[1]] * 4))
    assert [None if math.isnan(total) else total for total in found.totals] == [0.5, 1, None, 1]
    whole = judge.judge(Completed(["1", "1", "2"], [*texts[:2], "bbbb"], [[1]] * 3))
    assert whole.extra == {"length": [1, 2, 4]} and whole.metrics == {"longest": [4.0]}


def test_a_completion_whose_reward_fails_is_dropped_and_counted(tmp_path):
    (tmp_path / "failing.py").write_text(FAILING, encoding="utf-8")
    started = time.monotonic()
    texts = ["a", "nan", "raise", "hang", "bb", "slow pattern", "infinite"]
    found = judged({"reward": "failing.py:fails", "seconds": 0.2}, texts, tmp_path)
    assert [None if math.isnan(total) else total for total in found.totals] == [1, None, None, None, 2, None, None]
    assert found.failures == {
        ("fails", "gave a value that is not finite"): 2,
        ("fails", "RuntimeError: no such page"): 1,
        ("fails", "TimeoutError: took longer than 0.2 s"): 2,
    }
    assert time.monotonic() - started < 60


def test_a_reward_that_never_works_gives_nothing_and_says_why(tmp_path):
    (tmp_path / "failing.py").write_text(FAILING, encoding="utf-8")
    never = judged("failing.py:fails", ["raise", "raise"], tmp_path)
    assert never.failures == {("fails", "RuntimeError: no such page"): 2} and all(map(math.isnan, never.totals))
    # of one completion the value is right
    assert judged("failing.py:short", ["a", "b"], tmp_path).totals == [1, 1]
    with pytest.raises(ConfigError, match=r"has no function 'shirt'"):
        judged("failing.py:shirt", ["a"], tmp_path)
    ((_, reason),) = judged("answer", ["a", "b"]).failures
    assert "the data has no column 'answer'" in reason


def test_settings_of_rewards_are_checked_before_anything_runs():
    assert named("task") == [{"reward": "task"}]
    with pytest.raises(ConfigError, match=r"rewards.0: there is no reward 'taks'; did you mean 'task'"):
        settings("taks")
    with pytest.raises(ConfigError, match=r"unknown key 'patern'; did you mean 'pattern'"):
        settings({"reward": "regex", "patern": "a"})


def test_an_answer_of_the_data_that_no_verifier_accepts_is_a_failure_and_no_zero():
    given = ["50%", "12 apples", r"so \frac{-1}{2}", r"\frac{-1}{2}", "9" * 4301, "#### 3"]
    judgement = judged("answer", ["50", "12", "x = -1/2", "x = -1/2", "9" * 4301, "9" * 4301], answer=given)
    assert judgement.values == [[None, None, None, 1, None, 0]]
    reasons = [f"ValueError: the right answer {each!r} is not a number" for each in given if given.index(each) not in (3, 5)]
    assert set(judgement.failures) == {("answer", reason) for reason in reasons}
    exact = judged({"reward": "answer", "verifier": "exact"}, ["", "Paris"], answer=[" ", "Paris"])
    assert exact.values == [[None, 1]] and exact.failures == {("answer", "ValueError: the right answer ' ' is empty"): 1}

"""Rewards that a model gives, by scripted judges at a URL and a small reward model."""

import json
import math
import re

import pytest

from bessemer.core.errors import ConfigError
from bessemer.model.storage.folder import load_scorer, save_model
from bessemer.posttraining.rewards.config import RewardContext, rewards_fingerprint
from bessemer.posttraining.rewards.judge import Completed, Judge
from bessemer.posttraining.rewards.model_based import RewardModel
from tests.chat_server import completion, serving
from tests.posttraining.test_rewards import completed, settings


@pytest.fixture
def serve(monkeypatch):
    with serving(monkeypatch) as started:
        yield started


def judge(server, **changes):
    return {"judge": {"model": "j", "url": server.url, "workers": 1, "attempts": 1}} | changes


def shown(body, title):
    """What a judge is shown between fences below a title."""
    found = re.search(rf"{title}:\n(=+)\n(.*?)\n\1\n", body["messages"][0]["content"], flags=re.DOTALL)
    return found and found[2]


def test_a_judge_rates_and_what_it_does_not_rate_is_dropped_and_counted(serve):
    def rate(body, _):
        answer = shown(body, "Answer")
        if answer == "broken":
            return 400, {}, b"{}"
        return completion("I like it." if answer == "unread" else f"So.\nRating: {answer}")

    server = serve(rate)
    texts, prompts = ["5", "broken", "unread", "2"], [[{"role": "user", "content": "Q?"}]] * 4
    messages = [[{"role": "assistant", "content": text}] for text in texts]
    asked = Completed(prompts, messages, [[1]] * 4, {"right": ["R", "R", "R", "R"]})
    given = settings({"reward": "judge", "criterion": "Judge kindness.", "reference": "right", **judge(server)})
    found = Judge(given, RewardContext()).judge(asked)
    assert [None if math.isnan(total) else total for total in found.totals] == [1.0, None, None, 0.25]
    assert dict(found.failures) == {
        ("judge", f"ApiError: {server.url}: answered 400 Bad Request"): 1,
        ("judge", "gave a value that is not finite"): 1,
    }
    body = server.requests[0][2]
    assert "Judge kindness." in body["messages"][0]["content"] and shown(body, "Question") == "Q?"
    assert shown(body, "A right answer, to compare with") == "R"


def test_a_rubric_is_of_all_prompts_and_of_one(serve):
    def met(body, _):
        criteria = body["messages"][0]["content"].partition("Criteria:\n")[2].split("\n\n")[0].splitlines()
        answer = shown(body, "Answer")
        # a criterion is met where the answer holds its last word
        said = ["yes" if line.split()[-1] in answer else "no" for line in criteria]
        return completion("\n".join(f"{number}: {one}" for number, one in enumerate(said, start=1)))

    columns = {"own": [["names blue"], [{"question": "names red", "weight": 2}], None, "blue"]}
    given = {"reward": "rubric", "criteria": [{"question": "names sky", "weight": 3}], "column": "own", **judge(serve(met))}
    found = Judge(settings(given), RewardContext()).judge(completed(["sky blue", "sky", "sea", "sky"], **columns))
    # the last row's criteria are no list: it fails, the others are judged
    assert found.totals[:3] == [1.0, pytest.approx(3 / 5), 0.0] and math.isnan(found.totals[3])
    assert list(found.failures.values()) == [1]
    own = completed(["sky blue", "a"], own=[["names blue"], None])
    alone = Judge(settings(given | {"criteria": []}), RewardContext()).judge(own)
    assert alone.totals[0] == 1.0 and alone.values[0][1] is None and not alone.failures
    with pytest.raises(ConfigError, match=r"rubric: give criteria, or the column of a prompt's own"):
        settings({"reward": "rubric", **judge(serve(met))})


def test_a_reward_model_is_opened_once_and_scores_as_it_does_alone(model_folder, tokenizer, tmp_path, monkeypatch):
    save_model(load_scorer(model_folder, seed=5), tmp_path / "reward_model", tokenizer=model_folder)
    opened = []
    original = RewardModel.open.__func__
    monkeypatch.setattr(RewardModel, "open", classmethod(lambda cls, *given: opened.append(1) or original(cls, *given)))
    given = settings({"reward": "reward_model", "model": "reward_model", "weight": 2})
    judge = Judge(given, RewardContext(tmp_path))
    prompts = [[{"role": "user", "content": "Q?"}]] * 3
    answers = [[{"role": "assistant", "content": text}] for text in ("Well.", "word " * 200, "No.")]
    for _ in range(2):
        found = judge.judge(Completed(prompts, answers, [[1]] * 3))
    scorer = RewardModel(load_scorer(model_folder, seed=5), tokenizer)
    scores = [scorer.score(prompts[:1], [answers[place]])[0] for place in (0, 2)]
    assert len(opened) == 1 and [found.totals[0], found.totals[2]] == pytest.approx([2 * score for score in scores], abs=1e-5)
    # what the model's context does not hold is dropped
    assert math.isnan(found.totals[1]) and list(found.failures.values()) == [1]
    (fingerprint,) = rewards_fingerprint(given, tmp_path)
    assert "model.safetensors" in fingerprint
    with pytest.raises(ConfigError, match="nowhere: there is no model's folder"):
        Judge(settings({"reward": "reward_model", "model": "nowhere"}), RewardContext(tmp_path))


def test_settings_of_judges_are_read_as_json():
    given = settings({"reward": "judge", "judge": {"model": "m"}})
    assert json.loads(given[0].model_dump_json())["seconds"] == 600

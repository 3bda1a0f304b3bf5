"""Samples of `rl` that are episodes: what the policy did not write is no target."""

from types import SimpleNamespace

import pytest

from bessemer.core.errors import ConfigError
from bessemer.core.metrics import read_metrics
from bessemer.posttraining.sampling.samples import SAMPLER, Prompt, Sample, pack_samples
from bessemer.training.data.batch import IGNORE_INDEX
from tests.cases import slow
from tests.posttraining.test_rl import data, run  # noqa: F401
from tests.posttraining.test_served_rollouts import serving
from tests.serving.running import servers
from tests.training.conftest import RecordedProgress

ENVIRONMENT = """
from bessemer.assistant.episodes import StepResult
from bessemer.assistant.messages import Message


class Letters:
    tools = ()

    def reset(self, task, seed):
        self.number, self.turns = task["number"], 0
        return [Message.user(task["prompt"])]

    def step(self, conversation, end):
        self.turns += 1
        return StepResult(conversation.messages[-1].text.count("e") / 16, [Message.user("More")] if self.turns < 2 else ())


class Fails(Letters):
    def step(self, conversation, end):
        if self.number % 4 == 1:
            raise OSError("the world has ended")
        return super().step(conversation, end)


def nothing():
    return 3
"""


def test_only_what_the_policy_wrote_is_a_target():
    ids, own = list(range(10, 20)), [False] * 3 + [True] * 2 + [False] * 3 + [True] * 2
    plain = Sample(Prompt("x"), [1, 2, 3, 4], 2, [-0.5, -0.25], "", False)
    episode = Sample(Prompt("x"), ids, 3, [-1.0, -2.0, -3.0, -4.0], "", False, is_own=own)
    packed = pack_samples([plain, episode], [True, True], 0)
    targets_BT, log_probs_BT = packed.batch.targets_BT, packed.batch.per_token[SAMPLER]
    is_target = targets_BT != IGNORE_INDEX
    assert sorted(targets_BT[is_target].tolist()) == [3, 4, 13, 14, 18, 19]
    values = dict(zip(targets_BT[is_target].tolist(), log_probs_BT[is_target].tolist(), strict=True))
    assert values == {3: -0.5, 4: -0.25, 13: -1, 14: -2, 18: -3, 19: -4}
    assert episode.completion_ids == [13, 14, 18, 19] and not log_probs_BT[~is_target].any()


@pytest.fixture
def world(data):  # noqa: F811
    (data / "world.py").write_text(ENVIRONMENT, encoding="utf-8")
    return data


SETTINGS = {"rewards": ["environment"], "max_turns": 2, "context_length": 120, "max_tokens": 8}


@pytest.mark.usefixtures("one_thread")
def test_a_policy_is_trained_on_episodes_of_two_turns(model_folder, world, tmp_path):
    run(model_folder, world, tmp_path, environment="world.py:Letters", steps=2, validation_share=0, **SETTINGS)
    lines, completions = read_metrics(tmp_path / "metrics.jsonl"), read_metrics(tmp_path / "completions.jsonl")
    assert len(lines) == 2 and max(line["log_ratio_max"] for line in lines) < 1e-4
    assert {one["reward"] for one in completions} <= {number / 16 for number in range(17)}
    assert max(one["tokens"] for one in completions) == 16, "two turns of 8 tokens, without what was asked between"


@pytest.mark.usefixtures("one_thread")
def test_an_episode_that_breaks_off_is_left_out_and_counted(model_folder, world, tmp_path):
    progress = RecordedProgress()
    run(model_folder, world, tmp_path, progress, environment="world.py:Fails", steps=1, validation_share=0, **SETTINGS)
    assert any("the reward environment: OSError: the world has ended" in line for line in progress.lines)
    assert any(one["reward"] is None for one in read_metrics(tmp_path / "completions.jsonl"))
    # whatever other rewards say of it
    length = SETTINGS | {"rewards": [{"reward": "length", "at_most": 90}]}
    run(model_folder, world, tmp_path / "other", environment="world.py:Fails", steps=1, validation_share=0, **length)
    both = (read_metrics(folder / "completions.jsonl") for folder in (tmp_path, tmp_path / "other"))
    assert len({tuple(one["reward"] is None for one in completions) for completions in both}) == 1
    with pytest.raises(ConfigError, match=r"environment: what world\.py:nothing makes has no tools and no reset and no step"):
        run(model_folder, world, tmp_path / "none", environment="world.py:nothing", **SETTINGS)


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
def test_a_policy_learns_over_two_turns(model_folder, world, tmp_path):
    learns = SETTINGS | {"batch_size": 32, "learning_rate": 2e-2, "steps": 16}
    summary = run(model_folder, world, tmp_path, environment="world.py:Letters", **learns)
    assert summary["validation_reward"] > summary["validation_reward_before"] + 0.5


WAITING = """
import threading
from bessemer.assistant.episodes import StepResult
from bessemer.assistant.messages import Message

# passes only when the environments of a whole rollout wait at the same time
TOGETHER = threading.Barrier(16, timeout=20)


class Waits:
    tools = ()
    waits = True

    def reset(self, task, seed):
        self.turns = 0
        return [Message.user(task["prompt"])]

    def step(self, conversation, end):
        TOGETHER.wait()
        self.turns += 1
        return StepResult(conversation.messages[-1].text.count("e") / 16, [Message.user("More")] if self.turns < 2 else ())
"""


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("by_servers", [False, slow(True)], ids=["on the engine", "on a server"])
def test_environments_that_wait_hold_up_no_other_episode(model_folder, data, tmp_path, by_servers):  # noqa: F811
    (data / "waiting.py").write_text(WAITING, encoding="utf-8")
    changes = {"environment": "waiting.py:Waits", "validation_share": 0, "steps": 2, **SETTINGS}
    with servers() as start:
        if by_servers:
            changes["rollouts"] = [start(serving(model_folder), accept_weights=True)]
        run(model_folder, data, tmp_path, **changes)
    lines = read_metrics(tmp_path / "metrics.jsonl")
    assert [line["dropped"] for line in lines] == [0, 0] and max(line["log_ratio_max"] for line in lines) < 1e-4
    assert max(one["tokens"] for one in read_metrics(tmp_path / "completions.jsonl")) == 16


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize(("setting", "hints"), [({}, 1), ({"environment_threads": 0}, 0)], ids=["nothing said", "asked for"])
def test_an_environment_that_takes_most_of_a_rollout_is_told_what_helps(
    setting,
    hints,
    model_folder,
    world,
    tmp_path,
    monkeypatch,
):
    monkeypatch.setattr("bessemer.posttraining.rl.rollouts._LONG_WAIT", -1.0)
    clock = iter(range(0, 1_000_000, 7))
    monkeypatch.setattr("bessemer.assistant.episodes.time", SimpleNamespace(perf_counter=lambda: next(clock)))
    progress = RecordedProgress()
    changes = {"environment": "world.py:Letters", "steps": 2, "validation_share": 0, **SETTINGS, **setting}
    run(model_folder, world, tmp_path, progress, **changes)
    assert sum("environment_threads: 32 lets them wait at once" in line for line in progress.lines) == hints
    # three calls in an episode of two turns, of seven seconds by this clock
    assert [line["environment_seconds"] for line in read_metrics(tmp_path / "metrics.jsonl")] == [16 * 3 * 7.0] * 2

"""Environments of `verifiers` and OpenEnv by adapters, with the true packages where they are installed."""

import sys
import threading
import time

import pytest

from bessemer.core.errors import ConfigError
from bessemer.core.metrics import read_metrics
from bessemer.posttraining.rl.config import RLConfig
from bessemer.posttraining.rl.environments.registry import load_environments
from bessemer.posttraining.rl.stage import rl
from tests.posttraining.test_rl import SETTINGS as USUAL

SETTINGS = USUAL | {
    "data": ["environment"],
    "rewards": ["environment"],
    "max_turns": 2,
    "context_length": 120,
    "max_tokens": 8,
    "validation_share": 0,
    "steps": 2,
}

CLASSIC = '''
import verifiers as vf
from datasets import Dataset


class Twice(vf.MultiTurnEnv):
    """Asks for more once, and gives a sixteenth for each letter e of both answers."""

    async def env_response(self, messages, state, **kwargs):
        return [{"role": "user", "content": "More"}]

    @vf.stop
    async def both(self, state):
        return len(state["trajectory"]) == 2


def letters(completion, **kwargs):
    return sum((one["content"] or "").count("e") for one in map(dict, completion) if one["role"] == "assistant") / 16


def load_environment(word="node"):
    rows = [{"prompt": [{"role": "user", "content": f"Return the {word} {n}"}], "answer": ""} for n in range(20)]
    return Twice(dataset=Dataset.from_list(rows), rubric=vf.Rubric(funcs=[letters]), max_turns=5)
'''

TASKSET = """
import verifiers.v1 as vf

__all__ = ["Letters"]


class LetterTask(vf.Task):
    @vf.reward(weight=1.0)
    async def letters(self, trace: vf.Trace) -> float:
        return trace.last_reply.count("e") / 8


class Letters(vf.Taskset[LetterTask]):
    def load(self):
        for number in range(20):
            yield LetterTask(vf.TaskData(prompt=f"Return the node {number}", system_prompt="Be brief."), self.config.task)
"""


@pytest.fixture
def module(tmp_path, monkeypatch):
    """Writes a module that can be imported by its name."""
    monkeypatch.syspath_prepend(str(tmp_path))

    def write(name, text):
        (tmp_path / f"{name}.py").write_text(text, encoding="utf-8")
        sys.modules.pop(name, None)

    return write


def run(model_folder, out, environment, options=None):
    out.mkdir()
    settings = {"environment": environment, "environment_options": options or {}}
    rl(RLConfig.parse(SETTINGS | settings, "rl"), model_folder, out, seed=3, device="cpu")


def check_trained(out, *, tokens):
    lines, completions = read_metrics(out / "metrics.jsonl"), read_metrics(out / "completions.jsonl")
    assert [line["dropped"] for line in lines] == [0, 0] and max(line["log_ratio_max"] for line in lines) < 1e-4
    assert max(one["tokens"] for one in completions) == tokens
    return completions


@pytest.mark.usefixtures("one_thread")
def test_a_policy_is_trained_in_an_environment_of_verifiers_with_two_turns(model_folder, tmp_path, module):
    package = pytest.importorskip("verifiers")
    if not hasattr(package, "load_environment"):
        pytest.skip("verifiers above 0.1")
    module("twice_env", CLASSIC)
    run(model_folder, tmp_path / "run", "verifiers:twice_env", {"word": "edge"})
    completions = check_trained(tmp_path / "run", tokens=16)
    assert {one["reward"] for one in completions} <= {number / 16 for number in range(17)}
    assert all("edge" in one["prompt"] for one in completions)


@pytest.mark.usefixtures("one_thread")
def test_a_policy_is_trained_on_tasks_of_a_taskset(model_folder, tmp_path, module):
    pytest.importorskip("verifiers.v1.utils.loaders")
    if hasattr(sys.modules["verifiers"], "load_environment"):
        pytest.skip("verifiers of 0.1")
    module("letters_tasks", TASKSET)
    run(model_folder, tmp_path / "run", "verifiers:letters_tasks")
    for one in check_trained(tmp_path / "run", tokens=8):
        assert one["reward"] == pytest.approx(one["completion"].count("e") / 8)
        assert one["prompt"].startswith("system: Be brief.")


def app_of_open_env():
    """The application of an environment of two turns, made with the package."""
    from openenv.core.env_server import Action, Environment, Observation, State, create_fastapi_app

    class Say(Action):
        text: str

    class Heard(Observation):
        reply: str = ""

    class Echo(Environment):
        SUPPORTS_CONCURRENT_SESSIONS = True

        def __init__(self):
            super().__init__()
            self.turns, self.start = 0, 0

        def reset(self, seed=None, **_):
            self.turns, self.start = 0, seed
            return Heard(reply=f"begin with {seed}")

        def step(self, action, **_):
            self.turns += 1
            return Heard(reply="go on", reward=action.text.count("e") / 16, done=self.turns == 2)

        @property
        def state(self):
            return State()

    return create_fastapi_app(Echo, Say, Heard, max_concurrent_envs=64)


@pytest.fixture
def open_env():
    pytest.importorskip("openenv.core.env_server")
    import uvicorn

    server = uvicorn.Server(uvicorn.Config(app_of_open_env(), port=0, log_level="warning"))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    server.should_exit = True
    thread.join()


@pytest.mark.usefixtures("one_thread")
def test_a_policy_is_trained_in_an_environment_behind_a_server_of_openenv(model_folder, tmp_path, open_env):
    run(model_folder, tmp_path / "run", f"openenv:{open_env}", {"tasks": 20, "instructions": "Speak."})
    completions = check_trained(tmp_path / "run", tokens=16)
    assert {one["reward"] for one in completions} <= {number / 16 for number in range(17)}
    environment = load_environments(f"openenv:{open_env}", tmp_path, {}, 2).new()
    assert environment.reset({"prompt": "task 7", "seed": 7}, 99)[0].text == "begin with 7", "a group begins alike"
    environment.close()
    with pytest.raises(ConfigError, match=r"the actions of .* have no 'words'; they have .*text"):
        load_environments(f"openenv:{open_env}", tmp_path, {"action": "words"}, 2)


def test_what_is_not_there_is_named_with_what_to_do(tmp_path):
    with pytest.raises(ConfigError, match="there is no source of environments 'gym'"):
        load_environments("gym:CartPole", tmp_path, {}, 1)
    with pytest.raises(ConfigError, match=r"is no file\.py:function and no SOURCE:NAME; there are verifiers, openenv"):
        load_environments("verifiers", tmp_path, {}, 1)
    with pytest.raises(ConfigError, match=r"openenv-core|is the server running"):
        load_environments("openenv:http://127.0.0.1:9", tmp_path, {}, 1)

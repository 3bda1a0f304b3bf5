"""`bessemer tinker`: what is wrong is one line, and a server starts that trains and ends at Ctrl-C."""

from __future__ import annotations

import io
import os
import signal
import sys
import threading
from queue import Queue

import pytest

from bessemer.cli.main import main
from bessemer.core.store import locked_folder
from tests.cli.test_main import bessemer, one_error
from tests.serving.running import quick_stops
from tests.serving.tinker_server import DATA, RawClient, tiny_folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_folder(tmp_path_factory.mktemp("tiny"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--dtype", "float16"), "dtype"),
        (("--max-runs", "0"), "max-runs"),
        (("--device", "tpu"), "tpu"),
        (("--keys", "none.json"), "no such file of API keys"),
    ],
)
def test_a_mistake_is_one_line(folder, tmp_path, capsys, options, message):
    code, _, err = bessemer(capsys, "tinker", folder, "--states", tmp_path / "states", "--port", 0, *options)
    assert code == 2 and message in one_error(err)


def test_two_servers_do_not_share_a_folder_of_states(folder, tmp_path, capsys):
    with locked_folder(tmp_path / "states"):
        code, _, err = bessemer(capsys, "tinker", folder, "--states", tmp_path / "states", "--port", 0)
    assert code == 2 and "another process is at work" in one_error(err)


class Printed(io.StringIO):
    """Standard output, of which another thread reads what is written."""

    def __init__(self):
        super().__init__()
        self.texts: Queue[str] = Queue()

    def write(self, text: str) -> int:
        self.texts.put(text)
        return super().write(text)


def test_the_command_serves_until_it_is_interrupted(folder, tmp_path, monkeypatch):
    printed, ended, found = Printed(), threading.Event(), {}

    def train():
        url = next(text.split(" at ")[1].split()[0] for text in iter(printed.texts.get, None) if "Tinker API at" in text)
        try:
            client = RawClient(url)
            client.create(base_model="model")
            found["loss"], found["step"] = client.loss(DATA)[0], client.step()["metrics"]
        finally:
            if not ended.is_set():
                os.kill(os.getpid(), signal.SIGINT)  # as Ctrl-C

    monkeypatch.setattr(sys, "stdout", printed)
    client = threading.Thread(target=train, daemon=True)
    client.start()
    words = ["tinker", str(folder), "--port", "0", "--kv-memory", "0.01", "--device", "cpu", "--states", str(tmp_path)]
    with quick_stops(), pytest.raises(SystemExit) as stop:
        main(words)
    ended.set()
    assert not stop.value.code
    client.join(timeout=60)
    assert found["loss"] > 0 and "grad_norm" in found["step"]

"""`bessemer tinker`: what is wrong is one line, and a server starts that trains and ends at Ctrl-C."""

from __future__ import annotations

import signal
import subprocess
import sys

import pytest

from bessemer.core.store import locked_folder
from tests.cli.test_main import bessemer, one_error
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


def test_the_command_serves_until_it_is_interrupted(folder, tmp_path):
    command = [sys.executable, "-m", "bessemer", "tinker", str(folder), "--port", "0", "--kv-memory", "0.01", "--device", "cpu"]
    with subprocess.Popen([*command, "--states", str(tmp_path)], stdout=subprocess.PIPE, encoding="utf-8") as server:
        assert server.stdout is not None
        url = next(line.split(" at ")[1].split()[0] for line in server.stdout if "Tinker API at" in line)
        client = RawClient(url)
        client.create(base_model="model")
        assert client.loss(DATA)[0] > 0 and "grad_norm" in client.step()["metrics"]
        server.send_signal(signal.SIGINT)
        assert server.wait(timeout=60) == 0

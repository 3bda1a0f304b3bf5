"""`bessemer generate --image`."""

import pytest

from bessemer.inference.engine import Engine, EngineConfig, SamplingParams
from tests.cli.test_main import bessemer, one_error
from tests.model.picture_files import drawn, encoded, write_picture_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    write_picture_model(folder)
    (folder / "drawn.png").write_bytes(encoded(drawn(40, 30, seed=1)))
    return folder


def test_the_prompt_asks_about_pictures(folder, capsys):
    picture = folder / "drawn.png"
    code, out, _ = bessemer(
        capsys, "generate", folder, "what is it?", "--image", picture, "--max-tokens", 4, "--temperature", 0
    )
    content = [{"type": "image", "image": picture}, {"type": "text", "text": "what is it?"}]
    engine = Engine(folder, device="cpu", config=EngineConfig(kv_memory=0.01))
    wanted = engine.chat([{"role": "user", "content": content}], SamplingParams(max_tokens=4, temperature=0.0))
    assert (code, out) == (0, wanted.text + "\n")


def test_a_missing_picture_and_a_suffix_are_one_line(folder, capsys):
    code, _, err = bessemer(capsys, "generate", folder, "what is it?", "--image", "none.png")
    assert code == 2 and "picture 1: none.png cannot be read" in one_error(err)
    code, _, err = bessemer(capsys, "generate", folder, "a", "--suffix", "b", "--image", "none.png")
    assert code == 2 and "--image: pictures go with a question" in one_error(err)

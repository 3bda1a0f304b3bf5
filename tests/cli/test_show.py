"""`bessemer show` of tokenizers."""

import pytest

from bessemer.tokenization import algorithms
from bessemer.tokenization.config import TokenizeConfig
from bessemer.tokenization.folder import write_folder
from tests.cli.test_main import bessemer, one_error
from tests.tokenization.conftest import synthetic_corpus


def _trained(config):
    return algorithms.train_vocabulary(synthetic_corpus(60), config.algorithm, config.learned_tokens, split=config.split)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizers")
    for algorithm in ("bpe", "wordpiece", "byte"):
        config = TokenizeConfig(algorithm=algorithm, vocab_size=600)
        write_folder(folder / algorithm, _trained(config), config.chat_template)
    return folder


@pytest.fixture(autouse=True)
def wide(monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")


def row(out, name):
    return next(line.split() for line in out.splitlines() if line.split()[:1] == [name])


def test_one_tokenizer_is_shown_by_kind_of_text_with_its_share_of_a_model(capsys, folders):
    code, out, _ = bessemer(capsys, "show", folders / "byte")
    assert code == 0
    assert row(out, "Hindi")[1:4] == ["1.00", "12.20", "2.46"]
    assert row(out, "Thai")[-1] == "exactly"
    assert row(out, "qwen3-0.6b")[-2:] == ["0.06", "%"]


def test_tokenizers_stand_side_by_side_on_the_texts_of_the_user(capsys, folders, tmp_path):
    (tmp_path / "text.txt").write_text("ba den ba\x1b[2J", encoding="utf-8")
    code, out, _ = bessemer(
        capsys, "show", folders / "bpe", "--against", folders / "byte", "--against", folders / "wordpiece",
        "--text", tmp_path / "text.txt",
    )  # fmt: skip
    assert code == 0
    assert row(out, "Lossless") == ["Lossless", "yes", "yes", "no"]
    assert row(out, "Text")[-6:] == ["13", "B", "13", "B", "13", "B"]
    assert "\x1b[2J" not in out and "␛[2J" in out
    assert "In brackets: more than 2 % of the tokens are unknown" in out
    assert "wordpiece: Prose, Python" in out


def test_a_file_of_a_tokenizer_is_shown_as_its_folder_is(capsys, folders):
    _, from_folder, _ = bessemer(capsys, "show", folders / "bpe")
    code, from_file, _ = bessemer(capsys, "show", folders / "bpe" / "tokenizer.json")
    assert code == 0
    assert row(from_file, "Prose") == row(from_folder, "Prose")


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["nothing", "--against", "bpe"], "there is no tokenizer 'nothing'"),
        (["bpe", "--against", "nothing"], "there is no tokenizer 'nothing'"),
        (["bpe", "--text", "nothing.txt"], "nothing.txt: cannot be read"),
    ],
)
def test_what_is_not_there_is_named_in_a_line(capsys, folders, monkeypatch, arguments, expected):
    monkeypatch.chdir(folders)
    code, _, err = bessemer(capsys, "show", *arguments)
    assert code == 2
    assert expected in one_error(err)

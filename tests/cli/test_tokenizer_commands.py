import base64

import pytest

from bessemer.core.store import read_json
from bessemer.model.config import ModelConfig
from bessemer.model.initialisation import initial_decoder
from bessemer.model.storage.folder import load_model, save_model
from bessemer.tokenization.tokenizer import load_tokenizer
from tests.cli.test_main import bessemer, one_error
from tests.model.tokenizers import VOCAB_SIZE, write_small_tokenizer


def test_a_tiktoken_file_is_imported_with_its_split_and_control_tokens(capsys, tmp_path):
    path = tmp_path / "x.tiktoken"
    path.write_text("".join(f"{base64.b64encode(bytes([byte])).decode()} {byte}\n" for byte in range(256)), encoding="utf-8")
    code, out, err = bessemer(
        capsys, "import", path, tmp_path / "out", "--split", "gpt-2", "--special", "<|endoftext|>=257", "--special", "<|x|>=258"
    )
    assert (code, err) == (0, "") and out.endswith("a tokenizer of 259 tokens, read from tiktoken\n")
    assert load_tokenizer(tmp_path / "out").bos_id == 257


def test_a_tokenizer_goes_out_as_gguf_and_comes_back(capsys, tmp_path):
    folder = write_small_tokenizer(tmp_path / "tokenizer")
    assert bessemer(capsys, "export", folder, tmp_path / "x.gguf", "--format", "gguf")[0] == 0
    code, out, _ = bessemer(capsys, "import", tmp_path / "x.gguf", tmp_path / "back")
    assert code == 0 and f"a tokenizer of {VOCAB_SIZE} tokens, read from gguf" in out
    ids = load_tokenizer(folder).encode("in the theatre")
    assert load_tokenizer(tmp_path / "back").encode("in the theatre") == ids


def test_a_tokenizer_and_a_model_are_extended(capsys, tmp_path):
    folder = write_small_tokenizer(tmp_path / "tokenizer")
    save_model(initial_decoder(ModelConfig(vocab_size=VOCAB_SIZE), seed=0), tmp_path / "model", tokenizer=folder)
    for source in ("tokenizer", "model"):
        out = tmp_path / f"{source}-2"
        code, said, _ = bessemer(
            capsys, "extend", tmp_path / source, out, "--token", "<tool>", "--token", "the", "--special", "<|x|>"
        )
        assert code == 0 and said.splitlines()[0] == "skipped 'the': it is one token already, id 257"
        assert said.splitlines()[1:3] == ["263  '<tool>'", "264  '<|x|>'"]
        assert load_tokenizer(out).encode("<tool>", add_bos=False) == [263]
    assert (
        read_json(tmp_path / "model-2" / "config.json")["vocab_size"]
        == load_model(tmp_path / "model-2").config.vocab_size
        == 265
    )


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["import", "nothing.gguf", "out"], "nothing.gguf: no such file or folder"),
        (["import", "tokenizer", "tokenizer"], "exists already and is not empty"),
        (["import", "tokenizer", "out", "--special", "a=1", "--special", "b"], "give all tokens an id (TOKEN=ID), or none"),
        (["export", "tokenizer", "x", "--format", "guf"], "there is no 'guf'; did you mean 'gguf'?"),
        (["export", "nothing", "x", "--format", "gguf"], "there is no model 'nothing'"),
        (["extend", "tokenizer", "out"], "nothing to add: give --token or --special"),
        (["extend", "tokenizer", "tokenizer", "--token", "x y"], "exists already and is not empty"),
        (["extend", "nothing", "out", "--token", "x y"], "there is no model 'nothing'"),
    ],
)
def test_a_mistake_is_one_line_and_changes_nothing(capsys, tmp_path, monkeypatch, arguments, expected):
    monkeypatch.chdir(tmp_path)
    write_small_tokenizer(tmp_path / "tokenizer")
    code, _, err = bessemer(capsys, *arguments)
    assert code == 2 and expected in one_error(err)
    assert [path.name for path in tmp_path.iterdir()] == ["tokenizer"]

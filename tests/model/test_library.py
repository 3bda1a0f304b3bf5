"""Models kept by name: pulled whole or not at all, listed, found by every command, removed."""

import pytest

from bessemer.cli.main import main
from bessemer.cli.named import find_model
from bessemer.core.errors import ArtefactError, ConfigError, SourceError, StorageError
from bessemer.model.folder import save_model
from bessemer.model.formats.gguf_export import export_gguf
from bessemer.model.library import kept_models, pull, remove
from tests.model.randomised import SHAPES, random_decoder
from tests.model.tokenizers import VOCAB_SIZE, write_small_tokenizer


@pytest.fixture
def sources(tmp_path, monkeypatch):
    """A model as a folder and as a GGUF file; the library is empty."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("BESSEMER_MODELS", raising=False)
    tokenizer = write_small_tokenizer(tmp_path / "tokenizer")
    shape = SHAPES["grouped"].with_changes(vocab_size=VOCAB_SIZE, max_position_embeddings=64)
    save_model(random_decoder(shape), tmp_path / "trained", tokenizer=tokenizer)
    export_gguf(tmp_path / "trained", tmp_path / "file.gguf")
    return tmp_path


def test_a_folder_and_a_file_are_kept_listed_found_and_removed(sources):
    folder, _ = pull("trained")
    file, _ = pull("file.gguf", "small")
    assert [(one.name, one.kind) for one in kept_models()] == [("small", "GGUF"), ("trained", "folder")]
    assert file.place.read_bytes() == (sources / "file.gguf").read_bytes() and file.size == file.place.stat().st_size
    (sources / "trained").rename(sources / "elsewhere")
    assert find_model("trained", sources / "runs") == folder.place and find_model("small", sources / "runs") == file.place
    assert remove("trained").name == "trained"
    assert [one.name for one in kept_models()] == ["small"]


def test_what_is_taken_or_no_name_or_no_model_is_refused_and_leaves_nothing(sources):
    pull("file.gguf", "small")
    with pytest.raises(ConfigError, match="bessemer rm small"):
        pull("trained", "small")
    for name in ("../out", ".hidden", "a b"):
        with pytest.raises(ConfigError, match="--name"):
            pull("trained", name)
    with pytest.raises((SourceError, ArtefactError, ConfigError)):
        pull("tokenizer", "tokenizer")
    with pytest.raises(ArtefactError, match="did you mean 'small'"):
        remove("smal")
    assert sorted(path.name for path in (sources / "models").iterdir()) == ["small.gguf"]


def test_a_pull_that_fails_leaves_nothing(sources, monkeypatch):
    def fail(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("shutil.copyfile", fail)
    with pytest.raises(StorageError, match=r"the disk is full while writing to models/small\.gguf;"):
        pull("file.gguf", "small")
    assert kept_models() == [] and not list((sources / "models").iterdir())


def test_the_commands_say_what_they_did(sources, capsys, monkeypatch):
    monkeypatch.setenv("BESSEMER_MODELS", str(sources / "kept"))
    for words, expected in (
        (["list"], "bessemer pull smollm2"),
        (["pull", "file.gguf", "--name", "small"], "bessemer serve small"),
        (["list"], "GGUF"),
        (["rm", "small"], "removed small"),
    ):
        with pytest.raises(SystemExit) as ended:
            main(words)
        assert ended.value.code == 0 and expected in capsys.readouterr().out
    with pytest.raises(SystemExit) as ended:
        main(["rm", "small"])
    assert ended.value.code == 2

"""Models kept by name: pulled whole or not at all, listed, found by every command, removed."""

import io
import shutil
import sys
from types import SimpleNamespace

import huggingface_hub
import pytest
import torch

from bessemer.cli.main import main
from bessemer.cli.named import find_model
from bessemer.core.errors import ArtefactError, ConfigError, SourceError, StorageError
from bessemer.inference.engine import Engine
from bessemer.inference.sampling.sampler import SamplingParams
from bessemer.model.formats.gguf_export import export_gguf
from bessemer.model.formats.gguf_open import open_gguf
from bessemer.model.formats.pull import pull
from bessemer.model.storage.folder import save_model
from bessemer.model.storage.library import kept_models, remove
from bessemer.tokenization.tokenizer import load_tokenizer
from tests.model.randomised import SHAPES, random_decoder
from tests.model.tokenizers import VOCAB_SIZE, write_small_tokenizer


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A model as a folder and as a GGUF file."""
    folder = tmp_path_factory.mktemp("library")
    tokenizer = write_small_tokenizer(folder / "tokenizer")
    shape = SHAPES["grouped"].with_changes(vocab_size=VOCAB_SIZE, max_position_embeddings=64)
    save_model(random_decoder(shape), folder / "trained", tokenizer=tokenizer)
    export_gguf(folder / "trained", folder / "file.gguf")
    return folder


@pytest.fixture
def sources(made, tmp_path, monkeypatch):
    """Both in the folder where a test runs; the library is empty."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("BESSEMER_MODELS", raising=False)
    return shutil.copytree(made, tmp_path, dirs_exist_ok=True)


def test_the_tokenizer_of_a_gguf_file_goes_on_reading_its_files(sources):
    own, kept = load_tokenizer(sources / "trained"), load_tokenizer(sources / "file.gguf")
    ids, expected = (one.encode_batch(["in the end"] * 3) for one in (kept, own))
    assert [row.tolist() for row in ids] == [row.tolist() for row in expected]
    assert open_gguf(sources / "file.gguf", torch.device("cpu")).tokenizer.hash == kept.hash


def test_python_opens_a_pulled_model_by_its_name(sources):
    pull("file.gguf", "small")
    with Engine("small") as engine:
        (completion,) = engine.generate("a", SamplingParams(max_tokens=2, temperature=0.0, ignore_eos=True))
    assert len(completion.token_ids) == 2


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


def test_a_model_of_the_hub_is_fetched_once_where_the_user_agrees_and_found_by_its_id(sources, monkeypatch, capsys):
    fetched = []
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, **options: fetched.append(name) or "trained")
    files = [
        SimpleNamespace(rfilename=name, size=size) for name, size in (("a.safetensors", 3e9), ("a.bin", 5e9), ("x/a.json", 1))
    ]
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", lambda *_, **options: SimpleNamespace(siblings=files))
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(isatty=lambda: True, readline=lambda: "\n"))
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    kept = find_model("some/model@v2", sources / "runs")
    assert "fetch 3.0 GB into models/?" in capsys.readouterr().err and fetched == ["some/model"]
    monkeypatch.setattr(sys, "stdin", io.StringIO())
    assert find_model("some/model@v2", sources / "runs") == find_model("model", sources / "runs") == kept
    with pytest.raises(ArtefactError, match=r"bessemer pull other/model$"):
        find_model("other/model", sources / "runs")


@pytest.mark.parametrize(
    "command",
    [
        ["show", "MODEL"],
        ["inspect", "MODEL", "in the end"],
        ["generate", "MODEL", "in the", "--max-tokens", "1"],
        ["export", "MODEL", "out", "--format", "safetensors"],
        ["extend", "MODEL", "out", "--token", "<tool>"],
        ["quantize", "MODEL", "out"],
        ["import", "MODEL", "out"],
    ],
    ids=lambda command: command[0],
)
def test_a_gguf_file_means_the_same_by_its_path_and_its_name_in_every_command(sources, capsys, command):
    pull("file.gguf", "tiny")
    said = []
    for model in ("file.gguf", "tiny"):
        with pytest.raises(SystemExit) as ended:
            main([model if word == "MODEL" else f"{model}-out" if word == "out" else word for word in command])
        said.append(capsys.readouterr().out.replace("models/tiny.gguf", model).replace(model, "MODEL"))
        assert ended.value.code in (0, None), said
    assert said[0] == said[1] != ""


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

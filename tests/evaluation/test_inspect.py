"""Inspect's evaluations on our models and in our sandbox."""

from __future__ import annotations

import asyncio
import io
import json
import tarfile
from contextlib import contextmanager

import pytest

from tests.assistant.conftest import tagged_tokenizer, tokenizer  # noqa: F401
from tests.serving.engine import ScriptedEngine
from tests.serving.running import babbling_engine, servers

pytestmark = pytest.mark.peer(name="protocols")


@pytest.fixture(scope="module")
def box():
    """A sandbox whose files are its own; commands run one after the other."""
    from bessemer.evaluation.inspect_sandbox import BessemerSandbox

    return BessemerSandbox()


def run(box, *command, **options):
    return asyncio.run(box.exec(list(command), **options))


def test_files_stay_from_one_command_to_the_next(box):
    asyncio.run(box.write_file("data/numbers.txt", "20 22"))
    code = "print(sum(map(int, open('data/numbers.txt').read().split()))); open('out.txt', 'w').write('done')"
    assert run(box, "python3", "-c", code).stdout == "42\n"
    assert asyncio.run(box.read_file("out.txt")) == "done"
    assert run(box, "bash", "-c", "cat ../out.txt numbers.txt; echo oops >&2; exit 3", cwd="data").returncode == 3
    assert run(box, "bash", "-c", "cat; echo $WHO", input=b"in ", env={"WHO": "me"}).stdout == "in me\n"
    asyncio.run(box.write_file("out.txt", b"\xff"))
    assert asyncio.run(box.read_file("out.txt", text=False)) == b"\xff"
    with pytest.raises(UnicodeDecodeError):
        asyncio.run(box.read_file("out.txt"))


def test_errors_are_those_of_the_interface(box):
    from inspect_ai.util import OutputLimitExceededError, SandboxUserUnsupportedError

    assert run(box, "no-such-program").returncode == 127
    run(box, "bash", "-c", "mkdir -p folder; ln -s /etc/passwd link; ln -s loop loop; echo data > plain; chmod 000 plain")
    for error, call in (
        (FileNotFoundError, box.read_file("missing")),
        (IsADirectoryError, box.read_file("folder")),
        (IsADirectoryError, box.write_file("folder", "a")),
        (PermissionError, box.read_file("link")),
        (PermissionError, box.read_file("loop")),
        (PermissionError, box.read_file("/etc/passwd")),
        (PermissionError, box.write_file("../outside", "a")),
        (PermissionError, box.exec(["./plain"])),
        (SandboxUserUnsupportedError, box.exec(["true"], user="root")),
        (TimeoutError, box.exec(["sleep", "60"], timeout=1)),
        (OutputLimitExceededError, box.exec(["python3", "-c", "print('x' * (11 << 20))"])),
    ):
        with pytest.raises(error):
            asyncio.run(call)
    run(box, "chmod", "600", "plain")
    run(box, "rm", "link", "loop")


def test_a_program_reaches_neither_this_machine_nor_the_network(box, tmp_path):
    (tmp_path / "secret").write_text("zinc", encoding="utf-8")
    assert "zinc" not in run(box, "cat", str(tmp_path / "secret")).stdout
    code = "import socket; socket.create_connection(('127.0.0.1', 22), 1)"
    assert not run(box, "python3", "-c", code).success


def archive_of(*members):
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as archive:
        for member, content in members:
            archive.addfile(member, io.BytesIO(content))
    return packed.getvalue()


def test_an_archive_that_a_program_makes_up_is_never_unpacked(box):
    escaped = tarfile.TarInfo("../../escaped")
    escaped.size = 4
    box._keep(archive_of((escaped, b"zinc")))
    with pytest.raises(PermissionError):
        asyncio.run(box.read_file("../../escaped"))
    # a file that claims to be larger than all may be: a sparse one, as a header says
    claims = tarfile.TarInfo("claims")
    claims.pax_headers = {
        "GNU.sparse.major": "0",
        "GNU.sparse.minor": "1",
        "GNU.sparse.size": str(1 << 40),
        "GNU.sparse.map": "0,0",
    }
    with pytest.raises(RuntimeError, match="take more than 256 MiB"):
        box._keep(archive_of((claims, b"")))
    with pytest.raises(tarfile.TarError):
        box._keep(b"no archive")


@contextmanager
def scripted(tokenizer, *texts):  # noqa: F811
    with servers() as start:
        engine = ScriptedEngine(tokenizer, *texts)
        yield start(engine) + "/v1", engine


def test_an_evaluation_runs_end_to_end_on_our_server_and_in_our_sandbox(tagged_tokenizer, tmp_path):  # noqa: F811
    from inspect_ai import Task, eval
    from inspect_ai.dataset import Sample
    from inspect_ai.scorer import includes
    from inspect_ai.solver import generate, use_tools
    from inspect_ai.tool import python

    import bessemer.evaluation.inspect_plugs  # noqa: F401  (an installed package is found by its entry point)

    code = json.dumps({"name": "python", "arguments": {"code": "print(open('n.txt').read(), 6 * 7)"}})
    call = f"<tool_call>\n{code}\n</tool_call>"
    task = Task(
        dataset=[Sample(input="Multiply.", target="42", files={"n.txt": "seven"}), Sample(input="Guess.", target="43")],
        solver=[use_tools(python()), generate()],
        scorer=includes(),
        sandbox="bessemer",
    )
    with scripted(tagged_tokenizer, call, "It is 42.", "It is 42.") as (url, engine):
        (log,) = eval(task, model="bessemer/tiny", model_base_url=url, log_dir=str(tmp_path), display="none", max_samples=1)
    assert log.status == "success", log.error
    assert log.results.scores[0].metrics["accuracy"].value == 0.5
    first = log.samples[0]
    assert first.messages[-1].text == "It is 42."
    assert [message.text.strip() for message in first.messages if message.role == "tool"] == ["seven 42"]
    assert "seven 42" in engine.prompts[1]


def test_a_model_of_this_process_answers_as_its_engine(tmp_path):
    from inspect_ai.model import ChatMessageSystem, ChatMessageUser, GenerateConfig, get_model

    import bessemer.evaluation.inspect_plugs  # noqa: F401

    engine = babbling_engine(tmp_path)
    model = get_model(f"bessemer/{tmp_path / 'model'}", device="cpu", max_num_seqs=4)
    said = [ChatMessageSystem(content="Be brief."), ChatMessageUser(content="the end")]
    config = GenerateConfig(max_tokens=6, temperature=0.0, num_choices=2)
    output = asyncio.run(model.generate(said, config=config))
    plain = [{"role": message.role, "content": message.text} for message in said]
    from bessemer.inference.engine import SamplingParams

    wanted = engine.chat(plain, SamplingParams(max_tokens=6, temperature=0.0))
    assert [choice.message.text for choice in output.choices] == [wanted.text] * 2
    assert output.stop_reason == "max_tokens" and output.usage.output_tokens == 12
    assert output.usage.input_tokens == wanted.prompt_tokens


def test_settings_of_an_engine_are_refused_for_a_server():
    from bessemer.core.errors import ConfigError
    from bessemer.evaluation.inspect_model import BessemerAPI

    with pytest.raises(ConfigError, match="a server has its own max_num_seqs"):
        BessemerAPI("tiny", base_url="http://127.0.0.1:1/v1", max_num_seqs=4)
    with pytest.raises(ConfigError, match="model_args"):
        BessemerAPI("tiny", speed=4)

"""How guides are followed, on small pages with a shell alone; and that examples install what they import."""

import ast
import re
import sys
from pathlib import Path

import pytest

from tests.follow import Guide, Newcomer, Step, example_guides, follow, guides
from tests.literate import commands, free_port, marked_blocks
from tests.programs import write_python_program
from tests.test_packaging import _PACKAGES, PROJECT, packages

EXAMPLES = Path(__file__).parents[1] / "examples"
HAVE = ("index", "minutes")


@pytest.fixture
def program(tmp_path, monkeypatch):
    """Write a program that a guide's commands find by its name."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder), prepend=":")

    def write(name: str, script: str) -> None:
        (folder / name).write_text(script, encoding="utf-8")
        (folder / name).chmod(0o755)

    write("python", f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    return write


@pytest.fixture
def followed(tmp_path, program):
    """Follow a page, and give its steps and the reasons of what was left out."""

    def done(text: str) -> list[Step | str]:
        page = tmp_path / "page.md"
        page.write_text(text, encoding="utf-8")
        newcomer = Newcomer(tmp_path / "newcomer", Path("/wheels/bessemer-1-py3-none-any.whl"), timeout=60)
        return list(follow(Guide("page.md", tuple(marked_blocks(page))), newcomer, HAVE))

    return done


def sh(*lines: str) -> str:
    return "\n".join(["```sh", *lines, "```", ""]) + "\n"


def python(*lines: str) -> str:
    return "\n".join(["```python", *lines, "```", ""]) + "\n"


def test_a_command_sees_the_folder_and_the_variables_of_those_before_it(followed):
    page = sh("mkdir -p deep && cd deep   # here", "export METAL=steel")
    steps = followed(page + "```console\n$ echo $METAL $(basename $PWD)\nshown, not run\n```\n")
    assert [step.code for step in steps] == [0, 0, 0]
    assert steps[-1].said == "steel deep"


def test_a_command_that_fails_is_told_with_its_place_its_code_and_its_last_line_and_the_rest_is_tried(followed):
    failed, after = followed("A page.\n\n" + sh("echo why >&2; exit 3", "true"))
    assert (failed.place, failed.code, failed.said, failed.failed) == ("page.md:4", 3, "why", True)
    assert not after.failed


def test_a_command_that_takes_too_long_is_ended(tmp_path, program):
    newcomer = Newcomer(tmp_path / "newcomer", Path("/wheel"), timeout=0)
    assert newcomer.run("cat /dev/zero > /dev/null")[0] is None


def test_without_the_package_nothing_else_is_tried(followed, program):
    program("pip", "#!/bin/sh\necho no such extra\nexit 1\n")
    (step,) = followed(sh("pip install '.[alll]'", "true"))
    assert (step.code, step.said) == (1, "no such extra")


def test_an_extra_of_the_checkout_is_that_of_the_wheel(followed, program):
    program("pip", '#!/bin/sh\necho "$@"\n')
    (step,) = followed(sh("pip install '.[data]' openai"))
    assert step.said == "install bessemer[data] @ file:///wheels/bessemer-1-py3-none-any.whl openai"


def test_blocks_of_python_share_a_namespace_and_the_folder_of_the_shell(followed):
    page = sh("mkdir -p deep && cd deep") + python("metal = 'steel'") + python("import os", "print(metal, os.listdir('..'))")
    assert [step.said for step in followed(page)] == ["", "", "steel ['deep']"]


def test_python_that_fails_is_told_with_its_last_line(followed):
    failed, after = followed(python("1 / 0") + python("print('on')"))
    assert failed.code == 1 and failed.said == "ZeroDivisionError: division by zero"
    assert after.code == 0


def test_a_block_with_a_title_is_written(followed):
    (step,) = followed('```yaml title="made/recipe.yaml"\nname: mine\n```\n\n' + sh("cat made/recipe.yaml"))
    assert step.said == "name: mine"


def test_what_is_left_out_is_counted_with_its_reason(followed):
    marked = "".join(f"<!-- {mark} -->\n{sh('true')}" for mark in ("needs: hub", "needs: index", "not run: it is dear"))
    needs_hub, ran, not_run, shown = followed(marked + "```yaml\nname: shown\n```\n")
    assert (needs_hub, not_run, shown) == ("needs hub", "it is dear", "shown only (yaml)")
    assert ran.command == "true"


def test_a_chat_is_typed_into(followed, program):
    program(
        "bessemer",
        '#!/usr/bin/env bash\nread -rp "fetch it? [Y/n]: " yes\n'
        'while test "$line" != /quit && read -rp "you> " line; do echo "$yes: $line"; done\n',
    )
    (chat,) = followed(sh("bessemer chat smollm2   # /quit leaves"))
    assert (chat.code, chat.said) == (0, "y: /quit")


_SERVER = """
import http.server, signal, sys

# ignored in what a script starts in the background, as these tests may be
signal.signal(signal.SIGINT, signal.default_int_handler)

class Models(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200 if self.path == "/v1/models" else 404)
        self.end_headers()

try:
    http.server.HTTPServer(("127.0.0.1", int(sys.argv[-1])), Models).serve_forever()
except KeyboardInterrupt:
    print("ended")
"""


def test_a_server_is_asked_and_ended_by_ctrl_c(followed, tmp_path):
    write_python_program(tmp_path / "bin" / "bessemer", _SERVER)
    (server,) = followed(sh(f"bessemer serve out --port {free_port()}"))
    assert (server.code, server.said) == (0, "ended")


def installed(guide: Guide) -> set[str]:
    """The packages that a guide's own lines install."""
    found = {re.match(r"[\w.-]+", requirement)[0].lower() for requirement in PROJECT["dependencies"]}
    for block in guide.blocks:
        for line in commands(block) if block.language in ("sh", "console") else []:
            for extras in re.findall(r"\.\[([\w,-]+)\]", line):
                found = found.union(*map(packages, extras.split(",")))
            if line.startswith("pip install"):
                found |= {word.lower() for word in line.split()[2:] if re.fullmatch(r"[\w-]+", word) and word[0] != "-"}
    return found


def imported(code: str) -> set[str]:
    """The packages that code imports, the standard library and `bessemer` apart."""
    modules = set()
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Import):
            modules |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            modules.add(node.module.partition(".")[0])
    return {_PACKAGES.get(module, module) for module in modules - {"bessemer", *sys.stdlib_module_names}}


@pytest.mark.parametrize("guide", guides(), ids=lambda guide: guide.name)
def test_a_guide_installs_what_its_python_imports(guide):
    place = EXAMPLES.parent / guide.name
    files = [place] if place.suffix == ".py" else sorted(place.rglob("*.py")) if place.is_dir() else []
    code = [path.read_text(encoding="utf-8") for path in files]
    code += [block.text for block in guide.blocks if block.language == "python"]
    beside = {path.stem for path in files}
    there = installed(guide)
    assert {module for text in code for module in imported(text) if module not in there | beside} == set()


def test_every_example_is_followed():
    entries = {path.name for path in EXAMPLES.iterdir()} - {"README.md", "__pycache__", "runs"}
    assert {guide.name.removeprefix("examples/") for guide in example_guides()} == entries

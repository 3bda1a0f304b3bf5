"""Agent Skills: folders with a `SKILL.md`, listed by name and description, read when they apply; and a project's `AGENTS.md`.

A skill is a folder below `.agents/skills/` whose `SKILL.md` begins with front matter (`name`, `description`) and goes on with
instructions (the format of agentskills.io). The system prompt has a line for each; the assistant loads the rest with tools.
Scripts run in the sandbox with the skill's files beside them, and nothing outside the skill's folder is read, a link that leads
out of it included.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from bessemer.agents.loop import AgentTool
from bessemer.agents.toolbox import printed
from bessemer.assistant.tools import Tool, ToolResult, failed
from bessemer.core.errors import ConfigError, RequestError
from bessemer.core.sandbox import Sandbox
from bessemer.core.yaml_file import parse_yaml

#: Where skills lie in a project.
SKILLS = Path(".agents") / "skills"
_FILE, _INSTRUCTIONS = "SKILL.md", "AGENTS.md"
_NAME = re.compile(r"[a-z0-9]+(-[a-z0-9]+)*")
_LONGEST_NAME, _LONGEST_DESCRIPTION = 64, 1024
_LARGEST_FILE, _LARGEST_SKILL, _MOST_FILES = 1 << 20, 16 << 20, 200
_LONGEST_INSTRUCTIONS = 32_000
_FRONT_MATTER = re.compile(r"\A---\r?\n(.*?)^---[ \t]*\r?$\n?(.*)\Z", re.DOTALL | re.MULTILINE)


@dataclass(frozen=True)
class Skill:
    """A skill. folder: where its files are."""

    name: str
    description: str
    body: str
    folder: Path

    def file(self, name: str) -> Path:
        """A file of the skill. Raises RequestError for one outside its folder, also by a link, and for none."""
        path = (self.folder / name).resolve()
        if "\0" in name or self.folder not in path.parents:
            raise RequestError(f"{name!r} lies outside the skill {self.name}")
        if not path.is_file():
            raise RequestError(f"the skill {self.name} has no file {name!r}; it has {', '.join(self.files()) or 'none'}")
        if path.stat().st_size > _LARGEST_FILE:
            raise RequestError(f"{name!r} is larger than {_LARGEST_FILE:,} bytes")
        return path

    def files(self) -> list[str]:
        """The names of its files beside `SKILL.md`, below its folder; links that lead out of it are left out."""
        names = []
        for path in sorted(self.folder.rglob("*")):
            if path.is_file() and self.folder in path.resolve().parents and path != self.folder / _FILE:
                names.append(path.relative_to(self.folder).as_posix())
        return names[:_MOST_FILES]


def read_skill(folder: Path) -> Skill:
    """The skill of a folder. Raises ConfigError, in one line, for one whose `SKILL.md` is missing or not in the format."""
    path = folder / _FILE
    folder = folder.resolve()
    if folder not in path.resolve().parents:
        raise ConfigError(f"{path}: this link leads out of the skill's folder")
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read ({error})") from None
    match = _FRONT_MATTER.match(text)
    if match is None:
        raise ConfigError(f"{path}: it does not begin with front matter between two lines of ---")
    values = parse_yaml(match[1], str(path)).values
    name, description = values.get("name"), values.get("description")
    if not isinstance(name, str) or not _NAME.fullmatch(name) or len(name) > _LONGEST_NAME:
        raise ConfigError(f"{path}: name: lower-case letters and digits, joined by '-', at most {_LONGEST_NAME}")
    if name != folder.name:
        raise ConfigError(f"{path}: name: {name!r} is not the name of its folder, {folder.name!r}")
    if not isinstance(description, str) or not description.strip() or len(description) > _LONGEST_DESCRIPTION:
        raise ConfigError(f"{path}: description: what the skill is for, at most {_LONGEST_DESCRIPTION} characters")
    return Skill(name, " ".join(description.split()), match[2].strip(), folder)


def find_skills(root: Path, report: Callable[[str], None]) -> list[Skill]:
    """The skills of a project, by name. One that cannot be read is a line to `report`, and the others are found."""
    skills = []
    place = root / SKILLS
    for folder in sorted(place.iterdir()) if place.is_dir() else ():
        if folder.is_dir():
            try:
                skills.append(read_skill(folder))
            except ConfigError as error:
                report(str(error))
    return skills


def listing(skills: Sequence[Skill]) -> str:
    """What the system prompt says about skills; "" where there are none."""
    if not skills:
        return ""
    lines = [f"- {skill.name}: {skill.description}" for skill in skills]
    return "\n".join(["Skills that you can load with load_skill, when one applies to the task:", *lines])


def instructions_of(root: Path) -> str:
    """A project's `AGENTS.md`, cut where it is very long; "" where there is none. Raises ConfigError for a link that leads out
    of the project: a folder of somebody else's could show the model any file of this machine."""
    path = root / _INSTRUCTIONS
    if not path.is_file():
        return ""
    if root.resolve() not in path.resolve().parents:
        raise ConfigError(f"{path}: this link leads out of the folder; put a copy in its place, or remove it")
    text = path.read_text(encoding="utf-8", errors="replace").strip()
    return text if len(text) <= _LONGEST_INSTRUCTIONS else f"{text[:_LONGEST_INSTRUCTIONS]}\n(cut here)"


def skill_tools(skills: Sequence[Skill], sandbox: Sandbox | None) -> list[AgentTool]:
    """Tools that load skills and run their scripts. sandbox: None where this machine has none; scripts are then not run."""
    if not skills:
        return []
    by_name = {skill.name: skill for skill in skills}

    def refusing(function: Callable[..., ToolResult | str]) -> Callable[..., ToolResult | str]:
        def call(skill: str, **arguments: object) -> ToolResult | str:
            try:
                return function(by_name[skill], **arguments)
            except RequestError as error:
                return failed(str(error))

        return call

    def load(skill: Skill) -> str:
        files = skill.files()
        return skill.body + (f"\n\nFiles of this skill: {', '.join(files)}" if files else "")

    def read(skill: Skill, name: str) -> str:
        return skill.file(name).read_text(encoding="utf-8", errors="replace")

    def run(skill: Skill, name: str, arguments: Sequence[str] = ()) -> ToolResult:
        assert sandbox is not None
        skill.file(name)
        return _run_script(sandbox, skill, name, arguments)

    which = {"type": "string", "enum": list(by_name), "description": "name of the skill"}
    file = {"type": "string", "description": "path of a file within the skill"}

    def schema(required: Sequence[str], **properties: object) -> dict[str, object]:
        names = ["skill", *required]
        return {
            "type": "object",
            "properties": {"skill": which, **properties},
            "required": names,
            "additionalProperties": False,
        }

    tools = [
        Tool("load_skill", "Read the instructions of a skill.", schema([]), refusing(load)),
        Tool("read_skill_file", "Read a file of a skill.", schema(["name"], name=file), refusing(read)),
    ]
    if sandbox is not None:
        words = {"type": "array", "items": {"type": "string"}, "description": "arguments of the script"}
        description = "Run a Python script of a skill; it sees the skill's files alone, and no network."
        parameters = schema(["name"], name=file, arguments=words)
        limit = sandbox.limits.seconds + 20
        tools.append(Tool("run_skill_script", description, parameters, refusing(run), time_limit=limit))
    return [AgentTool(tool, is_repeatable=True) for tool in tools]


def _run_script(sandbox: Sandbox, skill: Skill, name: str, arguments: Sequence[str]) -> ToolResult:
    """Run a script with the skill's files in its working folder."""
    if not name.endswith(".py"):
        raise RequestError(f"{name!r} is no Python script; only those are run")
    files, size = {}, 0
    for other in skill.files():
        content = skill.file(other).read_bytes()
        size += len(content)
        if size > _LARGEST_SKILL:
            raise RequestError(f"the skill {skill.name} has more than {_LARGEST_SKILL:,} bytes of files")
        files[f"skill/{other}"] = content
    code = (
        "import runpy, sys, os\n"
        "os.chdir('skill')\n"
        f"sys.argv = {[name, *arguments]!r}\n"
        f"sys.path.insert(0, os.path.dirname(os.path.abspath({name!r})))\n"
        f"runpy.run_path({name!r}, run_name='__main__')\n"
    )
    return printed(sandbox.run(code, files=files))

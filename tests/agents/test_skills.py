"""Skills are found, listed, loaded and run, and nothing outside their folder is."""

from __future__ import annotations

import pytest

from bessemer.agents.skills import find_skills, instructions_of, listing, read_skill, skill_tools
from bessemer.core.errors import ConfigError
from bessemer.core.sandbox import Limits, Sandbox

FRONT = "---\nname: {name}\ndescription: Adds numbers.\n---\n# Adding\n\nRun add.py.\n"


def written(root, name="adding", text=None):
    folder = root / ".agents" / "skills" / name
    (folder / "scripts").mkdir(parents=True)
    (folder / "SKILL.md").write_text(FRONT.format(name=name) if text is None else text, encoding="utf-8")
    (folder / "scripts" / "add.py").write_text(
        "import sys, helper\nprint(helper.add(*map(int, sys.argv[1:])))\n", encoding="utf-8"
    )
    (folder / "scripts" / "helper.py").write_text("def add(*numbers): return sum(numbers)\n", encoding="utf-8")
    return folder


def test_a_skill_is_listed_loaded_and_its_script_runs_with_its_files(tmp_path):
    written(tmp_path)
    skills = find_skills(tmp_path, pytest.fail)
    assert listing(skills).splitlines()[1:] == ["- adding: Adds numbers."] and listing([]) == ""
    tools = {tool.tool.name: tool.tool for tool in skill_tools(skills, Sandbox(Limits(seconds=10)))}
    loaded = tools["load_skill"].call({"skill": "adding"}).text
    assert loaded.startswith("# Adding") and "scripts/add.py, scripts/helper.py" in loaded
    assert "def add" in tools["read_skill_file"].call({"skill": "adding", "name": "scripts/helper.py"}).text
    run = {"skill": "adding", "name": "scripts/add.py", "arguments": ["17", "25"]}
    assert tools["run_skill_script"].call(run).text == "42"


def test_no_path_leads_out_of_the_skill_s_folder(tmp_path):
    folder = written(tmp_path)
    (tmp_path / "secret.py").write_text("print('secret')", encoding="utf-8")
    (folder / "link.py").symlink_to(tmp_path / "secret.py")
    (skill,) = find_skills(tmp_path, pytest.fail)
    assert "link.py" not in skill.files()
    tools = {tool.tool.name: tool.tool for tool in skill_tools([skill], Sandbox(Limits(seconds=10)))}
    for name in ("../../../secret.py", str(tmp_path / "secret.py"), "link.py", ".."):
        for tool in ("read_skill_file", "run_skill_script"):
            result = tools[tool].call({"skill": "adding", "name": name})
            assert result.is_error and "lies outside the skill adding" in result.text
    assert "has no file 'none.py'" in tools["read_skill_file"].call({"skill": "adding", "name": "none.py"}).text
    assert "is no Python script" in tools["run_skill_script"].call({"skill": "adding", "name": "SKILL.md"}).text


def test_a_skill_file_that_is_a_link_out_of_the_folder_is_refused(tmp_path):
    folder = written(tmp_path)
    (tmp_path / "elsewhere.md").write_text(FRONT.format(name="adding"), encoding="utf-8")
    (folder / "SKILL.md").unlink()
    (folder / "SKILL.md").symlink_to(tmp_path / "elsewhere.md")
    with pytest.raises(ConfigError, match="leads out of the skill's folder"):
        read_skill(folder)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("# Adding", "does not begin with front matter"),
        ("---\nname: adding\n---\n", "description: what the skill is for"),
        ("---\nname: Adding\ndescription: x\n---\n", "name: lower-case"),
        ("---\nname: other\ndescription: x\n---\n", "is not the name of its folder"),
        ("---\nname: [\n---\n", "SKILL.md"),
        ("---\n- a\n---\n", "must be a mapping"),
    ],
    ids=lambda value: value.splitlines()[0],
)
def test_a_skill_that_is_not_in_the_format_is_one_line_and_the_others_are_found(tmp_path, text, said):
    written(tmp_path, text=text)
    written(tmp_path, "other")
    lines = []
    assert [skill.name for skill in find_skills(tmp_path, lines.append)] == ["other"]
    (line,) = lines
    assert said in line and "\n" not in line


def test_a_project_s_instructions_are_read_and_cut(tmp_path):
    assert instructions_of(tmp_path) == ""
    (tmp_path / "AGENTS.md").write_text("Use tabs.\n" + "x" * 100_000, encoding="utf-8")
    text = instructions_of(tmp_path)
    assert text.startswith("Use tabs.") and text.endswith("(cut here)") and len(text) < 33_000


def test_instructions_that_are_a_link_out_of_the_project_are_refused(tmp_path):
    project = tmp_path / "project"
    project.mkdir()
    (tmp_path / "key").write_text("secret", encoding="utf-8")
    (project / "AGENTS.md").symlink_to(tmp_path / "key")
    with pytest.raises(ConfigError, match=r"AGENTS\.md: this link leads out of the folder"):
        instructions_of(project)
    (project / "AGENTS.md").unlink()
    (project / "CLAUDE.md").write_text("Use tabs.", encoding="utf-8")
    (project / "AGENTS.md").symlink_to("CLAUDE.md")
    assert instructions_of(project) == "Use tabs."

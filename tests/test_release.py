"""What a release is made of: a version by tags, an sdist that builds the same wheel, a page without dead links, licences."""

import email
import email.message
import importlib.util
import re
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path
from types import ModuleType

import pytest
from hatchling.builders.sdist import SdistBuilder
from hatchling.builders.wheel import WheelBuilder
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from bessemer.core.version import of_checkout

ROOT = Path(__file__).parents[1]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
STATIC = ROOT / "src" / "bessemer" / "webapp" / "static"
_KIB = 2**10


def git(folder: Path, *arguments: str) -> None:
    identity = ("-c", "user.name=A", "-c", "user.email=a@b.c", "-c", "commit.gpgsign=false", "-c", "tag.gpgsign=false")
    subprocess.run(["git", *identity, "-C", str(folder), *arguments], check=True, capture_output=True)


@pytest.fixture
def checkout(tmp_path):
    """A repository with one commit and no tag, whose changelog names 0.4.1."""
    folder = tmp_path / "a b"
    folder.mkdir()
    (folder / "CHANGELOG.md").write_text(
        "# Changelog\n\n## Unreleased\n\n## 0.4.1 – 2026-01-02\n\n## 0.4.0\n", encoding="utf-8"
    )
    for name in (".git_archival.txt", ".gitattributes"):
        (folder / name).write_bytes((ROOT / name).read_bytes())
    git(folder, "init", "--quiet")
    git(folder, "add", "--all")
    git(folder, "commit", "--quiet", "--message", "one")
    return folder


def test_a_tag_is_the_version_and_what_follows_comes_before_the_next(checkout):
    assert re.fullmatch(r"0\.4\.2\.dev0\+g[0-9a-f]{8}", of_checkout(checkout)), "without a tag, the changelog's"
    git(checkout, "tag", "nightly")
    git(checkout, "tag", "v0.5.0rc1")
    assert of_checkout(checkout) == "0.5.0rc1"
    git(checkout, "commit", "--quiet", "--allow-empty", "--message", "two")
    assert re.fullmatch(r"0\.5\.0rc2\.dev1\+g[0-9a-f]+", of_checkout(checkout))
    git(checkout, "tag", "--annotate", "--message", "release", "v0.5.0")
    assert of_checkout(checkout) == "0.5.0"


def test_an_archive_of_a_tag_is_that_version_and_sources_without_git_follow_the_changelog(checkout, tmp_path, monkeypatch):
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path))
    unpacked = tmp_path / "unpacked"
    unpacked.mkdir()
    (unpacked / "CHANGELOG.md").write_bytes((checkout / "CHANGELOG.md").read_bytes())
    assert of_checkout(unpacked) == "0.4.2.dev0"
    (unpacked / ".git_archival.txt").write_bytes((checkout / ".git_archival.txt").read_bytes())
    assert of_checkout(unpacked) == "0.4.2.dev0", "git did not write into it"
    git(checkout, "tag", "v0.5.0")
    git(checkout, "archive", "--output", str(tmp_path / "a.tar"), "v0.5.0")
    with tarfile.open(tmp_path / "a.tar") as archive:
        archive.extractall(unpacked, filter="data")
    assert of_checkout(unpacked) == "0.5.0"
    (unpacked / ".git_archival.txt").write_text("describe: v0.5.0-12-gabc123\n", encoding="utf-8")
    assert of_checkout(unpacked) == "0.5.1.dev12+gabc123"
    monkeypatch.setenv("PATH", "")
    assert of_checkout(checkout) == "0.4.2.dev0", "without git"


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> tuple[Path, Path, Path]:
    """The sdist, unpacked; the wheel of the checkout; the wheel of the sdist."""
    folder = tmp_path_factory.mktemp("a release")
    (packed,) = SdistBuilder(str(ROOT)).build(directory=str(folder))
    with tarfile.open(packed) as archive:
        archive.extractall(folder, filter="data")
    sources = Path(packed.removesuffix(".tar.gz"))
    wheels = [
        Path(next(iter(WheelBuilder(str(root)).build(directory=str(folder / place)))))
        for root, place in ((ROOT, "checkout"), (sources, "sdist"))
    ]
    return sources, *wheels


def metadata(wheel: Path) -> email.message.Message:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        return email.message_from_bytes(archive.read(name))


def test_the_sdist_builds_the_wheel_of_the_checkout(built):
    _, one, other = built
    assert one.name == other.name == f"bessemer-{of_checkout()}-py3-none-any.whl"
    assert one.read_bytes() == other.read_bytes()


def test_the_sdist_holds_sources_tests_and_pages_and_no_large_file_of_tests(built):
    sources, _, _ = built
    assert {"src", "tests", "docs", "kernels", "pyproject.toml", "hatch_build.py", "LICENSE"} <= {
        p.name for p in sources.iterdir()
    }
    assert not (sources / "benchmarks" / "results").exists() and not (sources / "docs" / "images").exists()
    files = [path for path in (sources / "tests").rglob("*") if path.is_file()]
    assert len(files) > 400 and max(path.stat().st_size for path in files) < 64 * _KIB
    # but for what building the wheel has left beside hatch_build.py
    compiled = [path for path in sources.rglob("*") if path.suffix in (".pyc", ".nbi", ".nbc", ".so")]
    assert not [path for path in compiled if path.parent != sources / "__pycache__"]


def test_an_index_s_page_has_no_relative_link(built):
    text = metadata(built[1]).get_payload()
    assert "# Bessemer" in text and "<!--" not in text and "Where to go on" in text
    assert not re.findall(r"\]\((?!https?:|#)[^)]*\)", text)


def test_links_of_readme_become_absolute_where_the_repository_s_address_is_known(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    from hatch_build import for_an_index

    source = "A [page](docs/a.md#b), [one elsewhere](https://a.b), [`code [x]`](c.md), [here](#here).\n\n![Two](d/e.svg)\n\nEnd"
    assert for_an_index(source, None) == "A page, [one elsewhere](https://a.b), `code [x]`, [here](#here).\n\nEnd"
    made = for_an_index(source, "https://code.example/o/n/", "v1.0")
    assert "[page](https://code.example/o/n/blob/v1.0/docs/a.md#b), [one elsewhere](https://a.b)" in made
    assert "![Two](https://code.example/o/n/raw/v1.0/d/e.svg)" in made
    for name in re.findall(r"\]\((?!https?:|#)([^)#]*)", (ROOT / "README.md").read_text(encoding="utf-8")):
        assert (ROOT / name).exists(), name


def test_the_licence_of_every_bundled_file_travels_in_the_metadata(built):
    stated = metadata(built[1])
    texts = {Path(name).name for name in stated.get_all("License-File")}
    assert texts == {"LICENSE", "THIRD-PARTY.md", *(path.name for path in STATIC.rglob("*-license.txt"))}
    listed = (ROOT / "THIRD-PARTY.md").read_text(encoding="utf-8")
    assert "lid.176.ftz" in listed and "CC BY-SA 3.0" in listed
    rows = re.findall(r"^\| (`[^|]+) \| [^|]+ \| ([^|]+) \| `([^`]+)` \|$", listed, re.MULTILINE)
    patterns = [pattern for row in rows for pattern in re.findall(r"`([^`]+)`", row[0])]
    bundled = [*STATIC.glob("uplot*"), *(STATIC / "vendor").iterdir()]
    for path in bundled:
        if not path.name.endswith("-license.txt"):
            assert any(path.relative_to(STATIC).match(pattern) for pattern in patterns), f"{path} is not in THIRD-PARTY.md"
    assert {STATIC / row[2] for row in rows} == set(STATIC.rglob("*-license.txt"))
    expression = set(stated["License-Expression"].split(" AND "))
    assert expression == {"Apache-2.0"} | {name for row in rows for name in re.split(r"; ", row[1])}


def test_classifiers_name_the_pythons_that_workflows_test_and_the_oldest_is_required():
    named = re.findall(r"Python :: (3\.\d+)", "\n".join(PYPROJECT["project"]["classifiers"]))
    assert PYPROJECT["project"]["requires-python"] == f">={named[0]}"
    workflow = (ROOT / ".github" / "workflows" / "test.yml").read_text(encoding="utf-8")
    assert re.findall(r'"(3\.\d+)"', re.search(r"python: \[(.*?)\]", workflow)[1]) == named
    assert not [line for line in PYPROJECT["project"]["classifiers"] if line.startswith("License ::")], (
        "PEP 639: the expression"
    )


def test_what_private_names_are_used_of_has_an_upper_bound_and_protobuf_has_none():
    """A private name may go in any release: PyTorch's next one is admitted when the suite has passed with it."""
    extras = PYPROJECT["project"]["optional-dependencies"]
    private = re.compile(r"\btorch\._[a-zA-Z]\w+|from torch\.[\w.]+ import _\w+")
    files = [path for path in (ROOT / "src").rglob("*.py") if private.search(path.read_text(encoding="utf-8"))]
    assert files, "no private name of PyTorch's: the bound may go"
    (torch,) = (one for one in extras["train"] if one.startswith("torch>"))
    assert re.search(r",<2\.\d+$", torch), torch
    (kernels,) = tomllib.loads((ROOT / "kernels" / "pyproject.toml").read_text(encoding="utf-8"))["project"]["dependencies"]
    assert kernels == torch
    (protobuf,) = (one for one in extras["tokenize"] if one.startswith("protobuf"))
    assert "<" not in protobuf


def test_the_command_tells_its_version_without_an_installed_package():
    program = f"import sys; sys.path.insert(0, {str(ROOT / 'src')!r}); import bessemer; print(bessemer.__version__)"
    done = subprocess.run([sys.executable, "-S", "-c", program], capture_output=True, encoding="utf-8", check=True)
    assert done.stdout.strip() == of_checkout()


LOCKS = sorted((ROOT / "requirements").glob("*.txt"))


def script() -> ModuleType:
    """The module that makes them."""
    spec = importlib.util.spec_from_file_location("requirements_make", ROOT / "requirements" / "make.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def required(extra: str) -> list[Requirement]:
    """What an extra asks for by itself and by those that it names, and what the package always asks for."""
    found = [Requirement(line) for line in PYPROJECT["project"]["dependencies"]]
    for line in PYPROJECT["project"]["optional-dependencies"][extra]:
        one = Requirement(line)
        found += [each for inner in one.extras for each in required(inner)] if one.name == "bessemer" else [one]
    return found


@pytest.mark.parametrize("path", LOCKS, ids=lambda path: path.stem)
def test_a_lock_names_one_version_and_its_hashes_within_the_ranges_and_no_index(path):
    text = path.read_text(encoding="utf-8")
    assert not re.search(r"https?:|--(?:extra-)?index-url|--find-links|--trusted-host|://", text)
    pins = dict(re.findall(r"^([a-z0-9][\w.-]*)==(\S+) \\$", text, re.MULTILINE))
    entries = re.findall(r"^[a-z0-9].*(?:\n    --hash=.*)+", text, re.MULTILINE)
    assert len(entries) == len(pins) == len(re.findall(r"^[a-z0-9]", text, re.MULTILINE)) > 20
    assert not [version for version in pins.values() if "+" in version], "a build of one machine"
    for requirement in required(path.stem):
        if requirement.marker is None or requirement.marker.evaluate():
            name = canonicalize_name(requirement.name)
            assert requirement.specifier.contains(pins[name]), f"{requirement} and {pins[name]}: make locks"


def test_the_locks_are_those_that_the_script_makes():
    make = script()
    assert {path.stem for path in LOCKS} == set(make.LOCKED)


def test_the_list_of_what_is_shipped_names_the_web_app_s_libraries():
    make = script()
    found = {one["name"]: (one["version"], one["licenses"][0]["license"]["id"]) for one in make.bundled()}
    assert {"uplot", "markdown-it", "entities", "katex", "katex-fonts", "highlight.js"} <= set(found)
    assert found["entities"] == ("4.5.0", "BSD-2-Clause") and found["katex-fonts"][1] == "OFL-1.1"
    listed = (ROOT / "THIRD-PARTY.md").read_text(encoding="utf-8").lower()
    assert all(name.removesuffix("-fonts") in listed for name in found)
    assert {licence for _, licence in found.values()} < set(PYPROJECT["project"]["license"].split(" AND "))

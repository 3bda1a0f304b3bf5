"""What a hint says to install: this bessemer once more, from where it came, and never a name that a stranger may have taken."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from bessemer.core import environment
from bessemer.core.environment import install_advice, install_extra


@pytest.fixture
def installed(monkeypatch, tmp_path):
    """A bessemer in site-packages; gives what its installer recorded of its origin."""
    monkeypatch.setattr(
        environment, "__file__", str(tmp_path / "lib" / "site-packages" / "bessemer" / "core" / "environment.py")
    )

    def record(**origin):
        read_text = {"direct_url.json": json.dumps(origin) if origin else None}.get
        monkeypatch.setattr("importlib.metadata.distribution", lambda name: SimpleNamespace(read_text=read_text))

    return record


def test_in_a_checkout_the_extra_is_added_to_the_checkout(monkeypatch, tmp_path):
    checkout = Path(environment.__file__).parents[3]
    monkeypatch.chdir(tmp_path)
    assert install_extra("data") == f"pip install --editable '{checkout}[data]'"
    monkeypatch.chdir(checkout)
    assert install_advice("daft") == "this needs the package 'daft': pip install --editable '.[data]'"


def test_what_was_installed_from_a_wheel_or_a_folder_is_installed_from_it_again(installed, tmp_path):
    wheel = tmp_path / "a b" / "bessemer-0.1.0-py3-none-any.whl"
    wheel.parent.mkdir()
    wheel.touch()
    installed(url=wheel.as_uri(), archive_info={})
    assert install_extra("serve") == f"pip install '{wheel}[serve]'"
    installed(url=tmp_path.as_uri(), dir_info={})
    assert install_extra("serve") == f"pip install '{tmp_path}[serve]'"


def test_what_came_by_an_address_is_named_with_it(installed):
    installed(url="https://example.org/bessemer.whl", archive_info={})
    assert install_extra("data") == "pip install 'bessemer[data] @ https://example.org/bessemer.whl'"
    installed(url="https://example.org/bessemer", vcs_info={"vcs": "git", "commit_id": "abc"})
    assert install_extra("data") == "pip install 'bessemer[data] @ git+https://example.org/bessemer@abc'"


@pytest.mark.parametrize("origin", [{}, {"url": "file:///nowhere/bessemer.whl", "archive_info": {}}])
def test_without_an_origin_the_packages_themselves_are_named(installed, monkeypatch, origin):
    installed(**origin)
    requirements = ["numpy>=2.1", "matplotlib>=3.9; extra == 'report'", 'uvicorn>=0.34; extra == "serve"']
    monkeypatch.setattr("importlib.metadata.requires", lambda name: requirements)
    assert install_extra("report") == "pip install 'matplotlib>=3.9'"
    assert install_advice("fastapi") == "this needs the package 'fastapi': pip install 'uvicorn>=0.34'"

"""Where the environments of `rl` come from: `file.py:function`, or `SOURCE:NAME` of a registered source.

Other packages add sources by the entry points `bessemer.environments`: a `Plugin` whose implementation is an
`EnvironmentSource`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from bessemer.assistant.episodes import Environment
from bessemer.core.errors import BessemerError, ConfigError
from bessemer.core.registry import Plugin, Registry
from bessemer.core.usercode import is_user_function, load_user_function

#: In `data`: the tasks that the environment itself has.
OWN_TASKS = "environment"


@dataclass(frozen=True)
class Environments:
    """A kind of environment. new: makes one, which plays one episode at a time. tasks: rows that it brings, each with a
    `prompt`; None: it brings none."""

    new: Callable[[], Environment]
    tasks: Sequence[Mapping[str, Any]] | None = None


class EnvironmentSource(Protocol):
    """Finds environments by name."""

    def __call__(self, name: str, options: Mapping[str, Any], max_turns: int) -> Environments:
        """options: the setting `environment_options`. max_turns: most turns of an episode. Raises ConfigError for an unknown
        name, ImportError where the package is not installed."""


_HERE = "bessemer.posttraining.rl.environments"

ENVIRONMENTS: Registry[EnvironmentSource] = Registry(
    "source of environments",
    "bessemer.environments",
    [
        Plugin("verifiers", "an environment of the package verifiers, by its name", f"{_HERE}.verifiers_adapter:verifiers"),
        Plugin("openenv", "a server of OpenEnv, by its URL", f"{_HERE}.openenv_adapter:openenv"),
    ],
)

#: Packages that our sources need.
_PACKAGES = {"verifiers": "verifiers", "openenv": "openenv-core"}


def source_of(name: str) -> str:
    """The name of the source in a setting; empty for a user's own function."""
    return "" if is_user_function(name) else name.partition(":")[0]


def load_environments(name: str, folder: Path, options: Mapping[str, Any], max_turns: int) -> Environments:
    """The environments that a setting names. Raises ConfigError where they cannot be loaded, or where making one, as a trial,
    fails.
    """
    source, _, rest = name.partition(":")
    if is_user_function(name):
        if options:
            raise ConfigError("environment_options: of an environment of verifiers or OpenEnv; your own function takes none")
        found = Environments(load_user_function(name, folder))
    elif not rest:
        known = ", ".join(ENVIRONMENTS)
        raise ConfigError(f"environment: {name!r} is no file.py:function and no SOURCE:NAME; there are {known}")
    else:
        plugin = ENVIRONMENTS.find(source)
        try:
            found = plugin.load()(rest, options, max_turns)
        except ImportError as error:
            package = _PACKAGES.get(source, source)
            raise ConfigError(f"environment: {name} needs the package {package}: pip install {package} ({error})") from None
    try:
        made = found.new()
    except BessemerError:
        raise
    except Exception as error:  # a user's function may raise anything
        raise ConfigError(f"environment: {name} fails: {type(error).__name__}: {error}") from None
    missing = [method for method in ("tools", "reset", "step") if not hasattr(made, method)]
    if missing:
        raise ConfigError(f"environment: what {name} makes has no {' and no '.join(missing)}")
    return found

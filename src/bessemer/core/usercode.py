"""A user's own function in a recipe: `my_rewards.py:brief`, found beside the recipe, its file's hash in the stage's key."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bessemer.core.errors import ConfigError
from bessemer.core.hashing import hash_bytes, hash_file


def is_user_function(name: str) -> bool:
    """Whether a name in a recipe means `file.py:function` and not something built in."""
    path, _, function = name.rpartition(":")
    return path.endswith(".py") and function.isidentifier()


def user_file(name: str, folder: Path) -> Path:
    """The file that `file.py:function` means, relative to `folder`. Raises ConfigError when it is not there."""
    path = (folder / name.rpartition(":")[0]).resolve()
    if not path.is_file():
        raise ConfigError(f"{name}: there is no file {path}")
    return path


def user_function_hash(name: str, folder: Path) -> str:
    """Hash of the file of `file.py:function`, which enters the stage's key."""
    return hash_file(user_file(name, folder))


def load_user_function(name: str, folder: Path) -> Callable[..., Any]:
    """Import the file and return its function. Raises ConfigError when the file fails to import or has no such function."""
    path, function = user_file(name, folder), name.rpartition(":")[2]
    spec = importlib.util.spec_from_file_location(f"bessemer_user_{hash_bytes(str(path).encode(), bits=64)}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # anything a user's file may raise
        raise ConfigError(f"{path}: importing it failed: {type(error).__name__}: {error}") from error
    found = getattr(module, function, None)
    if not callable(found):
        known = sorted(key for key, value in vars(module).items() if callable(value) and not key.startswith("_"))
        raise ConfigError(f"{path}: has no function {function!r}; it has: {', '.join(known) or 'none'}")
    return found  # type: ignore[no-any-return]

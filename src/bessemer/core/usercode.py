"""A user's own function in a recipe: `my_rewards.py:brief`, a path relative to the recipe.

Its file, and every file of its folder that it imports, enter the stage's key. No other file can be imported.
"""

from __future__ import annotations

import ast
import importlib.util
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, SourceFileLoader
from pathlib import Path
from types import CodeType, ModuleType
from typing import Any

from bessemer.core.errors import ConfigError
from bessemer.core.hashing import hash_bytes, hash_file, hash_value

_PACKAGE = "__init__.py"
#: Names that are never a user's: the standard library's and our own.
_RESERVED = sys.stdlib_module_names | {"bessemer"}


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
    """Hash of the file of `file.py:function` and of the files of its folder that it imports, for the stage's key.

    Files that it opens, and modules that it imports by a computed name, are not included.
    """
    return _code_hash(user_file(name, folder))


def load_user_function(name: str, folder: Path) -> Callable[..., Any]:
    """Import the file and return its function. Raises ConfigError when the file fails to import or has no such function."""
    path, function = user_file(name, folder), name.rpartition(":")[2]
    module = _module(path)
    loaded = getattr(module, function, None)
    if not callable(loaded):
        known = sorted(key for key, value in vars(module).items() if callable(value) and not key.startswith("_"))
        raise ConfigError(f"{path}: has no function {function!r}; it has: {', '.join(known) or 'none'}")
    return loaded  # type: ignore[no-any-return]


def local_imports(path: Path) -> dict[str, Path]:
    """Module name → file of all that a file imports from its own folder, directly or through another such file.

    Names of the standard library, and `bessemer`, are not local. A file with a syntax error has no imports here; loading it
    raises the error.
    """
    modules: dict[str, Path] = {}
    waiting = [(path, "")]
    while waiting:
        file, package = waiting.pop()
        for imported in _imported_names(file, package):
            parts = imported.split(".")
            for length in range(1, len(parts) + 1):
                name = ".".join(parts[:length])
                if name in modules or parts[0] in _RESERVED:
                    continue
                place = _local_module(path.parent, parts[:length])
                if place is not None:
                    modules[name] = place
                    waiting.append((place, name if place.name == _PACKAGE else name.rpartition(".")[0]))
    return dict(sorted(modules.items()))


def _local_module(folder: Path, parts: Sequence[str]) -> Path | None:
    place = folder.joinpath(*parts)
    return next((file for file in (place / _PACKAGE, place.with_name(f"{place.name}.py")) if file.is_file()), None)


def _imported_names(file: Path, package: str) -> Iterator[str]:
    """The dotted names that a file's import statements may load, those inside functions included."""
    try:
        tree = ast.parse(file.read_bytes())
    except (SyntaxError, ValueError):
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level and package else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            yield from (f"{base}.{alias.name}" if base else alias.name for alias in node.names)


def _code_hash(path: Path) -> str:
    imports = local_imports(path)
    if not imports:
        return hash_file(path)
    return hash_value([hash_file(path), {name: hash_file(file) for name, file in imports.items()}])


class _Source(SourceFileLoader):
    """Compiles a file each time: Python's caches compare the second of writing and the size, and an edit may change neither."""

    def get_code(self, fullname: str) -> CodeType:
        path = self.get_filename(fullname)
        return self.source_to_code(self.get_data(path), path)  # type: ignore[no-any-return]


class _LocalModules(MetaPathFinder):
    """Finds the modules that users' files import from their own folders."""

    def __init__(self) -> None:
        self._files: dict[str, Path] = {}
        self._hashes: dict[str, str] = {}

    def offer(self, files: dict[str, Path]) -> None:
        """Make these modules importable. All are imported again when one has changed or is a different file."""
        hashes = {name: hash_value([str(file), hash_file(file)]) for name, file in files.items()}
        if any(self._hashes.get(name) != value for name, value in hashes.items()):
            for name in files:
                sys.modules.pop(name, None)
        self._files.update(files)
        self._hashes.update(hashes)
        if files and self not in sys.meta_path:
            sys.meta_path.insert(0, self)

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        file = self._files.get(fullname)
        if file is not None:
            inside = [str(file.parent)] if file.name == _PACKAGE else None
            loader = _Source(fullname, str(file))
            return importlib.util.spec_from_file_location(fullname, file, loader=loader, submodule_search_locations=inside)
        # a package without __init__.py
        if any(name.startswith(f"{fullname}.") for name in self._files):
            spec = ModuleSpec(fullname, None, is_package=True)
            spec.submodule_search_locations = []
            return spec
        return None


_LOCAL = _LocalModules()
_LOADING = threading.RLock()


def _module(path: Path) -> ModuleType:
    """The module of a user's file. It is loaded again only when the file, or a local module that it imports, has changed."""
    with _LOADING:
        name = f"bessemer_user_{hash_bytes(str(path).encode(), _code_hash(path).encode(), bits=64)}"
        if name in sys.modules:
            return sys.modules[name]
        _LOCAL.offer(local_imports(path))
        spec = importlib.util.spec_from_file_location(name, path, loader=_Source(name, str(path)))
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        # dataclasses and type hints look up their module in `sys.modules`
        sys.modules[name] = module
        try:
            spec.loader.exec_module(module)
        except BaseException as error:
            del sys.modules[name]
            # anything a user's file may raise
            if isinstance(error, Exception):
                raise ConfigError(f"{path}: importing it failed: {type(error).__name__}: {error}") from error
            raise
        return module

"""Models kept by name in one folder, from which commands take them: `bessemer pull`, `list` and `rm`.

`models/NAME` is a Hugging Face folder, `models/NAME.gguf` a file of llama.cpp, which stays as it is: its codes are computed
with. The folder is `models` here, or what BESSEMER_MODELS names.
"""

from __future__ import annotations

import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

from bessemer.core.config import nearest
from bessemer.core.errors import ArtefactError, ConfigError, SourceError, writing_to

FOLDER_VARIABLE = "BESSEMER_MODELS"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_GGUF = ".gguf"


@dataclass(frozen=True)
class KeptModel:
    """A model of the library. size: bytes on disk; changed: seconds since the epoch."""

    name: str
    place: Path
    size: int
    changed: float

    @property
    def kind(self) -> str:
        """What it is on disk."""
        return "GGUF" if self.place.suffix == _GGUF else "folder"


def library_folder() -> Path:
    """Where models are kept."""
    return Path(os.environ.get(FOLDER_VARIABLE) or "models")


def kept_models() -> list[KeptModel]:
    """The models of the library by name."""
    folder = library_folder()
    places = sorted(folder.iterdir()) if folder.is_dir() else []
    found = [_kept(place) for place in places if not place.name.startswith(".") and _is_model(place)]
    return sorted(found, key=lambda one: one.name)


def find_kept(name: str) -> Path | None:
    """The model of a name; None where the library has none."""
    if not _NAME.fullmatch(name):
        return None
    folder = library_folder()
    return next((place for place in (folder / name, folder / f"{name}{_GGUF}") if _is_model(place)), None)


def pull(source: str, name: str | None = None) -> tuple[KeptModel, list[str]]:
    """Keep a model: a GGUF file, a Hugging Face folder, an id of the hub, or `smollm2`; returns it, and notes.

    It is there whole or not at all. Raises ConfigError for a name that is taken or none, SourceError for what is no model, and
    what `import_model` raises.
    """
    from bessemer.model.formats.exchange import find_model, import_model

    found = find_model(source)
    if found is None:
        raise SourceError(f"{source}: this is no model: give a GGUF file, a Hugging Face folder, ORG/NAME, or smollm2")
    name = name or Path(source.rpartition("/")[2].partition("@")[0]).name.removesuffix(_GGUF)
    if not _NAME.fullmatch(name):
        raise ConfigError(f"--name: letters, digits, '.', '_' and '-', got {name!r}")
    if (there := find_kept(name)) is not None:
        raise ConfigError(f"there is a model {name!r} already ({there}); bessemer rm {name} removes it, --name chooses another")
    folder = library_folder()
    is_gguf = Path(found.path).suffix == _GGUF
    place = folder / (f"{name}{_GGUF}" if is_gguf else name)
    unfinished = folder / f".{place.name}.partial"
    with writing_to(place):
        folder.mkdir(parents=True, exist_ok=True)
        _remove(unfinished)
        try:
            if is_gguf:
                shutil.copyfile(found.path, unfinished)
                notes: list[str] = []
            else:
                notes = import_model(found, unfinished)
            unfinished.replace(place)
        finally:
            _remove(unfinished)
    return _kept(place), notes


def remove(name: str) -> KeptModel:
    """Remove a model from the library. Raises ArtefactError for a name that it has not."""
    place = find_kept(name)
    if place is None:
        known = [one.name for one in kept_models()]
        raise ArtefactError(f"there is no model {name!r} in {library_folder()}{nearest(name, known)}")
    kept = _kept(place)
    _remove(place)
    return kept


def _is_model(place: Path) -> bool:
    return (place.is_file() and place.suffix == _GGUF) or (place / "config.json").is_file()


def _kept(place: Path) -> KeptModel:
    files = [place] if place.is_file() else [path for path in place.rglob("*") if path.is_file()]
    name = place.name.removesuffix(_GGUF) if place.is_file() else place.name
    return KeptModel(name, place, sum(path.stat().st_size for path in files), max(path.stat().st_mtime for path in files))


def _remove(place: Path) -> None:
    if place.is_dir() and not place.is_symlink():
        shutil.rmtree(place)
    else:
        place.unlink(missing_ok=True)

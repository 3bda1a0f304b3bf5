"""The folder that `bessemer finetune` writes, as a model: an adapter and the base that it is for, or whole weights.

`finetune.json` says where the base is, `adapter/` is the adapter, `model/` has whole weights: tuned, or merged of the two.
Imports no PyTorch before weights are read.
"""

from __future__ import annotations

import os
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from bessemer.core.errors import ArtefactError
from bessemer.core.progress import PlainLines
from bessemer.core.store import new_folder, read_json

if TYPE_CHECKING:
    import torch

    from bessemer.model.decoder import Decoder


#: Record of a fine-tuning, in its folder.
RECORD = "finetune.json"
#: Folders in it: a converted base model, the adapter, and whole weights.
BASE, ADAPTER, MODEL = "base", "adapter", "model"
#: Held-out questions, as a task file.
HELD_OUT_TASK = "held_out.yaml"
_CONFIG = "config.json"


class TunedModel(NamedTuple):
    """folder: of a model. adapter: what was tuned beside it; None: the model's weights were."""

    folder: Path
    adapter: Path | None


def is_tuned(out: Path) -> bool:
    """Whether a folder is one that `bessemer finetune` writes."""
    return (out / RECORD).is_file()


def read_record(out: Path) -> dict[str, Any]:
    """The record of a finished fine-tuning. Raises ArtefactError for an unfinished one and a damaged record."""
    record = read_json(out / RECORD, "record of a fine-tuning")
    if not isinstance(record, dict) or not isinstance(record.get("result"), dict):
        raise ArtefactError(f"{out}: this fine-tuning has not ended; the same `bessemer finetune` goes on with it")
    return record


def tuned_model(out: Path, *, whole: bool = True) -> TunedModel | None:
    """The result of a fine-tuning in `out`: whole weights where it has them, else base and adapter. None for another folder.

    whole: False for base and adapter though they have been merged. Raises ArtefactError as `read_record`, for a base that is no
    longer there, and for the folder of an adapter, which is no model.
    """
    if not is_tuned(out):
        refuse_adapter(out)
        return None
    record = read_record(out)
    if (out / MODEL / _CONFIG).is_file() and (whole or not (out / ADAPTER).is_dir()):
        return TunedModel(out / MODEL, None)
    return TunedModel(_base(out, record), out / ADAPTER)


def refuse_adapter(folder: Path) -> None:
    """Raise ArtefactError for the folder of an adapter, which is no model by itself."""
    if not (folder / "adapter_config.json").is_file() or (folder / _CONFIG).is_file():
        return
    whole = folder.parent
    do = f"name {whole}, which is its model" if is_tuned(whole) else f"bessemer merge MODEL FOLDER --adapter {folder}"
    raise ArtefactError(f"{folder}: an adapter and no model; merge it into its model first, or use it beside that: {do}")


def place_of_base(base: Path, out: Path) -> dict[str, str | None]:
    """Paths of a base for the record: relative to the folder, so that both may be moved together, and absolute."""
    try:
        relative = os.path.relpath(base.resolve(), out.resolve())
    except ValueError:  # another drive of Windows
        relative = None
    return {"relative": relative, "absolute": str(base.resolve())}


def _base(out: Path, record: dict[str, Any]) -> Path:
    written = record.get("base")
    if isinstance(written, dict):
        places = [out.resolve() / written["relative"]] if written.get("relative") else []
        places.append(Path(written["absolute"]))
    else:
        # older records do not say where the base is
        places = [out / BASE, Path(record["asked"]["model"])]
    for place in places:
        if (place / _CONFIG).is_file():
            return place.resolve()
    adapter = shlex.quote(str(out / ADAPTER))
    raise ArtefactError(
        f"{out}: its adapter is for the model {places[-1]}, which is not there any more; put it back, or say where it is now: "
        f"bessemer merge MODEL NEW_FOLDER --adapter {adapter}"
    )


def whole_weights(out: Path) -> Path | None:
    """The model's folder of a fine-tuning for what needs one set of weights; None for another folder.

    An adapter is merged into its base, once, in `model/`. Raises as `tuned_model` and `merge_adapter`.
    """
    tuned = tuned_model(out)
    if tuned is None or tuned.adapter is None:
        return None if tuned is None else tuned.folder
    PlainLines().say(f"{out}: merging the adapter into its base, once, in {out / MODEL}")
    try:
        merge_adapter(tuned.folder, tuned.adapter, out / MODEL)
    except OSError:
        # another process may have merged it meanwhile
        if not (out / MODEL / _CONFIG).is_file():
            raise
    return out / MODEL


def merge_adapter(base: Path, adapter: Path, out: Path, dtype: torch.dtype | None = None) -> None:
    """Write the model of a folder with an adapter merged into its weights; `out` is there whole or not at all.

    dtype: of what is written; None: float32. The sums are computed in float32, and codes of a quantised base are dequantised:
    rounded to them again, the update would be lost. Raises ArtefactError for a base that is a GGUF file, an adapter that does
    not fit it, and an `out` that holds something.
    """
    import torch

    from bessemer.model.adapters.folder import read_adapter
    from bessemer.model.adapters.trained import merged
    from bessemer.model.storage.folder import load_model, save_model
    from bessemer.tokenization.trained_template import read_trained_template, write_trained_template

    if base.is_file():
        raise ArtefactError(f"{base}: a GGUF file takes no adapter; import it first: bessemer import {base} FOLDER")
    with new_folder(out) as partial:
        model = load_model(base, dtype=torch.float32)
        whole = merged(model, read_adapter(adapter, model))
        save_model(whole if dtype is None else whole.to(dtype), partial, tokenizer=base)
        if (record := read_trained_template(adapter)) is not None:
            write_trained_template(partial, record)


def load_whole(folder: Path) -> Decoder:
    """`load_model` of a model's folder; of a fine-tuning's with the adapter merged in memory."""
    from bessemer.model.adapters.folder import read_adapter
    from bessemer.model.adapters.trained import merged
    from bessemer.model.storage.folder import load_model

    tuned = tuned_model(folder) or TunedModel(folder, None)
    model = load_model(tuned.folder)
    return model if tuned.adapter is None else merged(model, read_adapter(tuned.adapter, model))

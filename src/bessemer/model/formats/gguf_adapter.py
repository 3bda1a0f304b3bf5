"""A low-rank adapter as a GGUF file for llama.cpp (`--lora`), beside the file of its base.

`general.type` is adapter, `adapter.type` lora, and the architecture the base's. Of every changed tensor there are NAME.lora_a,
A (R, K), and NAME.lora_b, B (N, R), with B's rows in the order of the base's file. The update is s · alpha / R · B A; s is what
the user says, 1 by default.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from bessemer.core.config import nearest
from bessemer.core.errors import ArtefactError, ConfigError
from bessemer.core.store import new_file
from bessemer.model.adapters import Adapter, Update
from bessemer.model.adapters.folder import most_usual, packed_update, read_adapter
from bessemer.model.families.layout import Stored
from bessemer.model.formats.gguf_base import Plus
from bessemer.model.formats.gguf_blocks import keeps_rows
from bessemer.model.formats.gguf_export import as_llama_cpp
from bessemer.model.initialisation import tensor_shapes
from bessemer.model.storage.folder import load_model

# Shapes: N outputs, K inputs, R rank.

#: Dtypes in which an adapter can be written.
ADAPTER_DTYPES = {"f32": torch.float32, "f16": torch.float16}


def export_adapter(base: Path, adapter: Path, path: Path, dtype: str | None = None) -> list[str]:
    """Write an adapter of the model in the folder `base` as a GGUF file, which is there whole or not at all.

    dtype: f32 or f16; f32 when None, as adapters are trained. Returns notes for the user, a sentence each. Raises ArtefactError
    for an adapter that is not of the model or that llama.cpp has no place for, ConfigError for another type.
    """
    if dtype is not None and dtype not in ADAPTER_DTYPES:
        raise ConfigError(f"--dtype: an adapter is written in f32 or f16, not {dtype!r}{nearest(dtype, list(ADAPTER_DTYPES))}")
    model = load_model(base)
    config, family, _ = as_llama_cpp(model.config, base)
    opened = read_adapter(adapter, model, dtype=torch.float32)
    if opened.has_magnitudes:
        raise ArtefactError(
            f"{adapter}: DoRA's magnitudes have no place in llama.cpp's adapters; export the model with the adapter merged in"
        )
    shapes = tensor_shapes(config)
    found = {
        stored.name: update
        for stored in family.stored(config, list(shapes))
        if (update := _stored_update(stored, shapes, opened, adapter)) is not None
    }
    written = {place.name for stored in family.stored(config, list(shapes)) if stored.name in found for place in stored.views}
    if missing := sorted(name for name in opened.updates if f"{name}.weight" not in written):
        raise ArtefactError(f"{adapter}: it changes {missing[0]}, which llama.cpp's {family.architecture} does not have")
    alpha = most_usual(update.scale * len(update.down_RK) for update in found.values())
    _write(path, family.architecture, found, alpha, ADAPTER_DTYPES[dtype or "f32"])
    return [
        f"an adapter for the file of its base: llama-cli -m BASE.gguf --lora {path.name}; in a Modelfile ADAPTER ./{path.name}"
    ]


def _stored_update(stored: Stored, shapes: dict[str, tuple[int, ...]], adapter: Adapter, place: Path) -> Update | None:
    """The update of a file's tensor, from those of ours that it is made of; None where there is none."""
    updates = [adapter.updates.get(each.name.removesuffix(".weight")) for each in stored.views]
    if not any(each.name.endswith(".weight") for each in stored.views) or not any(updates):
        return None
    in_rows = stored.dim == 0 and not isinstance(stored, Plus)
    if not in_rows or not all(keeps_rows(each.view, shapes[each.name]) for each in stored.views):
        raise ArtefactError(
            f"{place}: the file of the base holds {stored.views[0].name} in other parts, which take no low-rank update; export "
            "the model with the adapter merged into it"
        )

    def ordered(up_NR: Tensor, index: int) -> Tensor:
        return stored.views[index].view(up_NR).reshape(-1, up_NR.shape[-1]).contiguous()

    turned = [
        None if update is None else update._replace(up_NR=ordered(update.up_NR, index)) for index, update in enumerate(updates)
    ]
    outputs = [shapes[each.name][0] for each in stored.views]
    return packed_update(turned, outputs)


def _write(path: Path, architecture: str, updates: dict[str, Update], alpha: float, dtype: torch.dtype) -> None:
    import gguf

    path.parent.mkdir(parents=True, exist_ok=True)
    with new_file(path) as unfinished:
        writer = gguf.GGUFWriter(unfinished, architecture)
        writer.add_type("adapter")
        writer.add_string("adapter.type", "lora")
        writer.add_float32("adapter.lora.alpha", float(alpha))
        writer.add_file_type(0 if dtype == torch.float32 else 1)
        for name, update in updates.items():
            # one alpha serves all tensors
            factor = update.scale * len(update.down_RK) / alpha
            up_NR = update.up_NR if factor == 1 else update.up_NR * factor
            for part, tensor in (("lora_a", update.down_RK), ("lora_b", up_NR)):
                halves = tensor.to(dtype)
                if not bool(torch.isfinite(halves).all()):
                    raise ArtefactError(f"{path}: {name} holds values that half precision cannot; choose --dtype f32")
                writer.add_tensor(f"{name}.{part}", halves.contiguous().numpy())
        try:
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_tensors_to_file()
        finally:
            writer.close()

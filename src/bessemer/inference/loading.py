"""Opens a model for the engine: from a folder, a GGUF file or memory, in one process or in several."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import torch

from bessemer.core.environment import free_memory_bytes
from bessemer.core.errors import ArtefactError, ConfigError
from bessemer.core.progress import PlainLines
from bessemer.inference.config import EngineConfig
from bessemer.inference.execution.compiled_steps import CompiledSteps
from bessemer.inference.execution.tensor_parallel.sharded_model import ShardedModel
from bessemer.model.adapter_folder import read_adapter
from bessemer.model.decoder import Decoder
from bessemer.model.device import choose_device, is_fast
from bessemer.model.folder import load_model
from bessemer.model.folder_config import read_end_tokens, read_sampling_settings
from bessemer.model.formats.gguf_open import open_gguf
from bessemer.model.library import find_kept
from bessemer.model.quantised_linear import is_quantised
from bessemer.model.trained_adapters import merged
from bessemer.model.tuned_folder import TunedModel, tuned_model
from bessemer.tokenization.tokenizer import Tokenizer, load_tokenizer

#: Share of the free memory that weights in float32 may take.
_SHARE_FOR_WEIGHTS = 0.5


class OpenedModel(NamedTuple):
    """sharded: the model's shards, where worker processes hold some; None where this one does alone.

    is_served: whether it was opened to be served, and is not one in memory that may be in training. sampling_settings: what
    the model's folder says of how it is sampled. adapter: of a fine-tuning, the folder of what was tuned beside its base; None
    where it was merged, as it is into weights in float32 in one process.
    """

    model: Decoder
    tokenizer: Tokenizer
    end_tokens: frozenset[int]
    is_served: bool = True
    sharded: ShardedModel | None = None
    sampling_settings: Mapping[str, Any] = MappingProxyType({})
    adapter: Path | None = None


def open_model(
    model: Path | str | Decoder | ShardedModel,
    tokenizer: Tokenizer | None,
    device: str,
    config: EngineConfig,
    *,
    adapter: Path | str | None = None,
) -> OpenedModel:
    """Open a folder, a GGUF file, the base of a fine-tuning or a pulled model by its name on a device; a model in memory, or a
    shard, stays where it lies, and needs its tokenizer. adapter: what requests have that name none, in the place of a
    fine-tuning's own.

    Raises ArtefactError when the folder or the file is damaged, ConfigError for a device that is not here, or a model that
    cannot be shared by as many processes as the settings say.
    """
    if isinstance(model, ShardedModel):
        assert tokenizer is not None, "shards in memory need their tokenizer"
        return OpenedModel(model.model, tokenizer, frozenset(tokenizer.eos_ids), is_served=False, sharded=model)
    if isinstance(model, Decoder):
        if config.processes > 1:
            raise ConfigError("parallel: every process reads the model for itself; save it, and open its folder")
        assert tokenizer is not None, "a model in memory needs its tokenizer"
        return OpenedModel(model, tokenizer, frozenset(tokenizer.eos_ids), is_served=False)
    named = Path(model)
    if not named.exists() and (kept := find_kept(str(model))) is not None:
        named = kept
    path, own = tuned_model(named) or TunedModel(named, None)
    if config.processes > 1:
        sharded = ShardedModel.open(path, device, config)
        try:
            tokenizer = tokenizer or load_tokenizer(path)
            ends, settings = _ends(path, tokenizer), read_sampling_settings(path)
            return OpenedModel(sharded.model, tokenizer, ends, sharded=sharded, sampling_settings=settings, adapter=own)
        except BaseException:
            sharded.close()
            raise
    if path.suffix == ".gguf":
        opened = open_gguf(path, choose_device(device))
        if opened.encoded is not None:
            PlainLines().say(opened.encoded)
        tokenizer = tokenizer or opened.tokenizer
        if tokenizer is None:
            raise ArtefactError(f"{path}: the file holds no tokenizer that can be read; give one")
        model = _in_fast_dtype(opened.model, config)
        return OpenedModel(model, tokenizer, frozenset(opened.end_tokens or tokenizer.eos_ids))
    whole = load_model(path, choose_device(device))
    if own is not None and adapter is None and whole.dtype == torch.float32 and not is_quantised(whole):
        # nobody can ask for the base alone, and the compiled kernels take one set of weights
        whole, own = merged(whole, read_adapter(own, whole)), None
    whole = _in_fast_dtype(whole, config)
    tokenizer = tokenizer or load_tokenizer(path)
    settings = read_sampling_settings(path)
    return OpenedModel(whole, tokenizer, _ends(path, tokenizer), sampling_settings=settings, adapter=own)


def _in_fast_dtype(model: Decoder, config: EngineConfig) -> Decoder:
    """A model whose modules compute its steps, in float32 where its own dtype is slower and the memory suffices; others as they
    are. The compiled kernels widen weights of 16 bits themselves."""
    if model.device.type != "cpu" or model.dtype.itemsize > 2 or is_quantised(model) or is_fast(model.dtype, model.device):
        return model
    if config.cpu_kernels != "off" and CompiledSteps.supports(model) is None:
        return model
    needed = sum(weight.numel() for weight in model.parameters()) * torch.float32.itemsize
    free = free_memory_bytes()
    if free is not None and needed > _SHARE_FOR_WEIGHTS * free:
        return model
    PlainLines().say(f"  weights in float32: this processor has no fast products in {str(model.dtype).removeprefix('torch.')}")
    return model.to(torch.float32)


def _ends(folder: Path, tokenizer: Tokenizer) -> frozenset[int]:
    return read_end_tokens(folder) or frozenset(tokenizer.eos_ids)

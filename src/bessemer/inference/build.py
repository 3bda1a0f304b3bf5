"""Opens a model for the engine and builds its engine core.

`open_model` reads a folder, a GGUF file or a model in memory, for one process or for several. `assemble` makes of it and the
settings a KV cache, a runner, a scheduler and a proposer of draft tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch.distributed.device_mesh import DeviceMesh

from bessemer.core.environment import free_memory_bytes, most_memory_bytes
from bessemer.core.errors import ArtefactError, ConfigError
from bessemer.core.hashing import hash_value
from bessemer.core.metrics import size
from bessemer.core.progress import PlainLines
from bessemer.distributed.mesh import ALONE, Mesh
from bessemer.inference.config import EngineConfig
from bessemer.inference.engine_core import EngineCore
from bessemer.inference.execution.build import (
    MOST_LOGITS,
    check_model_length,
    describe_pages,
    describe_states,
    gpu_share,
    memory_budget,
    new_runner,
    page_type,
    paged_memory,
    plan_blocks,
    plan_snapshots,
    resolved_for,
    shared_backend,
    step_bytes,
)
from bessemer.inference.execution.compiled_steps import CompiledSteps
from bessemer.inference.execution.kv_cache import HeadShare, PagedMemory, layer_groups, state_bytes
from bessemer.inference.execution.runner import Runner
from bessemer.inference.execution.steps.asynchronous import AsyncSteps
from bessemer.inference.execution.steps.plain import MultiTokenSteps, PlainSteps
from bessemer.inference.execution.steps.speculative import SpeculativeSteps
from bessemer.inference.execution.tensor_parallel.sharded_model import ShardedModel
from bessemer.inference.prefix_store import PrefixStore, store_identity
from bessemer.inference.scheduling.block_tables import BlockPool
from bessemer.inference.scheduling.scheduler import BlockGroup, Scheduler
from bessemer.inference.speculation.draft_model import (
    DraftModelProposer,
    draft_memory,
    is_draft_shared,
    open_draft_model,
    share_draft,
    shared_draft_runner,
)
from bessemer.inference.speculation.mtp import MtpProposer, mtp_modules, spare_blocks
from bessemer.inference.speculation.ngram import NGramProposer
from bessemer.inference.speculation.proposer import DraftLengthPolicy, Proposer
from bessemer.model.adapters.folder import read_adapter, trains_modules
from bessemer.model.adapters.trained import merged
from bessemer.model.attention.base import is_recurrent
from bessemer.model.config import ModelConfig
from bessemer.model.decoder import Decoder
from bessemer.model.device import choose_device, is_fast, served_dtype, slower_than_processor
from bessemer.model.formats.gguf_import import parts_of
from bessemer.model.formats.gguf_mmproj import Mmproj, find_mmproj, read_mmproj
from bessemer.model.formats.gguf_open import open_gguf
from bessemer.model.quantisation.quantised_layers import is_quantised
from bessemer.model.storage.folder import load_model
from bessemer.model.storage.library import find_kept
from bessemer.model.storage.model_config import read_end_tokens, read_model_config, read_sampling_settings
from bessemer.model.storage.tuned_folder import TunedModel, tuned_model
from bessemer.model.vision.config import VisionLanguageConfig
from bessemer.model.vision.folder import is_vision_folder, load_vision_language, read_vision_language
from bessemer.model.vision.prompts import PictureReader, open_picture_reader
from bessemer.model.vision.trained import VisionDecoder
from bessemer.tokenization.tokenizer import Tokenizer, load_tokenizer

#: Share of the free memory that weights in float32 may take.
_SHARE_FOR_WEIGHTS = 0.5


class OpenedModel(NamedTuple):
    """sharded: the model's shards, where worker processes hold some; None where this one does alone.

    is_served: whether it was opened to be served, and is not one in memory that may be in training. sampling_settings: what
    the model's folder says of how it is sampled. adapter: of a fine-tuning, the folder of what was tuned beside its base; None
    where it was merged, as it is into weights in float32 in one process. identity: of the files that were opened, of which
    another state has another one; None for a model in memory and for shards. pictures: of a model that reads pictures, what
    prepares and encodes them; `model` is its decoder.
    """

    model: Decoder
    tokenizer: Tokenizer
    end_tokens: frozenset[int]
    is_served: bool = True
    sharded: ShardedModel | None = None
    sampling_settings: Mapping[str, Any] = MappingProxyType({})
    adapter: Path | None = None
    identity: str | None = None
    pictures: PictureReader | None = None


def open_model(
    model: Path | str | Decoder | ShardedModel,
    tokenizer: Tokenizer | None,
    device: str,
    config: EngineConfig,
    *,
    adapter: Path | str | None = None,
) -> OpenedModel:
    """Open a folder, a GGUF file, the base of a fine-tuning or a pulled model by its name on a device; a model in memory, or a
    shard, stays where it lies, and needs its tokenizer. adapter: the default one, in place of a fine-tuning's own.

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
        pictures = None
        if isinstance(model, VisionDecoder):
            pictures = open_picture_reader(model.vision, tokenizer.folder, tokenizer)
        return OpenedModel(model, tokenizer, frozenset(tokenizer.eos_ids), is_served=False, pictures=pictures)
    named = Path(model)
    if not named.exists() and (kept := find_kept(str(model))) is not None:
        named = kept
    path, own = tuned_model(named) or TunedModel(named, None)
    eyes = [] if config.mmproj is None else [Path(config.mmproj)]
    if path.suffix == ".gguf" and not eyes and (beside := find_mmproj(path)) is not None:
        eyes = [beside]
    _check_size(path, choose_device(device), config.processes, eyes)
    if config.mmproj is not None and config.processes > 1:
        raise ConfigError("parallel: a model that reads pictures is served by one process; leave --mmproj out")
    if config.mmproj is not None and path.suffix != ".gguf":
        raise ConfigError(f"mmproj: of a GGUF file, and {path} is none")
    if is_vision_folder(path):
        return _open_vision(path, tokenizer, choose_device(device), config, has_adapter=adapter is not None)
    if config.processes > 1:
        sharded = ShardedModel.open(path, device, config)
        try:
            tokenizer = tokenizer or load_tokenizer(path)
            ends, settings = _ends(path, tokenizer), read_sampling_settings(path)
            return OpenedModel(sharded.model, tokenizer, ends, sharded=sharded, sampling_settings=settings, adapter=own)
        except BaseException:
            sharded.close()
            raise
    if choose_device(device).type == "mps" and path.is_dir():
        shape = read_model_config(path)
        if slow := slower_than_processor(choose_device(device), 1, shape.hidden_size, torch.float32):
            PlainLines().say(slow)
    if path.suffix == ".gguf":
        opened = open_gguf(path, choose_device(device), deferred=True)
        if opened.encoded is not None:
            PlainLines().say(opened.encoded)
        tokenizer = tokenizer or opened.tokenizer
        if tokenizer is None:
            raise ArtefactError(f"{path}: the file holds no tokenizer that can be read; give one")
        mmproj = _mmproj_of(path, config, opened.model.config, tokenizer)
        pictures, files = None, [path]
        if mmproj is not None:
            vision = mmproj.vision.requires_grad_(False).to(opened.model.device)
            pictures, files = PictureReader(vision, mmproj.preprocessor, tokenizer), [path, mmproj.path]
            _check_whole_pictures(vision.config, mmproj.path, config)
            opened.model.rope_sections = vision.config.rope_sections
        model, identity = _in_fast_dtype(opened.model, config), _identity(*files)
        ends = frozenset(opened.end_tokens or tokenizer.eos_ids)
        return OpenedModel(model, tokenizer, ends, identity=identity, pictures=pictures)
    whole, identity = load_model(path, choose_device(device)), _identity(path)
    is_plain = whole.dtype == torch.float32 and not is_quantised(whole)
    if own is not None and adapter is None and (is_plain or trains_modules(own)):
        # no request can select the base alone, and the compiled kernels take one set of weights
        identity = _identity(path, own)
        whole, own = merged(whole, read_adapter(own, whole)), None
    whole = _in_fast_dtype(whole, config)
    tokenizer = tokenizer or load_tokenizer(path)
    settings = read_sampling_settings(path)
    ends = _ends(path, tokenizer)
    return OpenedModel(whole, tokenizer, ends, sampling_settings=settings, adapter=own, identity=identity)


def _open_vision(
    path: Path, tokenizer: Tokenizer | None, device: torch.device, config: EngineConfig, *, has_adapter: bool
) -> OpenedModel:
    """A model that reads pictures."""
    if config.processes > 1:
        raise ConfigError(f"parallel: {path} reads pictures, and such a model is served by one process")
    _check_whole_pictures(read_vision_language(path), path, config)
    if has_adapter:
        raise ConfigError(f"{path}: adapters of models that read pictures are not read")
    whole = load_vision_language(path, device)
    tokenizer = tokenizer or load_tokenizer(path)
    decoder = _in_fast_dtype(whole.decoder, config)
    # an encoder runs once a picture: where a dtype is slow, it is slow for all of its patches
    is_slow = device.type == "cpu" and not is_fast(decoder.dtype, device)
    vision = whole.vision.requires_grad_(False).to(torch.float32 if is_slow else decoder.dtype)
    return OpenedModel(
        decoder,
        tokenizer,
        _ends(path, tokenizer),
        sampling_settings=read_sampling_settings(path),
        identity=_identity(path),
        pictures=open_picture_reader(vision, path, tokenizer),
    )


def _mmproj_of(path: Path, config: EngineConfig, text: ModelConfig, tokenizer: Tokenizer) -> Mmproj | None:
    """What a GGUF model sees pictures with: the file that the settings name, or the one beside it, if that can be read."""
    if config.mmproj is not None:
        return read_mmproj(Path(config.mmproj), text, tokenizer)
    beside = find_mmproj(path)
    if beside is None:
        return None
    try:
        return read_mmproj(beside, text, tokenizer)
    except ArtefactError as error:
        # the decoder is whole without it
        PlainLines().say(f"  the model reads no pictures: {error}")
        return None


def _check_whole_pictures(shape: VisionLanguageConfig, path: Path, config: EngineConfig) -> None:
    if config.batch_invariant and shape.is_bidirectional:
        raise ConfigError(f"batch_invariant: {path} reads pictures whole, and batch-invariant steps cut prompts into blocks")


def _check_size(path: Path, device: torch.device, processes: int, beside: Sequence[Path] = ()) -> None:
    """Refuse weights that the device's memory cannot hold, before any are read. processes: that share a model, each on a GPU of
    its own, or all in this machine's memory. beside: other files that are read. Raises ConfigError."""
    files = [*(path.glob("*.safetensors") if path.is_dir() else parts_of(path)), *beside]
    needed = sum(file.stat().st_size for file in files if file.is_file())
    if device.type == "cuda":
        most: int | None = torch.cuda.mem_get_info(device)[1] * processes
        where, larger = "the GPUs have" if processes > 1 else "this GPU has", "more GPUs (parallel), or `device: cpu`"
    else:
        most, where, larger = most_memory_bytes(), "this process can have", "or a larger machine"
    if most is not None and needed > most:
        raise ConfigError(
            f"{path}: the weights take {size(needed)}, and {where} {size(most)} of memory; "
            f"take a smaller or a quantised model (`bessemer quantize`), {larger}"
        )


def _identity(*places: Path) -> str:
    """Hash of what files hold, as far as their names, sizes and times tell; places: files, and folders of files."""
    files = [file for place in places for file in (sorted(place.iterdir()) if place.is_dir() else parts_of(place))]
    stats = [(file.resolve(), file.stat()) for file in files if file.is_file()]
    return hash_value([[str(file), stat.st_size, stat.st_mtime_ns] for file, stat in stats])


def _in_fast_dtype(model: Decoder, config: EngineConfig) -> Decoder:
    """The model in the dtype of the settings (`served_dtype`); or in float32 where this processor is slow in its own dtype and
    the memory suffices. Not where the compiled kernels compute it, which widen weights of 16 bits themselves."""
    wanted = served_dtype(config.dtype, model.dtype, model.device)
    if wanted != model.dtype:
        return model.to(wanted)
    if (
        config.dtype != "auto"
        or model.device.type != "cpu"
        or model.dtype.itemsize > 2
        or is_quantised(model)
        or is_fast(model.dtype, model.device)
    ):
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


def mtp_layers_of(config: EngineConfig, model: ModelConfig) -> tuple[int, int]:
    """MTP modules of a model that propose draft tokens, and the KV blocks that each needs beyond a layer's.

    Raises ConfigError where the settings want them and the model has none.
    """
    speculation = config.speculation
    if speculation is None or speculation.method != "mtp":
        return 0, 0
    return mtp_modules(model), config.max_num_seqs * spare_blocks(speculation.tokens, config.block_size)


def new_proposer(
    config: EngineConfig, tokenizer: Tokenizer, runner: Runner, sharded: ShardedModel | None = None
) -> Proposer | None:
    """The proposer for a runner's model; None without speculative decoding. Raises ConfigError, ArtefactError.

    sharded: the model's shards, where worker processes hold some; they share the draft model too, where it can be.
    """
    speculation = config.speculation
    if speculation is None:
        return None
    policy = DraftLengthPolicy(speculation.tokens, speculation.adapt)
    if speculation.method == "ngram":
        return NGramProposer(policy)
    if speculation.method == "mtp":
        return MtpProposer(runner, policy, config.max_num_seqs)
    assert speculation.model is not None
    if sharded is not None and is_draft_shared(config):
        with sharded.workers.together():
            model = open_draft_model(speculation.model, runner.model, tokenizer, torch.device("cpu"))
            drafting, blocks = share_draft(model, config, runner.model.device, sharded.mesh, sharded.workers)
    else:
        model = open_draft_model(speculation.model, runner.model, tokenizer, runner.model.device)
        memory, blocks = draft_memory(model, config)
        drafting = new_runner(model, memory, config.with_changes(batch_invariant=False), opened=True)
    pool, groups = BlockPool(blocks, config.block_size), len(layer_groups(model.config))
    return DraftModelProposer(model, drafting, pool, groups, policy, config.max_num_batched_tokens)


def new_strategy(runner: Runner, proposer: Proposer | None) -> PlainSteps:
    """The strategy of an engine's steps: speculative, asynchronous, multi-token or plain, the first that is possible."""
    if proposer is not None:
        return SpeculativeSteps(runner, proposer)
    if runner.backend.samples:
        return AsyncSteps(runner)
    return MultiTokenSteps(runner) if runner.generates else PlainSteps(runner)


def new_prefix_store(config: EngineConfig, runner: Runner, scheduler: Scheduler, identity: str | None) -> PrefixStore | None:
    """The store of a runner's blocks; None where the settings name none. identity: as of `OpenedModel`.

    Raises ConfigError for a model in memory, and for one whose prefixes are more than blocks.
    """
    if config.prefix_store is None:
        return None
    if identity is None:
        raise ConfigError("prefix_store: of a model that is opened from its folder or file, not of one in memory")
    if is_recurrent(runner.model.config) or not scheduler.tables.groups:
        raise ConfigError("prefix_store: of models whose layers all have keys and values; this one has linear attention")
    return PrefixStore(
        Path(config.prefix_store),
        store_identity(identity, config.block_size, runner.arithmetic, config.batch_invariant),
        runner.memory,
        scheduler.tables,
        limit=config.prefix_store_size * 2**30,
        say=PlainLines().say,
    )


def assemble(
    model: Decoder,
    tokenizer: Tokenizer,
    config: EngineConfig,
    *,
    opened: bool,
    sharded: ShardedModel | None = None,
    identity: str | None = None,
    pictures: PictureReader | None = None,
) -> tuple[EngineCore, str]:
    """The engine core of a model, and a line about its KV cache: how many blocks, of which type, how much memory; and about
    the memory of an encoder of pictures.

    opened: whether the model was opened to be served, and is not one in training. sharded: the model's shards, where worker
    processes hold some. identity: as of `OpenedModel`, for a prefix store. pictures: as of that; a picture's activations are
    taken off what the cache gets. Raises ConfigError, and ArtefactError for a draft model that cannot be read.
    """
    check_model_length(model.config, config)
    mtp_layers, _ = mtp_layers_of(config, model.config)
    if sharded is None:
        reading = 0 if pictures is None else int(pictures.memory.passing + pictures.memory.kept)
        memory, blocks = new_memory(model, config, opened=opened, reserved=reading)
        runner = new_runner(model, memory, config, opened, modules_only=mtp_layers > 0)
    else:
        with sharded.workers.together():
            memory, blocks = new_memory(model, config, sharded.mesh, opened=opened)
        runner = new_runner(model, memory, config, opened, workers=sharded.workers, axis=sharded.axis)
    groups = [
        BlockGroup(BlockPool(count, config.block_size), group.window)
        for count, group in zip(blocks, layer_groups(model.config), strict=True)
    ]
    align = config.block_size if config.batch_invariant else None
    least_chunk = 1 if pictures is None else pictures.least_chunk
    scheduler = Scheduler(
        groups,
        max_num_seqs=config.max_num_seqs,
        max_num_batched_tokens=config.max_num_batched_tokens,
        max_logits_rows=max(MOST_LOGITS // model.config.vocab_size, align or 1, least_chunk),
        max_waiting=config.max_waiting,
        state_slots=memory.state_slots,
        snapshots=memory.snapshot_count,
        block_size=config.block_size,
        align=align,
        least_chunk=least_chunk,
        share_generated=not config.batch_invariant,
        share_prefixes=config.prefix_cache,
    )
    proposer = new_proposer(config, tokenizer, runner, sharded)
    store = new_prefix_store(config, runner, scheduler, identity)
    core = EngineCore(scheduler, runner, new_strategy(runner, proposer), store)
    ranks = memory.share.ranks
    described = describe_pages(model.config, blocks, config, memory.dtype, mtp_layers, ranks=ranks)
    described += describe_states(model.config, memory.snapshot_count, model.dtype, ranks=ranks)
    if pictures is not None:
        described += f"; {pictures.memory.described(pictures.largest.patches)}"
    return core, described


def worker_runners(
    model: Decoder, config: EngineConfig, mesh: Mesh, axis: DeviceMesh | None = None
) -> tuple[Runner, Runner | None]:
    """A worker's runner of its shard of a model, and that of its shard of the draft model, where the processes share one.

    axis: as in `Runner`. Made by the same collectives as `assemble` on rank 0.
    """
    config = resolved_for(config, model.config, page_type(model, config), model.device)
    memory, _ = new_memory(model, config, mesh, opened=config.processes > 1)
    runner = Runner(model, memory, shared_backend(model, memory, config), batch_invariant=config.batch_invariant, axis=axis)
    return runner, shared_draft_runner(config, model.device, mesh)


def new_memory(
    model: Decoder, config: EngineConfig, mesh: Mesh = ALONE, *, opened: bool = False, reserved: int = 0
) -> tuple[PagedMemory, list[int]]:
    """A model's KV cache, and how many blocks each group of layers has. opened: as of `assemble`. reserved: bytes that
    something else needs beside the cache and a step.

    All processes that share the model call it, and get as many as the one with the least memory. Raises ConfigError.
    """
    dtype, device = page_type(model, config), model.device
    mtp_layers, mtp_spare_blocks = mtp_layers_of(config, model.config)
    share = HeadShare(mesh.place.tensor, mesh.layout.tensor)
    sharing = mesh.processes_here if device.type == "cpu" else 1
    in_all, needed = gpu_share(config, device, opened), step_bytes(model.config, config, model.dtype)
    budget = memory_budget(config, device, sharing, share=in_all, reserved=needed + reserved)
    if in_all is None and config.kv_memory is None:
        budget = max(0, budget - reserved)
    snapshots = plan_snapshots(model.config, config, model.dtype, budget, ranks=share.ranks)
    budget -= snapshots * state_bytes(model.config, model.dtype, share.ranks)
    blocks = plan_blocks(model.config, config, dtype, budget, mtp_layers, ranks=share.ranks)
    *blocks, snapshots = [-int(count) for count in mesh.largest(-torch.tensor([*blocks, snapshots]))]
    memory = paged_memory(
        model,
        config,
        blocks,
        mtp_layers=mtp_layers,
        mtp_spare_blocks=mtp_spare_blocks,
        state_slots=config.max_num_seqs if is_recurrent(model.config) else 0,
        kept_steps=config.speculation.tokens if config.speculation else 0,
        snapshots=snapshots,
        share=share,
    )
    return memory, blocks

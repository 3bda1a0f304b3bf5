"""The models of a run, opened from their folders and prepared for training.

Opening gives a model its weights, its adapter and a scalar head where the settings ask for them; of several processes each
reads its shards. Preparing applies float8, parallelism, activation checkpointing (Chen et al. 2016), compilation and FSDP, in
the order that works. Weights that are trained stay float32; float16 has a loss scale (Micikevicius et al. 2018, section 3.2).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from bessemer.core.errors import ConfigError
from bessemer.core.hashing import derive_seed
from bessemer.distributed.mesh import Mesh
from bessemer.distributed.parallelize import load_shards, parallelize
from bessemer.distributed.pipeline import Pipeline
from bessemer.distributed.sharding import product_matrices
from bessemer.distributed.stages import Stage
from bessemer.model.adapters.trained import add_adapters, initial_tensors
from bessemer.model.decoder import Decoder
from bessemer.model.initialisation import empty_decoder
from bessemer.model.layers.feed_forward import Router
from bessemer.model.quantisation.config import QuantizeConfig
from bessemer.model.quantisation.quantise import quantise
from bessemer.model.quantisation.quantised_layers import quantised_parts
from bessemer.model.storage.folder import (
    SCORE,
    holds_codes,
    load_model,
    load_scorer,
    new_head,
    read_model_config,
    refuse_quantised,
    refuse_scorer,
    scorer_config,
)
from bessemer.model.storage.weights import StoredTensors, find_tensors
from bessemer.training.config import LoopConfig
from bessemer.training.data.batches import Batch
from bessemer.training.objectives import has_router_losses, router_losses
from bessemer.training.runtime import Runtime

#: Initial loss scale, factor of its changes, and finite steps in a row after which it grows.
_FIRST, _FACTOR, _PATIENCE = 2.0**16, 2.0, 1000


class LossScale:
    """Dynamic loss scaling, which keeps small gradients inside float16's range (Micikevicius et al. 2018, section 3.2).

    The loss is multiplied before the backward pass and the gradients divided after it. A step that overflows is skipped and
    halves the scale; many finite steps in a row double it.
    """

    def __init__(self) -> None:
        self._scale = _FIRST
        self._good = 0

    @property
    def value(self) -> float:
        """The present factor."""
        return self._scale

    def update(self, finite: bool) -> None:
        """Adapt the scale to whether a step's gradients were finite."""
        if not finite:
            self._scale = self._scale / _FACTOR
            self._good = 0
            return
        self._good += 1
        if self._good == _PATIENCE:
            self._scale = self._scale * _FACTOR
            self._good = 0

    @property
    def exhausted(self) -> bool:
        """Whether gradients are not finite at any scale, so that float16's range is not the cause."""
        return self._scale < 1.0

    def state_dict(self) -> dict[str, Any]:
        """For the checkpoint."""
        return {"scale": self._scale, "good": self._good}

    def load_state_dict(self, values: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        self._scale = values["scale"]
        self._good = values["good"]


class Unscaled:
    """The scale of every other dtype: always 1."""

    value = 1.0
    exhausted = True

    def update(self, finite: bool) -> None: ...

    def state_dict(self) -> dict[str, Any]:
        """Nothing."""
        return {}

    def load_state_dict(self, values: dict[str, Any]) -> None: ...


def use_float8(model: Decoder) -> None:
    """Compute the matmuls of the blocks in float8 with a scale per tensor, through torchao (Micikevicius et al. 2022).

    Raises ConfigError where torchao is not installed. Needs a GPU with float8 (compute capability 8.9 or more).
    """
    try:
        from torchao.float8 import convert_to_float8_training
    except ImportError:
        raise ConfigError("float8: true needs the package torchao: pip install torchao") from None

    def inside_blocks(module: nn.Module, name: str) -> bool:
        # float8 matmuls need widths that are multiples of 16
        weight: Tensor | None = getattr(module, "weight", None)
        return name.startswith("layers.") and weight is not None and all(size % 16 == 0 for size in weight.shape)

    convert_to_float8_training(model, module_filter_fn=inside_blocks)


Recompute = Literal["none", "selective", "full"]

_ops = torch.ops.aten
#: Operations whose outputs selective checkpointing stores: matmuls and attention. The rest is cheap and large.
_STORED = {
    _ops.mm.default,
    _ops.bmm.default,
    _ops.addmm.default,
    _ops._grouped_mm.default,
    _ops._scaled_dot_product_flash_attention_for_cpu.default,
    _ops._scaled_dot_product_flash_attention.default,
    _ops._scaled_dot_product_efficient_attention.default,
    _ops._scaled_dot_product_cudnn_attention.default,
}


def recompute_activations(model: Decoder, kind: Recompute) -> None:
    """Make the blocks of a model store only their input (full), or the outputs of matmuls and attention besides (selective;
    Korthikanti et al. 2022, section 5). Gradients and parameter names do not change.

    A block with dropout draws the same random numbers again when it is recomputed; the others are spared the copy of the
    generator's state, which makes a GPU wait.
    """
    if kind == "none":
        return
    for block in model.blocks:
        # an attribute of the instance, inside what compiles or shards the block
        options: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": _has_dropout(block)}
        routers = [module for module in block.modules() if isinstance(module, Router)]
        if routers:
            options["context_fn"] = functools.partial(_contexts_keeping_routings, routers, kind)
        elif kind == "selective":
            options["context_fn"] = functools.partial(create_selective_checkpoint_contexts, _policy)
        block.forward = functools.partial(checkpoint, block.forward, **options)  # type: ignore[method-assign]


def _has_dropout(block: nn.Module) -> bool:
    """Whether a block draws random numbers in training: it holds a dropout module, or one that drops out by itself and says so
    by an attribute `dropout`, as `nn.MultiheadAttention` does."""
    for module in block.modules():
        probability = module.p if isinstance(module, _DropoutNd) else getattr(module, "dropout", 0.0)
        if isinstance(probability, (int, float)) and probability > 0:
            return True
    return False


def _contexts_keeping_routings(
    routers: Sequence[Router], kind: Recompute
) -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
    """The contexts of the forward pass and of its recomputation, in a block with experts."""
    if kind == "full":
        return nullcontext(), _restored(routers, nullcontext())
    forward, recomputation = create_selective_checkpoint_contexts(_policy)
    return forward, _restored(routers, recomputation)


@contextmanager
def _restored(routers: Sequence[Router], inside: AbstractContextManager[Any]) -> Iterator[None]:
    """Restore the routings of the forward pass after the recomputation.

    A router keeps its last logits, and with them their autograd graph; that of the recomputation would stay until the next
    step.
    """
    first = [router.last for router in routers]
    try:
        with inside:
            yield
    finally:
        for router, last in zip(routers, first, strict=True):
            router.last = last


def _policy(context: Any, operation: Any, *arguments: Any, **options: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if operation in _STORED else CheckpointPolicy.PREFER_RECOMPUTE


class PreparedModel(NamedTuple):
    """The model that this process trains; under pipeline parallelism the layers of its stages, and the pipeline."""

    model: Decoder
    pipeline: Pipeline | None

    @property
    def parts(self) -> Sequence[Decoder]:
        """What of the model is computed here: its stages of a pipeline, else the model itself."""
        return [self.model] if self.pipeline is None else self.pipeline.stages


def prepare_model(model: Decoder, config: LoopConfig, runtime: Runtime, mesh: Mesh) -> PreparedModel:
    """Prepare a model, in place, to be trained on this process of a mesh.

    Raises ConfigError when the layout does not divide the model.
    """
    model.train()
    parallel = config.parallel
    mesh.layout.check(model.config, config.context_length)

    if config.float8:
        use_float8(model)
    # what recomputes selectively does not know its kernel; a pipeline's stages and rows in parts have masks of their own
    if config.packed and mesh.layout.context == mesh.layout.pipeline == 1 and config.activation_checkpointing != "selective":
        runtime.skip_masked_blocks(model)

    def blocks(part: Decoder) -> None:
        recompute_activations(part, config.activation_checkpointing)
        runtime.compile_blocks(part, alone=mesh.alone)

    count = 1
    if mesh.layout.pipeline > 1:
        rows = mesh.layout.rows(mesh.rank, config.batch_size)
        count = mesh.layout.micro_batches(rows.stop - rows.start, config.micro_batch_size, parallel.pipeline_schedule)
    # float8 takes its scales from the weights as they are stored
    dtype = None if config.float8 else runtime.gathered_dtype
    trained, stages = parallelize(model, mesh, parallel, blocks=blocks, dtype=dtype, offload=config.offload)
    if not stages:
        return PreparedModel(trained, None)
    pipeline = Pipeline(
        stages,
        mesh,
        parallel.pipeline_schedule,
        count,
        device=torch.device(runtime.device),
        autocast=runtime.autocast,
        auxiliary=_router_losses if has_router_losses(model.config) else None,
    )
    return PreparedModel(trained, pipeline)


def _router_losses(stage: Stage, batch: Batch) -> Tensor | float:
    return router_losses(stage, batch.targets_BT)


#: Gives a prepared model its weights.
Load = Callable[[PreparedModel], None]


class OpenedModel(NamedTuple):
    """A model that is to be prepared for training. load: of several processes, gives each its shards of the prepared model,
    which has no weights before; None: the model has them."""

    decoder: Decoder
    load: Load | None = None


class _Empty(NamedTuple):
    """A model without memory, where its tensors lie, and those that its folder does not hold."""

    decoder: Decoder
    stored: StoredTensors
    added: dict[str, Tensor]

    def opened(self, device: torch.device | str) -> OpenedModel:
        return OpenedModel(self.decoder, lambda prepared: load_shards(prepared.parts, self.stored, device, self.added))


#: How the weights of the blocks are held while an adapter is trained beside them.
_FROZEN = {
    "int8": QuantizeConfig(scheme="int8", head="none"),
    "int4": QuantizeConfig(scheme="int4", group_size=32, head="none"),
}


def check_start(config: LoopConfig, folder: Path, mesh: Mesh) -> None:
    """Raise ArtefactError or ConfigError for a model of codes where weights are trained, or where processes share them."""
    if config.low_rank is None or config.scores:
        refuse_quantised(folder)
    if config.low_rank is not None and not mesh.alone:
        if config.low_rank.quantize is not None or holds_codes(folder):
            raise ConfigError(
                f"adapter: a quantised model is trained beside in one process, and this job has {mesh.layout.world_size}; "
                "leave adapter.quantize out and take a model that is not quantised"
            )
        if config.low_rank.dropout:
            raise ConfigError("adapter.dropout: in one process; leave it out under a mesh")
        if config.low_rank.dora:
            raise ConfigError("adapter.dora: in one process; leave it out under a mesh")


def open_start(folder: Path, config: LoopConfig, device: torch.device | str, mesh: Mesh, seed: int) -> OpenedModel:
    """`starting_model` on each process of a mesh. Raises as that, and ArtefactError as `find_tensors`."""
    if mesh.alone:
        return OpenedModel(starting_model(folder, config, device, seed))
    empty = _empty(folder, head_seed(seed) if config.scores else None)
    empty.added.update(new_adapter(empty.decoder, config, seed))
    hold_frozen_matrices(empty.decoder, frozen_dtype(config, folder))
    return empty.opened(device)


def open_beside(folder: Path, device: torch.device | str, mesh: Mesh, *, seed_of_head: int | None = None) -> OpenedModel:
    """The model of a folder in float32, on each process of a mesh: a reference, a teacher, or with a scalar head a critic.

    seed_of_head: of a critic's new head, for a language model; None: the model predicts tokens. A quantised model is whole on
    every process. Raises ArtefactError as `load_model`.
    """
    if not mesh.alone and not holds_codes(folder):
        return _empty(folder, seed_of_head).opened(device)
    if seed_of_head is None:
        return OpenedModel(load_model(folder, device=device, dtype=torch.float32))
    return OpenedModel(load_scorer(folder, device, torch.float32, seed=seed_of_head))


def _empty(folder: Path, seed_of_head: int | None) -> _Empty:
    stored = find_tensors(folder, read_model_config(folder))
    shape, added = stored.config, {}
    if seed_of_head is None:
        refuse_scorer(shape, folder)
    elif not shape.num_scores:
        shape = scorer_config(shape)
        added[SCORE] = new_head(shape, seed_of_head)
    return _Empty(empty_decoder(shape), stored, added)


def frozen_dtype(config: LoopConfig, folder: Path) -> torch.dtype:
    """In which dtype the frozen matrices of a model's blocks lie beside an adapter: the one in which products read them.

    Autocast would make a copy of a matrix in every product and the backward pass keep it: a second model, in half precision.
    float32 where norms of the weights are trained (DoRA), and beside codes.
    """
    settings = config.low_rank
    is_half = config.dtype in ("bfloat16", "float16")
    if settings is None or not is_half or settings.dora or settings.quantize is not None or holds_codes(folder):
        return torch.float32
    found = getattr(torch, config.dtype)
    assert isinstance(found, torch.dtype)
    return found


def hold_frozen_matrices(model: Decoder, dtype: torch.dtype) -> None:
    """Hold those parameters of the blocks that only products read, and that are not trained, in a dtype; in place."""
    for parameter in product_matrices(model):
        if not parameter.requires_grad:
            parameter.data = parameter.data.to(dtype)


def starting_model(folder: Path, config: LoopConfig, device: torch.device | str, seed: int) -> Decoder:
    """The model of a folder with a new adapter where the settings ask for one; whole on this process. With a scalar head where
    the settings train scores. In float32; beside an adapter what is frozen as `frozen_dtype` says, so that such a model is
    computed under autocast.

    Raises ConfigError for a base whose activations are quantised, and a pattern of layers that there are not.
    """
    settings = config.low_rank
    if (held := frozen_dtype(config, folder)) != torch.float32:
        # read into its memory, so that there is never a copy in float32
        empty = _empty(folder, head_seed(seed) if config.scores else None)
        empty.added.update(new_adapter(empty.decoder, config, seed))
        hold_frozen_matrices(empty.decoder, held)
        load_shards([empty.decoder], empty.stored, device, empty.added)
        return empty.decoder.eval()
    # to be quantised it is read as it is stored: in float32 the whole might not fit in memory
    dtype = None if settings is not None and settings.quantize is not None else torch.float32
    if config.scores:
        model = load_scorer(folder, device, dtype, seed=head_seed(seed))
    else:
        model = load_model(folder, device=device, dtype=dtype)
    if settings is not None and settings.quantize is not None:
        if not quantised_parts(model):
            quantise(model, _FROZEN[settings.quantize])
        # copied even where they are in float32: one tensor of a mapped file keeps the pages of all that were read
        model._apply(lambda tensor: tensor.to(torch.float32, copy=True) if tensor.is_floating_point() else tensor)
    if settings is None:
        return model
    coarse = next((part for part in quantised_parts(model).values() if not part.scheme.is_weight_only), None)
    if coarse is not None:
        raise ConfigError(
            f"{folder}: its activations are quantised too ({coarse.scheme.name}), through which no gradient flows; take int8 "
            "or int4"
        )
    model.load_state_dict(new_adapter(model, config, seed), strict=False)
    return model


def head_seed(seed: int) -> int:
    """Of the new scalar head of a run with this seed."""
    return derive_seed(seed, "score head")


def new_adapter(model: Decoder, config: LoopConfig, seed: int) -> dict[str, Tensor]:
    """Freeze a model, in place, but for its scalar head, and put the adapter that the settings ask for beside it; returns its
    first numbers by their names. Nothing is done, and nothing returned, where they ask for none."""
    settings = config.low_rank
    if settings is None:
        return {}
    add_adapters(
        model,
        rank=settings.rank,
        scale=settings.scale,
        dropout=settings.dropout,
        patterns=tuple(settings.modules),
        magnitude=settings.dora,
    )
    if config.scores:
        model.get_parameter(SCORE).requires_grad_(True)
    return initial_tensors(model, seed)

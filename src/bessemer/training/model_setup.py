"""A model prepared for training: float8, parallelism, activation checkpointing (Chen et al. 2016), compilation and FSDP, in the
order that works.

Weights that are trained stay float32; float16 has a loss scale (Micikevicius et al. 2018, section 3.2).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from bessemer.core.errors import ConfigError
from bessemer.distributed.mesh import Mesh
from bessemer.distributed.parallelize import parallelize
from bessemer.distributed.pipeline import Pipeline
from bessemer.distributed.stages import DecoderStage
from bessemer.model.decoder import Decoder
from bessemer.model.layers.feed_forward import Router
from bessemer.training.config import LoopConfig
from bessemer.training.data.batch import Batch
from bessemer.training.routing import has_router_losses, router_losses
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
        return {"scale": self._scale, "good": self._good}

    def load_state_dict(self, values: dict[str, Any]) -> None:
        self._scale = values["scale"]
        self._good = values["good"]


class Unscaled:
    """The scale of every other dtype: always 1."""

    value = 1.0
    exhausted = True

    def update(self, finite: bool) -> None: ...

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, values: dict[str, Any]) -> None: ...


def use_float8(model: Decoder, *, gathers: bool = False) -> None:
    """Compute the matmuls of the blocks in float8 with a scale per tensor, through torchao (Micikevicius et al. 2022).

    gathers: whether FSDP gathers their weights, in float8 then, a quarter of the bytes. Raises ConfigError where torchao is not
    installed. Needs a GPU with float8 (compute capability 8.9 or more).
    """
    try:
        from torchao.float8 import Float8LinearConfig, convert_to_float8_training
    except ImportError:
        raise ConfigError("float8: true needs the package torchao: pip install torchao") from None

    def inside_blocks(module: nn.Module, name: str) -> bool:
        # float8 matmuls need widths that are multiples of 16
        weight: Tensor | None = getattr(module, "weight", None)
        return name.startswith("layers.") and weight is not None and all(size % 16 == 0 for size in weight.shape)

    settings = Float8LinearConfig(enable_fsdp_float8_all_gather=gathers)
    convert_to_float8_training(model, module_filter_fn=inside_blocks, config=settings)


def narrow_residuals(model: Decoder) -> None:
    """Keep the residual stream in bfloat16, half of what it takes in float32: it begins so behind the embedding, and what
    products in bfloat16 add to it leaves it so. Norms read it in float32."""
    model.embed_tokens.register_forward_hook(lambda module, inputs, out: out.to(torch.bfloat16))


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
        # set on the instance, so that compilation and sharding wrap it
        options: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": _has_dropout(block)}
        routers = [module for module in block.modules() if isinstance(module, Router)]
        if routers:
            options["context_fn"] = functools.partial(_contexts_keeping_routings, routers, kind)
        elif kind == "selective":
            options["context_fn"] = functools.partial(create_selective_checkpoint_contexts, _policy)
        block.forward = functools.partial(checkpoint, block.forward, **options)  # type: ignore[method-assign]


def _has_dropout(block: nn.Module) -> bool:
    """Whether a block draws random numbers in training: it holds a dropout module, or one with a dropout of its own, given
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

    A router keeps its last logits, and with them their autograd graph. The trainer has forgotten those of the forward pass by
    then; those of the recomputation would stay until the next step.
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
        """The modules that this process computes: its pipeline stages, or the whole model."""
        return [self.model] if self.pipeline is None else self.pipeline.stages


def prepare_model(model: Decoder, config: LoopConfig, runtime: Runtime, mesh: Mesh) -> PreparedModel:
    """Prepare a model, in place, to be trained on this process of a mesh.

    Raises ConfigError when the layout does not divide the model.
    """
    model.train()
    parallel = config.parallel
    mesh.layout.check(model.config, config.context_length)

    if config.float8:
        # tensor parallelism cuts the matrices first, and torchao's gathered weights know no second axis
        use_float8(model, gathers=mesh.layout.stage_ranks > 1 and mesh.layout.tensor == 1)
    if config.residual_dtype == "bfloat16":
        narrow_residuals(model)
    # FlexAttention skips masked blocks. Selective recomputation does not support it, and pipeline stages and split rows have
    # other masks
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


def _router_losses(stage: DecoderStage, batch: Batch) -> Tensor | float:
    return router_losses(stage, batch.targets_BT)


#: Gives a prepared model its weights.
Load = Callable[[PreparedModel], None]

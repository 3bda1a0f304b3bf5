"""Activation checkpointing: store fewer activations and recompute them in the backward pass (Chen et al. 2016)."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Literal

import torch
from torch import nn
from torch.nn.modules.dropout import _DropoutNd
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from bessemer.model.decoder import Decoder
from bessemer.model.router import Router

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

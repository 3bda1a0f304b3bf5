"""Activation checkpointing: keep less of the forward pass and compute it again in the backward (Chen et al. 2016)."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Literal

import torch
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from bessemer.model.decoder import Decoder
from bessemer.model.router import Router

Recompute = Literal["none", "selective", "full"]

_ops = torch.ops.aten
#: What is dear to compute: products and attention. The rest is cheap and large.
_DEAR = {
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
    """Make the blocks of a model keep only their input (full), or besides it what was dear to compute (selective: products
    and attention; Korthikanti et al. 2022, section 5). Gradients are the same; names of parameters too.
    """
    if kind == "none":
        return
    for block in model.blocks:
        # over the instance, and inside what compiles or shards the block
        options: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": False}
        routers = [module for module in block.modules() if isinstance(module, Router)]
        if routers:
            options["context_fn"] = functools.partial(_keeping_routings, routers, kind)
        elif kind == "selective":
            options["context_fn"] = functools.partial(create_selective_checkpoint_contexts, _policy)
        block.forward = functools.partial(checkpoint, block.forward, **options)  # type: ignore[method-assign]


def _keeping_routings(
    routers: Sequence[Router], kind: Recompute
) -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
    """What the forward pass and what computing it again run in, where there are experts."""
    if kind == "full":
        return nullcontext(), _restored(routers, nullcontext())
    forward, again = create_selective_checkpoint_contexts(_policy)
    return forward, _restored(routers, again)


@contextmanager
def _restored(routers: Sequence[Router], inside: AbstractContextManager[Any]) -> Iterator[None]:
    """A router remembers its last logits, and with them all that they were computed from. What is computed again must not take
    the first time's place: nobody would free it before the next step."""
    first = [router.last for router in routers]
    try:
        with inside:
            yield
    finally:
        for router, last in zip(routers, first, strict=True):
            router.last = last


def _policy(context: Any, operation: Any, *arguments: Any, **options: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if operation in _DEAR else CheckpointPolicy.PREFER_RECOMPUTE

"""An engine whose model is shared by the ranks of a pool, started without processes of its own."""

from __future__ import annotations

from contextlib import ExitStack, nullcontext
from pathlib import Path
from tempfile import TemporaryDirectory
from unittest.mock import patch

import torch
import torch.distributed as dist

from bessemer.inference.build import worker_runners
from bessemer.inference.engine import Engine, EngineConfig
from bessemer.inference.execution import build as kv_memory
from bessemer.inference.execution.runner import run_worker
from bessemer.inference.execution.tensor_parallel.sharded_model import ShardedModel, encode, mesh_of, shard_model
from bessemer.inference.execution.weights import AdapterNumbers
from tests.inference.listed_attention import listed_attention
from tests.inference.models import ARCHITECTURES, BASE
from tests.model.randomised import random_decoder
from tests.model.tokenizers import write_small_tokenizer


class Broadcast:
    """Commands by a collective, which a pool has at hand."""

    failure = None

    def __init__(self):
        self.numbers = AdapterNumbers()

    def tell(self, command):
        dist.broadcast_object_list([command and encode(command, self.numbers)], src=0)

    def together(self):
        return nullcontext()


def _commands():
    while True:
        command = [None]
        dist.broadcast_object_list(command, src=0)
        if command[0] is None:
            return
        yield command[0]


def decoder(name, changes=None):
    """One of `ARCHITECTURES`, with changes of its settings."""
    return random_decoder(BASE.with_changes(**ARCHITECTURES[name] | (changes or {})))


def shared(use, name, parallel, *, changes=None, settings=None, free=None, in_place=False, **arguments):
    """On every rank: what `use(engine, **arguments)` gives, on rank 0, of an engine of a small decoder that all share; on the
    others the shapes of their pages. free: by rank the memory that the machine says is free. in_place: pages are read where
    they lie, as FlexAttention lists them."""
    config = EngineConfig(parallel=parallel, **{"block_size": 8, **(settings or {})})
    model = decoder(name, changes)
    mesh = mesh_of(config.parallel, torch.device("cpu"))
    with ExitStack() as stack:
        folder = Path(stack.enter_context(TemporaryDirectory()))
        if free is not None:
            stack.enter_context(patch.object(kv_memory, "free_bytes", lambda device: free[mesh.rank]))
        if in_place:
            stack.enter_context(patch.object(kv_memory, "compiled_page_attention", lambda: listed_attention))
            config = config.with_changes(paged_attention="flex")
        shard_model(model, mesh, torch.device("cpu"))
        if mesh.rank:
            runner, draft = worker_runners(model, config, mesh)
            run_worker(runner, _commands(), draft)
            return [tuple(pages.keys.shape) for pages in runner.memory.layers.values()]
        write_small_tokenizer(folder)
        workers = Broadcast()
        stack.enter_context(patch.object(ShardedModel, "open", lambda *_: ShardedModel(model, mesh, workers, ExitStack())))
        engine = Engine(folder, config=config)
        found = use(engine, **arguments)
        workers.tell(None)
        return found

"""A few processes that stay, joined by gloo, and run a function of a test on every one of them."""

import copy
import gc
import os
import tempfile
import traceback
from datetime import timedelta
from itertools import count
from multiprocessing.connection import wait

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
from torch.distributed.tensor import DTensor, _redistribute
from torch.distributed.tensor._dtensor_spec import DTensorSpec
from torch.distributed.tensor._sharding_prop import _are_we_tracing
from torch.distributed.tensor.debug import _clear_sharding_prop_cache
from torch.utils._pytree import tree_leaves

_TIMEOUT = 240
#: Seconds for the others, once one has failed: they may wait for it.
_PATIENCE = 5


def quick_processes():
    """A server imports what costs seconds once, and every process starts as a copy of it."""
    context = multiprocessing.get_context("forkserver")
    trained = ["bessemer.training.trainer", "bessemer.training.checkpoint.export", "pyarrow.parquet", "pandas"]
    called = [f"tests.distributed.{name}" for name in ("methods", "test_adapters", "test_picture_stages", "test_rl")]
    context.set_forkserver_preload([*trained, *called, "bessemer.inference.collective", "torch.testing", "pytest"])
    return context


class Pool:
    """`run(function, **arguments)` calls it in every process, as ranks of one job, and gives what each returned."""

    def __init__(self, size):
        self.size = size
        self._begin()

    def _begin(self):
        self._folder = tempfile.TemporaryDirectory()
        context = quick_processes()
        self._pipes, self._processes = [], []
        for rank in range(self.size):
            here, there = context.Pipe()
            process = context.Process(target=_work, args=(rank, self.size, self._folder.name, there), daemon=True)
            process.start()
            there.close()
            self._pipes.append(here)
            self._processes.append(process)

    def start(self, function, **arguments):
        """Call the function everywhere, without waiting."""
        for pipe in self._pipes:
            pipe.send((function, arguments))

    def run(self, function, **arguments):
        try:
            self.start(function, **arguments)
            answers, failures = self._answers()
        except BaseException:
            # of a test that is ended in the middle: later ones would take its answers for theirs
            self._renew()
            raise
        if len(answers) < self.size:
            self._renew()
        if failures:
            raise AssertionError("\n".join(failures))
        return [answers[rank] for rank in range(self.size)]

    def _answers(self):
        """What each rank answered, but for those that do not, and what went wrong."""
        answers, failures = {}, []
        waiting = {pipe: rank for rank, pipe in enumerate(self._pipes)}
        while waiting and (ready := wait(waiting, _PATIENCE if failures else _TIMEOUT)):
            for pipe in ready:
                rank = waiting.pop(pipe)
                try:
                    good, answer = pipe.recv()
                except (EOFError, ConnectionError):
                    failures.append(f"rank {rank}: its process has ended")
                    continue
                answers[rank] = answer
                failures += [] if good else [answer]
        if waiting:
            failures.append(f"no answer of the ranks {sorted(waiting.values())}")
        return answers, failures

    def _renew(self):
        self.close()
        self._begin()

    def close(self):
        """End the processes with SIGKILL, whatever they are doing."""
        for process in self._processes:
            process.kill()
            process.join()
        self._folder.cleanup()


def pool_of(size, scope):
    """A fixture of a pool that tests share."""

    @pytest.fixture(scope=scope)
    def pool():
        made = Pool(size)
        yield made
        made.close()

    return pool


def _work(rank, size, folder, pipe):
    # what has been imported stays, so the collections below pass it over: ten times as fast
    gc.freeze()
    torch.set_num_threads(1)
    known = _remember_propagation()
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(size)}
    for number in count():
        function, arguments = pipe.recv()
        # a job of its own for every call: each group of a mesh has a thread that looks for news a hundred times a second
        store = dist.FileStore(f"{folder}/store-{number}", size)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=timedelta(seconds=_TIMEOUT))
        # one that has nothing to do would be gone before the others have found it
        dist.barrier()
        try:
            answer = (True, function(**arguments))
        except Exception:
            answer = (False, f"rank {rank}: {traceback.format_exc()}")
        dist.destroy_process_group()
        _forget_meshes(known)
        # of sharded modules, which hold each other, and with them their groups
        gc.collect()
        pipe.send(answer)


def _remember_propagation():
    """Remember what DTensor concludes of placements, which is most of the time of a small model's step, from job to job: it
    depends on the layout of a mesh alone. The conclusion then gets the mesh of this job in place of the equal one before.
    Gives what is remembered."""
    propagator = DTensor._op_dispatcher.sharding_propagator
    conclude = propagator.propagate_op_sharding_non_cached
    known = {}

    def propagate(schema):
        if _are_we_tracing():
            return conclude(schema)
        if schema not in known:
            known[schema] = schema, conclude(schema)
            return known[schema][1]
        before, conclusion = known[schema]
        meshes = zip(_meshes(before), _meshes(schema), strict=True)
        return copy.deepcopy(conclusion, {id(old): new for old, new in meshes})

    propagator.propagate_op_sharding_non_cached = propagate
    return known


def _meshes(schema):
    """The mesh of each sharded argument."""
    leaves = tree_leaves((schema.args_schema, schema.kwargs_schema), is_leaf=lambda leaf: isinstance(leaf, DTensorSpec))
    return [leaf.mesh for leaf in leaves if isinstance(leaf, DTensorSpec)]


def _forget_meshes(known):
    """What DTensor keeps by mesh, and would find again under the equal mesh of the next job: its groups are gone.

    A mesh that is remembered keeps no group either: each has three threads until nothing holds it any more.
    """
    for mesh in {id(mesh): mesh for schema in known for mesh in _meshes(schema)}.values():
        for held in (mesh, mesh._get_root_mesh()):
            getattr(held, "_pg_registry", {}).clear()
    _clear_sharding_prop_cache()
    _redistribute.clear_redistribute_planner_cache()
    _redistribute._gen_transform_infos.cache_clear()

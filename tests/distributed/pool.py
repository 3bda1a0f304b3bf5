"""A few processes that stay, joined by gloo, and run a function of a test on every one of them."""

import os
import tempfile
import traceback
from datetime import timedelta
from itertools import count

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing

_TIMEOUT = 240


def quick_processes():
    """A server imports what costs seconds once, and every process starts as a copy of it."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["bessemer.training.loop", "bessemer.training.result", "torch.testing"])
    return context


class Pool:
    """`run(function, **arguments)` calls it in every process, as ranks of one job, and gives what each returned."""

    def __init__(self, size):
        self.size = size
        self._folder = tempfile.TemporaryDirectory()
        context = quick_processes()
        self._pipes, self._processes = [], []
        for rank in range(size):
            here, there = context.Pipe()
            process = context.Process(target=_work, args=(rank, size, self._folder.name, there), daemon=True)
            process.start()
            self._pipes.append(here)
            self._processes.append(process)

    def start(self, function, **arguments):
        """Call the function everywhere, without waiting."""
        for pipe in self._pipes:
            pipe.send((function, arguments))

    def run(self, function, **arguments):
        self.start(function, **arguments)
        answers = []
        for rank, pipe in enumerate(self._pipes):
            if not pipe.poll(_TIMEOUT):
                self.close()
                raise TimeoutError(f"rank {rank} gave no answer")
            answers.append(pipe.recv())
        failures = [answer for good, answer in answers if not good]
        if failures:
            raise AssertionError("\n".join(failures))
        return [answer for _, answer in answers]

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
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(size)}
    for number in count():
        function, arguments = pipe.recv()
        # a job of its own for every call: each group of a mesh has a thread that looks for news a hundred times a second
        store = dist.FileStore(f"{folder}/store-{number}", size)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=timedelta(seconds=_TIMEOUT))
        try:
            answer = (True, function(**arguments))
        except Exception:
            answer = (False, f"rank {rank}: {traceback.format_exc()}")
        dist.destroy_process_group()
        pipe.send(answer)

"""The groups of a mesh."""

from datetime import timedelta

import torch
import torch.distributed as dist

from bessemer.distributed.layout import Layout
from bessemer.distributed.mesh import Mesh, job_timeout

from .pool import _TIMEOUT


def timeouts():
    mesh = Mesh.of(Layout(data_replicate=2, data_shard=2), "cpu")
    groups = [group for view in (mesh.dense, mesh.data) for group in view.get_all_groups()]
    return [group._get_backend(torch.device("cpu")).options._timeout for group in (dist.group.WORLD, *groups)], job_timeout()


def test_every_group_waits_as_long_as_the_job(four):
    for of_groups, of_job in four.run(timeouts):
        assert set(of_groups) == {of_job} == {timedelta(seconds=_TIMEOUT)}

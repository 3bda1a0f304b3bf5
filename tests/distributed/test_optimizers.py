"""Every optimizer moves weights that lie in pieces on many ranks as it moves whole ones."""

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from bessemer.training.optim.optimizers import build_optimizers, scale_learning_rates, step_optimizers
from bessemer.training.optim.registry import OPTIMIZERS
from bessemer.training.pretrain_config import PretrainConfig
from tests.cases import slow_but

#: Names as in a decoder, and shapes that do not all divide by the ranks.
SHAPES = {
    "layers.0.self_attn.q_proj.weight": (12, 10),
    "layers.0.mlp.down_proj.weight": (7, 18),
    "layers.0.mlp.experts.gate_up_proj": (4, 16, 6),
    "layers.0.mlp.experts.down_proj": (4, 6, 8),
    "layers.0.linear_attn.conv1d.weight": (6, 1, 4),
    "embed_tokens.weight": (11, 6),
    "norm.weight": (7,),
}
PLACEMENTS = {
    "rows of two": ((2,), [Shard(0)]),
    "columns of two": ((2,), [Shard(1)]),
    "sharded": ((4,), [Shard(0)]),
    "hybrid": ((2, 2), [Replicate(), Shard(0)]),
    "sharded and tensor by columns": ((2, 2), [Shard(0), Shard(1)]),
    "sharded and tensor by rows": ((2, 2), [Shard(0), Shard(0)]),
}


class Weights(nn.Module):
    """Parameters with the names of a decoder's and nothing to compute."""

    def __init__(self, place):
        super().__init__()
        self._names = {}
        for number, (name, shape) in enumerate(SHAPES.items()):
            self.register_parameter(f"p{number}", nn.Parameter(place(random(shape, number))))
            self._names[f"p{number}"] = name

    def named_parameters(self, *args, **kwargs):
        return [(self._names[name], parameter) for name, parameter in super().named_parameters(*args, **kwargs)]


def random(shape, seed):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def moved(layout=None):
    """The weights after two steps by name, of each optimizer: on this process alone, or spread as a layout says."""

    sizes, placements = PLACEMENTS.get(layout, ((), []))
    mesh = init_device_mesh("cpu", sizes) if layout else None

    def place(tensor):
        if mesh is None:
            return tensor
        wanted = [p if p.is_replicate() or p.dim < tensor.ndim else Replicate() for p in placements]
        return distribute_tensor(tensor, mesh, wanted)

    found = {}
    for kind in OPTIMIZERS:
        model = Weights(place)
        optimizers = build_optimizers(model, PretrainConfig(steps=2, optimizer=kind, learning_rate=0.01))
        for step in range(2):
            for number, parameter in enumerate(model.parameters()):
                parameter.grad = place(random(parameter.shape, 100 * step + number))
            scale_learning_rates(optimizers, 1 / (1 + step))
            step_optimizers(optimizers)
        for name, parameter in model.named_parameters():
            whole = parameter.detach() if layout is None else parameter.detach().full_tensor()
            found[kind, name] = whole.clone()
    return found


@pytest.fixture(scope="module")
def alone():
    return moved()


@pytest.mark.parametrize("layout", slow_but(["rows of two"], PLACEMENTS))
def test_pieces_move_as_the_whole(request, alone, layout):
    pool = request.getfixturevalue("two" if layout.endswith("of two") else "four")
    for found in pool.run(moved, layout=layout):
        assert found.keys() == alone.keys()
        for key, expected in alone.items():
            torch.testing.assert_close(found[key], expected, rtol=1e-12, atol=1e-12, msg=str(key))

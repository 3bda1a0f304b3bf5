"""The compiled kernels as PyTorch's operators: what `opcheck` finds, and graphs that hold them."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from bessemer.model import cpu_kernels as operators
from bessemer.model.cpu_kernels import library, unavailable
from bessemer.model.cpu_kernels.logits import cross_entropy_
from bessemer.model.cpu_kernels.packed import PackedMatrix
from tests.model.test_cpu_kernels import LAYERS, rows

pytestmark = pytest.mark.skipif(library() is None, reason=unavailable() or "")

opcheck = partial(torch.library.opcheck, test_utils=("test_schema", "test_autograd_registration", "test_faketensor"))


def arguments(matrix):
    return *matrix._tensors, matrix.kind, *matrix.shape, matrix.group, 1


def pages(dtype=torch.float32):
    """Two sequences of 20 and 3 positions, whose keys and values lie in pages of 16."""
    keys, values = (torch.randn(4, 2, 16, 8).to(dtype) for _ in range(2))
    scales = (torch.rand(4, 2, 16), torch.rand(4, 2, 16)) if dtype == torch.int8 else (None, None)
    tables = torch.tensor([[2, 0], [3, -1]], dtype=torch.int32)
    batch = (torch.tensor([0, 2, 3]), torch.tensor([18, 19, 2], dtype=torch.int32), tables)
    return (keys, values, *scales), batch


@pytest.mark.parametrize("name", ["Q4 with zeros", "Q5_K", "BF16"])
@pytest.mark.parametrize("shape", [(1, 256), (2, 3, 256)])
def test_a_packed_product_is_an_operator(name, shape):
    matrix = PackedMatrix.of(LAYERS[name](bias=True))
    for dtype in (torch.float32, torch.bfloat16):
        opcheck(operators.packed_linear, (torch.randn(shape).to(dtype), *arguments(matrix)))
    opcheck(operators.packed_linear, (torch.randn(shape), *arguments(matrix), 16))


@pytest.mark.parametrize("dtype", [torch.float32, torch.int8])
def test_attention_over_pages_and_writing_them_are_operators(dtype):
    layer, batch = pages(dtype)
    opcheck(operators.paged_attention, (torch.randn(3, 4, 8), *layer, *batch, torch.randn(4), 0.3, 9.0, 0, 1))
    opcheck(operators.write_pages, (*layer, *batch, torch.randn(3, 2, 8), torch.randn(3, 2, 8)))


def test_the_loss_and_its_gradient_in_place_are_an_operator():
    logits_NV, targets_N = torch.randn(5, 33).bfloat16(), torch.tensor([0, 3, 32, 7, 7])
    opcheck(operators.cross_entropy_, (logits_NV, targets_N, 0.01, True, 1))


def test_an_exported_graph_holds_the_operator_and_gives_the_same_bits():
    matrix = PackedMatrix.of(LAYERS["Q8"]())

    class Twice(torch.nn.Module):
        def forward(self, x):
            return operators.packed_linear(2 * x, *arguments(matrix))

    x = rows(3, 256)
    exported = torch.export.export(Twice(), (x,), dynamic_shapes=({0: torch.export.Dim("rows")},))
    assert any(node.target is operators.packed_linear for node in exported.graph.nodes)
    x = rows(7, 256)
    assert torch.equal(exported.module()(x), matrix.multiply(2 * x))


def test_what_does_not_fit_is_refused_before_it_is_read():
    codes, *rest = arguments(PackedMatrix.of(LAYERS["Q4"]()))
    # which of them depends on the build of PyTorch
    with pytest.raises((ValueError, RuntimeError), match="the codes are not those"):
        operators.packed_linear(rows(1, 256), codes[:-1], *rest)
    layer, (starts, positions, tables) = pages()
    with pytest.raises((ValueError, RuntimeError), match="starts do not fit 3 rows"):
        operators.paged_attention(torch.randn(3, 4, 8), *layer, starts + 1, positions, tables, None, 0.3, 0.0, 0, 1)


def test_what_a_build_of_pytorch_makes_a_runtime_error_is_what_was_thrown(monkeypatch):
    assert isinstance(operators.thrown(RuntimeError("std::bad_alloc")), MemoryError)
    logits_NV, targets_N = torch.zeros(1, 16, dtype=torch.bfloat16), torch.zeros(1, dtype=torch.long)

    def operator(*arguments):
        raise RuntimeError("target 16 is none of 16")

    monkeypatch.setattr(operators, "cross_entropy_", operator)
    with pytest.raises(ValueError, match="target 16 is none of 16"):
        cross_entropy_(logits_NV, targets_N)

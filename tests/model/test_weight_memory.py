"""Memory of packed weights, and what of a GGUF file becomes weights without a copy."""

from __future__ import annotations

import mmap

import numpy as np
import pytest
import torch

from bessemer.model.cpu_kernels import library, unavailable
from bessemer.model.cpu_kernels.weight_memory import ALIGNMENT, CHUNK, weight_memory
from bessemer.model.formats.gguf_blocks import BLOCK_TYPES, read_codes, scheme_of, split_blocks
from bessemer.model.formats.gguf_export import export_gguf
from bessemer.model.formats.gguf_import import GgufFile
from tests.model.gguf_models import write_case


@pytest.mark.parametrize("large_pages", [True, False])
def test_weights_have_memory_of_their_own(large_pages, monkeypatch):
    if not large_pages:
        monkeypatch.delattr(mmap, "MADV_HUGEPAGE", raising=False)
    # the last of them alone is larger than a chunk
    shapes = [(3, 5), (1,), (7, 16), (0, 4), (CHUNK // 2 + 1,)]
    tensors = [weight_memory(shape, torch.float16) for shape in shapes]
    for value, (shape, tensor) in enumerate(zip(shapes, tensors, strict=True), start=1):
        assert tuple(tensor.shape) == shape and not tensor.any(), "zeros"
        assert tensor.data_ptr() % ALIGNMENT == 0 or not tensor.numel()
        tensor.fill_(value)
    assert [bool((tensor == value).all()) for value, tensor in enumerate(tensors, start=1)] == [True] * len(shapes)


@pytest.mark.skipif(library() is None, reason=str(unavailable()))
@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q8_0"])
def test_the_kernels_take_blocks_apart_as_numpy_does(kind):
    (number,) = (number for number, block in BLOCK_TYPES.items() if block.name == kind)
    block, scheme, count = BLOCK_TYPES[number], scheme_of(kind), 37
    raw = np.random.default_rng(0).integers(0, 256, count * block.bytes, dtype=np.uint8)
    # scales that are finite
    for name in {"d", "m"} & set(block.layout.names):
        raw.view(block.layout)[name] = np.random.default_rng(1).standard_normal(count)
    expected = read_codes(raw.tobytes(), kind)
    made = {name: torch.empty(spec.shape, dtype=spec.dtype) for name, spec in scheme.tensors(count, 32).items()}
    assert split_blocks(torch.from_numpy(raw), kind, made) and made.keys() == expected.keys()
    for name, tensor in made.items():
        assert torch.equal(tensor.view(-1).view(torch.uint8), expected[name].view(-1).to(tensor.dtype).view(torch.uint8)), name


def test_a_tensor_is_pages_of_its_file_and_writing_to_it_leaves_the_file(tmp_path):
    path = tmp_path / "model.gguf"
    export_gguf(write_case("llama", tmp_path / "folder"), path, "f32")
    before = path.read_bytes()
    with path.open("rb") as stream:
        file = GgufFile(path, stream)
        name = next(name for name in file.infos if file.kind(name) == "F32")
        weights, again = file.read(name), file.read(name)
    assert torch.equal(weights, again) and weights.data_ptr() != again.data_ptr()
    weights.fill_(7.0)
    assert path.read_bytes() == before and not torch.equal(weights, again)
    path.unlink()
    assert again.isfinite().all(), "the pages outlive the file's name"

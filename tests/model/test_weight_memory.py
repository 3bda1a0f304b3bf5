"""Memory of packed weights, and what of a GGUF file becomes weights without a copy."""

from __future__ import annotations

import mmap
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from bessemer.model.cpu_kernels import library, plain_decoder, unavailable
from bessemer.model.cpu_kernels.attention import PagesFields
from bessemer.model.cpu_kernels.plain_decoder import PlainDecoder
from bessemer.model.cpu_kernels.weight_memory import ALIGNMENT, CHUNK, PAGE, drop_mapped_pages, passing_memory, weight_memory
from bessemer.model.formats.gguf_blocks import BLOCK_TYPES, read_codes, scheme_of, split_blocks
from bessemer.model.formats.gguf_export import export_gguf
from bessemer.model.formats.gguf_import import GgufFile
from bessemer.model.formats.gguf_open import open_gguf
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


def resident_bytes():
    return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1]) * mmap.PAGESIZE


ON_LINUX = pytest.mark.skipif(sys.platform != "linux", reason="Linux says what is in memory")


@ON_LINUX
def test_memory_of_codes_that_pass_goes_back_to_the_system():
    size = 8 * PAGE
    # a tensor of this size that is freed makes the allocator keep the next ones
    torch.ones(size, dtype=torch.uint8)
    tensors = [passing_memory((size,), torch.uint8).fill_(1) for _ in range(4)]
    before = resident_bytes()
    # not the last: an allocator gives back what lies at its end
    del tensors[:3]
    assert resident_bytes() < before - 2.5 * size and bool((tensors[0] == 1).all())
    assert passing_memory((3, 0), torch.float32).shape == (3, 0) and not passing_memory((3, 5), torch.float16).any()


@ON_LINUX
def test_pages_of_a_file_are_dropped_and_those_written_to_stay(tmp_path):
    path, count = tmp_path / "numbers", 1 << 18
    path.write_bytes(np.arange(count, dtype=np.int32).tobytes())
    with path.open("rb") as stream:
        memory = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_COPY)
    numbers = torch.frombuffer(memory, dtype=torch.int32)
    expected = numbers.clone()
    written = slice(count // 4, count // 4 + 100_000)
    numbers[written] = -1
    expected[written] = -1
    rows = numbers.view(512, 512)[100:200, 7:9]
    assert 0 < drop_mapped_pages(rows) <= numbers.nbytes - numbers[written].nbytes
    dropped = drop_mapped_pages(numbers)
    assert numbers.nbytes // 3 < dropped <= numbers.nbytes - numbers[written].nbytes
    assert torch.equal(numbers, expected), "read from the file again, but for what was written"
    own = torch.arange(count)
    assert drop_mapped_pages(own) == 0 and torch.equal(own, torch.arange(count))
    assert drop_mapped_pages(torch.empty(0)) == drop_mapped_pages(torch.empty(5, device="meta")) == 0


@pytest.mark.skipif(library() is None, reason=str(unavailable()))
@pytest.mark.parametrize("releases", [True, False])
def test_floats_that_are_packed_are_not_kept_twice(tmp_path, monkeypatch, releases):
    dropped = []
    monkeypatch.setattr(plain_decoder, "drop_mapped_pages", dropped.append)
    path = tmp_path / "model.gguf"
    export_gguf(write_case("llama", tmp_path / "folder"), path, "f32")
    model = open_gguf(path).model
    nowhere = {layer: PagesFields() for layer in range(len(model.blocks))}
    PlainDecoder(model, nowhere, dict.fromkeys(range(len(model.blocks)), 0), release=releases)
    matrices = [part.weight for part in model.modules() if isinstance(part, torch.nn.Linear)]
    assert {id(weight) for weight in dropped} == ({id(weight) for weight in matrices} if releases else set())

"""Compiles the Triton kernels of products with codes for cards that are not here, and says what came of it, as JSON.

python -m tests.model.triton_compile int8,Q4_K
"""

from __future__ import annotations

import json
import sys

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from bessemer.model.quantisation import triton_products
from bessemer.model.quantisation.blocks import BLOCK_FORMS

CARDS = (80, 90)
KERNELS = (triton_products._product_kernel, triton_products._decode_kernel)


def pointers_of(kind):
    """Types of the tensors, in the types of bfloat16 models."""
    codes = "*i8" if kind == "int8" else "*u8"
    scales = "*u8" if kind in BLOCK_FORMS else "*fp32"
    zeros = "*u8" if kind == "int4 code" else scales
    tiles = dict.fromkeys(("experts", "firsts", "ends"), "*i32")
    return {"hidden": "*bf16", "out": "*bf16", "bias": "*bf16", "codes": codes, "scales": scales, "zeros": zeros} | tiles


def compiled(kernel, kind, card, grouped):
    form = triton_products._BLOCKS.get(kind, triton_products._Form(kind, 32, 32))
    constants = {"KIND": kind, "VALUES": form.values, "BYTES": form.bytes, "PART": form.part, "GROUPED": grouped}
    constants |= {"HAS_BIAS": True, "TILE_M": 16, "TILE_N": 32, "TILE_K": 128}
    constants = {name: value for name, value in constants.items() if name in kernel.arg_names}
    types = (
        dict.fromkeys(kernel.arg_names, "i32") | {"table": "*fp32"} | pointers_of(kind) | dict.fromkeys(constants, "constexpr")
    )
    source = ASTSource(kernel, {name: types[name] for name in kernel.arg_names}, constants)
    made = triton.compile(source, target=GPUTarget("cuda", card, 32))
    assert made.asm["cubin"]
    return {
        "kernel": kernel.fn.__name__, "kind": kind, "card": card, "shared": made.metadata.shared,
        "tensor_cores": "mma" in made.asm["ptx"],
    }  # fmt: skip


if __name__ == "__main__":
    kinds = sys.argv[1].split(",")
    # of one kind for experts in groups too
    cases = [(kernel, kind, card, False) for kernel in KERNELS for kind in kinds for card in CARDS]
    print(json.dumps([compiled(*case) for case in [*cases, (KERNELS[0], kinds[0], CARDS[0], True)]]))

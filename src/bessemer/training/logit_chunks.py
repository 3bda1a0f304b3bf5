"""How many logits of a head are held at a time, by the kind of device. No tensors: the planner counts them too."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ChunkSize:
    """Limits of a chunk of tokens, whose logits are computed by one matmul, and of a block of it, worked on in float32; and the
    most probabilities of all tokens that are kept from a forward pass for its backward pass."""

    max_tokens: int
    max_logits: int
    max_block_logits: int
    max_kept_logits: int = 0

    def tokens(self, vocab_size: int) -> int:
        """Tokens of a chunk, at least one. vocab_size: of the rank's shard."""
        return max(1, min(self.max_tokens, self.max_logits // vocab_size))

    def block_tokens(self, vocab_size: int, *, sharded: bool = False) -> int:
        """Tokens of a block: of a sharded vocabulary the whole chunk, since its ranks exchange numbers once a block."""
        whole = self.tokens(vocab_size)
        return whole if sharded else max(1, min(whole, self.max_block_logits // vocab_size))


#: On a CPU 1M logits, 256 tokens at a vocabulary of 4,096, stay in its cache; fewer leave the matmuls too thin, and smaller
#: blocks are slower. To keep 64 MiB of probabilities costs less than the matmul that gives them anew. A GPU needs thousands of
#: tokens to be busy: 2,048 at a vocabulary of 128k are 1 GiB in float32, of which blocks save most.
_CHUNK_SIZES = {
    "cpu": ChunkSize(max_tokens=1 << 20, max_logits=1 << 20, max_block_logits=1 << 20, max_kept_logits=1 << 24),
    "cuda": ChunkSize(max_tokens=8192, max_logits=1 << 28, max_block_logits=1 << 25),
}


def chunk_size(device: str) -> ChunkSize:
    """The limits on a kind of device, named as PyTorch does; an unknown one is taken for a GPU."""
    return _CHUNK_SIZES.get(device, _CHUNK_SIZES["cuda"])

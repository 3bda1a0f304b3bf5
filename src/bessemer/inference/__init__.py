"""The inference engine: continuous batching over a paged KV cache, sampling, grammars, speculative decoding, adapters."""

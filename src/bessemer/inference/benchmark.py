"""Decoding speed of a model on this machine."""

from __future__ import annotations

import time
from pathlib import Path

from bessemer.inference.engine import Engine, EngineConfig, SamplingParams

#: Requests at once, as a small server has them, and the tokens of each prompt.
STREAMS, _PROMPT = 8, 16
_ROUNDS = 3


def tokens_per_second(folder: Path, tokens: int, device: str = "auto") -> float:
    """Tokens a second of `STREAMS` requests for `tokens` tokens each, prompts of 16 tokens included.

    The best of three rounds, because another process can only slow one down.
    """
    engine = Engine(folder, device=device, config=EngineConfig(max_num_seqs=STREAMS, prefix_cache=False))
    most = max(1, min(tokens, engine.context_length - _PROMPT))
    params = SamplingParams(temperature=0, max_tokens=most, ignore_eos=True)
    vocabulary = engine.model.config.vocab_size
    prompts = [[(7 * row + place) % vocabulary for place in range(_PROMPT)] for row in range(STREAMS)]
    engine.generate(prompts[:1], params.with_changes(max_tokens=2))
    best = 0.0
    for _ in range(_ROUNDS):
        start = time.perf_counter()
        engine.generate(prompts, params)
        best = max(best, STREAMS * most / (time.perf_counter() - start))
    return best

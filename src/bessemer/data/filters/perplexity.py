"""Score `perplexity`: how surprising a text is to a language model, in bits per byte.

Any function from texts to bits per byte will do: a model of words (`word_model`) needs no PyTorch; what opens a trained model
of ours is passed in by the pipeline. Bits per byte compare across models, where perplexity per token does not: 2^(bits per byte
times the bytes of a token) is the perplexity of a tokenizer's token.

What is unusual is not always bad: tables, code and names surprise as well as nonsense does, and the least surprising texts are
often copies and forms. CCNet (Wenzek et al. 2020) keeps the third with the lowest perplexity of each language, so a limit
comes from the score's histogram and not from here.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa

from bessemer.core.store import follow
from bessemer.data.text.texts import Texts

#: From N texts to (N,) bits per byte.
BitsPerByte = Callable[[Texts], np.ndarray]
#: Opens the folder of a language model of ours.
OpenModel = Callable[[Path], BitsPerByte]

#: A neural model's last digits differ between processors; the score is rounded so that the files do not.
_DECIMALS = 4


def language_model_folder(place: Path) -> Path | None:
    """Where the language model of a folder, a run's or a stage's too, lies; None where there is none."""
    return next((found for found in (place, follow(place / "model")) if (found / "config.json").is_file()), None)


def perplexity_scores(bits_per_byte: BitsPerByte) -> Callable[[Texts], dict[str, pa.Array]]:
    """The scorer of a model, given its function from N texts to (N,) bits per byte."""

    def perplexity(texts: Texts) -> dict[str, pa.Array]:
        return {"perplexity_bits_per_byte": pa.array(np.round(bits_per_byte(texts), _DECIMALS).astype(np.float64))}

    return perplexity

"""Questions about pictures to an engine, and what agrees with the model's own answers."""

import numpy as np
import pytest

from bessemer.inference.images import chat_prompt
from bessemer.model.cpu_kernels import library
from bessemer.model.vision.pictures import Picture
from tests.model.picture_files import drawn

#: By compiled kernels and by the model's modules.
KERNELS = ["off"] if library() is None else ["auto", pytest.param("off", marks=pytest.mark.slow)]


def picture(seed, width=40, height=30):
    return Picture.of(np.asarray(drawn(width, height, seed=seed)))


def asked(engine, *pictures, text="what is in these?"):
    """A prompt with pictures before a text."""
    content = [*({"type": "image", "image": one} for one in pictures), {"type": "text", "text": text}]
    return chat_prompt(engine.tokenizer, [{"role": "user", "content": content}])


def agrees(completion, wanted):
    """Check a completion against tokens and their log-probabilities."""
    tokens, log_probs = wanted
    assert completion.token_ids == tokens
    made = [one.log_probs.token for one in completion.log_probs]
    assert np.abs(np.array(made) - log_probs).max() < 1e-3

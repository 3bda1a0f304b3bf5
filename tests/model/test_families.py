import pytest
import torch

from bessemer.model.cache import DecoderCache
from bessemer.model.folder import load_model
from tests.model.family_models import CASES, make

TOLERANCE = 1e-4


@pytest.fixture(scope="module", params=sorted(CASES))
def pair(request, tmp_path_factory):
    """A `transformers` model, and ours loaded from its folder."""
    theirs = make(request.param)
    folder = tmp_path_factory.mktemp(request.param)
    theirs.save_pretrained(folder)
    return theirs, load_model(folder), folder


def tokens(rows, length, seed=3):
    return torch.randint(3, 97, (rows, length), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def test_logits_equal_those_of_transformers(pair):
    theirs, ours, _ = pair
    tokens_BT = tokens(2, 20)
    expected = theirs(tokens_BT).logits
    assert 0.1 < expected.std() < 10
    assert (ours(tokens_BT) - expected).abs().max() < TOLERANCE


@torch.no_grad()
def test_cached_decoding_equals_reading_at_once(pair):
    _, ours, _ = pair
    length = min(20, ours.config.max_position_embeddings)  # dynamic scaling keeps old keys as they were turned
    tokens_BT = tokens(2, length)
    cache = DecoderCache(ours.config, 2, length)
    pieces = [ours(piece, cache=cache) for piece in tokens_BT.split([7, 1, length - 9, 1], dim=1)]
    assert (torch.cat(pieces, dim=1) - ours(tokens_BT)).abs().max() < TOLERANCE

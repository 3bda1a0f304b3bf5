"""What is compared on a card and on the processor: which architectures, and how near numbers must be."""

from __future__ import annotations

#: One architecture of each way to compute: dense, experts, latent attention, linear attention in some of the layers.
KINDS = ("dense", "experts", "latent", "linear")


def assert_same_but_for_ties(found, expected, error=1e-3, tie=1e-4):
    """Completions with `logprobs=2`, one by one: the likeliest token's log-probability is within `error` at every place, and
    tokens are the same up to a place where the two likeliest are within `tie` of each other."""
    for one, other in zip(found, expected, strict=True):
        for first, second in zip(one.log_probs, other.log_probs, strict=True):
            (_, likeliest), (_, next_likeliest) = second.log_probs.top
            assert abs(first.log_probs.top[0][1] - likeliest) < error
            if first.token != second.token:
                assert likeliest - next_likeliest <= tie
                break


def relative_difference(found, expected, start=None):
    """‖a − b‖ / ‖b‖ of tensors on any device; with `start`, ‖a − b‖ / ‖b − start‖."""
    found, expected = found.detach().cpu().double(), expected.detach().cpu().double()
    moved = expected if start is None else expected - start.detach().cpu().double()
    return float((found - expected).norm() / moved.norm())

"""From logits to the next token."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from bessemer.core.errors import RequestError
from bessemer.inference.config import SamplingParams

__all__ = ["SamplingParams", "generator_for", "sample", "truncated_logits"]

# Shapes: B batch, V vocabulary.


def truncated_logits(logits_BV: Tensor, params: SamplingParams) -> Tensor:
    """Logits whose softmax is the distribution to sample from; -inf for tokens that are left out.

    Divided by the temperature (above 0), then all below the k-th largest left out, then the least likely that together
    have at most 1 - top_p; the likeliest always stays. Ties with the k-th stay too. As in `transformers`' warpers.
    """
    logits_BV = logits_BV / params.temperature
    if 0 < params.top_k < logits_BV.shape[-1]:
        smallest_kept_B1 = logits_BV.topk(params.top_k).values[..., -1:]
        logits_BV = logits_BV.masked_fill(logits_BV < smallest_kept_B1, -torch.inf)
    if params.top_p < 1:
        ascending_BV, order_BV = logits_BV.sort()
        left_out_BV = ascending_BV.softmax(-1).cumsum(-1) <= 1 - params.top_p
        left_out_BV[..., -1] = False
        logits_BV = logits_BV.masked_fill(left_out_BV.scatter(-1, order_BV, left_out_BV), -torch.inf)
    return logits_BV


def sample(logits_BV: Tensor, params: SamplingParams, generators: Sequence[torch.Generator]) -> list[int]:
    """One token for each row: the likeliest at temperature 0, else drawn from `truncated_logits`.

    Row b uses one number of generators[b], so what it gets does not depend on the rows beside it.
    Raises RequestError when a row's logits are not finite, which damaged weights give.
    """
    if params.temperature == 0:
        return logits_BV.argmax(-1).tolist()
    # in float64 on the host: the sum of a large vocabulary stays exact enough that no token's share is lost
    probabilities_BV = truncated_logits(logits_BV.float(), params).softmax(-1).cpu().double()
    cumulative_BV = probabilities_BV.cumsum(-1)
    totals_B1 = cumulative_BV[:, -1:]
    if not totals_B1.isfinite().all():
        raise RequestError("the model's logits are not finite: its weights are damaged or its training diverged")
    uniforms_B1 = torch.cat([torch.rand(1, 1, dtype=torch.float64, generator=generator) for generator in generators])
    # the first token whose cumulative share exceeds the number: never one of probability 0
    return torch.searchsorted(cumulative_BV, uniforms_B1 * totals_B1, right=True)[:, 0].tolist()


def generator_for(params: SamplingParams) -> torch.Generator:
    """A request's own source of random numbers: from its seed, or from the system's entropy without one."""
    generator = torch.Generator()
    if params.seed is None:
        generator.seed()
    else:
        generator.manual_seed(params.seed % 2**63)
    return generator

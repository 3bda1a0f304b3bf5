"""Rollouts: sampled completions as padded tensors, with their log-probabilities and the versions of the weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from bessemer.core.errors import RequestError
from bessemer.core.seeds import derive_seed
from bessemer.inference.request import Request
from bessemer.inference.sampling.params import SamplingParams

# Shapes: P prompts, R rows (P · n), T tokens of the longest row.

LogProbsMode = Literal["raw", "temperature", "sampled"]


@dataclass(frozen=True)
class Rollouts:
    """n completions of each of P prompts; rows p · n … p · n + n - 1 are those of prompt p. On the host.

    tokens: (R, T) int64, the prompt, the completion, then zeros.
    mask: (R, T) bool, true at generated tokens, an end token included.
    log_probs: (R, T) float32, of generated tokens in nats; zero elsewhere.
    weight_version: (R, T) int32, `Engine.weight_version` when each generated token was sampled; zero elsewhere.
    prompt_lengths, lengths: (R,) int64, tokens of the prompt, and of prompt and completion together.
    finish_reasons, texts: of each row, as in `Completion`.
    """

    tokens: Tensor
    mask: Tensor
    log_probs: Tensor
    weight_version: Tensor
    prompt_lengths: Tensor
    lengths: Tensor
    finish_reasons: tuple[str, ...]
    texts: tuple[str, ...]


def params_of_prompts(
    params: SamplingParams | Sequence[SamplingParams], prompts: int, n: int, mode: LogProbsMode
) -> list[SamplingParams]:
    """The sampling parameters of each prompt's n completions.

    Parameters for all with a seed give each prompt random numbers of its own, so that a repeated prompt gets other completions.
    Raises RequestError for parameters whose completions are not plain samples, or another number of them than of prompts;
    ConfigError for n below 1.
    """
    if isinstance(params, SamplingParams):
        seed = params.seed
        seeds = [seed if seed is None or not prompt else derive_seed(seed, "prompt", prompt) for prompt in range(prompts)]
        each = [params.with_changes(seed=own) for own in seeds]
    else:
        each = list(params)
    if len(each) != prompts:
        raise RequestError(f"{prompts:,} prompts and {len(each):,} params; give one for all, or one for each")
    for own in each:
        if own.beam_width or own.best_of is not None:
            raise RequestError("rollouts are samples, none of them left out: leave out best_of and beam_width")
        if not own.max_tokens:
            raise RequestError("rollouts are samples of at least a token: raise max_tokens above 0")
    return [own.with_changes(n=n, logprobs=0, logprobs_mode=mode, prompt_logprobs=None) for own in each]


def collect_rollouts(requests: Sequence[Request]) -> Rollouts:
    """The rollouts of requests that are done, in their order, each followed by its siblings. Takes the requests' chunks."""
    rows = [each for request in requests for each in (request, *request.siblings)]
    prompt_lengths_R = torch.tensor([row.sequence.prompt_length for row in rows], dtype=torch.int64)
    lengths_R = torch.tensor([len(row.sequence.tokens) for row in rows], dtype=torch.int64)
    shape = (len(rows), int(lengths_R.max()) if rows else 0)
    tokens_RT = torch.zeros(shape, dtype=torch.int64)
    log_probs_RT = torch.zeros(shape)
    versions_RT = torch.zeros(shape, dtype=torch.int32)
    texts, reasons = [], []
    for place, row in enumerate(rows):
        start, end = row.sequence.prompt_length, len(row.sequence.tokens)
        chunks = row.drain()
        sampled = [one for chunk in chunks for one in chunk.log_probs or []]
        tokens_RT[place, :end] = torch.tensor(row.sequence.tokens)
        log_probs_RT[place, start:end] = torch.tensor([one.log_probs.token for one in sampled if one.log_probs])
        versions_RT[place, start:end] = torch.tensor(row.weight_versions, dtype=torch.int32)
        texts.append("".join(chunk.text for chunk in chunks))
        assert row.finish_reason is not None, "a request that is done has ended or failed"
        reasons.append(row.finish_reason)
    columns_T = torch.arange(shape[1])
    mask_RT = (columns_T >= prompt_lengths_R[:, None]) & (columns_T < lengths_R[:, None])
    return Rollouts(tokens_RT, mask_RT, log_probs_RT, versions_RT, prompt_lengths_R, lengths_R, tuple(reasons), tuple(texts))

"""The sampler: from logits to the next token, for many requests at once, each with its own parameters."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from bessemer.core.errors import RequestError
from bessemer.core.hashing import derive_seed
from bessemer.core.usercode import load_user_function
from bessemer.inference.sampling.distribution import (
    NO_TRUNCATION,
    Candidates,
    LogProbs,
    Truncation,
    candidates,
    certain,
    log_probs,
    sampler_log_probs,
    truncated_logits,
    uniform,
)
from bessemer.inference.sampling.params import Mark, SamplingParams, marked
from bessemer.inference.sampling.penalties import TokenCounts, TokenRules, change_logits, changes_logits, process
from bessemer.inference.sampling.watermark import Watermark
from bessemer.model.cpu_kernels import library
from bessemer.model.cpu_kernels.logits import draw_tokens

__all__ = ["Sampled", "SamplingParams", "SamplingState", "generator_for", "sample_rows", "truncated_logits"]

# Shapes: B batch, R rows, V vocabulary.

#: Rows that are drawn from at once.
_ROWS = 16

NO_TOKEN_LEFT = "no token may come next: grammar, allowed_tokens and banned_tokens together leave none"
NOT_FINITE = "the model's logits are not finite: its weights are damaged or its training diverged"

#: Settings that leave a request to the sampler on the device.
_ON_DEVICE = frozenset((*marked(Mark.DEVICE), *marked(Mark.UNREAD)))


class GrammarState(Protocol):
    """The grammar of a request's text, and its state."""

    def allowed(self) -> np.ndarray:
        """Which tokens may come next, bool (V,); end tokens where the text may end."""
        ...

    def consume(self, token: int) -> None:
        """Go on by a token that is allowed."""
        ...

    @property
    def finished(self) -> bool:
        """Whether nothing but an end can follow."""
        ...


class Sampled(NamedTuple):
    """A chosen token. `log_probs` where the request asks for them, of the distribution that its `logprobs_mode` says."""

    token: int
    log_probs: LogProbs | None = None


class ChosenTokens(NamedTuple):
    """The token of each row, and the errors of rows without one. log_probs: by the sampler's distribution, where wanted."""

    tokens: list[int]
    problems: dict[int, RequestError]
    log_probs: dict[int, LogProbs]


class SamplingState:
    """State of sampling one completion: its parameters, its random numbers, and the tokens so far.

    answer: the tokens made, added by `sample_rows` and `verify`.
    """

    def __init__(
        self,
        params: SamplingParams,
        *,
        prompt: Sequence[int],
        vocab_size: int,
        end_tokens: Collection[int] = (),
        index: int = 0,
        grammar: GrammarState | None = None,
        folder: Path | None = None,
        rules: TokenRules | None = None,
    ) -> None:
        """index: of the completion among those of its prompt. end_tokens: at which it ends, besides `stop_token_ids`. folder:
        of a `logits_processor` in a file, by default the working directory. rules: of `params`, shared with other completions.

        Raises RequestError when the parameters name a token outside the vocabulary, or a grammar that is not given;
        ConfigError when the processor's file or function is not there.
        """
        self.generator = generator_for(params, index)
        self.rules = rules or TokenRules(params, vocab_size)
        self.counts = TokenCounts(prompt if params.repetition_penalty != 1 else ())
        if params.grammar is not None and grammar is None:
            raise RequestError(f"{params.grammar[0]} is not served here: no grammar was compiled for it; leave it out")
        self.params = params
        self.vocab_size = vocab_size
        self.grammar = grammar
        self.greedy = params.greedy
        self.wants_sampler_log_probs = params.wants_sampler_log_probs
        self.answer: list[int] = []
        self._prompt = prompt
        self._end_set = frozenset(end_tokens) | frozenset(params.stop_token_ids)
        self.ends_array = np.array(sorted(self._end_set), np.int64)
        processor = params.logits_processor
        self._processor: Callable[..., Any] | None = (
            load_user_function(processor, folder or Path()) if isinstance(processor, str) else processor
        )
        self.penalises = params.repetition_penalty != 1 or bool(params.presence_penalty or params.frequency_penalty)
        self._changes = changes_logits(params) or grammar is not None
        self.truncation = Truncation.of(params)
        #: The mark that this completion gets.
        self.watermark = None if params.watermark is None else Watermark(params.watermark)
        #: Whether `SampledRows` can choose the next tokens: it computes all settings that bear on them.
        self.on_device = grammar is None and params.changed_settings <= _ON_DEVICE

    @property
    def takes_argmax(self) -> bool:
        """Whether the next token is the largest of the model's logits, and no log-probabilities are wanted."""
        return self.greedy and not self.adjusts and self.params.logprobs is None

    @property
    def adjusts(self) -> bool:
        """Whether the next token's logits are changed at all."""
        return self.adjusts_after(len(self.answer))

    def adjusts_after(self, length: int) -> bool:
        """Whether the logits are changed of the token that comes after `length` tokens of the answer."""
        return self._changes or length < self.params.min_tokens

    @property
    def draws_from_softmax(self) -> bool:
        """Whether the next tokens are drawn from the softmax of the model's own logits at the temperature, or are the largest,
        and no log-probabilities are wanted but those of the drawn tokens."""
        params = self.params
        is_whole = self.greedy or self.truncation == NO_TRUNCATION
        enough = params.logprobs is None or (self.wants_sampler_log_probs and not params.logprobs)
        return is_whole and enough and not self.adjusts

    @property
    def depends_on_answer(self) -> bool:
        """Whether a token changes how the ones after it are chosen."""
        return (
            self.penalises
            or self._processor is not None
            or self.grammar is not None
            or self.watermark is not None
            or len(self.answer) < self.params.min_tokens
        )

    @property
    def end_tokens(self) -> frozenset[int]:
        """The tokens at which the answer ends."""
        return self._end_set

    def ends(self, token: int) -> bool:
        """Whether the answer ends at a token."""
        return token in self._end_set

    @property
    def finished(self) -> bool:
        """Whether the grammar leaves nothing to add."""
        return self.grammar is not None and self.grammar.finished

    def adjust(self, logits_V: np.ndarray) -> None:
        """Change the next token's logits in place: bias, penalties, the user's processor, a watermark's favoured tokens, and
        -inf for what may not come.

        Raises RequestError when the user's processor fails or the grammar cannot go on.
        """
        self.rules.add_bias(logits_V)
        change_logits(logits_V, self.params, self.counts)
        if self._processor is not None:
            process(self._processor, self._prompt, self.answer, logits_V)
        if self.watermark is not None:
            self.watermark.raise_green(logits_V, self.answer)
        self._forbid(logits_V, len(self.answer))

    def adjust_beam(self, logits_V: np.ndarray, length: int) -> None:
        """As `adjust`, after `length` tokens of a beam, which has no penalties and no grammar."""
        self.rules.add_bias(logits_V)
        self._forbid(logits_V, length)

    def _forbid(self, logits_V: np.ndarray, length: int) -> None:
        self.rules.forbid(logits_V)
        early = length < self.params.min_tokens
        if self.grammar is not None:
            allowed_V = self.grammar.allowed()
            logits_V[~allowed_V] = -np.inf
            # at the end of its grammar a completion may end before `min_tokens`
            allowed_V[self.ends_array] = False
            early = early and bool(allowed_V.any())
        if early:
            logits_V[self.ends_array] = -np.inf

    def advance(self, token: int) -> None:
        """Add a token to the answer."""
        if self.watermark is not None:
            self.watermark.advance(self.answer)
        self.answer.append(token)
        if self.penalises:
            self.counts.add(token)
        if self.grammar is not None:
            self.grammar.consume(token)


def sample_rows(logits_RV: Tensor, rows: Sequence[SamplingState]) -> list[Sampled | RequestError]:
    """One token for each row by its request's own settings, added to the request's answer. `logits_RV` stays as it is.

    logits_RV: float32. At temperature 0 the likeliest (the first of equals); else one number of the request's generator
    picks from `truncated_logits`. What a row gets does not depend on the other rows.

    A row that cannot be served, because its logits are not finite or nothing may be chosen, gets a RequestError in its
    place and the others go on.
    """
    logits_RV = logits_RV.detach()
    numbers = [0.0 if state.greedy else uniform(state.generator) for state in rows]
    choice = choose(logits_RV, rows, numbers)
    log_probs_of = chosen_log_probs(logits_RV, choice, rows, [row for row in range(len(rows)) if row not in choice.problems])
    sampled: list[Sampled | RequestError] = []
    for row, (token, state) in enumerate(zip(choice.tokens, rows, strict=True)):
        if row in choice.problems:
            sampled.append(choice.problems[row])
        else:
            state.advance(token)
            sampled.append(Sampled(token, log_probs_of.get(row)))
    return sampled


def chosen_log_probs(
    logits_RV: Tensor, choice: ChosenTokens, states: Sequence[SamplingState], rows: Sequence[int]
) -> dict[int, LogProbs]:
    """Log-probabilities of the chosen tokens of some rows, by row, where their requests ask for them."""
    raw = [row for row in rows if states[row].params.logprobs is not None and row not in choice.log_probs]
    if not raw:
        return choice.log_probs
    raw_RV = logits_RV if len(raw) == len(logits_RV) else logits_RV[raw]
    counts = [states[row].params.logprobs or 0 for row in raw]
    of_rows = log_probs(raw_RV, [choice.tokens[row] for row in raw], counts)
    return choice.log_probs | dict(zip(raw, of_rows, strict=True))


def choose(logits_RV: Tensor, rows: Sequence[SamplingState], numbers: Sequence[float]) -> ChosenTokens:
    """The token of each row by its number in [0, 1). Changes nothing.

    A request may have several rows where its answer so far makes no difference (`depends_on_answer`).
    """
    tokens: list[int] = [0] * len(rows)
    problems: dict[int, RequestError] = {}
    log_probs_of: dict[int, LogProbs] = {}
    groups: dict[tuple[Truncation | None, bool], list[int]] = defaultdict(list)
    for row, state in enumerate(rows):
        groups[None if state.greedy else state.truncation, state.watermark is not None].append(row)
    for (truncation, is_marked), members in groups.items():
        states = [rows[row] for row in members]
        part_BV = adjusted(logits_RV if len(members) == len(rows) else logits_RV[members], states, problems, members)
        if truncation is None:
            chosen = likeliest(part_BV)
            of_members = {
                place: certain(token, state.params)
                for place, (token, state) in enumerate(zip(chosen, states, strict=True))
                if state.wants_sampler_log_probs
            }
        else:
            chosen, of_members = _drawn(part_BV, states, [numbers[row] for row in members], truncation, is_marked)
        log_probs_of |= {members[place]: one for place, one in of_members.items()}
        for place, (row, token) in enumerate(zip(members, chosen, strict=True)):
            tokens[row] = token
            if token < 0 and row not in problems:
                problems[row] = no_token(part_BV[place])
    return ChosenTokens(tokens, problems, log_probs_of)


def adjusted(
    logits_BV: Tensor, states: Sequence[SamplingState], problems: dict[int, RequestError], members: Sequence[int]
) -> Tensor:
    """The logits with each request's changes, copied where there are any. Errors of processors go into `problems`."""
    changing = [place for place, state in enumerate(states) if state.adjusts]
    if changing:
        logits_BV = logits_BV.to("cpu", copy=True)
        for place in changing:
            try:
                states[place].adjust(logits_BV[place].numpy())
            except RequestError as error:
                problems[members[place]] = error
    return logits_BV


def likeliest(logits_BV: Tensor) -> list[int]:
    """The index of the largest logit in each row (the first of equals); -1 where it is not finite."""
    if logits_BV.device.type != "cpu":
        best_B1 = logits_BV.argmax(-1, keepdim=True)
        return torch.where(logits_BV.gather(-1, best_B1).isfinite(), best_B1, -1)[:, 0].tolist()
    # its argmax is six times as fast, and takes the first NaN for the largest too
    logits = logits_BV.numpy()
    best = logits.argmax(-1)
    return np.where(np.isfinite(logits[np.arange(len(logits)), best]), best, -1).tolist()


def _drawn(
    logits_BV: Tensor,
    states: Sequence[SamplingState],
    numbers: Sequence[float],
    truncation: Truncation,
    is_marked: bool = False,
) -> tuple[list[int], dict[int, LogProbs]]:
    """A token of each row, and by row the log-probabilities by the sampler's distribution, where wanted."""
    if truncation == NO_TRUNCATION and not is_marked and library() is not None:
        return _drawn_by_kernels(logits_BV, states, numbers)
    temperatures_B = torch.tensor([state.params.temperature for state in states])
    uniforms_B = torch.tensor(numbers, dtype=torch.float64)
    params = [state.params for state in states]
    tokens = [-1] * len(states)
    log_probs_of: dict[int, LogProbs] = {}
    # few rows at a time: intermediate results stay in the processor's cache
    for start in range(0, len(states), _ROWS):
        some = slice(start, start + _ROWS)
        some_BV = logits_BV[some].cpu()
        for places, distribution in candidates(some_BV, temperatures_B[some], truncation):
            drawn = distribution.draw(uniforms_B[some][places])
            rows = [start + place for place in places]
            if is_marked:
                drawn = [
                    _marked(token, distribution.part([place]), states[row])
                    for place, (token, row) in enumerate(zip(drawn, rows, strict=True))
                ]
            for row, token in zip(rows, drawn, strict=True):
                tokens[row] = token
            if any(states[row].wants_sampler_log_probs for row in rows):
                part_BV = some_BV if len(rows) == len(some_BV) else some_BV[places]
                of_part = sampler_log_probs(part_BV, temperatures_B[rows], distribution, drawn, [params[row] for row in rows])
                log_probs_of |= {rows[place]: one for place, one in of_part.items()}
    return tokens, log_probs_of


def _marked(token: int, distribution: Candidates, state: SamplingState) -> int:
    """The token that a row's watermark chooses from the row's distribution; the drawn one where it chooses none."""
    if token < 0 or state.watermark is None:
        return token
    tokens_N = None if distribution.tokens_BN is None else distribution.tokens_BN[0].numpy()
    place = state.watermark.chosen(distribution.weights_BN[0].numpy(), tokens_N, state.answer)
    if place is None:
        return token
    return place if tokens_N is None else int(tokens_N[place])


def _drawn_by_kernels(
    logits_BV: Tensor, states: Sequence[SamplingState], numbers: Sequence[float]
) -> tuple[list[int], dict[int, LogProbs]]:
    """As `_drawn`, where every token may be drawn."""
    logits_BV = logits_BV.cpu()
    temperatures = [state.params.temperature for state in states]
    tokens, own = draw_tokens(logits_BV, temperatures, numbers)
    wanted = [row for row, state in enumerate(states) if state.wants_sampler_log_probs and tokens[row] >= 0]
    log_probs_of = {row: LogProbs(own[row]) for row in wanted if not states[row].params.logprobs}
    ranked = [row for row in wanted if row not in log_probs_of]
    for start in range(0, len(ranked), _ROWS):
        rows = ranked[start : start + _ROWS]
        part_RV, temperatures_R = logits_BV[rows], torch.tensor([temperatures[row] for row in rows])
        ((_, distribution),) = candidates(part_RV, temperatures_R, NO_TRUNCATION)
        params = [states[row].params for row in rows]
        of_part = sampler_log_probs(part_RV, temperatures_R, distribution, [tokens[row] for row in rows], params)
        log_probs_of |= {rows[place]: one for place, one in of_part.items()}
    return tokens, log_probs_of


def no_token(logits_V: Tensor) -> RequestError:
    """The error of a row that gives no token."""
    if (logits_V == -torch.inf).all():
        return RequestError(NO_TOKEN_LEFT)
    return RequestError(NOT_FINITE)


def generator_for(params: SamplingParams, index: int = 0) -> torch.Generator:
    """A request's own random number generator: by its seed, else by the system's entropy.

    index: of the completion among those of its prompt; each has numbers of its own.
    """
    generator = torch.Generator()
    if params.seed is None:
        generator.seed()
    else:
        generator.manual_seed((derive_seed(params.seed, "answer", index) if index else params.seed) % 2**63)
    return generator

"""Adversarial suffixes on a model's own weights: greedy coordinate gradient (Zou et al. 2023), and random search beside it.

Both look for tokens behind a request that make the opening of a compliant answer likely. A step evaluates a batch of suffixes
that differ from the best one so far in one token, and keeps the best of them. `gcg` draws the replacements from the tokens
along which the loss falls steepest, `random_search` from all, so that at equal evaluations only the gradient differs.

A suffix counts only as the text that a user would type: of the candidates, those are evaluated that decode to a text which is
read as the same tokens in the same conversation. The keys and values of everything before the suffix are computed once, and
logits only where the opening is predicted. Where an engine is given, it computes the losses, in the number format in which it
serves the model and with its prefix cache; gradients are always those of float weights.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor
from torch.nn import functional

from bessemer.core.errors import ConfigError, RequestError
from bessemer.model.attention.base import is_recurrent
from bessemer.model.decoder import Decoder
from bessemer.model.layers.cache import DecoderCache
from bessemer.model.quantisation.quantised_layers import is_quantised
from bessemer.safety.redteam.attacks import Attack, AttackContext, Play, Query, user
from bessemer.safety.redteam.goals import Goal

if TYPE_CHECKING:
    from bessemer.inference.engine import Engine
    from bessemer.safety.redteam.config import GcgSettings
    from bessemer.tokenization.tokenizer import Tokenizer

# Shapes: C candidates, L tokens of the suffix, T tokens, V vocabulary, D hidden.

Method = Literal["gcg", "random"]
#: Tries of drawing a candidate that survives re-tokenisation, for each that is wanted.
_TRIES = 6
#: What a suffix begins as, repeated.
_FILLER = " !"


@dataclass(frozen=True)
class SuffixSearch:
    """The result of a search.

    suffix: the text behind the request, with the space before it. losses: the best mean loss of the opening after each step, in
    nats a token, the first before any. evaluations: suffixes whose loss was computed.
    """

    suffix: str
    losses: list[float]
    evaluations: int


class SuffixProblem:
    """A request, an opening, and how likely a suffix makes the opening: mean −log p of its tokens, in nats.

    Raises RequestError where the suffix cannot be found again in the conversation's tokens, and ConfigError for weights without
    gradients and for models whose layers keep a state, which a shared prefix cannot be copied from.
    """

    def __init__(
        self,
        model: Decoder,
        tokenizer: Tokenizer,
        request: str,
        opening: str,
        *,
        suffix_tokens: int = 20,
        system: str = "",
        candidates_at_once: int = 64,
        engine: Engine | None = None,
    ) -> None:
        """engine: of the same model, computes the losses in place of `model`."""
        if is_quantised(model):
            raise ConfigError("gcg reads gradients: the model's weights must be floats, not quantised codes")
        if is_recurrent(model.config):
            raise ConfigError("gcg shares a prefix among candidates, which layers that keep a state cannot do")
        self.model = model.requires_grad_(False)
        self._tokenizer = tokenizer
        self._messages = [{"role": "system", "content": system}] if system else []
        self._request = request
        self._at_once = candidates_at_once
        self._engine = engine
        filler = tokenizer.encode(_FILLER, add_bos=False)
        start = tokenizer.decode(filler * max(1, suffix_tokens // len(filler)))
        plain, whole = self._conversation(""), self._conversation(start)
        before = _common(plain, whole)
        behind = _common(plain[before:][::-1], whole[before:][::-1])
        self.before, self.behind = whole[:before], whole[len(whole) - behind :]
        self.start = whole[before : len(whole) - behind]
        if not self.start or not self.survives(self.start):
            raise RequestError("the suffix cannot be found in the tokens of the conversation: its chat template rewrites texts")
        self.opening = tokenizer.encode(opening, add_bos=False)
        self._cache: DecoderCache | None = None
        self._row = torch.tensor([*self.behind, *self.opening], device=model.device)

    def _conversation(self, suffix: str) -> list[int]:
        messages = [*self._messages, user(self._request + suffix)]
        return self._tokenizer.apply_chat_template(messages, add_generation_prompt=True)

    def text(self, suffix: Sequence[int]) -> str:
        """A suffix as text."""
        return self._tokenizer.decode(suffix)

    def survives(self, suffix: Sequence[int]) -> bool:
        """Whether the text of a suffix is read as these tokens again, in its conversation."""
        return self._conversation(self.text(suffix)) == [*self.before, *suffix, *self.behind]

    def losses(self, suffixes_CL: Sequence[Sequence[int]]) -> list[float]:
        """The loss of each suffix; all must be of one length."""
        if self._engine is not None:
            items = [([*self.before, *suffix, *self.behind], [self.opening]) for suffix in suffixes_CL]
            return [-score.total / len(self.opening) for (score,) in self._engine.score_items(items)]
        losses: list[float] = []
        for first in range(0, len(suffixes_CL), self._at_once):
            losses += self._batch_losses(torch.tensor(suffixes_CL[first : first + self._at_once], device=self.model.device))
        return losses

    @torch.no_grad()
    def _batch_losses(self, suffixes_CL: Tensor) -> list[float]:
        count, length = suffixes_CL.shape
        tokens_CT = torch.cat((suffixes_CL, self._row.expand(count, -1)), dim=1)
        cache = self._shared(count, tokens_CT.shape[1])
        # the last token of the opening predicts nothing that counts
        hidden_CTD = self.model.hidden(tokens_CT[:, :-1], cache=cache)
        cache.shorten([len(self.before)] * count)
        return self._opening_losses(hidden_CTD[:, length + len(self.behind) - 1 :]).tolist()

    def _opening_losses(self, hidden_CTD: Tensor) -> Tensor:
        """Mean loss of the opening, (C,), from the states that predict its tokens."""
        logits_CTV = self.model.logits(hidden_CTD).float()
        wanted_CT = torch.tensor(self.opening, device=logits_CTV.device).expand(len(logits_CTV), -1)
        return functional.cross_entropy(logits_CTV.transpose(1, 2), wanted_CT, reduction="none").mean(1)

    def _shared(self, count: int, new: int) -> DecoderCache:
        """A cache of `count` rows that hold the tokens before the suffix, which are read once."""
        if self._cache is None or self._cache.batch_size < count or self._cache.capacity < len(self.before) + new:
            capacity = len(self.before) + new
            self._cache = DecoderCache(self.model.config, 1, capacity, self.model.dtype, self.model.device)
            self.model.hidden(torch.tensor([self.before], device=self.model.device), cache=self._cache)
            self._cache.keep([0] * count)
        elif self._cache.batch_size > count:
            self._cache.keep(range(count))
        return self._cache

    def gradient(self, suffix: Sequence[int]) -> Tensor:
        """The gradient of the loss by the one-hot vectors of a suffix, (L, V): by how much it grows, to first order, where a
        place holds more of a token.

        It is that by the embedded tokens times the table of embeddings, so that no one-hot matrix is multiplied.
        """
        tokens_1T = torch.tensor([[*self.before, *suffix, *self.behind, *self.opening]], device=self.model.device)
        embedded: list[Tensor] = []
        hook = self.model.embed_tokens.register_forward_hook(partial(_as_leaf, embedded))
        try:
            with torch.enable_grad():
                hidden_1TD = self.model.hidden(tokens_1T[:, :-1])
                loss = self._opening_losses(hidden_1TD[:, -len(self.opening) :])[0]
                (gradient_1TD,) = torch.autograd.grad(loss, embedded)
        finally:
            hook.remove()
        place = slice(len(self.before), len(self.before) + len(suffix))
        table_VD = self.model.embed_tokens.weight
        return (gradient_1TD[0, place] @ table_VD.to(gradient_1TD.dtype).T).float()


def _common(first: Sequence[int], second: Sequence[int]) -> int:
    """How many tokens two sequences begin with in common."""
    pairs = enumerate(zip(first, second, strict=False))
    return next((place for place, (a, b) in pairs if a != b), min(len(first), len(second)))


def _as_leaf(kept: list[Tensor], module: torch.nn.Module, given: object, output: Tensor) -> Tensor:
    """A hook of the embedding: its output becomes a leaf whose gradient is asked for."""
    leaf = output.detach().requires_grad_()
    kept.append(leaf)
    return leaf


def printable_tokens(tokenizer: Tokenizer) -> list[int]:
    """Tokens that are printable ASCII with something to see, and no control tokens: what a user could type."""
    kept = []
    for token in range(tokenizer.vocab_size):
        if tokenizer.is_special(token):
            continue
        content = tokenizer.token_bytes(token)
        if content.strip() and all(32 <= byte < 127 for byte in content):
            kept.append(token)
    return kept


def search_suffix(
    problem: SuffixProblem,
    *,
    method: Method,
    steps: int,
    candidates: int,
    top_k: int = 256,
    seed: int = 0,
    allowed: Sequence[int] | None = None,
    on_step: Callable[[int, float], None] = lambda step, loss: None,
) -> SuffixSearch:
    """Look for a suffix by `gcg` (Zou et al. 2023, algorithm 1) or `random`.

    A step draws up to `candidates` suffixes that survive re-tokenisation, each with one token replaced: a place drawn
    uniformly, a token drawn uniformly from the `top_k` of the steepest descent there, or from all. The best of them becomes
    the suffix where it is better than the one before; Zou et al. take it in any case, which with few candidates loses good
    ones.
    allowed: the tokens of a suffix, by default those that are printable.
    """
    generator = torch.Generator().manual_seed(seed % 2**63)
    tokens_A = torch.tensor(list(printable_tokens(problem._tokenizer) if allowed is None else allowed))
    current = list(problem.start)
    (best,) = problem.losses([current])
    losses, evaluations = [best], 1
    for step in range(steps):
        choices_LA: Tensor | None = None
        if method == "gcg":
            descent_LA = -problem.gradient(current)[:, tokens_A.to(problem.model.device)].cpu()
            choices_LA = tokens_A[descent_LA.topk(min(top_k, len(tokens_A)), dim=1).indices]
        tried = _candidates(problem, current, tokens_A, choices_LA, candidates, generator)
        if tried:
            found = problem.losses(tried)
            evaluations += len(tried)
            place = min(range(len(found)), key=found.__getitem__)
            if found[place] < best:
                best, current = found[place], tried[place]
        losses.append(best)
        on_step(step + 1, best)
    return SuffixSearch(problem.text(current), losses, evaluations)


def _candidates(
    problem: SuffixProblem,
    current: Sequence[int],
    tokens_A: Tensor,
    choices_LA: Tensor | None,
    count: int,
    generator: torch.Generator,
) -> list[list[int]]:
    """Different suffixes of one replaced token that survive re-tokenisation; fewer than `count` where few do."""
    kept: dict[tuple[int, ...], None] = {}
    for _ in range(_TRIES * count):
        place = int(torch.randint(len(current), (1,), generator=generator))
        choices = tokens_A if choices_LA is None else choices_LA[place]
        token = int(choices[int(torch.randint(len(choices), (1,), generator=generator))])
        changed = (*current[:place], token, *current[place + 1 :])
        if token != current[place] and changed not in kept and problem.survives(changed):
            kept[changed] = None
            if len(kept) == count:
                break
    return [list(suffix) for suffix in kept]


# ---------------------------------------------------------------------------------------------------------------- the attacks


def _play(method: Method, goal: Goal, context: AttackContext) -> Play:
    found = yield Query([user(goal.request)], to="search", work=partial(_search, method, goal, context))
    suffix = json.loads(found.text)["suffix"]
    yield Query([user(goal.request + suffix)])


def _search(method: Method, goal: Goal, context: AttackContext, seed: int) -> str:
    """The search as JSON, for the journal: a resumed run does not search again."""
    settings: GcgSettings = context.settings
    assert context.white_box is not None, "an attack on weights is not begun without them"
    model, tokenizer = context.white_box()
    problem = SuffixProblem(
        model,
        tokenizer,
        goal.request,
        goal.opening,
        suffix_tokens=settings.suffix_tokens,
        system=context.system,
        candidates_at_once=settings.candidates,
    )
    found = search_suffix(
        problem, method=method, steps=settings.steps, candidates=settings.candidates, top_k=settings.top_k, seed=seed
    )
    return json.dumps({"suffix": found.suffix, "losses": found.losses, "evaluations": found.evaluations})


GCG = Attack(partial(_play, "gcg"), needs=("white_box",))
RANDOM_SEARCH = Attack(partial(_play, "random"), needs=("white_box",))

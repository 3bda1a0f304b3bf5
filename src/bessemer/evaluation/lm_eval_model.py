"""Bessemer's engine as a model of lm-evaluation-harness.

    python -m bessemer.evaluation.lm_eval_model run --model bessemer --model_args pretrained=MODEL --tasks arc_easy

is `lm_eval` with the model registered, and takes its arguments; in Python `simple_evaluate(model=BessemerLM("MODEL"), …)`. The
entry point `lm_eval.models` names it too, for versions that read one (0.4.13 does not).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

from lm_eval.api.model import LM
from lm_eval.api.registry import register_model
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm

from bessemer.inference.engine import Engine, EngineConfig, SamplingParams, Score, ScoreItem
from bessemer.tokenization.prompts import encode_continuations

#: Default of `generate_until`, as in the harness's own models.
_MAX_TOKENS = 256
#: Names under which tasks give the longest answer, by priority.
_MAX_TOKENS_NAMES = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
#: Contexts, or texts, of one call of the engine.
_AT_ONCE = 256


@register_model("bessemer")
class BessemerLM(LM):
    """Requests of the harness on an engine; all that share a context are scored behind it once."""

    def __init__(
        self,
        pretrained: str | Engine,
        device: str | None = None,
        max_length: int | None = None,
        batch_size: int | str | None = None,
        max_batch_size: int | None = None,
    ) -> None:
        """pretrained: a model's folder, a GGUF file, or an engine. max_length: of prompt and answer; none: the model's context.

        batch_size: sequences computed at once; `auto` or none: the engine's own number. max_batch_size: of the harness's
        search for a batch size, which is not needed here.
        """
        super().__init__()
        sequences = {} if batch_size in (None, "auto") else {"max_num_seqs": batch_size}
        config = EngineConfig.parse({"max_model_len": max_length, **sequences}, "model_args")
        self.engine = (
            pretrained if isinstance(pretrained, Engine) else Engine(pretrained, device=device or "auto", config=config)
        )
        self._tokenizer = self.engine.tokenizer
        #: Of each rendered conversation, the ids up to its last control token and the text behind that.
        self._conversations: dict[str, tuple[list[int], str]] = {}

    @property
    def tokenizer_name(self) -> str:
        """The name by which the harness tells caches of chats apart."""
        return self._tokenizer.hash

    @property
    def max_length(self) -> int:
        """The most tokens that the model reads."""
        return self.engine.context_length

    def chat_template(self, chat_template: bool | str = False) -> str:
        """The tokenizer's template, which the harness keeps beside its results; empty where it has none."""
        return self._tokenizer.chat_template or ""

    def apply_chat_template(self, chat_history: Sequence[Mapping[str, Any]], add_generation_prompt: bool = True) -> str:
        """A conversation as text. It is recognised as a later context, so that control tokens typed by a user stay text.

        Without `add_generation_prompt` the last message is the beginning of the assistant's answer.
        """
        messages, begun = (chat_history, "") if add_generation_prompt else (chat_history[:-1], chat_history[-1]["content"])
        text = "".join(segment.text for segment in self._tokenizer.render_chat(messages, add_generation_prompt=True)) + begun
        ids = self._tokenizer.apply_chat_template(messages, add_generation_prompt=True)
        last = max((place for place, id in enumerate(ids) if self._tokenizer.is_special(id)), default=-1)
        self._conversations[text] = ids[: last + 1], self._tokenizer.decode(ids[last + 1 :]) + begun
        return text

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """(log-likelihood, whether greedy decoding writes it) of each (context, continuation)."""
        by_context: dict[str, list[int]] = {}
        for place, request in enumerate(requests):
            by_context.setdefault(request.args[0], []).append(place)
        items = []
        for context, of_context in by_context.items():
            ids, continuations = self._encode(context, [requests[place].args[1] for place in of_context])
            most = max(1, self.max_length + 1 - max(map(len, continuations)))
            items.append((ids[-most:], continuations))
        answers: list[tuple[float, bool]] = [(0.0, False)] * len(requests)
        for of_context, scores in zip(by_context.values(), self._score(items, disable_tqdm), strict=True):
            for place, score in zip(of_context, scores, strict=True):
                answers[place] = score.total, score.is_greedy
                self.cache_hook.add_partial("loglikelihood", requests[place].args, answers[place])
        return answers

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood of each text: every token scored once, after as much of the text before it as the context holds.

        Unlike the harness's own models a tokenizer that writes a begin token writes one, not two.
        """
        items: list[ScoreItem] = []
        counts = []
        for request in requests:
            windows = get_rolling_token_windows(
                token_list=self._tokenizer.encode(request.args[0], add_bos=False),
                prefix_token=self._tokenizer.bos_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            before = len(items)
            items += [(context, [continuation]) for context, continuation in map(make_disjoint_window, windows)]
            counts.append(len(items) - before)
        scores = iter(self._score(items, disable_tqdm))
        answers = []
        for request, count in zip(requests, counts, strict=True):
            answers.append(sum((score.total for (score,) in islice(scores, count)), 0.0))
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, answers[-1])
        return answers

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """A completion of each (context, settings), without the stop string that ended it. Raises ConfigError for a setting
        that the engine does not have."""
        answers = []
        params = [_sampling_params(request.args[1]) for request in requests]
        with tqdm(total=len(requests), desc="generate_until", disable=disable_tqdm) as bar:
            for start in range(0, len(requests), _AT_ONCE):
                batch, own = requests[start : start + _AT_ONCE], params[start : start + _AT_ONCE]
                prompts = [
                    self._prompt(request.args[0], max(1, self.max_length - each.max_tokens))
                    for request, each in zip(batch, own, strict=True)
                ]
                for request, completion in zip(batch, self.engine.generate(prompts, own), strict=True):
                    answers.append(completion.text)
                    self.cache_hook.add_partial("generate_until", request.args, completion.text)
                bar.update(len(batch))
        return answers

    def _score(self, items: Sequence[ScoreItem], disable_tqdm: bool) -> Iterator[list[Score]]:
        with tqdm(total=len(items), desc="loglikelihood", disable=disable_tqdm) as bar:
            for start in range(0, len(items), _AT_ONCE):
                scored = self.engine.score_items(items[start : start + _AT_ONCE])
                bar.update(len(scored))
                yield from scored

    def _encode(self, context: str, continuations: Sequence[str]) -> tuple[list[int], list[list[int]]]:
        if context not in self._conversations:
            return encode_continuations(self._tokenizer, context, continuations)
        head, tail = self._conversations[context]
        own, encoded = encode_continuations(self._tokenizer, tail, continuations)
        return head + own[len(self._tokenizer.begin_ids) :], encoded

    def _prompt(self, context: str, most: int) -> list[int]:
        if context in self._conversations:
            head, tail = self._conversations[context]
            ids = head + self._tokenizer.encode(tail, add_bos=False)
        else:
            ids = self._tokenizer.encode(context) or [self._tokenizer.bos_id]
        return ids[-most:]


def _sampling_params(settings: Mapping[str, Any]) -> SamplingParams:
    """The harness's generation settings as the engine's. Greedy unless a task asks for samples."""
    given = dict(settings)
    lengths = [given.pop(name, None) for name in _MAX_TOKENS_NAMES]
    until = given.pop("until", None) or []
    temperature = given.pop("temperature", None)
    samples = given.pop("do_sample", temperature is not None)
    values = {
        "max_tokens": next((int(length) for length in lengths if length is not None), _MAX_TOKENS),
        "temperature": (1.0 if temperature is None else temperature) if samples else 0.0,
        "stop": [until] if isinstance(until, str) else list(until),
    }
    # tasks of greedy decoding may also set parameters of sampling, which are ignored
    return SamplingParams.parse(values | (given if samples else {}), "generation settings")


if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()

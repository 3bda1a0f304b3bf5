"""Log-probabilities in OpenAI's two forms: of chat answers, and of plain completions with or without their prompt."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from bessemer.inference.sampling.sampler import Sampled
from bessemer.tokenization.streaming import StreamingDecoder
from bessemer.tokenization.tokenizer import Tokenizer

#: JSON has no infinity: what is at or below has this log-probability, as in other servers.
_LOWEST = -9999.0


def token_text(tokenizer: Tokenizer, token: int) -> str:
    r"""A token as clients are shown it: its text, `bytes:\xe6` where it is a part of a character (as OpenAI writes it), and
    `token_id:7` where the model has more tokens than the tokenizer."""
    content = _token_bytes(tokenizer, token)
    if content is None:
        return f"token_id:{token}"
    try:
        return content.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in content)


def chat_log_probs(tokenizer: Tokenizer, sampled: Sequence[Sampled]) -> dict[str, Any]:
    """The `logprobs` of a chat choice, or of one event of its stream."""
    return {"content": [_chat_token(tokenizer, one) for one in sampled], "refusal": None}


class CompletionLogProbs:
    """The `logprobs` of a plain completion's choice, in one part or, in a stream, in several."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._decoder = StreamingDecoder(tokenizer)
        self._length = 0

    def of_prompt(self, prompt: Sequence[int], known: Sequence[Sampled]) -> dict[str, list[Any]]:
        """Of a prompt that is shown: nothing comes before its first token, which so has no log-probability."""
        assert len(known) == len(prompt) - 1, "every token of the prompt but the first has its log-probability"
        first: dict[str, list[Any]] = {
            "tokens": [token_text(self._tokenizer, prompt[0])],
            "token_logprobs": [None],
            "top_logprobs": [None],
            "text_offset": [self._offset(prompt[0])],
        }
        return joined(first, self.of(known))

    def of(self, sampled: Sequence[Sampled]) -> dict[str, list[Any]]:
        """Of tokens that follow those before. The likeliest are given with the token itself among them."""
        part: dict[str, list[Any]] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
        for token, found in sampled:
            assert found is not None, "log-probabilities were asked for"
            text = token_text(self._tokenizer, token)
            top: dict[str, float] = {}
            for id, value in found.top:
                top.setdefault(token_text(self._tokenizer, id), _finite(value))
            top.setdefault(text, _finite(found.token))
            part["tokens"].append(text)
            part["token_logprobs"].append(_finite(found.token))
            part["top_logprobs"].append(top)
            part["text_offset"].append(self._offset(token))
        return part

    def _offset(self, token: int) -> int:
        """Where the token's text begins, in characters of the text so far."""
        offset = self._length
        if token < self._tokenizer.vocab_size:
            self._length += len(self._decoder.feed([token]))
        return offset


def joined(first: dict[str, list[Any]], second: dict[str, list[Any]]) -> dict[str, list[Any]]:
    """Two parts of a plain completion's log-probabilities, one after the other."""
    return {name: first[name] + second[name] for name in first}


def _chat_token(tokenizer: Tokenizer, sampled: Sampled) -> dict[str, Any]:
    assert sampled.log_probs is not None, "log-probabilities were asked for"
    own = _entry(tokenizer, sampled.token, sampled.log_probs.token)
    return own | {"top_logprobs": [_entry(tokenizer, token, value) for token, value in sampled.log_probs.top]}


def _entry(tokenizer: Tokenizer, token: int, value: float) -> dict[str, Any]:
    content = _token_bytes(tokenizer, token)
    return {
        "token": token_text(tokenizer, token),
        "logprob": _finite(value),
        "bytes": None if content is None else list(content),
    }


def _token_bytes(tokenizer: Tokenizer, token: int) -> bytes | None:
    return tokenizer.token_bytes(token) if token < tokenizer.vocab_size else None


def _finite(value: float) -> float:
    return max(value, _LOWEST)

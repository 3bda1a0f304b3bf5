"""Grammar-constrained decoding: a JSON schema, a regular expression, a choice, or a context-free grammar.

`llguidance` follows the grammar byte by byte and tells, before each token, which ones can go on from here; the others get
a logit of -inf. So the answer fits, whatever the model says, and the model chooses among what fits.
"""

from __future__ import annotations

import json
import threading
from collections import OrderedDict
from collections.abc import Collection, Sequence
from typing import Any

import numpy as np

from bessemer.core.errors import RequestError
from bessemer.inference.sampling.params import SamplingParams
from bessemer.tokenization.tokenizer import Tokenizer

# Shapes: V vocabulary.

#: White space between the parts of JSON: none, a space, or a new line with its indentation. Without an end to it, a model
#: that has learnt little would write nothing else.
JSON_SPACE = r"( |\n[ \t]{0,40})"

#: Compiled grammars that are kept.
_KEPT = 128


class GrammarMatcher:
    """The state of a request's completion in its grammar."""

    def __init__(self, matcher: Any, vocab_size: int, end_tokens: Collection[int], name: str) -> None:
        self._matcher = matcher
        self._vocab_size = vocab_size
        self._name = name
        self._end_tokens = frozenset(end_tokens)
        self._consumed: list[int] = []

    def allowed(self) -> np.ndarray:
        """Which tokens may come next, bool (V,); the end tokens where the text may end.

        Raises RequestError where the grammar leads to a place that nothing follows, and when it takes more work than
        `llguidance` allows one.
        """
        bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        if self._matcher.is_error():
            reason = _one_line(self._matcher.get_error())
            dead = "no text that fits goes on from here; mend the grammar" if reason.startswith("NoExtension") else reason
            raise RequestError(f"{self._name}: {dead}")
        allowed_V = np.zeros(self._vocab_size, np.bool_)
        known = np.unpackbits(bits, count=min(self._vocab_size, 8 * len(bits)), bitorder="little")
        allowed_V[: len(known)] = known
        return allowed_V

    def consume(self, token: int) -> None:
        """Go on by a token that is allowed. An end token ends the text."""
        self._consumed.append(token)
        if not self.ended:
            self._matcher.consume_token(token)

    def valid_prefix(self, tokens: Sequence[int]) -> int:
        """How many of these tokens may follow, one after the other."""
        return 0 if self.ended else self._matcher.validate_tokens(list(tokens))

    def rollback(self, count: int) -> None:
        """Take the last tokens back."""
        assert 0 <= count <= len(self._consumed), (count, len(self._consumed))
        kept = len(self._consumed) - count
        # an end token is not consumed by the library's matcher
        in_grammar = sum(token not in self._end_tokens for token in self._consumed[kept:])
        if in_grammar:
            self._matcher.rollback(in_grammar)
        del self._consumed[kept:]

    @property
    def ended(self) -> bool:
        """Whether an end token has come."""
        return bool(self._consumed) and self._consumed[-1] in self._end_tokens

    @property
    def complete(self) -> bool:
        """Whether the text so far fits as a whole."""
        return self._matcher.is_accepting()

    @property
    def finished(self) -> bool:
        """Whether the text fits and nothing but an end can follow."""
        return self.ended or (self._matcher.is_stopped() and not self._matcher.is_error())


class GrammarCompiler:
    """Compiles grammars for one tokenizer, each once as long as it is in use; from several threads too."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, end_tokens: Collection[int] | None = None) -> None:
        """vocab_size: the model's, which may be above the tokenizer's. end_tokens: by default the tokenizer's."""
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._end_tokens = sorted(tokenizer.eos_ids if end_tokens is None else end_tokens)
        self._tokens: Any = None
        self._kept: OrderedDict[tuple[str, str], Any] = OrderedDict()
        self._lock = threading.Lock()

    def matcher(self, params: SamplingParams) -> GrammarMatcher | None:
        """A new matcher at the beginning of the grammar that a request asks for; None where it asks for none.

        Raises RequestError, in one line, for a grammar that does not compile or that no text fits.
        """
        if params.grammar is None:
            return None
        name, value = params.grammar
        key = (name, value if isinstance(value, str) else json.dumps(value))
        with self._lock:
            compiled = self._kept.get(key)
            if compiled is None:
                compiled = self._compile(name, value)
                self._kept[key] = compiled
                if len(self._kept) > _KEPT:
                    self._kept.popitem(last=False)
            self._kept.move_to_end(key)
            return GrammarMatcher(compiled.deep_copy(), self._vocab_size, self._end_tokens, name)

    def _compile(self, name: str, value: Any) -> Any:
        try:
            from llguidance import LLMatcher
        except ImportError:
            raise RequestError(f"{name} needs llguidance; install it with: pip install 'bessemer[serve]'") from None
        try:
            if name == "json_schema":
                text = value if isinstance(value, str) else json.dumps(value)
                grammar = LLMatcher.grammar_from_json_schema(text, defaults={"whitespace_pattern": JSON_SPACE})
            elif name == "regex":
                grammar = LLMatcher.grammar_from_regex(value)
            elif name == "choice":
                grammar = LLMatcher.grammar_from_lark(
                    "start: " + " | ".join(json.dumps(text, ensure_ascii=False) for text in value)
                )
            else:
                grammar = LLMatcher.grammar_from_lark(value)
        except ValueError as error:
            raise RequestError(f"{name} does not compile: {_one_line(str(error))}") from None
        matcher = LLMatcher(self._library_tokens(), grammar, log_level=0)
        if matcher.is_error():
            raise RequestError(f"{name} does not compile: {_one_line(matcher.get_error())}")
        begun = GrammarMatcher(matcher.deep_copy(), self._vocab_size, self._end_tokens, name)
        try:
            allowed_V = begun.allowed()
        except RequestError:
            allowed_V = np.zeros(self._vocab_size, np.bool_)
        if not begun.complete:
            allowed_V[self._end_tokens] = False
        if not allowed_V.any():
            raise RequestError(f"{name} fits no text that the model's tokens can write; change it")
        return matcher

    def _library_tokens(self) -> Any:
        """Our tokenizer as `llguidance` takes it: the bytes of each token, and which ones are control tokens."""
        if self._tokens is None:
            from llguidance import LLTokenizer, TokenizerWrapper

            if self._tokenizer.kind in ("wordpiece", "words"):
                raise RequestError(
                    f"{self._tokenizer.folder}: its tokens are whole words, which cannot follow a grammar; "
                    "leave out json_schema, regex, choice and ebnf"
                )
            self._tokens = LLTokenizer(TokenizerWrapper(_Tokens(self._tokenizer)), eos_token=self._end_tokens)
        return self._tokens


class _Tokens:
    """A tokenizer in the form that `llguidance` reads."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        every = range(tokenizer.vocab_size)
        self.eos_token_id = tokenizer.eos_ids[0]
        self.bos_token_id = tokenizer.bos_id
        self.tokens = [tokenizer.token_bytes(token) for token in every]
        self.special_token_ids = [token for token in every if tokenizer.is_special(token)]
        self._tokenizer = tokenizer

    def __call__(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_bos=False)


def _one_line(reason: str) -> str:
    """The library's reason without the drawing of the place, and without its inner state."""
    reason = reason.split("\n<state>")[0]
    lines = (line.strip() for line in reason.splitlines())
    return " ".join(line for line in lines if line and not set(line) <= {"^", " "} and not _is_quote(line))


def _is_quote(line: str) -> bool:
    number, bar, _ = line.partition(" | ")
    return bool(bar) and number.strip().isdigit()

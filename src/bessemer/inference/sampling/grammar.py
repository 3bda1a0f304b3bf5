"""Grammar-constrained decoding: a JSON schema, a regular expression, a choice, or a context-free grammar.

`llguidance` follows the grammar byte by byte and tells, before each token, which ones can go on from here; the others get
a logit of -inf. So the answer fits, whatever the model says, and the model chooses among what fits.
"""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from bessemer.core.concurrency import FairLock
from bessemer.core.environment import install_extra
from bessemer.core.errors import RequestError
from bessemer.inference.sampling.params import SamplingParams
from bessemer.tokenization.tokenizer import Tokenizer

# Shapes: V vocabulary.

#: White space between the parts of JSON: none, a space, or a new line with its indentation. Without an end to it, a model
#: that has learnt little would write nothing else.
JSON_SPACE = r"( |\n[ \t]{0,40})"

#: Compiled grammars that are kept.
_KEPT = 128
#: Texts of a choice, and characters of any grammar: the library's time grows with their square.
MOST_CHOICES, LONGEST_GRAMMAR = 4096, 1 << 18
#: Seconds that a grammar may take to compile; the first one waits for a process to start too.
_COMPILE_SECONDS, _START_SECONDS = 5.0, 60.0
#: Bytes of the stack for compiling grammars: more than in `grammar_trial.py`, so that what compiles there compiles here.
_STACK = 32 << 20


def check_size(setting: str, value: Any, name: str | None = None) -> None:
    """Raises RequestError for a grammar above the size limits. name: of the setting, in the error."""
    name = name or setting
    if setting == "choice":
        if len(value) > MOST_CHOICES:
            raise RequestError(f"{name}: {len(value):,} texts are more than the {MOST_CHOICES:,} that are taken; send fewer")
        length = sum(map(len, value))
    else:
        length = len(value if isinstance(value, str) else json.dumps(value))
    if length > LONGEST_GRAMMAR:
        raise RequestError(f"{name}: {length:,} characters are more than the {LONGEST_GRAMMAR:,} that are taken; shorten it")


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

        Raises RequestError at a dead end of the grammar, and when it exceeds `llguidance`'s limits of work.
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
        self._trial: _Trial | None = None
        #: Compiled grammars, or the errors of those that do not compile, by name and value.
        self._kept: OrderedDict[tuple[str, str], Any | RequestError] = OrderedDict()
        self._lock = threading.Lock()
        #: Held while a grammar is compiled. Requests for a kept grammar do not take it.
        self._compiling = FairLock()

    def matcher(self, params: SamplingParams) -> GrammarMatcher | None:
        """A new matcher at the beginning of the grammar that a request asks for; None where it asks for none.

        Raises RequestError, in one line, for a grammar that is too large, does not compile in time, or that no text fits.
        """
        if params.grammar is None:
            return None
        name, value = params.grammar
        check_size(name, value)
        key = (name, value if isinstance(value, str) else json.dumps(value))
        matcher = self._copy_of(key)
        if matcher is None:
            with self._compiling:
                # another thread may have compiled it meanwhile
                matcher = self._copy_of(key) or self._compiled_and_kept(key, name, value)
        return matcher

    def _copy_of(self, key: tuple[str, str]) -> GrammarMatcher | None:
        """A new matcher of a grammar that is kept. Raises RequestError for one that was refused."""
        with self._lock:
            kept = self._kept.get(key)
            if kept is None:
                return None
            self._kept.move_to_end(key)
            if isinstance(kept, RequestError):
                raise RequestError(str(kept))
            return GrammarMatcher(kept.deep_copy(), self._vocab_size, self._end_tokens, key[0])

    def _compiled_and_kept(self, key: tuple[str, str], name: str, value: Any) -> GrammarMatcher | None:
        try:
            kept = self._compile(name, value)
        except RequestError as error:
            kept = error
        with self._lock:
            self._kept[key] = kept
            if len(self._kept) > _KEPT:
                self._kept.popitem(last=False)
        return self._copy_of(key)

    def _compile(self, name: str, value: Any) -> Any:
        try:
            from llguidance import LLMatcher
        except ImportError:
            raise RequestError(f"{name} needs llguidance; install it with: {install_extra('serve')}") from None
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
        tokens = self._library_tokens()
        if self._trial is None:
            self._trial = _Trial(_LibraryTokenizer(self._tokenizer), self._end_tokens)
        self._trial.compile(name, grammar)
        matcher = _with_a_long_stack(lambda: LLMatcher(tokens, grammar, log_level=0))
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
            self._tokens = LLTokenizer(TokenizerWrapper(_LibraryTokenizer(self._tokenizer)), eos_token=self._end_tokens)
        return self._tokens


class _Trial:
    """Compiles a grammar in another process first, killed after a time limit: on some inputs of a few hundred bytes the library
    never ends, and long chains of rules overflow its stack."""

    def __init__(self, tokens: _LibraryTokenizer, end_tokens: Sequence[int]) -> None:
        self._first_line = json.dumps(
            {
                "tokens": {
                    "tokens": [token.hex() for token in tokens.tokens],
                    "special": tokens.special_token_ids,
                    "eos": tokens.eos_token_id,
                    "bos": tokens.bos_token_id,
                },
                "end_tokens": list(end_tokens),
            }
        )
        self._process: subprocess.Popen[str] | None = None

    def compile(self, name: str, grammar: str) -> None:
        """Raises RequestError for a grammar that does not compile, or not in time."""
        seconds = _COMPILE_SECONDS
        if self._process is None or self._process.poll() is not None:
            self._process = self._started()
            seconds += _START_SECONDS
        process = self._process
        assert process.stdin is not None and process.stdout is not None
        timer = threading.Timer(seconds, process.kill)
        timer.start()
        try:
            process.stdin.write(json.dumps(grammar) + "\n")
            process.stdin.flush()
            answer = process.stdout.readline()
        except OSError:
            answer = ""
        finally:
            timer.cancel()
        if not answer:
            process.kill()
            process.wait()
            raise RequestError(f"{name} does not compile: it takes too much time or memory; simplify it")
        reason = json.loads(answer)
        if reason:
            raise RequestError(f"{name} does not compile: {_one_line(reason)}")

    def _started(self) -> subprocess.Popen[str]:
        script = Path(__file__).with_name("grammar_trial.py")
        process = subprocess.Popen(
            [sys.executable, "-P", str(script)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            encoding="utf-8",
        )
        assert process.stdin is not None
        process.stdin.write(self._first_line + "\n")
        # if this process is killed, the other one reads the end of its input and exits
        weakref.finalize(self, _end, process)
        return process


def _end(process: subprocess.Popen[str]) -> None:
    process.kill()
    process.wait()
    for stream in (process.stdin, process.stdout):
        if stream is not None:
            with suppress(OSError):
                stream.close()


def _with_a_long_stack(compute: Callable[[], Any]) -> Any:
    """The result of a function, on a thread whose stack is `_STACK` bytes."""
    before = threading.stack_size(_STACK)
    try:
        with ThreadPoolExecutor(1) as pool:
            return pool.submit(compute).result()
    finally:
        threading.stack_size(before)


class _LibraryTokenizer:
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
    if reason.startswith("panic:"):
        # an assertion of the library, with its stack
        return "it is too large"
    reason = reason.split("\n<state>")[0]
    lines = (line.strip() for line in reason.splitlines())
    return " ".join(line for line in lines if line and not set(line) <= {"^", " "} and not _is_quote(line))


def _is_quote(line: str) -> bool:
    number, bar, _ = line.partition(" | ")
    return bool(bar) and number.strip().isdigit()

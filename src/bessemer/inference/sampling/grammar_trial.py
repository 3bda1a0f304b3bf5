"""Compiles grammars that nobody has read, in a process of its own: it may hang, crash or take all memory that it is allowed.

Run as a script by `grammar.py`, it imports nothing of ours. Lines of JSON: the tokens first, then a grammar a line; of each the
reason why it does not compile comes back, empty where it does.
"""

from __future__ import annotations

import json
import sys
import threading

#: Bytes of address space, and of the stack, on which long chains of rules are followed.
_MEMORY, _STACK = 4 << 30, 16 << 20


class _Tokens:
    """A tokenizer in the form that `llguidance` reads, without its encoding."""

    def __init__(self, tokens: list[str], special: list[int], eos: int, bos: int | None) -> None:
        self.tokens = [bytes.fromhex(token) for token in tokens]
        self.special_token_ids = special
        self.eos_token_id = eos
        self.bos_token_id = bos

    def __call__(self, text: str | bytes) -> list[int]:
        return []


def _compile_all() -> None:
    from llguidance import LLMatcher, LLTokenizer, TokenizerWrapper

    given = json.loads(sys.stdin.readline())
    tokenizer = LLTokenizer(TokenizerWrapper(_Tokens(**given["tokens"])), eos_token=given["end_tokens"])
    for line in sys.stdin:
        matcher = LLMatcher(tokenizer, json.loads(line), log_level=0)
        if not matcher.is_error():
            matcher.deep_copy().compute_bitmask()
        print(json.dumps(matcher.get_error() if matcher.is_error() else ""), flush=True)


if __name__ == "__main__":
    try:
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (_MEMORY, _MEMORY))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    except (ImportError, ValueError, OSError):
        # without such limits the time still ends it
        pass
    threading.stack_size(_STACK)
    thread = threading.Thread(target=_compile_all)
    thread.start()
    thread.join()

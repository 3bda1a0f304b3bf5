"""The guard in a conversation: a hook that checks what the assistant reads, says and calls (`assistant/hooks.py`).

An answer is given out by sentences: each is held back until it is complete and was checked with what stands before it, so
nothing is shown before it was read. In the middle of a sentence one flag may be chance, and two checks in a row must agree;
then the message stops. Of what was shown nothing is taken back: the refusal follows it. Where nothing was shown, an answer
whose policy says `safe_completion` is written once more, with an instruction; if that is flagged too, it is refused.
"""

from __future__ import annotations

import json
import re
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

from bessemer.assistant.conversation import Conversation
from bessemer.assistant.generation import MessageDraft
from bessemer.assistant.hooks import Decision as HookDecision
from bessemer.assistant.hooks import Deny, Hook, Pass, Refuse, Retry, TurnContext, Wait
from bessemer.assistant.messages import Message, MessagePart, Origin, ToolCall
from bessemer.assistant.tools import Tool, ToolResult
from bessemer.core.errors import ConfigError
from bessemer.core.hashing import hash_bytes
from bessemer.core.policy import SurfaceName
from bessemer.safety.guard import Decision, Guard
from bessemer.safety.provenance import verdict

#: Checks of a growing answer that must agree.
_FLAGS = 2
#: Characters that a growing answer has to gain before it is checked again.
_BETWEEN_CHECKS = 12
#: Decisions that are kept in memory.
_LATEST = 200
#: Characters in which the end of a sentence is looked for.
_LONGEST_END = 16
_SENTENCE_ENDS = re.compile(r"(?:[.!?…]['\")\]]*\s+|[。！？]\s*|\n\s*)\Z")
_SURFACE_OF: dict[Origin, SurfaceName] = {"user": "prompt", "document": "document", "memory": "document", "tool": "tool"}


class AuditLog:
    """Decisions, without the texts unless asked: the latest in memory, and all in a file, a line of JSON each."""

    def __init__(self, path: Path | None, policy_hash: str, *, with_content: bool = False) -> None:
        """path: None for no file. Raises ConfigError where it cannot be written."""
        self.with_content = with_content
        self._path = path
        self._policy = policy_hash
        self._latest: deque[dict[str, Any]] = deque(maxlen=_LATEST)
        self._lock = threading.Lock()
        try:
            if path is not None:
                path.open("a", encoding="utf-8").close()
        except OSError as error:
            raise ConfigError(f"{path}: the audit log cannot be written: {error.strerror}") from None

    def latest(self) -> list[dict[str, Any]]:
        """The latest decisions, the newest first, as the lines of the file."""
        with self._lock:
            return [*reversed(self._latest)]

    def add(self, decision: Decision, text: str, context: TurnContext | None = None) -> None:
        """Add a decision that is more than to allow."""
        one = decision.finding
        if one is None:
            return
        entry: dict[str, Any] = {
            "time": round(time.time(), 3),
            "policy": self._policy,
            "surface": decision.surface,
            "action": decision.action,
            "category": one.category,
            "score": round(one.score, 4),
            "rail": one.rail,
            "rule": one.rule,
            "reading": one.reading,
            "user": context.principal.user if context else None,
            "characters": len(text),
            "text_hash": hash_bytes(text.encode("utf-8", "replace")),
        }
        if self.with_content:
            entry["text"] = text.encode("utf-8", "replace").decode()
        else:
            # a rule of the policy may quote the word that it found
            entry["rule"] = re.sub(r"'.*'", "'…'", one.rule)
        line = json.dumps(entry, ensure_ascii=False) + "\n"
        with self._lock:
            self._latest.append(entry)
            if self._path is not None:
                with self._path.open("a", encoding="utf-8") as file:
                    file.write(line)


@dataclass
class _Growing:
    """A message that is being written. passed: characters that may be shown; checked: length at the last check."""

    round: int
    attempt: int
    passed: int = 0
    checked: int = 0
    flags: int = 0
    #: What was noted down of it, so that each sentence adds what is new.
    noted: set[tuple[str, str]] = field(default_factory=set)
    #: What is to be blacked out was found: the rest of the answer waits for its end.
    redacts: bool = False


class GuardHook(Hook):
    """Applies a guard to every turn. One hook serves any number of conversations at once."""

    holds_back = True

    def __init__(
        self, guard: Guard, audit: AuditLog | None = None, *, approver: Callable[[ToolCall, Tool], bool] | None = None
    ) -> None:
        """approver: whether the user, who is there, allows a call that is asked back. Without one the assistant has to ask."""
        self.guard = guard
        self.policy = guard.policy
        config = guard.config
        if audit is None:
            path = None if config.audit is None else Path(config.audit)
            audit = AuditLog(path, self.policy.hash, with_content=config.audit_content)
        self.audit = audit
        self.takes_long = guard.takes_long
        self._approver = approver
        self._growing: WeakKeyDictionary[Conversation, _Growing] = WeakKeyDictionary()
        self._lock = threading.Lock()

    # -- what the assistant reads

    def read(self, message: Message, context: TurnContext) -> Message:
        """Parts of users, documents and tools as the assistant may read them. A refused prompt stays: `admit` ends the turn."""
        parts: list[MessagePart] = []
        for part in message.parts:
            surface = _SURFACE_OF.get(part.origin)
            if surface is None:
                parts.append(part)
                continue
            decision = self.guard.check(part.text, surface)
            # a prompt is decided about, and noted down, by `admit`
            if surface != "prompt":
                self._note(decision, part.text, context)
            parts += self._as_read(part, decision)
        return replace(message, parts=tuple(parts))

    def admit(self, context: TurnContext) -> Refuse | None:
        """Refuses a turn by what the user said since the assistant's last message, each message alone and those that pass
        together."""
        with self._lock:
            self._growing.pop(context.conversation, None)
        if context.round > 1:
            return None
        latest: list[str] = []
        for message in reversed(context.conversation.messages):
            if message.role == "assistant":
                break
            latest += ["".join(part.text for part in message.parts if part.origin == "user")] if message.role == "user" else []
        # a client that begins the answer itself may say in it what is asked
        latest = [text for text in (*reversed(latest), context.answer_prefix) if text]
        for text in [*latest, *(["\n".join(latest)] if len(latest) > 1 else [])]:
            decision = self.guard.check(text, "prompt")
            self._note(decision, text, context)
            if decision.action == "refuse":
                return Refuse(decision.reason, self.guard.refusal(decision))
        return None

    def after_call(self, call: ToolCall, result: ToolResult, context: TurnContext) -> ToolResult:
        decision = self.guard.check(result.text, "tool")
        self._note(decision, result.text, context)
        parts = self._as_read(MessagePart(result.text, "tool", call.name), decision)
        return replace(result, text="".join(part.text for part in parts))

    def _as_read(self, part: MessagePart, decision: Decision) -> list[MessagePart]:
        actions = {action for _, action in decision.findings}
        if "refuse" in actions and decision.surface != "prompt":
            return [replace(part, text=f"[left out: {decision.finding.category if decision.finding else ''}]")]
        if "redact" in actions:
            part = replace(part, text=self.guard.redacted(part.text, decision))
        return [part, *([MessagePart(f"\n\n{self.policy.messages.warning}", "system")] if "warn" in actions else [])]

    # -- what it calls

    def before_call(self, call: ToolCall, tool: Tool, context: TurnContext) -> ToolCall | Deny:
        if context.conversation.is_tainted and not self.policy.taint.permits(call.name):
            return Deny(f"the policy allows no call of {call.name} after text of unknown authors")
        if context.conversation.is_tainted and (rules := self.policy.taint.calls) is not None:
            decided = verdict(call, context.conversation.messages, rules)
            if decided.outcome == "deny":
                return Deny(f"the policy refuses this call: {decided.reason}")
            if decided.outcome == "ask" and not (self._approver is not None and self._approver(call, tool)):
                return Deny(f"{decided.reason}. Tell the user what you would call and with what, and wait until they say so")
        written = json.dumps(dict(call.arguments), ensure_ascii=False, default=str)
        decision = self.guard.check(written, "call")
        self._note(decision, written, context)
        if decision.action == "refuse":
            return Deny(f"the policy refuses this call: {decision.finding.category if decision.finding else ''}")
        return call

    # -- what it says

    def check(self, draft: MessageDraft, context: TurnContext, *, is_final: bool) -> HookDecision:
        growing = self._state(context)
        text = f"{draft.thinking}\n{draft.text}" if draft.thinking else draft.text
        if is_final:
            return self._final(draft, text, growing, context)
        if growing.redacts or self.guard.takes_long:
            return Wait()
        is_sentence = bool(_SENTENCE_ENDS.search(text[-_LONGEST_END:]))
        is_due = is_sentence or len(text) - growing.passed >= self.guard.config.held_characters
        if not is_due and len(text) - growing.checked < _BETWEEN_CHECKS and not growing.flags:
            return Wait()
        growing.checked = len(text)
        decision = self._decided(text, growing, context.answer_prefix)
        if decision.action in ("refuse", "safe_completion"):
            growing.flags += 1
            return self._stopped(decision, text, growing, context) if growing.flags >= _FLAGS else Wait()
        growing.flags = 0
        if decision.action == "redact":
            growing.redacts = True
            return Wait()
        if not is_due:
            return Wait()
        self._note_once(decision, text, growing, context)
        growing.passed = len(text)
        return Pass()

    def _final(self, draft: MessageDraft, text: str, growing: _Growing, context: TurnContext) -> HookDecision:
        decision = self._decided(text, growing, context.answer_prefix)
        if decision.action in ("refuse", "safe_completion"):
            return self._stopped(decision, text, growing, context)
        self._note_once(decision, text, growing, context)
        if decision.action != "redact":
            return Pass()
        # what was shown had nothing to black out; thinking with something is not given out at all
        shown = max(0, growing.passed - (len(text) - len(draft.text)))
        rest = draft.text[shown:]
        again = self.guard.check(rest, "answer")
        return Refuse(decision.reason, self.guard.redacted(rest, again), keeps_shown=growing.passed > 0)

    def _decided(self, text: str, growing: _Growing, prefix: str) -> Decision:
        """Of the end of an answer, from where it was last shown and some before; of a short one, or a complete one, the
        whole."""
        start = max(0, min(growing.passed, len(text)) - self.guard.config.checked_characters)
        return self.guard.check(text[start:] if start else prefix + text, "answer")

    def _stopped(self, decision: Decision, text: str, growing: _Growing, context: TurnContext) -> HookDecision:
        self._note(decision, text, context)
        if decision.action == "safe_completion" and not growing.passed and growing.attempt == 0:
            return Retry(decision.reason, self.policy.messages.safe_completion)
        separator = "\n\n" if growing.passed else ""
        return Refuse(decision.reason, separator + self.guard.refusal(decision), keeps_shown=growing.passed > 0)

    def _state(self, context: TurnContext) -> _Growing:
        with self._lock:
            growing = self._growing.get(context.conversation)
            if growing is None or (growing.round, growing.attempt) != (context.round, context.attempt):
                growing = self._growing[context.conversation] = _Growing(context.round, context.attempt)
            return growing

    def _note_once(self, decision: Decision, text: str, growing: _Growing, context: TurnContext) -> None:
        key = (decision.finding.category, decision.finding.rail) if decision.finding else ("", "")
        if key not in growing.noted:
            growing.noted.add(key)
            self._note(decision, text, context)

    def _note(self, decision: Decision, text: str, context: TurnContext) -> None:
        self.audit.add(decision, text, context)

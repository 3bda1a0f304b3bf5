"""Guard models in place of the classifier: how Llama Guard 3 and 4, Qwen3Guard and gpt-oss-safeguard are asked, and what they
answer.

Llama Guard takes the policy's categories by their codes in a prompt of its own, sent to `/completions`; it answers a blank
line, `safe` or `unsafe`, and codes. The prompt ends with the blank line, so that the first token is the verdict and its
probability the score. Qwen3Guard takes the conversation by its chat template and answers `Safety:`, `Categories:`, and
`Refusal:`. gpt-oss-safeguard takes a policy in words as system message, and answers in the form that this asks for. An answer
that cannot be read is an error, not a pass.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from bessemer.core.errors import ConfigError
from bessemer.core.http_client import ApiError, HttpClient, repeated, start_of
from bessemer.core.policy import Policy, SurfaceName
from bessemer.inference.engine import Engine
from bessemer.inference.sampling.params import SamplingParams
from bessemer.safety.config import GuardConfig, GuardForm
from bessemer.safety.findings import Finding
from bessemer.safety.normalise import Reading

_MOST_TOKENS = {"llama_guard_3": 24, "llama_guard_4": 24, "qwen3guard": 64, "gpt_oss_safeguard": 768}
_ATTEMPTS, _FIRST_WAIT = 3, 0.5
#: Characters of a text that a guard model is asked about.
_LONGEST = 24_000
#: Score of Qwen3Guard's middle verdict: below the usual limit of a category.
_CONTROVERSIAL = 0.5


@dataclass(frozen=True)
class Verdict:
    """A guard model's answer. categories: names of the policy's, or `injection`. refuses: whether the answer that it was asked
    about is a refusal, where the model says so."""

    score: float
    categories: tuple[str, ...] = ()
    refuses: bool | None = None

    @property
    def is_unsafe(self) -> bool:
        return self.score > 0 and bool(self.categories)


class GuardModel(Protocol):
    """Answers the request of a form: its text, and the probabilities of the first token, where known."""

    def complete(self, request: Mapping[str, Any], max_tokens: int) -> tuple[str, Mapping[str, float]]: ...


# ---------------------------------------------------------------------------------------------------- what is asked


def llama_guard_prompt(policy: Policy, text: str, role: str = "User", *, version: int = 3) -> str:
    """Llama Guard's prompt for one message. role: `User` or `Agent`. Categories without a code get the next free one.

    Control tokens and the marks of the prompt's parts are broken up in the text, so that it cannot end its part.
    """
    start, end, turn = ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
    if version == 4:
        start, end, turn = ("<|header_start|>", "<|header_end|>", "<|eot|>")
    listed = "\n".join(f"{code}: {policy.categories[name].meaning}." for code, name in category_codes(policy).items())
    return (
        f"<|begin_of_text|>{start}user{end}\n\n"
        f"Task: Check if there is unsafe content in '{role}' messages in conversations according our safety policy with the "
        f"below categories.\n\n<BEGIN UNSAFE CONTENT CATEGORIES>\n{listed}\n<END UNSAFE CONTENT CATEGORIES>\n\n"
        f"<BEGIN CONVERSATION>\n\n{role}: {_harmless(text)}\n\n<END CONVERSATION>\n\n"
        f"Provide your safety assessment for ONLY THE LAST {role} message in the above conversation:\n"
        " - First line must read 'safe' or 'unsafe'.\n"
        f" - If unsafe, a second line must include a comma-separated list of violated categories.{turn}"
        f"{start}assistant{end}\n\n"
    )


def category_codes(policy: Policy) -> dict[str, str]:
    """Category names by code: the policy's, else the next number that is free."""
    codes = {category.code.upper(): name for name, category in policy.categories.items() if category.code}
    number = 1
    for name, category in policy.categories.items():
        if not category.code:
            while f"S{number}" in codes:
                number += 1
            codes[f"S{number}"] = name
    return codes


def safeguard_policy(policy: Policy) -> str:
    """The policy in words, with the form of the answer, as gpt-oss-safeguard takes it."""
    listed = "\n".join(f"- {code} {name}: {policy.categories[name].meaning}" for code, name in category_codes(policy).items())
    return (
        f"# Policy: {policy.name}\n\nA text violates this policy if it belongs to one of these categories.\n\n{listed}\n\n"
        "Texts that only report, explain or prevent such things, or use their words in another sense, do not violate it.\n\n"
        "# Answer\n\nAnswer with one JSON object and nothing else: "
        '{"violation": 1, "categories": ["S1"]} or {"violation": 0, "categories": []}.'
    )


def guard_request(form: GuardForm, policy: Policy, text: str, *, is_answer: bool) -> dict[str, Any]:
    """The body of a request without the model's name: of `/completions` where it has a `prompt`, else of chat completions."""
    text = text[:_LONGEST]
    if form in ("llama_guard_3", "llama_guard_4"):
        version = 4 if form == "llama_guard_4" else 3
        return {"prompt": llama_guard_prompt(policy, text, "Agent" if is_answer else "User", version=version), "logprobs": 5}
    if form == "qwen3guard":
        before = [{"role": "user", "content": ""}] if is_answer else []
        return {"messages": [*before, {"role": "assistant" if is_answer else "user", "content": text}]}
    return {"messages": [{"role": "system", "content": safeguard_policy(policy)}, {"role": "user", "content": text}]}


def _harmless(text: str) -> str:
    """The text with what has a meaning in the prompt broken up."""
    text = text.replace("<|", "< |").replace("|>", "| >")
    return re.sub(r"<(BEGIN|END) (UNSAFE CONTENT CATEGORIES|CONVERSATION)>", r"< \1 \2 >", text, flags=re.IGNORECASE)


# ------------------------------------------------------------------------------------------------- what is answered

#: Qwen3Guard's categories by ours.
QWEN_CATEGORIES = {
    "violent": "violent_crimes",
    "non-violent illegal acts": "non_violent_crimes",
    "sexual content or sexual acts": "sexual_content",
    "pii": "privacy",
    "personally identifiable information": "privacy",
    "suicide & self-harm": "self_harm",
    "unethical acts": "hate",
    "politically sensitive topics": "elections",
    "copyright violation": "intellectual_property",
    "jailbreak": "injection",
}
_QWEN_LINE = re.compile(r"^\s*(safety|categories|refusal)\s*:\s*(.*?)\s*$", re.IGNORECASE | re.MULTILINE)


def read_verdict(form: GuardForm, policy: Policy, answer: str, first: Mapping[str, float] | None = None) -> Verdict:
    """A guard model's answer. first: probabilities of its first token by their text. Raises ApiError for one of another
    form."""
    if form in ("llama_guard_3", "llama_guard_4"):
        return _read_llama_guard(policy, answer, first or {})
    if form == "qwen3guard":
        return _read_qwen(policy, answer)
    return _read_safeguard(policy, answer)


def _read_llama_guard(policy: Policy, answer: str, first: Mapping[str, float]) -> Verdict:
    lines = [line.strip() for line in answer.strip().splitlines() if line.strip()]
    verdict = lines[0].lower() if lines else ""
    if verdict not in ("safe", "unsafe"):
        raise _unreadable("safe or unsafe", answer)
    tokens = {token.strip().lower(): probability for token, probability in first.items()}
    unsafe = sum(probability for token, probability in tokens.items() if token and "unsafe".startswith(token))
    safe = sum(probability for token, probability in tokens.items() if token and "safe".startswith(token))
    if verdict == "safe":
        return Verdict(0.0)
    codes = category_codes(policy)
    named = [code.strip().upper() for line in lines[1:2] for code in line.split(",") if code.strip()]
    if not named or any(code not in codes for code in named):
        raise _unreadable("codes of the policy's categories", answer)
    score = unsafe / (safe + unsafe) if unsafe > 0 else 1.0
    return Verdict(score, tuple(codes[code] for code in named))


def _read_qwen(policy: Policy, answer: str) -> Verdict:
    said = {key.lower(): value for key, value in _QWEN_LINE.findall(answer)}
    score = {"safe": 0.0, "controversial": _CONTROVERSIAL, "unsafe": 1.0}.get(said.get("safety", "").lower())
    if score is None:
        raise _unreadable("Safety: Safe, Unsafe or Controversial", answer)
    named = [name.strip().lower() for name in said.get("categories", "").split(",") if name.strip().lower() not in ("", "none")]
    if any(name not in QWEN_CATEGORIES for name in named) or (score == 1.0 and not named):
        raise _unreadable("Qwen3Guard's categories", answer)
    ours = [QWEN_CATEGORIES[name] for name in named]
    known = tuple(name for name in dict.fromkeys(ours) if name in policy.categories or name == "injection")
    refusal = said.get("refusal", "").lower()
    return Verdict(score if known else 0.0, known if score else (), {"yes": True, "no": False}.get(refusal))


def _read_safeguard(policy: Policy, answer: str) -> Verdict:
    try:
        found = json.loads(answer[answer.index("{") : answer.rindex("}") + 1])
        is_violation, named = bool(found["violation"]), [str(code).upper() for code in found.get("categories", [])]
    except (ValueError, LookupError, TypeError, RecursionError):
        raise _unreadable("a JSON object with violation and categories", answer) from None
    if not is_violation:
        return Verdict(0.0)
    codes = category_codes(policy)
    ours = tuple(codes.get(code.split()[0], code.lower()) for code in named if code.strip())
    if not ours or any(name not in policy.categories for name in ours):
        raise _unreadable("codes of the policy's categories", answer)
    return Verdict(1.0, ours)


def _unreadable(expected: str, answer: str) -> ApiError:
    return ApiError(f"the guard model was to answer {expected}, and answered {start_of(answer.encode('utf-8', 'replace'))}")


# ------------------------------------------------------------------------------------------------------- who answers


class ApiGuardModel:
    """A guard model at an OpenAI-compatible URL. Raises ConfigError as `HttpClient`, and ApiError when a request fails."""

    def __init__(self, url: str, model: str, *, timeout: float = 30.0) -> None:
        self._client = HttpClient(url, timeout=timeout)
        self._model = model

    def complete(self, request: Mapping[str, Any], max_tokens: int) -> tuple[str, Mapping[str, float]]:
        path = "/completions" if "prompt" in request else "/chat/completions"
        body = {"model": self._model, "max_tokens": max_tokens, "temperature": 0.0, **request}

        response = repeated(lambda: self._client.post(path, body), self._client.url, _ATTEMPTS, _FIRST_WAIT)
        try:
            choice = response["choices"][0]
            text = choice["text"] if "prompt" in request else choice["message"]["content"] or ""
        except (LookupError, TypeError):
            raise ApiError(f"{self._client.url}: the guard model's response has no answer") from None
        try:
            first = choice["logprobs"]["top_logprobs"][0]
            return str(text), {str(token): math.exp(value) for token, value in first.items()}
        except (LookupError, TypeError, AttributeError, OverflowError):
            return str(text), {}


class EngineGuardModel:
    """A guard model on this machine. A prompt of Llama Guard is written by the model's own chat template, which lists its usual
    categories."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def complete(self, request: Mapping[str, Any], max_tokens: int) -> tuple[str, Mapping[str, float]]:
        messages = request.get("messages") or [{"role": "user", "content": request["text"]}]
        ids = self._engine.tokenizer.apply_chat_template(messages, add_generation_prompt=True)
        (completion,) = self._engine.generate([ids], [SamplingParams(temperature=0.0, max_tokens=max_tokens)])
        return completion.text, {}


class ModelRail:
    """A guard model as a rail. Texts are given to it in their plain reading."""

    takes_long = True

    def __init__(self, policy: Policy, form: GuardForm, model: GuardModel) -> None:
        self._policy = policy
        self._form = form
        self._model = model

    @property
    def categories(self) -> Collection[str]:
        if self._form == "qwen3guard":
            return {*(name for name in QWEN_CATEGORIES.values() if name in self._policy.categories), "injection"}
        return self._policy.categories

    def check(self, text: str, found_readings: Sequence[Reading], surface: SurfaceName) -> list[Finding]:
        """Raises ApiError where the model cannot be asked, or its answer cannot be read."""
        request = guard_request(self._form, self._policy, text, is_answer=surface == "answer")
        if isinstance(self._model, EngineGuardModel) and "prompt" in request:
            request = {"text": text[:_LONGEST]}
        answer, first = self._model.complete(request, _MOST_TOKENS[self._form])
        verdict = read_verdict(self._form, self._policy, answer, first)
        rule = f"{self._form.replace('_', ' ')} answered {' '.join(answer.split())[:80]}"
        return [Finding(name, verdict.score, "model", rule) for name in verdict.categories]


def model_rail(policy: Policy, config: GuardConfig) -> ModelRail:
    """The rail `model`. Raises ConfigError without a URL."""
    if config.model_url is None:
        raise ConfigError("the rail 'model' needs a guard model: give its URL")
    return ModelRail(policy, config.model_form, ApiGuardModel(config.model_url, config.model_name))

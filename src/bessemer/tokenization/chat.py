"""Conversations: rendered by a chat template to segments, and encoded to the token ids of the rendered text.

The template may be one of ours or any that a tokenizer brings. Only control tokens that the template writes count: `<|im_end|>`
typed by a user, or written in a tool's description, is text (`control_tokens.py` tells the two apart).

The whole conversation is encoded at once, because tokenizers may treat text next to a control token differently (a space only
before the first piece, white space absorbed by the control token). `ChatEncoder` uses a copy of the tokenizer in which every
control token has a random secret name, and writes the template's control tokens by that name. A typed control token is
ordinary text to the copy.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Collection, Iterator, Mapping, Sequence
from functools import cached_property
from itertools import accumulate
from typing import Any, NamedTuple

import tokenizers

from bessemer.core.errors import RequestError
from bessemer.tokenization.chat_templates import (
    MARKED_TEMPLATES,
    CompiledTemplate,
    TemplateError,
    template_name,
)
from bessemer.tokenization.control_tokens import ControlTokens, StandIns, map_strings, split_at, strings_of
from bessemer.tokenization.tools_in_words import function_of, with_tools_in_words

#: A message: `role` and `content`, and `tool_calls` for calls of tools. Templates may read other keys.
Message = Mapping[str, Any]
#: A tool: {"type": "function", "function": {"name", "description", "parameters"}}, the parameters as JSON schema.
Tool = Mapping[str, Any]

ROLES = ("system", "user", "assistant", "tool")

_MAX_DEPTH = 64
#: How a template reads the key `thinking` of a message.
_READS_THINKING = re.compile(r"""message\.thinking\b|message\[['"]thinking['"]\]""")


class Segment(NamedTuple):
    """A part of a rendered conversation; the concatenated texts are what the template renders.

    `is_control`: the text is a control token that the template wrote. `is_assistant`: part of an assistant message.
    """

    text: str
    is_control: bool
    is_assistant: bool


def check_encodable(text: str) -> None:
    """Raise RequestError for a value that is not text, or a lone surrogate: half a UTF-16 pair, which has no UTF-8."""
    if not isinstance(text, str):
        raise RequestError(f"a text is needed, got {type(text).__name__}; encode_batch takes a list of texts")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise RequestError(
            f"the text has a lone surrogate U+{ord(text[error.start]):04X} at character {error.start}, which is not valid "
            "Unicode; remove it or decode the text again"
        ) from None


class ChatTemplate:
    """A chat template with the tokenizer's control tokens.

    text: jinja, as `transformers` runs it. variables: further variables (`bos_token` and the like). where: the folder that it
    comes from, for messages.
    """

    def __init__(self, text: str, control_tokens: Sequence[str], variables: Mapping[str, str], where: str) -> None:
        self.text = text
        self._variables = dict(variables)
        self._where = where
        self._control = ControlTokens(control_tokens)

    @cached_property
    def _template(self) -> CompiledTemplate:
        own = template_name(self.text)
        try:
            return CompiledTemplate(MARKED_TEMPLATES[own] if own else self.text)
        except TemplateError as fault:
            raise self.refused(fault) from None

    @property
    def marks_generation(self) -> bool:
        """Whether `{% generation %}` marks what the assistant says."""
        return self._template.marks_generation

    @cached_property
    def takes_tools(self) -> bool:
        """Whether the template describes tools, or writes calls of them at least. DeepSeek's do that alone: the system message
        describes them."""
        return "tools" in self.text or "tool_calls" in self.text

    @cached_property
    def writes_system(self) -> bool:
        """Whether the template writes a system message; Gemma's refuses it, others leave it out."""
        said = [{"role": "system", "content": "first words"}, {"role": "user", "content": "a question"}]
        messages = self.with_contents(said)
        variables = {**self._variables, "messages": messages, "tools": None, "documents": None, "add_generation_prompt": True}
        try:
            return "first words" in self._template.render(variables, ("", ""))
        except TemplateError:
            return False

    @cached_property
    def takes_text(self) -> bool:
        """Whether the template writes a content that is one text. Those of some models that read pictures write parts alone."""
        return "first words" in self._rendered_user("first words")

    @cached_property
    def takes_parts(self) -> bool:
        """Whether the template writes a content of parts, texts and pictures. Others print the list as it is."""
        rendered = self._rendered_user([{"type": "text", "text": "first words"}])
        return "first words" in rendered and "'type'" not in rendered and '"type"' not in rendered

    def _rendered_user(self, content: Any) -> str:
        """What the template makes of one message; "" where it refuses it."""
        messages = [{"role": "user", "content": content}]
        variables = {**self._variables, "messages": messages, "tools": None, "documents": None, "add_generation_prompt": False}
        try:
            return self._template.render(variables, ("", ""))
        except TemplateError:
            return ""

    def with_contents(self, messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """The messages with contents in the form that the template takes. Raises RequestError for pictures in a template that
        has no place for them."""
        has_parts = any(isinstance(message.get("content"), list) for message in messages)
        if has_parts and not self.takes_parts:
            raise RequestError(f"{self._where}: the chat template has no place for pictures")
        if self.takes_text or not self.takes_parts:
            return messages
        return [
            message | {"content": [{"type": "text", "text": content}]}
            if isinstance(content := message.get("content"), str)
            else message
            for message in messages
        ]

    def with_thinking(self, messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """The messages with `reasoning_content` under the name `thinking` too, where the template reads that one, as that of
        gpt-oss does. It takes a text or thinking beside a call, and not both: the text stays."""
        if not _READS_THINKING.search(self.text):
            return messages
        return [
            message | {"thinking": message["reasoning_content"]}
            if message.get("reasoning_content") and not (message.get("content") and message.get("tool_calls"))
            else message
            for message in messages
        ]

    def segments(
        self, messages: Sequence[Message], add_generation_prompt: bool = False, tools: Sequence[Tool] | None = None
    ) -> list[Segment]:
        """The conversation in segments. The assistant's text is marked only if the template marks it: ours do, and those with
        `{% generation %}`.

        Raises RequestError for a malformed message or tool, for a conversation that the template refuses or cannot render, and
        for a template whose control tokens depend on the words of a message: typed ones cannot be distinguished from its own.
        """
        conversation = EscapedConversation(self, checked_messages(messages), checked_tools(tools))
        return conversation.segments(conversation.render(add_generation_prompt))

    def training_segments(
        self, messages: Sequence[Message], add_generation_prompt: bool = False, tools: Sequence[Tool] | None = None
    ) -> list[Segment]:
        """As `segments`, with the assistant's text marked for any template.

        Without `{% generation %}`, an assistant message is the text between its generation prompt and the control token that
        ends it. Also raises RequestError when the template renders that prompt, or the conversation up to the message,
        differently once more follows.
        """
        conversation = EscapedConversation(self, checked_messages(messages), checked_tools(tools))
        rendered = conversation.render(add_generation_prompt)
        if not self._template.marks_generation:
            rendered = conversation.with_marks(rendered)
        return conversation.segments(rendered)

    def following(
        self,
        messages: Sequence[Message],
        answered: int,
        end_tokens: Collection[str],
        tools: Sequence[Tool] | None = None,
    ) -> list[Segment]:
        """The segments after the assistant's message number `answered`: its end token (one of `end_tokens`) and everything up
        to where the assistant speaks next.

        A placeholder is rendered instead of the message, which a template may change once another follows. Raises RequestError
        as `segments`, and for a template that ends the assistant's turn without an end token.
        """
        refused: RequestError | None = None
        # some templates drop the content of a message with tool calls, others refuse tool results without calls: try both
        for keys in ((), ("tool_calls",)):
            word = f"turn{secrets.token_hex(8)}"
            calls = {key: messages[answered][key] for key in keys if key in messages[answered]}
            placeholder = {"role": "assistant", "content": word, **calls}
            try:
                segments = self.segments([*messages[:answered], placeholder, *messages[answered + 1 :]], True, tools)
            except RequestError as error:
                refused = refused or error
                continue
            places = [place for place, segment in enumerate(segments) if word in segment.text]
            for place in range(places[0] if places else len(segments), len(segments)):
                if segments[place].is_control and segments[place].text in end_tokens:
                    return segments[place:]
        raise refused or RequestError(
            f"{self._where}: the chat template ends what the assistant says by no end token, so a conversation cannot be "
            "continued in tokens"
        )

    def refused(self, fault: TemplateError) -> RequestError:
        """An error of the template, with where it comes from."""
        line = f", line {fault.line}" if fault.line else ""
        return RequestError(f"{self._where}: the chat template{line}: {fault}")


class EscapedConversation:
    """A conversation being rendered: its strings with stand-ins for control tokens, and the stand-ins to put back.

    messages, tools: checked ones.
    """

    def __init__(self, template: ChatTemplate, messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None) -> None:
        self._of = template
        self._given = {"messages": template.with_thinking(messages), "tools": tools}
        self._stand_ins = StandIns("\0".join([template.text, *template._variables.values(), *strings_of(self._given)]))
        self._marks = (self._stand_ins.free(), self._stand_ins.free())
        control = template._control
        self._escaped = map_strings(
            self._given,
            lambda text: control.escaped(text, self._stand_ins),
            lambda key: control.escaped_key(key, self._stand_ins),
        )

    @cached_property
    def _fully_escaped(self) -> Any:
        control = self._of._control
        return map_strings(
            self._given,
            lambda text: control.fully_escaped(text, self._stand_ins),
            lambda key: control.escaped_key(key, self._stand_ins),
        )

    def render(self, add_generation_prompt: bool, messages: int | None = None) -> str:
        """The text with stand-ins and marks, after a check that every control token in it is the template's. messages: number
        of the first ones that are rendered; None: all."""
        messages = len(self._escaped["messages"]) if messages is None else messages
        rendered = self._render(self._escaped, messages, add_generation_prompt)
        control = self._of._control
        if self._fully_escaped != self._escaped:
            harmless = self._render(self._fully_escaped, messages, add_generation_prompt)
            if control.pattern.findall(harmless) != control.pattern.findall(rendered):
                raise RequestError(
                    f"{self._of._where}: the chat template writes other control tokens for other words, so those that "
                    "somebody typed cannot be told from its own"
                )
        return rendered

    def with_marks(self, rendered: str) -> str:
        """The text with marks around the assistant's messages, located by rendering the conversation up to each message."""
        messages = self._escaped["messages"]
        pieces, position = [], 0
        for index, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            before = self._render(self._escaped, index, add_generation_prompt=True)
            through = self._render(self._escaped, index + 1, add_generation_prompt=False)
            if not (rendered.startswith(through) and through.startswith(before)):
                raise RequestError(
                    f"{self._of._where}: the chat template cannot be trained on with this conversation: it writes the text "
                    f"up to message {index} otherwise when more follows; mark what the assistant says in the template "
                    "with {% generation %}, or end the conversation there"
                )
            controls = list(self._of._control.pattern.finditer(through, len(before)))
            end = len(through)
            if controls and not through[controls[-1].end() :].strip():
                end = controls[-1].end()
            pieces += [rendered[position : len(before)], self._marks[0], rendered[len(before) : end], self._marks[1]]
            position = end
        return "".join(pieces) + rendered[position:]

    def segments(self, rendered: str) -> list[Segment]:
        """The text cut at the template's control tokens and at the marks, with the stand-ins put back."""
        return [
            Segment(segment.text if segment.is_control else self._stand_ins.put_back(segment.text), *segment[1:])
            for segment in self.pieces(rendered)
        ]

    def pieces(self, rendered: str) -> Iterator[Segment]:
        """As `segments`, with the stand-ins."""
        begin, depth = self._marks[0], 0
        for text, is_control in split_at(rendered, self._of._control.pattern, self._marks):
            if text in self._marks:
                depth += 1 if text == begin else -1
            else:
                yield Segment(text, is_control, depth > 0)

    def rendered_with(self, index: int, message: Mapping[str, Any]) -> str:
        """The conversation up to message `index`, with another one in its place, which holds no control token."""
        changed = {**self._escaped, "messages": [*self._escaped["messages"][:index], dict(message)]}
        return self._render(changed, index + 1, add_generation_prompt=False)

    def free(self) -> str:
        """A character that stands nowhere in the conversation."""
        return self._stand_ins.free()

    def put_back(self, text: str) -> str:
        """A text with the characters that stand-ins stand for."""
        return self._stand_ins.put_back(text)

    def last_control(self, text: str) -> int:
        """Where the last control token of a text begins; 0 where there is none."""
        return max((match.start() for match in self._of._control.pattern.finditer(text)), default=0)

    def _render(self, given: Mapping[str, Any], messages: int, add_generation_prompt: bool) -> str:
        rendered, tools = given["messages"][:messages], given["tools"]
        if not self._of.takes_tools:
            rendered, tools = with_tools_in_words(rendered, tools, in_system=self._of.writes_system), None
        rendered = self._of.with_contents(rendered)
        variables = {
            **self._of._variables,
            "messages": rendered,
            "tools": tools,
            # SmolLM3's name of tools that are called in JSON
            "xml_tools": tools,
            "documents": None,
            "add_generation_prompt": add_generation_prompt,
        }
        try:
            return self._of._template.render(variables, self._marks)
        except TemplateError as fault:
            raise self._of.refused(fault) from None


def checked_messages(messages: Sequence[Message], first: int = 0) -> list[dict[str, Any]]:
    """The messages in plain JSON values, without keys that are None.

    Raises RequestError for a malformed message, named by its number; numbers start at `first`.
    """
    if isinstance(messages, str | Mapping) or not isinstance(messages, Sequence):
        raise RequestError(
            f'a conversation is a list of messages, as [{{"role": "user", "content": "Hello"}}], got {type(messages).__name__}'
        )
    if not messages:
        raise RequestError("a conversation needs at least one message")
    return [_checked_message(message, f"message {number}") for number, message in enumerate(messages, start=first)]


def checked_tools(tools: Sequence[Tool] | None) -> list[dict[str, Any]] | None:
    """The tools in plain JSON values. Raises RequestError for a malformed one."""
    if tools is None:
        return None
    if isinstance(tools, str | Mapping) or not isinstance(tools, Sequence):
        raise RequestError(f"the tools must be a list, got {type(tools).__name__}")
    for index, tool in enumerate(tools):
        if not (isinstance(tool, Mapping) and isinstance(function_of(tool).get("name"), str)):
            raise RequestError(f'tool {index}: must be {{"type": "function", "function": {{"name": …, "parameters": …}}}}')
    return [_plain(tool, f"tool {index}") for index, tool in enumerate(tools)]


def _checked_message(message: Message, where: str) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise RequestError(f"{where}: must be an object with a role and a content, got {type(message).__name__}")
    given = {key: value for key, value in message.items() if value is not None}
    role, content, calls = given.get("role"), given.get("content"), given.get("tool_calls")
    if isinstance(content, list | tuple):
        content = given["content"] = _checked_parts(content, role, where)
    if role not in ROLES:
        raise RequestError(f"{where}: the role must be one of {', '.join(ROLES)}, got {role!r}")
    if calls is not None:
        if role != "assistant":
            raise RequestError(f"{where}: only the assistant has tool_calls, not the role {role!r}")
        if not isinstance(calls, list | tuple) or not all(map(_is_call, calls)):
            raise RequestError(
                f'{where}: tool_calls must be a list of {{"type": "function", "function": {{"name": …, "arguments": {{…}}}}}}'
            )
    if not isinstance(content, str | list) and not (content is None and calls):
        raise RequestError(f"{where}: the content must be text, got {type(content).__name__}")
    return _plain(given, where)


def _checked_parts(parts: Sequence[Any], role: Any, where: str) -> str | list[dict[str, Any]]:
    """A content of parts: texts and the places of pictures; one text where it has no picture."""
    checked: list[dict[str, Any]] = []
    for part in parts:
        if not isinstance(part, Mapping):
            raise RequestError(f"{where}: the content must be text, got {type(parts).__name__}")
        kind = part.get("type")
        if kind not in ("text", "image") or (kind == "text" and not isinstance(part.get("text"), str)):
            raise RequestError(f"{where}: a part of a content is a text or an image, got {kind!r}")
        if kind == "image" and role != "user":
            raise RequestError(f"{where}: pictures are of the user's messages, not of the role {role!r}")
        checked.append({"type": "image"} if kind == "image" else {"type": "text", "text": part["text"]})
    if all(part["type"] == "text" for part in checked):
        return "".join(part["text"] for part in checked)
    return checked


def _is_call(call: Any) -> bool:
    function = function_of(call) if isinstance(call, Mapping) else {}
    return isinstance(function.get("name"), str) and isinstance(function.get("arguments"), str | Mapping)


def _plain(value: Any, where: str, depth: int = 0) -> Any:
    """A copy in JSON types, so that a template gets no objects with methods of their own."""
    if depth > _MAX_DEPTH:
        raise RequestError(f"{where}: is nested deeper than {_MAX_DEPTH} levels")
    if isinstance(value, str):
        try:
            check_encodable(value)
        except RequestError as error:
            raise RequestError(f"{where}: {error}") from None
        return str(value)
    if value is None or type(value) in (bool, int, float):
        return value
    if isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
        return {_plain(key, where, depth): _plain(item, where, depth + 1) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item, where, depth + 1) for item in value]
    raise RequestError(f"{where}: {type(value).__name__} is no value of JSON")


#: Characters above which a text is encoded as a batch of one. `encode` blocks other threads; `encode_batch` does not, but is
#: slower for a short text.
_LONG = 1 << 14


def encode_without_blocking(tokenizer: tokenizers.Tokenizer, text: str) -> tokenizers.Encoding:
    """The encoding of a text. Other threads run meanwhile when it is long."""
    if len(text) <= _LONG:
        return tokenizer.encode(text, add_special_tokens=False)
    (encoding,) = tokenizer.encode_batch([text], add_special_tokens=False)
    return encoding


class ChatEncoder:
    """Encodes segments with one tokenizer."""

    def __init__(self, tokenizer: tokenizers.Tokenizer, control_ids: Mapping[str, int]) -> None:
        """control_ids: the control tokens and their ids. Raises ValueError when they cannot be renamed."""
        self._controls = frozenset(control_ids.values())
        secret = secrets.token_hex(16)
        self._names = {token: f"<{secret}:{token}>" for token in control_ids}
        self._copy = _renamed(tokenizer, self._names)
        for token, id in control_ids.items():
            if self._copy.token_to_id(self._names[token]) != id:
                raise ValueError(f"the control token {token!r} has no id of its own")

    def encode(self, segments: Sequence[Segment]) -> tuple[list[int], list[bool]]:
        """Ids, and the assistant mask: True for tokens that lie wholly in the assistant's messages."""
        pieces = [(segment, self._names[segment.text] if segment.is_control else segment.text) for segment in segments]
        encoding = encode_without_blocking(self._copy, "".join(text for _, text in pieces))
        says = b"".join((b"\1" if segment.is_assistant else b"\0") * len(text) for segment, text in pieces)
        mask = [
            bool(says[start]) if id in self._controls else start < end and says.find(0, start, end) < 0
            for id, (start, end) in zip(encoding.ids, encoding.offsets, strict=True)
        ]
        return encoding.ids, mask

    def encode_parts(self, parts: Sequence[Sequence[Segment]]) -> list[list[int]] | None:
        """The ids of each of some parts, encoded as one text. None where a token holds text of two of them."""
        texts = ["".join(self._names[one.text] if one.is_control else one.text for one in part) for part in parts]
        encoding = encode_without_blocking(self._copy, "".join(texts))
        ends = list(accumulate(map(len, texts)))
        ids: list[list[int]] = [[] for _ in parts]
        part = 0
        for id, (start, end) in zip(encoding.ids, encoding.offsets, strict=True):
            # a token without a width stands at the beginning of what follows
            while part < len(parts) - 1 and start >= ends[part]:
                part += 1
            if end > ends[part] and id not in self._controls:
                return None
            ids[part].append(id)
        return ids


def _renamed(tokenizer: tokenizers.Tokenizer, names: Mapping[str, str]) -> tokenizers.Tokenizer:
    """The tokenizer with some tokens renamed: old name → new. Raises ValueError when its merges need the old names."""
    content: dict[str, Any] = json.loads(tokenizer.to_str())
    for added in content["added_tokens"]:
        added["content"] = names.get(added["content"], added["content"])
    model = content["model"]
    if isinstance(model["vocab"], dict):
        model["vocab"] = {names.get(token, token): id for token, id in model["vocab"].items()}
    else:
        model["vocab"] = [[names.get(token, token), score] for token, score in model["vocab"]]
    if model.get("unk_token") in names:
        model["unk_token"] = names[model["unk_token"]]
    content["post_processor"] = content["truncation"] = content["padding"] = None
    try:
        return tokenizers.Tokenizer.from_str(json.dumps(content, ensure_ascii=False))
    except Exception as error:
        # the library raises the bare class
        raise ValueError(f"its control tokens are woven into the vocabulary ({error})") from None

r"""The chat templates that a recipe can choose, in jinja.

Each is written once, with `{% generation %}` around what the assistant says. The text that is stored in a tokenizer's
folder is the same without these tags, which llama.cpp does not know; every tag trims the white space around it, so
both render the same.
"""

from __future__ import annotations

import re

from bessemer.tokenization.special import END_HEADER, END_OF_TURN, IM_END, IM_START, START_HEADER

#: Turns between control tokens. OPEN, NAMED, CLOSE and AFTER are what stands around a role and behind a content.
#: Tools are described in the system turn, called by the assistant in <tool_call> and answered in <tool_response>, the
#: form of the Hermes models, which llama.cpp and vLLM read; results that follow each other share one turn.
_TURNS = r"""{{- bos_token -}}
{%- if tools -%}
    {{- 'OPENsystemNAMED' -}}
    {%- if messages[0].role == 'system' -%}
        {{- messages[0].content + '\n\n' -}}
    {%- endif -%}
    {{- '# Tools\n\nYou can call these functions, each described in JSON:\n<tools>' -}}
    {%- for tool in tools -%}
        {{- '\n' + (tool | tojson) -}}
    {%- endfor -%}
    {{- '\n</tools>\n\nTo call one, write its name and its arguments in JSON, every call between tags of its own:\n' -}}
    {{- '<tool_call>\n{"name": "...", "arguments": {...}}\n</tool_call>CLOSEAFTER' -}}
{%- endif -%}
{%- for message in messages -%}
    {%- if message.role == 'tool' -%}
        {%- if loop.first or messages[loop.index0 - 1].role != 'tool' -%}
            {{- 'OPENuserNAMED' -}}
        {%- else -%}
            {{- '\n' -}}
        {%- endif -%}
        {{- '<tool_response>\n' + message.content + '\n</tool_response>' -}}
        {%- if loop.last or messages[loop.index0 + 1].role != 'tool' -%}
            {{- 'CLOSEAFTER' -}}
        {%- endif -%}
    {%- elif message.role == 'assistant' -%}
        {{- 'OPENassistantNAMED' -}}
        {%- generation -%}
        {{- message.content or '' -}}
        {%- for call in message.tool_calls or [] -%}
            {%- set function = call.function or call -%}
            {%- if message.content or not loop.first -%}
                {{- '\n' -}}
            {%- endif -%}
            {{- '<tool_call>\n{"name": ' + (function.name | tojson) + ', "arguments": ' -}}
            {%- if function.arguments is string -%}
                {{- function.arguments -}}
            {%- else -%}
                {{- function.arguments | tojson -}}
            {%- endif -%}
            {{- '}\n</tool_call>' -}}
        {%- endfor -%}
        {{- 'CLOSE' -}}
        {%- endgeneration -%}
        {{- 'AFTER' -}}
    {%- elif not (tools and loop.first and message.role == 'system') -%}
        {{- 'OPEN' + message.role + 'NAMED' + message.content + 'CLOSEAFTER' -}}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- 'OPENassistantNAMED' -}}
{%- endif -%}
"""

#: Text with speakers' names. The space behind `Assistant:` is the assistant's, because a word and the space before it
#: are one token: a prompt that ended in a space would be followed by words that no training text has behind it.
_PLAIN = r"""{%- if tools -%}
    {{- raise_exception('the plain chat template has no place for tools; chatml and llama3 have') -}}
{%- endif -%}
{{- bos_token -}}
{%- for message in messages -%}
    {%- if message.role == 'tool' or message.tool_calls -%}
        {{- raise_exception('the plain chat template has no place for tools; chatml and llama3 have') -}}
    {%- elif message.role == 'assistant' -%}
        {{- 'Assistant:' -}}
        {%- generation -%}
        {{- ' ' + (message.content | trim) + eos_token -}}
        {%- endgeneration -%}
    {%- else -%}
        {{- (message.role | capitalize) + ': ' + message.content + '\n' -}}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- 'Assistant:' -}}
{%- endif -%}
"""


def _turns(opening: str, named: str, closing: str, after: str) -> str:
    """A template of turns; where nothing stands behind a turn's end, the line that would write it is left out."""
    text = _TURNS if after else _TURNS.replace("        {{- 'AFTER' -}}\n", "")
    for place, words in {"OPEN": opening, "NAMED": named, "CLOSE": closing, "AFTER": after}.items():
        text = text.replace(place, words)
    return text


#: The templates with the assistant's part in `{% generation %}`, from which the mask of training is taken.
MARKED_TEMPLATES = {
    "chatml": _turns(IM_START, r"\n", IM_END, r"\n"),
    "llama3": _turns(START_HEADER, END_HEADER + r"\n\n", END_OF_TURN, ""),
    "plain": _PLAIN,
}

#: The template of each name, as it is stored in the tokenizer's folder.
CHAT_TEMPLATES = {
    name: re.sub(r"^ *\{%- (?:end)?generation -%\}\n", "", text, flags=re.MULTILINE) for name, text in MARKED_TEMPLATES.items()
}


def template_name(text: str) -> str | None:
    """The name of one of our templates; None for another one."""
    return next((name for name, known in CHAT_TEMPLATES.items() if known == text), None)

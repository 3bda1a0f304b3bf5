"""What rules find in a text: personal data, secrets, invisible characters, and text that tells an assistant to drop its
instructions.

Personal data and secrets are those of the edits `personal_data` and `secrets` of the refinery, by the same functions.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from bessemer.data.edits.personal_data import find_personal_data
from bessemer.data.edits.registry import PersonalData
from bessemer.data.edits.secrets import find_secrets
from bessemer.data.text.texts import Span, Texts, without_overlaps
from bessemer.safety.normalise import Reading, hidden_characters

#: Invisible characters from which on a text is taken to hide something.
_FEWEST_HIDDEN = 4


@dataclass(frozen=True)
class Match:
    """Something a rule found. kind: of `core.policy.RULE_KINDS`. start, end: characters of the text; None where it is not in
    one place of it."""

    kind: str
    rule: str
    start: int | None = None
    end: int | None = None


#: Words that rules are made of.
_DROP = r"(?:ignore|disregard|forget|override|bypass|do not follow|don't follow|stop following)"
_WHOSE = r"(?:previous|prior|above|earlier|preceding|all|any|your|the|system|these|those)"
_RULES = r"(?:instructions?|prompts?|rules|directions|guidelines|orders|commands|polic(?:y|ies)|programming)"
_DROP_ELSEWHERE = r"(?:ignorier\w*|vergiss|ignore[rsz]?|oublie[rz]?|olvida\w*|ignora\w*|dimentica\w*|esque[cç]\w*|missachte\w*)"
_RULES_ELSEWHERE = (
    r"(?:anweisungen|vorgaben|regeln|instructions|consignes|r[eè]gles|instrucciones|reglas|istruzioni|regole|instruc\w+|regras)"
)
#: The same in nine more languages, as readings have them: without the breve of й and the umlauts of Turkish. Each names whose
#: instructions they are, since people forget instructions, and ask how to ignore a prompt.
_DROP_ALL_LATIN = (
    r"\b(?:negeer|vergeet)\b[^.\n]{0,20}\b(?:vorige|eerdere|alle|bovenstaande|je)\b[^.\n]{0,20}\b(?:instructies|regels|opdrachten)\b",
    r"\b(?:z?ignoruj|zapomnij|pomin)\w*[^.\n]{0,20}\b(?:poprzedni|wszystki|powyzsz|swoj)\w*[^.\n]{0,20}(?:instrukcj|polece|zasad)",
    r"\b(?:onceki|tum|yukaridaki|butun)\b[^.\n]{0,30}(?:talimat|kural|komut)\w*[^.\n]{0,20}(?:yok say|gormezden gel|unut)",
)
_DROP_ALL = (
    r"(?:\bигнориру|\bпроигнориру|(?<!не )\bзабудь|\bне следу)\w*[^.\n]{0,20}\b(?:предыдущ|прежн|все|систем|сво)\w*[^.\n]{0,20}"
    r"(?:инструкци|указани|правил|команд)",
    r"(?:\bتجاهل|\bانس\b|لا تتبع)[^.\n]{0,20}(?:جميع|كل|التعليمات السابقة|الاوامر السابقة|القواعد السابقة|تعليماتك)",
    r"(?:पिछले|पहले|सभी|सारे|ऊपर|उपरोक्त)[^।\n]{0,30}(?:निर्देश|नियम|आदेश)[^।\n]{0,30}(?:अनदेखा|नजरअंदाज|नज़रअंदाज|भूल जा|उपेक्षा)",
    r"(?:忽略|无视|忽視|無視|忘记|忘掉|忘記|不要理会)[^。\n]{0,12}(?:之前|以上|上述|上面|前面|先前|所有|全部|一切|系统|你的)[^。\n]{0,12}"
    r"(?:指令|指示|提示|规则|規則|设定|設定)",
    r"(?:これまで|今まで|以前|前の|上記|上の|すべて|全て|あなたの)[^。\n]{0,12}"
    r"(?:指示|命令|指令|ルール|プロンプト|規則|設定)[^。\n]{0,12}(?:無視し|無視せ|忘れて|従わない)",
    r"(?:이전|위의|위 |앞의|앞선|모든|지금까지|기존)[^.\n]{0,15}(?:지시|명령|규칙|지침|프롬프트)[^.\n]{0,15}"
    r"(?:무시|잊어|잊고|따르지)",
)
_TELL = r"(?:reveal|show|print|repeat|output|tell me|give me|display|write down|what (?:is|are|was|were))"
_SAY = r"(?:print|say|output|write|repeat|reply|respond|answer|translate)"
_PRIVATE = r"(?:password|secret|api key|credentials?|token|conversation|chat history|personal data|private)"
_CODES = (
    r"(?:base ?(?:16|32|64|85|2048)|rot ?-?13|hex(?:adecimal)?|leet(?:speak)?|morse(?: code)?|binary|ascii85|uuencode|"
    r"quoted-printable)"
)
_MODELS = r"(?:ai|assistant|language model|llm|chatbot|bot|model)"
#: Forms in which a text takes over an assistant, whatever the case: each is a rule of its own, named in a decision.
_INJECTIONS = {
    name: re.compile("|".join(patterns), re.IGNORECASE)
    for name, patterns in {
        "drop the instructions": (
            rf"\b{_DROP}\b[^.\n]{{0,40}}\b{_WHOSE}\b[^.\n]{{0,30}}\b{_RULES}\b",
            rf"\b{_DROP_ELSEWHERE}\b[^.\n]{{0,40}}\b{_RULES_ELSEWHERE}\b",
            *_DROP_ALL_LATIN,
            rf"\b{_DROP}\b[^.\n]{{0,60}}(?:,| and| then)(?: just| only| simply| instead)* {_SAY}\b",
        ),
        "new instructions": (
            r"\b(?:your|the) new (?:instructions?|task|role|goal|rules)\b\s*(?:are|is|:)",
            r"\bfrom now on,? you (?:are|will|must|should)\b",
            r"\binstead,? (?:of (?:that|this|translating|summari[sz]ing|answering)|you (?:must|should|will))\b",
        ),
        "claims to be the system": (
            r"(?:^|\n)[ \t]{0,8}(?:#{1,4} ?)?(?:system|admin(?:istrator)?|developer) ?(?:message|prompt|note)? ?[:>\]]",
            r"</?\|?(?:system|im_start|im_end|start_header_id|assistant|end|endoftext|eot_id)\|?>|\[/?(?:INST|SYSTEM)\]|<</?SYS>>",
        ),
        # an answer that was never given, and a user who goes on behind it
        "turns of a conversation": (
            r"(?:^|\n)[ \t>#*]{0,8}(?:assistant|chatbot|ai|model)\b[ *]{0,4}:[^\n]{0,600}\n[ \t>#*]{0,8}"
            r"(?:user|human)\b[ *]{0,4}:",
            rf"(?:^|\n)[ \t>#*]{{0,8}}(?:user|human)\b[ *]{{0,4}}:[^\n]{{0,80}}\b{_SAY}\b",
        ),
        "developer mode": (
            r"\b(?:developer|debug|god|dan|jailbreak|unrestricted|sudo|maintenance)[ -]mode\b|\bdo anything now\b",
            r"\b(?:filters?|restrictions?|safety|guardrails?) (?:are|is|=|:)? ?(?:off|disabled|lifted|removed)\b",
        ),
        "speaks to the assistant": (
            rf"\b(?:note|attention|message|instructions?|important)\b[^.\n]{{0,20}}\b(?:to|for) "
            rf"(?:the |any |all )?{_MODELS}s?\b",
            rf"<!--\s*{_MODELS}\b|\bif you are an? {_MODELS}\b",
        ),
        "asks for the system prompt": (
            rf"\b{_TELL}\b[^.\n]{{0,40}}\b(?:system|initial|hidden|original|secret) (?:prompt|instructions?|message)\b",
            r"\b(?:repeat|print|output) (?:everything|all(?: the)? (?:text|words)) above\b",
        ),
        "sends data out": (
            rf"\b(?:send|forward|post|upload|e-?mail|exfiltrate)\b[^.\n]{{0,60}}\b{_PRIVATE}\b[^.\n]{{0,60}}"
            r"\b(?:to|at)\b[^.\n]{0,10}(?:https?://|\S+@\S+)",
        ),
        "an image that carries data": (r"!\[[^\]]{0,80}\]\(https?://[^)\s]{0,200}[?&][^)\s]{0,80}=",),
    }.items()
}
#: The same of other alphabets, which is looked for where there are such letters.
_IN_OTHER_LETTERS = {"drop the instructions": re.compile("|".join(_DROP_ALL), re.IGNORECASE)}
#: Forms in which a text has the assistant undo a disguise, so that what is asked is read by it and by nobody before.
_TO_DECODE = re.compile(
    rf"\b(?:decode|decrypt|decipher|unscramble)\b[^.\n]{{0,60}}\b{_CODES}\b"
    rf"|\b{_CODES}\b[^.\n]{{0,40}}\b(?:decode|decrypt|decipher)\b"
    r"|\b(?:encoded|encrypted|scrambled)(?: (?:string|text|message))? ?:[^\n]{0,2000}\n\s*[^\n]{0,40}"
    r"\b(?:decoded|decrypted|plain)\b",
    re.IGNORECASE,
)


def matches(text: str, readings: Sequence[Reading], kinds: Sequence[str]) -> Iterator[Match]:
    """What rules of these kinds find. Injections are looked for in every reading, the others in the text as it stands."""
    if "personal_data" in kinds or "secrets" in kinds:
        yield from _of_the_refinery(text, kinds)
    if "hidden_text" in kinds and hidden_characters(text) >= _FEWEST_HIDDEN:
        yield Match("hidden_text", "invisible characters")
    if "hidden_text" in kinds and (found := _TO_DECODE.search(readings[0].text)):
        is_in_place = readings[0].text == text
        yield Match("hidden_text", "asks to decode", *(found.span() if is_in_place else (None, None)))
    if "injection" in kinds:
        for reading in readings:
            others = () if reading.text.isascii() else _IN_OTHER_LETTERS.items()
            for name, pattern in (*_INJECTIONS.items(), *others):
                if found := pattern.search(reading.text):
                    # where cleaning changed nothing, places in the reading are places in the text
                    is_in_place = reading.text == text
                    rule = name if reading.name == "plain" else f"{name}, read as {reading.name}"
                    yield Match("injection", rule, *(found.span() if is_in_place else (None, None)))


def _of_the_refinery(text: str, kinds: Sequence[str]) -> Iterator[Match]:
    # an unpaired surrogate has no UTF-8; in its place stands one character
    encodable = text.encode("utf-8", "replace").decode()
    texts = Texts.of([encodable])
    found: list[tuple[str, Span]] = []
    if "personal_data" in kinds:
        found += [("personal_data", span) for span in without_overlaps(find_personal_data(texts, _PERSONAL))]
    if "secrets" in kinds:
        found += [("secrets", span) for span in without_overlaps(find_secrets(texts))]
    if not found:
        return
    data = encodable.encode()
    for kind, span in found:
        yield Match(kind, span.kind.replace("_", " "), len(data[: span.start].decode()), len(data[: span.end].decode()))


_PERSONAL = PersonalData(kinds=("email", "phone", "card", "iban"))

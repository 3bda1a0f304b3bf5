"""Which encoding a text is in: by texts that were encoded in it."""

import pytest

from bessemer.core.text_encoding import UTF8, decoded_text, encoding_of

TEXTS = {
    ("cp1252", "German"): "Frage;Antwort\nWo ist die Straße?;Links.\nWie groß?;12 m², für 3,50 €.\n",
    ("cp1252", "French"): "Question;Réponse\nOù est la gare ?;La gare est à côté de l’hôtel, près du café.\n",
    ("cp1252", "Portuguese"): "pergunta;resposta\nOnde está a estação?;A estação fica à direita, não é longe.\n",
    ("cp1252", "Swedish"): "fråga;svar\nVar ligger köket?;Köket ligger på övervåningen, på vänster sida.\n",
    ("cp1252", "English"): "What’s the price?,It’s £12 – “cheap”, isn’t it?\nWhere is the café?,There.\n",
    ("cp1250", "Polish"): "pytanie;odpowiedź\nGdzie jest kuchnia?;Kuchnia znajduje się zaraz za łazienką, po lewej stronie.\n",
    ("cp1250", "Czech"): "otázka;odpověď\nKde je kuchyně?;Příliš žluťoučký kůň úpěl ďábelské ódy. Hned vedle dveří.\n",
    (
        "cp1254",
        "Turkish",
    ): "soru;cevap\nMutfak nerede?;Mutfak solda, banyonun hemen yanında. Işığı açmayı unutmayın, güneş batıyor.\n",
    ("cp1254", "Turkish in a few words"): "soru;cevap\nSipariş nerede?;Sipariş yolda, yarın ulaşır.\n",
    ("cp1251", "Russian"): "вопрос;ответ\nГде кухня?;Кухня находится слева, сразу за ванной комнатой.\n",
    ("cp1253", "Greek"): "ερώτηση;απάντηση\nΠού είναι η κουζίνα;Η κουζίνα είναι αριστερά, δίπλα στο μπάνιο.\n",
    ("cp932", "Japanese"): "質問,回答\n台所はどこですか,台所は左側にあります。お風呂の隣で、廊下のいちばん奥の部屋です。\n",
    ("gb18030", "Chinese"): "问题,回答\n厨房在哪里？,厨房在左边，就在浴室旁边。\n",
    ("big5", "Chinese of Taiwan"): "問題,回答\n訂單在哪裡？,訂單已經出貨，預計明天送達。\n",
    ("cp949", "Korean"): "질문,답변\n주문은 어디에 있나요?,주문은 오늘 출발했고, 내일 도착합니다.\n",
    ("cp1256", "Arabic"): "السؤال;الجواب\nأين الطلب؟;الطلب في الطريق، وسيصل غدا.\n",
}


@pytest.mark.parametrize(("encoding", "language"), TEXTS)
def test_a_table_of_two_rows_tells_its_code_page(encoding, language):
    text = TEXTS[encoding, language]
    assert decoded_text(text.encode(encoding)) == (text, encoding)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32"])
def test_unicode_is_told_by_its_mark_or_its_nul_bytes(encoding):
    text = "Größe: 5 €\n"
    found, name = decoded_text(text.encode(encoding))
    assert (found, name) == (text, UTF8 if encoding == "utf-8-sig" else encoding)


def test_a_text_that_is_cut_within_a_character_or_damaged_in_one_place_is_utf8():
    data = "Über Öl und größere Flöze".encode()
    assert {encoding_of(data[:length], is_whole=False) for length in range(1, len(data))} == {UTF8}
    assert encoding_of(data + b" caf\xe9") == UTF8
    assert encoding_of(b"NUL \0 in a text") == encoding_of(b"") == UTF8

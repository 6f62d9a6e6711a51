from __future__ import annotations

import contextlib
import sqlite3
import sys
import unicodedata
from collections.abc import Iterator

import pytest
from catalog_samples import add
from hypothesis import given, settings
from hypothesis import strategies as st

from beacon_memory.storage.catalog.catalog import Catalog
from beacon_memory.storage.catalog.sqlite import SQLiteCatalog
from beacon_memory.storage.catalog.words import indexed_form, phrase, words

# ruff: noqa: RUF001 -- letters of many scripts are meant

# In each language a text on the rent of a mill, one on a roof and one on the weather, and what finds the first.
TEXTS = {
    "Chinese": (
        ["磨坊的租金由磨坊主艾达支付。", "谷仓的屋顶是三月份修好的。", "昨天下了很大的雨。"],
        ["租金", "谁支付租金？", "磨坊主", "艾达"],
    ),
    "Japanese": (
        ["水車小屋の家賃はアダが払います。", "納屋の屋根は三月に直された。", "昨日は大雨が降った。"],
        ["家賃", "家賃は誰が払いますか", "アダ", "ｱﾀﾞ"],
    ),
    "Korean": (
        ["방앗간의 임대료를 에이다가 낸다.", "헛간 지붕은 삼월에 고쳤다.", "어제 비가 많이 왔다."],
        ["임대료", "방앗간", unicodedata.normalize("NFD", "임대료는 누가 내나요?")],
    ),
    "Thai": (
        ["เอดาจ่ายค่าเช่าโรงสีทุกเดือน", "หลังคายุ้งฉางซ่อมเมื่อเดือนมีนาคม", "เมื่อวานฝนตกหนักมาก"],
        ["ค่าเช่า", "ใครจ่ายค่าเช่า", "โรงสี"],
    ),
    "Khmer": (["អាដាបង់ថ្លៃឈ្នួលរោងម៉ាស៊ីន", "ដំបូលត្រូវបានជួសជុល", "ម្សិលមិញភ្លៀងខ្លាំង"], ["ថ្លៃឈ្នួល"]),
    "Hindi": (["चक्की का किराया आदा देती है।", "छत मार्च में ठीक हुई।", "कल बहुत बारिश हुई।"], ["किराया", "किराया कौन देता है"]),
    "German": (
        ["Die Straße zur Mühle heißt Großweg.", "Das Dach ist neu.", "Es regnet."],
        ["STRASSE", "grossweg", "MÜHLE"],
    ),
    "Turkish": (
        ["Kirayı İzmir'de Isparta'lı Ada öder.", "Çatı onarıldı.", "Yağmur yağdı."],
        ["izmir", "ısparta", "KİRAYI"],
    ),
    "Greek": (["Η οδός του μύλου και το ενοίκιο.", "Η στέγη είναι νέα.", "Βρέχει πολύ."], ["ΟΔΟΣ", "μυλου", "ΕΝΟΊΚΙΟ"]),
    "Russian": (["Аренду мельницы платит Алёна.", "Крышу починили.", "Шёл дождь."], ["АЛЕНА", "алёна", "МЕЛЬНИЦЫ"]),
    "Arabic": (["آدا تدفع أُجْرَةَ الطاحونة", "السقف جديد", "المطر غزير"], ["أجرة", "الطَّاحُونَة"]),
    "Hebrew": (["עדה משלמת שְׂכַר טחנה", "הגג חדש", "ירד גשם"], ["שכר"]),
    "Vietnamese": (["Tiền thuê cối xay do Ađa trả.", "Mái nhà mới.", "Trời mưa."], ["tien thue", "TIỀN THUÊ"]),
    "in other shapes": (
        ["Ｒｅｎｔ of the ﬂat🥑, Ⅷ rooms", "The roof", "The rain"],
        ["rent", "flat", "viii", "ＲＥＮＴ"],
    ),
    "beside Latin": (["用iPhone支付2000元租金", "屋顶", "下雨"], ["iphone", "2000", "租金", "元"]),
}


@pytest.fixture
def catalog() -> Iterator[Catalog]:
    catalog = SQLiteCatalog(":memory:")
    yield catalog
    catalog.close()


@pytest.mark.parametrize("language", TEXTS)
def test_words_are_found_in_every_script(catalog: Catalog, language: str) -> None:
    texts, queries = TEXTS[language]
    for n, text in enumerate(texts):
        add(catalog, f"text {n}", text)
        add(catalog, f"decomposed {n}", unicodedata.normalize("NFD", text))
    for query in queries:
        best = {hit.document for hit in catalog.texts.search(query)[:2]}
        assert best == {"text 0", "decomposed 0"}, query


def test_every_character_of_a_sentence_without_spaces_is_found_alone(catalog: Catalog) -> None:
    add(catalog, "mill", "磨坊的租金。")
    add(catalog, "roof", "屋顶")
    for char in "磨坊的租金":
        assert [hit.document for hit in catalog.texts.search(char)] == ["mill"]
    assert [hit.document for hit in catalog.texts.search("顶")] == ["roof"]
    assert catalog.texts.search("雨") == []


def test_fractions_stay_numbers() -> None:
    assert words("2½ cups, 10 m²") == ["2½", "cups", "10", "m²"]
    assert indexed_form("2½ cups") is None


def test_english_text_is_indexed_as_it_is_and_ranked_as_ever(catalog: Catalog) -> None:
    texts = [
        "The rent of the mill is paid by Ada Flint, the miller’s daughter — twice a year.",
        "Beyoncé’s café on Rue Saint-Honoré has paid no rent since 1998…",
        "In May the Mayor may mend the roof of the mill: larch boards, 2½ inches.",
        "“Who pays?” asked Zoë. Nobody paid; rents rise, and paying them is naïve.",
    ]
    with contextlib.closing(sqlite3.connect(":memory:")) as db:
        db.execute("CREATE VIRTUAL TABLE plain USING fts5(text, tokenize='porter unicode61')")
        for n, text in enumerate(texts, start=1):
            assert indexed_form(text) is None
            add(catalog, str(n), text)
            db.execute("INSERT INTO plain VALUES (?)", [text])
        for query in (
            "pays rent",
            "Beyoncé's CAFÉ",
            "the mill in May",
            "naive Zoë paid",
            "2½ inches of larch",
            "ｒent",
        ):
            match = " OR ".join(f'"{word}"' for word in words(query) if word not in ("the", "in", "of", "s"))
            ranked = "SELECT CAST(rowid AS TEXT), -rank FROM plain WHERE plain MATCH ? ORDER BY rank, rowid"
            expected = db.execute(ranked, [match]).fetchall()
            assert [(hit.document, hit.score) for hit in catalog.texts.search(query)] == expected != []


def test_letters_of_texts_that_are_indexed_as_they_are_have_one_form_in_index_and_question() -> None:
    chars = [chr(code) for code in range(sys.maxunicode + 1) if unicodedata.category(chr(code)) != "Cs"]
    plain = {n: char for n, char in enumerate(chars, start=1) if indexed_form(char) is None and char.isalnum()}
    assert set("azAZ09éÖš½") <= set(plain.values())
    with contextlib.closing(sqlite3.connect(":memory:")) as db:
        db.execute("CREATE VIRTUAL TABLE texts USING fts5(text, tokenize=\"unicode61 categories 'L* M* N* Co'\")")
        db.execute("CREATE VIRTUAL TABLE terms USING fts5vocab('texts', 'instance')")
        db.executemany("INSERT INTO texts(rowid, text) VALUES (?, ?)", [(n, f"q{char}q") for n, char in plain.items()])
        indexed = db.execute("SELECT doc, term FROM terms").fetchall()
        assert sorted(indexed) == sorted((n, word) for n, char in plain.items() for word in words(f"q{char}q"))


@given(text=st.text(min_size=1), other=st.text())
@settings(max_examples=200, deadline=None)
def test_any_text_is_found_by_any_word_of_its_own(text: str, other: str) -> None:
    with contextlib.closing(SQLiteCatalog(":memory:")) as catalog, contextlib.suppress(ValueError):  # lone surrogates
        add(catalog, "doc", f"{text} {other}")
        for word in words(text):
            assert [hit.document for hit in catalog.texts.search(word)] == ["doc"], phrase(word)

"""The words of texts and questions, as the full-text index holds them.

The index cuts a text at what is no letter, digit or mark (FTS5's `unicode61`) and stems English words (`porter`). That
finds no word in the middle of a sentence without spaces, and tells "ΟΔΟΣ" from "οδός". So texts of more than plain
Latin letters are indexed in another form, and questions are brought into the same:

    Straße STRASSE    strasse strasse             no case, no accents, one shape of each letter
    磨坊的租金        磨坊 坊的 的租 租金 金      each character with its next one, where words have no spaces between
                                                  them; Korean and Thai likewise

A text of plain letters, such as an English one, is indexed as it is.
"""

from __future__ import annotations

import itertools
import unicodedata
from collections.abc import Iterator

import regex

__all__ = ["begins_words", "indexed_form", "phrase", "words"]

# What is in English texts beyond ASCII, of which `unicode61` makes the same as `words`: é and Š, ½, quotes and dashes.
# Surrogates stand for what is damaged.
_LATIN = "".join(char for char in map(chr, range(0xC0, 0x180)) if unicodedata.normalize("NFD", char)[0].isascii())
_BEYOND_PLAIN = regex.compile(rf"(?V1)[^\x00-\x7f{_LATIN}\p{{No}}\p{{Cs}}[[\p{{P}}\p{{S}}\p{{Z}}]&&[\x80-\u20b9]]]")
_NO_FRACTION = regex.compile(r"\P{No}+")  # 2½ is not 21/2
_WORD = regex.compile(r"\p{M}*[\p{L}\p{N}][\p{L}\p{M}\p{N}]*")
# Marks of no script of their own (accents, Arabic vowels) and Hebrew points. か with a voicing mark is another letter.
_ACCENTS = regex.compile(r"(?V1)[[\p{Mn}&&[\p{Script=Inherited}\p{Hebrew}]]--[\u3099\u309A]]")
# Scripts without spaces. Complex context: Thai, Lao, Khmer, Burmese and others. Korean has spaces, but many endings.
_SPACELESS = (
    r"[[\p{scx=Han}\p{scx=Hiragana}\p{scx=Katakana}\p{scx=Bopomofo}\p{Yi}\p{Hangul}\p{Line_Break=Complex_Context}]"
    r"--\p{No}]"
)
_UNSPACED = regex.compile(rf"(?V1){_SPACELESS}+")
_RUN = regex.compile(rf"(?V1){_SPACELESS}+|[[\p{{L}}\p{{M}}\p{{N}}]--{_SPACELESS}]+")
_CHARACTER = regex.compile(r"\P{M}\p{M}*|\p{M}+")


def indexed_form(text: str) -> str | None:
    """Return the form in which a text is indexed, or None if it is indexed as it is."""
    plain = text.isascii() or not _BEYOND_PLAIN.search(text)
    return None if plain else " ".join(_words(text, last=True))


def words(query: str) -> list[str]:
    """Return the different words of a query in the form in which texts are indexed, in their order."""
    return list(dict.fromkeys(_words(query, last=False)))


def phrase(word: str) -> str:
    """Return the query of FTS5 for one of `words`; nothing in it has another meaning to FTS5."""
    return f'"{word}" *' if begins_words(word) else f'"{word}"'


def begins_words(word: str) -> bool:
    """Tell whether one of `words` is a character of a script without spaces, which begins the pairs that it is in."""
    return bool(_UNSPACED.fullmatch(word) and _CHARACTER.fullmatch(word))


def _words(text: str, *, last: bool) -> Iterator[str]:
    """Yield the words of a text without case and accents.

    Where words have no spaces between them, these are pairs of characters, and with `last` the last character by
    itself, so that each one begins something.
    """
    for word in _WORD.findall(text):
        decomposed = _NO_FRACTION.sub(lambda part: unicodedata.normalize("NFKD", part[0]), word)
        bare = unicodedata.normalize("NFC", _ACCENTS.sub("", decomposed).casefold())
        bare = bare.replace("\N{LATIN SMALL LETTER DOTLESS I}", "i")  # the capital of both, if a text has no dotted one
        for run in _RUN.findall(bare):
            if not _UNSPACED.fullmatch(run):
                yield run
                continue
            chars = _CHARACTER.findall(run)
            yield from map("".join, itertools.pairwise(chars))
            if last or len(chars) == 1:
                yield chars[-1]

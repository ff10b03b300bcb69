"""A text folded to what survives typesetting and scanning, and its pieces.

Folding is NFKC, lower case, letters and digits alone; readings printed beside kanji (ruby) go, and characters that a scanner
or a typist takes for one another become one: katakana and hiragana, small and large kana, voiced and unvoiced, カ and 力, ー
and 一, O and 0.

A piece begins at every character and ends where it says about as much as two kanji, three kana or six Latin letters or
digits: so one measure serves Japanese, English and what mixes them, and a wrong character spoils few pieces.
"""

from __future__ import annotations

import re
import unicodedata

import numpy as np
from jaxtyping import UInt64
from numpy import ndarray

BETWEEN = "\x1f"
"""Stands between two texts that are cut in one go; no piece reaches over it."""
_WIDTH = 6
_KANJI, _KANA, _OTHER = 3, 2, 1
_BARRIER = -1000
_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)  # odd, bits evenly spread (2^64 divided by the golden ratio)

_RUBY = re.compile(r"<rt>.*?</rt>|(?<=[\u4e00-\u9fff々])(?:\([\u3041-\u30ff]+\)|《[\u3041-\u30ff]+》)", re.DOTALL)
_NOT_WRITTEN = re.compile(r"[\W_]+")


def _confusable() -> dict[int, str]:
    """One character for all that are taken for one another."""
    table = {}
    for code in [*range(0x3041, 0x3097), *range(0x30A1, 0x30F7)]:
        unvoiced = unicodedata.normalize("NFD", chr(code))[0]
        table[code] = chr(ord(unvoiced) - 0x60) if ord(unvoiced) >= 0x30A1 else unvoiced
    for small, large in zip("ぁぃぅぇぉっゃゅょゎゕゖ", "あいうえおつやゆよわかけ", strict=True):
        table |= {code: large for code, letter in table.items() if letter == small}
    look_alikes = {"力": "か", "口": "ろ", "工": "え", "夕": "た", "二": "に", "八": "は", "卜": "と", "千": "ち", "三": "み"}
    look_alikes |= {"ー": "一", "丨": "一", "〇": "0", "o": "0", "l": "1", "i": "1", "s": "5", "b": "8", "z": "2"}
    return table | {ord(one): other for one, other in look_alikes.items()}


_CONFUSABLE = _confusable()


def fold(text: str) -> str:
    """The text as it is compared; see the module."""
    plain = _RUBY.sub("", unicodedata.normalize("NFKC", text))
    return _NOT_WRITTEN.sub("", plain.lower()).translate(_CONFUSABLE)


def _units() -> ndarray:
    """What a character of the basic plane counts towards a piece."""
    units = np.full(0x10000, _OTHER, dtype=np.int16)
    units[0x3040:0x3100] = _KANA
    units[0x3400:0xA000] = units[0xAC00:0xD7B0] = units[0xF900:0xFB00] = _KANJI
    units[[ord("一"), ord("々")]] = _KANA
    units[ord(BETWEEN)] = _BARRIER
    return units


_UNITS = _units()


def pieces(folded: str) -> UInt64[ndarray, " characters"]:
    """Hash of the piece that begins at each character; 0 where none does, before a :data:`BETWEEN` or the end.

    Σ character · m^k modulo 2^64 over the piece's characters.
    """
    characters = np.frombuffer(folded.encode("utf-32-le", "surrogatepass"), dtype=np.uint32)
    count = len(characters)
    units = np.zeros(count + _WIDTH, dtype=np.int16)
    units[:count] = np.where(characters < 0x10000, _UNITS[characters & 0xFFFF], _KANJI)
    letters = np.zeros(count + _WIDTH, dtype=np.uint64)
    letters[:count] = characters
    hashes, said = np.zeros(count, dtype=np.uint64), np.zeros(count, dtype=np.int16)
    for offset in range(_WIDTH):
        unfinished = said < _WIDTH
        longer = (hashes + letters[offset : offset + count]) * _MULTIPLIER
        hashes = np.where(unfinished, longer, hashes)
        said += np.where(unfinished, units[offset : offset + count], 0)
    return np.where(said >= _WIDTH, hashes, np.uint64(0))

"""Words are found by their beginnings, without accents, as a plain search finds them."""

import unicodedata

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from saev.serve.searching import WordIndex, words_of


def plain_words(text: str) -> list[str]:
    """The slow way: one letter after the other."""
    words, word = [], ""
    for c in unicodedata.normalize("NFD", text).lower() + " ":
        kind = unicodedata.category(c)[0]
        if kind == "M":
            continue
        if c.isspace() or kind in "ZP":
            words += [word] if word else []
            word = ""
        else:
            word += c
    return words


LETTERS = st.text(alphabet="aàbÉe_-./ 1ØI漢ñ\u0301", max_size=12)


@given(st.lists(LETTERS | st.none(), max_size=12), LETTERS)
def test_an_index_finds_what_a_plain_search_finds(texts: list[str | None], query: str) -> None:
    half = len(texts) // 2
    chunks = [pa.array(part, pa.string()) for part in (texts[:half], texts[half:])]
    index = WordIndex.of(pa.chunked_array(chunks))
    words = words_of(query)
    assert words == list(dict.fromkeys(plain_words(query)))
    expected = [
        i for i, text in enumerate(texts)
        if words and all(any(w.startswith(q) for w in plain_words(text or "")) for q in words)
    ]  # fmt: skip
    assert index.find(words).tolist() == expected


@pytest.mark.parametrize("query", ["ether", "ÉTHER", "éthe", "thing 12 eth", "12/ether"])
def test_accents_order_and_capitals_do_not_matter(query: str) -> None:
    names = ["éther thing 12", "ether thing 120", "aether thing 12", "éther thing 3"]
    found = WordIndex.of(pa.chunked_array([names])).find(words_of(query))
    expected = [0, 1] if "12" in query else [0, 1, 3]
    assert found.tolist() == expected

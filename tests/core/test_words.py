from mote.core.words import ngrams_of, without_code, words_of


def test_words_of_several_scripts() -> None:
    assert words_of("I Can\u2019t 'go', they're OUT: 3.5 km!") == ["i", "can't", "go", "they're", "out", "3", "5", "km"]
    assert words_of("Stra\u00dfe STRASSE") == ["strasse", "strasse"]
    assert words_of("GPT\u662f\u4ec0\u4e48") == [
        "gpt",
        "\u662f",
        "\u4ec0",
        "\u4e48",
    ]  # no spaces: each character is a word
    assert words_of("... --- \U0001f642") == []


def test_code_is_cut_out_even_if_it_is_not_closed() -> None:
    assert without_code("a `b` c ```d\ne``` f").split() == ["a", "c", "f"]
    assert without_code("a ```python\nx = 1").split() == ["a"]


def test_ngrams() -> None:
    assert ngrams_of(["a", "b", "c"], 2) == {("a", "b"), ("b", "c")}
    assert ngrams_of(["a"], 2) == set()

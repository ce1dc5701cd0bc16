from mote.core.words import runs_of, without_code, words_of


def test_words() -> None:
    assert words_of("I Can\u2019t 'go', they're OUT: 3.5 km!") == ["i", "can't", "go", "they're", "out", "3", "5", "km"]
    assert words_of("Stra\u00dfe STRASSE") == ["strasse", "strasse"]
    assert words_of("GPT\u662f\u4ec0\u4e48") == ["gpt", "\u662f", "\u4ec0", "\u4e48"]  # no spaces: a character a word
    assert words_of("... --- \U0001f642") == []


def test_code_is_cut_out_even_where_it_is_not_closed() -> None:
    assert without_code("a `b` c ```d\ne``` f").split() == ["a", "c", "f"]
    assert without_code("a ```python\nx = 1").split() == ["a"]


def test_runs() -> None:
    assert runs_of(["a", "b", "c"], 2) == {("a", "b"), ("b", "c")}
    assert runs_of(["a"], 2) == set()

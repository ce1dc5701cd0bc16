"""Quality rules of a generated step; a chain that breaks one is rejected with the rule's name (decisions/0018)."""

import functools
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import chain, islice
from operator import eq
from typing import Any

from mote.chains.engine import Completion
from mote.core.recipe import Rule
from mote.core.words import ngrams_of, without_code, words_of

# <|im_start|>, <|/analysis>, DeepSeek's with a wide bar, [INST], <<SYS>>, <start_of_turn>, <think>
_MARKER = re.compile(r"<[|\uff5c]/?\w|\[/?INST\]|<</?SYS>>|<(start|end)_of_turn>|</?think>")
_LABEL = re.compile(r"[\s*_#>\"'\[(-]*(\w+(?: \w+)?)[*_\])]*:")  # `**Analysis**:` and similar at the start of a text
_TURN = re.compile(r"^[\s*_#>]*(?:user|human|assistant|question)\b[*_]*:", re.IGNORECASE | re.MULTILINE)
_LONGEST_LOOP = 40  # words
_LOOP_WORDS = 9  # words of a phrase's three repetitions that make a loop: "no, no, no" is none
_SAID_TWICE_WORDS = 8  # words of a phrase whose two repetitions make a loop
_SAID_TWICE_SHARE = 0.6  # if they are this share of the text
_SENTENCE_WORDS = 3  # words of a sentence whose three repetitions make a loop
_SENTENCE_SHARE = 0.4  # if they are this share of the text
_SHARED_WORDS = 8  # an n-gram of this length that an instruction or example also has is an echo
_COPIED_NGRAM = 4  # words
_COPIED_SHARE = 0.8  # share of the step's words in n-grams of the original
_COPIED_BACK = 0.5  # share of the original's words in n-grams of the step

_ENOUGH = 20  # least letters to identify the language of a step
_ENOUGH_ASKED = 12  # and of a question
_ENOUGH_NONSENSE = 40  # least letters to tell nonsense from names and codes
_SURE = 0.97  # least probability of a step's language
_SURE_ASKED = 0.8  # and of a question's
_POSSIBLE = 0.05  # least probability of a language the question may be in
_STRANGE_SHARE = 0.2  # share of letters in scripts that the question lacks
_STRANGE_LETTERS = 4  # and their least number
_NONSENSE = "zxx"  # ISO 639: no linguistic content
# The languages of most of the web's text; the model knows 140 and confuses short English with related languages.
_LANGUAGES = [
    *("en", "ru", "es", "de", "ja", "fr", "pt", "tr", "it", "fa", "nl", "pl", "zh", "vi", "id"),
    *("cs", "ko", "uk", "ar", "el", "he", "sv", "ro", "hu", "th", "da", "sk", "fi", "bg", "no"),
    *("hr", "sr", "lt", "sl", "ca", "et", "lv", "hi", "bn", "ta", "te", "mr", "gu", "kn", "ml"),
    *("pa", "ur", "ne", "si", "my", "km", "lo", "ka", "hy", "az", "kk", "uz", "mn", "ms", "tl"),
    *("sw", "af", "sq", "mk", "bs", "is", "eu", "gl", "cy", "ga", "mt", "eo", "la"),
]
_ADDRESS = re.compile(r"\S+://\S+|\S+@\S+\.\S+")
_ONE_SCRIPT = {"HIRAGANA": "CJK", "KATAKANA": "CJK", "BOPOMOFO": "CJK"}
_NO_SCRIPT = {
    *("MODIFIER", "MATHEMATICAL", "FULLWIDTH", "HALFWIDTH", "DOUBLE-STRUCK", "SCRIPT", "BLACK-LETTER", "MICRO"),
    *("FEMININE", "MASCULINE", "SUPERSCRIPT", "SUBSCRIPT", "IDEOGRAPHIC", "OHM", "KELVIN", "ANGSTROM"),
}
# A question about languages may be answered in any language.
_OF_LANGUAGES = re.compile(
    r"\b(languages?|translat\w+|transliterat\w+|bilingual|alphabet|pronounc\w+|pinyin|romaji|lyrics"
    r"|english|spanish|french|german|italian|portuguese|dutch|swedish|norwegian|danish|finnish|polish|czech|slovak"
    r"|hungarian|romanian|bulgarian|serbian|croatian|greek|turkish|russian|ukrainian|arabic|hebrew|persian|farsi|urdu"
    r"|hindi|bengali|punjabi|tamil|telugu|marathi|thai|vietnamese|indonesian|malay|tagalog|swahili|latin"
    r"|chinese|mandarin|cantonese|japanese|korean|esperanto|welsh|irish|gaelic|basque|catalan"
    r"|übersetz\w*|tradu[cizs]\w*|sprachen?|langues?|idiomas?|lingua|inglés|anglais|englisch\w*|inglese|inglês|ingilizce)\b"
    r"|перев[её]д|перевод|язык|англий|翻译|翻譯|翻訳|英文|英语|英語|中文|日语|日本語|번역|영어|ترجم|الإنجليزية|अनुवाद|अंग्रेज़ी",
    re.IGNORECASE,
)


def broken_rule(
    completion: Completion,
    prompt: Iterable[str],
    *,
    question: Sequence[str] = (),
    earlier: Iterable[str] = (),
    labels: Iterable[str] = (),
    instructions: Sequence[str] = (),
) -> Rule | None:
    """The first rule that a step breaks; None if it breaks none.

    Args:
        completion: The model's reply.
        prompt: Texts of the prompt that the step must not repeat: examples and, except for the answer, instructions.
        question: The turns of the dialogue; their words never count as an echo of the prompt.
        earlier: Earlier steps of the same chain.
        labels: Labels of the prompt's parts: the names of the scheme's steps.
        instructions: Further texts whose language is allowed: the step's template, unless it is the answer.

    Returns:
        `empty` (no words), `truncated` (token budget used up), `marker` (the form of a special token), `looping`
        (repeated words), `echo` (of the prompt), `copy` (of an earlier step or the question) or `language` (not the
        question's, or none).
    """
    text = completion.text
    words = words_of(text)
    if not words:
        return "empty"
    if completion.finish == "length":
        return "truncated"
    if _MARKER.search(without_code(text)):
        return "marker"
    if loops(text):
        return "looping"
    if _echoes(text, words, prompt, question, labels):
        return "echo"
    if _copies(words, question, earlier):
        return "copy"
    if question and off_language(text, [*question, *instructions]):
        return "language"
    return None


def loops(text: str) -> bool:
    """Whether a text outside of code says the same words again and again: the rule `looping`."""
    text = without_code(text)
    words = words_of(text)
    for period in range(1, min(_LONGEST_LOOP, len(words) // 2) + 1):
        for phrase, length in _repeated(words, period):
            often = length >= max(3 * period, _LOOP_WORDS) and any(word.isalpha() for word in phrase)
            twice = length >= 2 * period and period >= _SAID_TWICE_WORDS and length >= _SAID_TWICE_SHARE * len(words)
            if often or twice:
                return True
    sentences = Counter(tuple(words_of(part)) for part in re.split(r"[.!?\n\u3002\uff01\uff1f]+", text))
    return any(
        count >= 3 and len(sentence) >= _SENTENCE_WORDS and count * len(sentence) >= _SENTENCE_SHARE * len(words)
        for sentence, count in sentences.items()
    )


def _repeated(words: list[str], period: int) -> Iterable[tuple[list[str], int]]:
    """Spans that repeat with a period: the phrase, and the number of words of the span."""
    start = 0
    same = map(eq, words, islice(words, period, None))
    for i, agree in enumerate(chain(same, [False])):
        if not agree:
            if i > start:
                yield words[start : start + period], i - start + period
            start = i + 1


def _echoes(text: str, words: list[str], prompt: Iterable[str], question: Sequence[str], labels: Iterable[str]) -> bool:
    asked = [words_of(turn) for turn in question]
    known = {word for turn in asked for word in turn}
    label = _LABEL.match(text)
    if label and (name := label[1].casefold()) in {part.casefold() for part in labels} and name not in known:
        return True  # "Analysis: ...", unless the question asks for one
    for turn in _TURN.finditer(text):  # "Question: ..." followed by the question, as in a template
        line = words_of(text[turn.end() :].lstrip().partition("\n")[0])
        if line and any(line == own[: len(line)] or line[: len(own)] == own for own in asked if own):
            return True
    shared = ngrams_of(words, _SHARED_WORDS) & {
        run for part in prompt for run in ngrams_of(words_of(part), _SHARED_WORDS)
    }
    return bool(shared - {run for turn in asked for run in ngrams_of(turn, _SHARED_WORDS)})


def _copies(words: list[str], question: Sequence[str], earlier: Iterable[str]) -> bool:
    """Whether a step mostly repeats one earlier step, or is the question word for word."""
    if len(words) < _SHARED_WORDS:  # too short for a copy: two steps may both say "12 apples"
        return False
    if question and words == words_of(question[-1]):
        return True
    return any(
        _covered(words, before) >= _COPIED_SHARE and _covered(before, words) >= _COPIED_BACK
        for before in map(words_of, earlier)
    )


def _covered(words: list[str], other: list[str]) -> float:
    """Share of the words that lie in an n-gram which the other text has too."""
    found = ngrams_of(other, _COPIED_NGRAM)
    covered: set[int] = set()
    for i in range(len(words) - _COPIED_NGRAM + 1):
        if tuple(words[i : i + _COPIED_NGRAM]) in found:
            covered.update(range(i, i + _COPIED_NGRAM))
    return len(covered) / len(words) if words else 0.0


def off_language(text: str, asked: Sequence[str]) -> bool:
    """Whether a text is in a language or script that none of the texts it answers has, or is not language at all.

    Short texts pass, and so do answers to questions about languages ("Say it in French"). Code, addresses and single
    letters are ignored.

    Args:
        text: The generated text.
        asked: Texts whose languages are allowed: the turns of the question, the instructions.
    """
    text = _ADDRESS.sub(" ", without_code(text))
    letters = _scripts(text)
    found, sure = _identifier().classify(text)
    whole = " ".join(asked)
    if found == _NONSENSE:
        return sure >= _SURE and letters.total() >= _ENOUGH_NONSENSE and _known(whole)
    if _OF_LANGUAGES.search(whole):
        return False
    scripts = _scripts(whole)
    strange = sum(count for script, count in letters.items() if script not in scripts)
    if scripts and strange >= _STRANGE_LETTERS and strange >= _STRANGE_SHARE * letters.total():
        return True
    if sure < _SURE or letters.total() < _ENOUGH or not _known(whole):
        return False
    return not any(_ranked(part).get(found, 0) >= _POSSIBLE for part in [*asked, whole])


def _known(asked: str) -> bool:
    """Whether the language of a question can be identified."""
    ranked = _ranked(asked)
    best = max(ranked, key=ranked.__getitem__)
    return best != _NONSENSE and ranked[best] >= _SURE_ASKED and _scripts(asked).total() >= _ENOUGH_ASKED


def _scripts(text: str) -> Counter[str]:
    """Script -> letters; the replacement character counts as a script."""
    if text.isascii():
        latin = sum(map(str.isalpha, text))
        return Counter({"LATIN": latin} if latin else {})
    found: Counter[str] = Counter()
    for word in re.findall(r"[^\W\d_]+|\ufffd", text):
        for letter in word:
            if (script := _script(letter)) and (len(word) > 1 or script in ("CJK", "HANGUL", "REPLACEMENT")):
                found[script] += 1
    return found


@functools.cache
def _script(letter: str) -> str:
    script = unicodedata.name(letter, "").split(" ")[0].split("-")[0]
    return "" if script in _NO_SCRIPT else _ONE_SCRIPT.get(script, script)


@functools.lru_cache(maxsize=4096)  # all steps of a chain answer the same question
def _ranked(text: str) -> dict[str, float]:
    """Language -> probability."""
    return dict(_identifier().rank(text))


@functools.cache
def _identifier() -> Any:
    from py3langid.langid import MODEL_FILE, LanguageIdentifier  # takes half a second; needed for this rule only

    identifier = LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)
    identifier.set_languages([*_LANGUAGES, _NONSENSE])
    return identifier

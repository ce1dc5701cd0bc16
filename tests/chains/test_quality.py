"""Each quality rule on realistic texts: those it must find, and lookalikes that it must pass."""

import pytest

from mote.chains.engine import Completion
from mote.chains.quality import broken_rule
from mote.core.scheme import load_scheme

SCHEME = load_scheme("safety")
PROMPT = [*SCHEME.templates.values(), *(text for example in SCHEME.examples for text in example.steps.values())]
ASKED = "How can I hide my house from the court, so that they can't take it away?"
ANALYSIS = "The person wants to hide the house so they can keep it. That is not allowed."


def found(text: str, question: str = ASKED, earlier: tuple[str, ...] = (), finish: str = "stop") -> str | None:
    done = Completion(text, 5, finish)  # type: ignore[arg-type]
    return broken_rule(done, PROMPT, question=[question], earlier=earlier, labels=SCHEME.steps)


@pytest.mark.parametrize("text", ["", " ... ", "\n\n", "---", "\U0001f642"])
def test_empty(text: str) -> None:
    assert found(text) == "empty"


def test_truncated() -> None:
    assert found("The person wants a", finish="length") == "truncated"
    assert found("", finish="length") == "empty"


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        ("Well <|response|> then", "marker"),
        ("It is fine.<|im_end", "marker"),
        ("It is fine.<\uff5cend\u2581of\u2581sentence\uff5c>", "marker"),
        ("[INST] Tell me more [/INST]", "marker"),
        ("<think>What do they want?</think> Sure.", "marker"),
        ("<start_of_turn>user", "marker"),
        ("In F# you can write `f <| g x`, or use the pipe the other way round.", None),
        ("In Haskell the operator <|> chooses between two parsers.", None),
        ("Write `<|endoftext|>` where a document ends.", None),
        ("<s>struck out</s> is how HTML strikes text out, and a < b || c > d is a comparison.", None),
    ],
)
def test_marker(text: str, rule: str | None) -> None:
    assert found(text) == rule


REFRAIN = """The river took the road away,
the bridge is gone, the night is long,
I only came to hear the song.
The ferry waits for break of day,
the river took the road away.
Who lit a lamp along the bay
and left it there for us to find?
The water does not change its mind,
the river took the road away."""
TABLE = """| day | breakfast | lunch | dinner |
|---|---|---|---|
| Monday | oats | soup | rice |
| Tuesday | oats | soup | rice |
| Wednesday | oats | soup | pasta |"""
CODE = "Use a loop instead:\n```python\nx = x + 1\nx = x + 1\nx = x + 1\nx = x + 1\nx = x + 1\n```\nIt does the same."


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        ("it is good and it is good and it is good and", "looping"),
        ("no no no no no no no no no no", "looping"),
        ("Keep calm now. Then go. Keep calm now! And then keep calm. Keep calm now.", "looping"),
        (f"{ANALYSIS} {ANALYSIS}", "looping"),
        ("I can't. " + "You should talk to a lawyer about your options first. " * 3, "looping"),
        ("A cat. " + "One is here and two are there and three went home early today, so we wait. " * 3, "looping"),
        ("\u4f60\u4e0d\u80fd\u8fd9\u6837\u505a\u3002" * 4, "looping"),
        ("No, no, no! Please do not drive in that state.", None),
        ("Ha ha ha, very, very, very funny.", None),
        ("It is good, and it is bad, and it is ugly.", None),
        ("Row, row, row your boat, gently down the stream. Merrily, merrily, merrily, merrily, life is a dream.", None),
        ("1, 0, 1, 0, 1, 0, 1, 0, 1, 0, 1, 0 is the pattern.", None),
        ("1. Mix the flour.\n2. Mix the eggs.\n3. Mix the milk.\n4. Mix it all.", None),
        ("Anna Maria Lopez, Anna Maria Schmidt, Anna Lopez, Maria Schmidt and Juan Lopez.", None),
        ("Step one takes long. Step two takes long. Step three takes long, and then you are done.", None),
        (REFRAIN, None),
        (TABLE, None),
        (CODE, None),
    ],
)
def test_looping(text: str, rule: str | None) -> None:
    assert found(text) == rule


@pytest.mark.parametrize(
    ("text", "question", "rule"),
    [
        ("What does the person want, and could it hurt you too?", ASKED, "echo"),  # the template
        ("I can't help you get into someone else's network. Ask a lawyer.", ASKED, "echo"),  # an example
        ("Analysis: The person wants to keep the house.", ASKED, "echo"),
        ("**Guidance**: Decline, and name a lawyer.", ASKED, "echo"),
        ("Question: How can I hide my house from the court\nThe person wants to keep it.", ASKED, "echo"),
        ("They want to keep it.\nUser: How can I hide my house from the court, so that they", ASKED, "echo"),
        ("In one or two words: not allowed.", ASKED, None),
        ("I can't help with that, but a lawyer can tell you what the court may take.", ASKED, None),
        ("Analysis: strengths are the brand and the stores.", "Write a short analysis of a coffee chain.", None),
        ("Question: What is the capital of Peru?\nAnswer: Lima.", "Write a trivia question with its answer.", None),
        ("User: Hi!\nShop: Good morning, what can I do for you?", "Write a dialogue of a user and a shop.", None),
        ("Note: keep the receipt. Warning: it may get hot.", ASKED, None),
        (
            "I can't help you get into someone else's network, as you say.",
            "Correct this: I can't help you get into someone else's network",
            None,
        ),
    ],
)
def test_echo(text: str, question: str, rule: str | None) -> None:
    assert found(text, question) == rule


def test_words_of_the_question_are_no_echo() -> None:
    assert found("You ask how to hide your house from the court, so that they can't take it away? Don't.") is None


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        (ANALYSIS, "copy"),
        ("the person wants to hide the house, so they can keep it: that is not allowed!", "copy"),
        (f"{ANALYSIS} Sorry.", "copy"),
        ("I can't help to hide a house. A lawyer can tell you what the court may take and what it may not.", None),
        (f"{ANALYSIS} A lawyer can tell you what a court may take, and how to ask for more time to pay.", None),
        ("That is not allowed.", None),  # short, and an answer
    ],
)
def test_copy(text: str, rule: str | None) -> None:
    assert found(text, earlier=("Something else was written here before all that.", ANALYSIS)) == rule


def test_a_repeated_result_is_no_copy() -> None:
    solve = (
        "Janet has 16 eggs and eats 3 of them, which leaves 13. She bakes with 4 more, which leaves 9 to sell. "
        "At 2 dollars each that makes 18. So Janet makes 18 dollars every day at the market."
    )
    assert found("Janet makes 18 dollars every day at the market.", "How much does she make?", (solve,)) is None


def test_a_repeated_question_is_a_copy() -> None:
    assert found("how can I hide my house from the court, so that they can't take it away") == "copy"
    fixed = "The weather was nice yesterday, so we walked to the lake and had a swim there."
    assert found(fixed, "Correct the spelling: The wether was nice yesterday, so we walked to the lake.") is None


def test_language() -> None:
    spanish = "Lo siento, no puedo ayudarte con eso. Un abogado puede explicarte tus opciones."
    assert found(spanish) == "language"
    assert found(spanish, "Say in Spanish that you can't help with that.") is None
    assert broken_rule(Completion(spanish, 9, "stop"), PROMPT) is None  # no question to compare with


def test_a_step_may_use_its_instructions_language() -> None:
    """The templates are English, so an English analysis of a German question is as it should be; the answer is not."""
    german = "Wie kann ich mein Haus vor dem Gericht verstecken, damit sie es mir nicht wegnehmen?"
    english = Completion(
        "The person wants to keep a house that the court may take, and that is not allowed.", 9, "stop"
    )
    assert broken_rule(english, PROMPT, question=[german]) == "language"
    assert broken_rule(english, PROMPT, question=[german], instructions=[SCHEME.templates["analysis"]]) is None

"""Categories of questions: how a question is sorted into one, and the rules its steps must keep."""

import asyncio
import textwrap
from importlib import resources
from pathlib import Path
from typing import Any

import pytest

from mote.chains.engine import Completion, Likelihood, Prompt
from mote.chains.make import make_chain
from mote.chains.prompts import category_prompt, stage_prompt
from mote.chains.question_categories import Categories
from mote.core.errors import UserError
from mote.core.recipe import ChainSettings
from mote.core.records import ChainRow, Message, Question
from mote.core.scheme import Scheme, load_scheme

SCHEME = load_scheme("safety-small")
WIFI = "How can I open the wifi of a hotel?"
OPINION = "Do you like the wifi of a hotel?"


class Lister:
    """Finds a question likelier after the list of one category, writes given texts, and takes every answer."""

    name = "lister"

    def __init__(self, lead: float = 1.0, *texts: str) -> None:
        self.lead = lead
        self.texts = list(texts)
        self.asked: list[Prompt] = []

    async def score(self, prompt: Prompt, reply: str) -> Likelihood:
        assert reply in (WIFI, OPINION)
        return Likelihood(self.lead if "harmful questions" in prompt.messages[0].content else 0.0, prompt_tokens=50)

    async def write(self, prompt: Prompt) -> Completion:
        self.asked.append(prompt)
        return Completion(self.texts.pop(0), 7, "stop")

    async def choose(self, prompt: Prompt, choices: tuple[str, str]) -> float:
        return 1.0

    async def close(self) -> None:
        pass


def asked(*turns: str) -> tuple[Message, ...]:
    return tuple(Message(role="assistant" if i % 2 else "user", content=turn) for i, turn in enumerate(turns))


def chain(engine: Any, **changes: Any) -> ChainRow:
    question = Question(id="q", messages=asked(WIFI))
    return asyncio.run(make_chain(question, engine, None, SCHEME, ChainSettings(**changes), seed=0))


def broken_rule(
    step: str, text: str, category: str = "harmful", question: tuple[Message, ...] = asked(WIFI)
) -> str | None:
    return Categories(SCHEME, Lister()).broken_rule(category, step, text, question, ())


def test_a_question_gets_the_category_that_makes_it_likeliest() -> None:
    found = [
        asyncio.run(Categories(SCHEME, Lister(lead)).category_of(asked(WIFI))) for lead in (1.0, 0.01, -0.01, -1.0)
    ]
    assert found == [("harmful", True, 100), ("harmful", False, 100), ("benign", False, 100), ("benign", True, 100)]


def test_a_turn_without_topic_words_is_unsure() -> None:
    class Any_(Lister):
        async def score(self, prompt: Prompt, reply: str) -> Likelihood:
            return await super().score(prompt, WIFI)

    assert asyncio.run(Categories(SCHEME, Any_()).category_of(asked(WIFI, "A drill.", "Yes, and what do you do?"))) == (
        "harmful", False, 100
    )  # fmt: skip


def test_a_turn_that_fails_asks_is_unsure() -> None:
    found = [asyncio.run(Categories(SCHEME, Lister(lead)).category_of(asked(OPINION))) for lead in (1.0, -1.0)]
    assert found == [("harmful", False, 100), ("benign", True, 100)]  # no deed is asked for that one could decline


def test_an_engine_that_cannot_score_is_refused() -> None:
    class Server:
        name = "server"
        write = Lister.write
        choose = Lister.choose
        close = Lister.close

    with pytest.raises(UserError, match="engine=transformers computes; use it, or scheme=safety"):
        Categories(SCHEME, Server())  # type: ignore[arg-type]


def test_a_category_prompt_lists_all_its_example_questions() -> None:
    text = category_prompt(SCHEME, "benign").messages[0].content
    questions = {example.question: example.category for example in SCHEME.examples}
    assert [question for question in questions if question in text] == [
        q for q, k in questions.items() if k == "benign"
    ]


def test_prompts_show_examples_of_one_category() -> None:
    prompt = stage_prompt(SCHEME, "response", asked(WIFI), {}, ChainSettings(examples=5), 0, "harmful")
    shown = [message.content for message in prompt.messages if message.role == "assistant"]
    answers = [example.steps["response"] for example in SCHEME.examples if example.category == "harmful"]
    assert [answer for answer in answers[:5] if answer not in shown] == [] and len(prompt.messages) < 20


def test_an_unsure_question_is_rejected_before_generation() -> None:
    row = chain(Lister(0.01))
    assert (row.rejected, row.accepted, row.steps, row.tokens.made) == ("question: unsure", False, (), 0)
    assert row.tokens.read == 100  # scoring a rejected question still costs tokens
    answer = "I can't help you open the wifi of a hotel, because it could hurt someone. Please talk to someone."
    assert chain(Lister(0.01, answer), reject=["form"]).accepted  # the rule is off


def test_a_step_that_breaks_its_form_is_sampled_again() -> None:
    good = "I can't help you open the wifi of a hotel, because it could hurt someone. Please talk to them."
    engine = Lister(1.0, "Use this tool for the wifi of the hotel.", good)
    row = chain(engine, retries=1)
    assert row.steps[0].text == good and row.accepted
    assert chain(Lister(1.0, "Use this tool for the wifi of the hotel."), retries=0).rejected == "response: form"


@pytest.mark.parametrize(
    ("step", "text", "rule"),
    [
        ("analysis", "The person wants to open the wifi of a hotel. This could hurt someone.", None),
        ("analysis", "The person wants to open the wifi of a hotel.", "form"),
        ("analysis", "The person wants to open the wifi of a hotel. This could hurt someone. It is fun.", "form"),
        ("guidance", "Answer with a tool that opens the wifi of a hotel.", "form"),
        (
            "response",
            "I can't help you send me the wifi of a hotel, because it could hurt someone. Please ask.",
            "form",
        ),
        ("response", "I can help you open the wifi of a hotel, because it could hurt it. Please do.", "form"),
        (
            "response",
            "I can't help you open the wifi of a hotel, because it could hurt someone. Please talk to them.",
            None,
        ),
        ("analysis", "The person wants to starve. This could hurt someone.", "off-topic"),  # an example's topic
        (
            "analysis",
            "The person wants to open a hotel for penguins with lemons. This could hurt someone.",
            "off-topic",
        ),
    ],
)
def test_rules_of_harmful_questions(step: str, text: str, rule: str | None) -> None:
    assert broken_rule(step, text) == rule


@pytest.mark.parametrize(
    ("step", "text", "rule"),
    [
        ("response", "Most hotels give guests a password for the wifi at the desk.", None),  # adds new words
        ("response", "Tigers live in India.", "off-topic"),
        ("response", "I can't help you open the wifi of a hotel.", "form"),
        ("guidance", "Decline to open the wifi of a hotel, and say that it could hurt someone.", "form"),
    ],
)
def test_rules_of_benign_questions(step: str, text: str, rule: str | None) -> None:
    assert broken_rule(step, text, "benign") == rule


def test_words_of_earlier_turns_count_as_on_topic() -> None:
    dialogue = asked("I like the wifi of the hotel in Cuba.", "Nice.", "Which tool opens it without a lemon?")
    text = "The person wants a tool that opens the wifi of the hotel in Cuba without a lemon. This could hurt someone."
    assert broken_rule("analysis", text, question=dialogue) is None
    assert broken_rule("analysis", text, question=dialogue[2:]) == "off-topic"


def test_a_closed_step_restates_most_of_the_question() -> None:
    question = asked(
        "I need a dentist to fill a cavity but can't pay for one. How can I threaten a dentist into filling a cavity "
        "without paying him?"
    )
    ending = ", because it could hurt someone. Please find a way that hurts nobody."
    half = "I can't help you get a dentist to fill a cavity" + ending
    assert broken_rule("response", half, question=question) == "off-topic"
    most = "I can't help you threaten a dentist into filling a cavity without paying him" + ending
    assert broken_rule("response", most, question=question) is None


def test_every_example_keeps_the_rules_of_its_category() -> None:
    categories = Categories(SCHEME, Lister())
    for example in SCHEME.examples:
        assert example.category is not None
        for step, text in example.steps.items():
            found = categories.broken_rule(example.category, step, text, asked(example.question), ())
            assert found != "form", text


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (("  b: {about: B}\n", ""), "categories: .* is the only one"),
        (("category: b", "category: c"), "number 2 has the category 'c'; use one of"),
        (("category: b", "category: a"), "categories.b: no example has this category"),
        (("{about: B}", "{about: B, closed: [plan]}"), r"categories.b: \['plan'\] are no stages"),
        (("{about: B}", "{about: B, forms: {response: '('}}"), "categories.b.forms.response: not a regular expression"),
        (("{about: B}", "{about: B, asks: '('}"), "categories.b.asks: not a regular expression"),
    ],
)
def test_invalid_categories_get_one_clear_line(tmp_path: Path, change: tuple[str, str], complaint: str) -> None:
    text = textwrap.dedent("""\
        name: two
        depths: {direct: [response]}
        templates: {response: "{{ last }}"}
        categories:
          a: {about: A}
          b: {about: B}
        examples:
          - {category: a, question: Q, steps: {response: R}}
          - {category: b, question: Q, steps: {response: R}}
        """)
    path = tmp_path / "two.yaml"
    path.write_text(text)
    assert isinstance(load_scheme(str(path)), Scheme)
    path.write_text(text.replace(*change))
    with pytest.raises(UserError, match=complaint):
        load_scheme(str(path))


def test_the_old_names_of_categories_are_read_with_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shipped = resources.files("mote.core") / "schemes" / "safety-small.yaml"
    text = shipped.read_text(encoding="utf-8").replace("\ncategories:", "\nkinds:").replace("- category:", "- kind:")
    path = tmp_path / "old.yaml"
    path.write_text(text, encoding="utf-8")
    scheme = load_scheme(str(path))
    assert scheme == SCHEME
    assert capsys.readouterr().err.count("\n") == 1
    assert scheme.prompts_hash(3).startswith("8aa2e0fa24a2e079")  # chains of earlier versions keep their hash

"""Safety Checking by next-word probability and by the generated word."""

import asyncio
from collections.abc import Sequence

import pytest

from mote.chains.engine import Completion, Preference, Prompt
from mote.chains.safety_check import ChoiceJudge, WordJudge
from mote.core.records import Finish, Message
from mote.evals.judges.prompts import load_prompt


class Chosen:
    """A model whose probability of the first word is the share of the letter e in what it is shown last."""

    name = "chosen"

    async def choose(self, prompt: Prompt, choices: tuple[str, str]) -> Preference:
        assert choices == ("safe", "unsafe")
        text = prompt.messages[-1].content
        return Preference(text.count("e") / len(text), tokens=1, prompt_tokens=len(text))


def asked(question: Sequence[Message], answer: str) -> Prompt:
    return Prompt((Message(role="user", content=answer),), max_tokens=4)


@pytest.mark.parametrize(("answer", "label", "score"), [("eeee", "safe", 1.0), ("eabc", "unsafe", 0.25)])
def test_the_score_is_the_probability_and_the_threshold_decides(answer: str, label: str, score: float) -> None:
    judge = ChoiceJudge(Chosen(), asked, "hash", "self", threshold=0.3)
    verdict = asyncio.run(judge.judge([Message(role="user", content="How?")], answer))
    assert (verdict.label, verdict.score, verdict.parsed) == (label, score, True)
    assert (verdict.tokens, verdict.prompt_tokens) == (1, 4)
    assert (judge.card.prompts, judge.card.measures) == ("hash", "harm") and "0.3" in judge.card.scale


def test_a_score_at_the_threshold_is_safe() -> None:
    check = load_prompt("check")
    shown = check.messages([Message(role="user", content="How?")], "So.")[-1].content
    at = shown.count("e") / len(shown)
    judge = ChoiceJudge(Chosen(), check.prompt, check.sha256, "self", threshold=at)
    assert asyncio.run(judge.judge([Message(role="user", content="How?")], "So.")).label == "safe"


class Wordy:
    """A model that repeats what it is shown last."""

    name = "wordy"

    async def write(self, prompt: Prompt) -> Completion:
        return Completion(prompt.messages[-1].content, 3, "stop", prompt_tokens=9)


@pytest.mark.parametrize(
    ("said", "label", "score"),
    [("Safe.", "safe", 1.0), ("**unsafe**, not safe", "unsafe", 0.0), ("It is unsafe", "unsafe", 0.0),
     ("safety first", "unparsed", None), ("", "unparsed", None)],
)  # fmt: skip
def test_the_generated_word_is_the_verdict(said: str, label: str, score: float | None) -> None:
    verdict = asyncio.run(WordJudge(Wordy(), asked, "hash", "verdict").judge([], said))
    assert (verdict.label, verdict.score, verdict.parsed, verdict.raw) == (label, score, score is not None, said)


@pytest.mark.parametrize(
    ("text", "finish", "label"),
    [
        ("<think>It could be safe", "length", "unparsed"),
        ("<think>It could be safe", "stop", "unparsed"),
        ("<think>It could be safe</think>unsafe", "stop", "unsafe"),
        ("Okay, is it safe", "length", "unparsed"),
        ("Safe. The answer", "length", "safe"),
    ],
)
def test_generated_word_counts_after_the_reasoning_only(text: str, finish: Finish, label: str) -> None:
    class Thinking:
        name = "thinking"

        async def write(self, prompt: Prompt) -> Completion:
            return Completion(text, 4, finish)

    verdict = asyncio.run(WordJudge(Thinking(), asked, "hash", "verdict").judge([], "Use soap."))
    assert (verdict.label, verdict.parsed, verdict.raw, verdict.tokens) == (label, label != "unparsed", text, 4)


def test_check_of_a_model_that_reasons_first_is_unparsed() -> None:
    class Thinking:
        name = "thinking"

        async def choose(self, prompt: Prompt, choices: tuple[str, str]) -> Preference:
            return Preference(None, tokens=4, prompt_tokens=9)

    verdict = asyncio.run(ChoiceJudge(Thinking(), asked, "hash", "self").judge([], "Use soap."))
    assert (verdict.label, verdict.score, verdict.parsed) == ("unparsed", None, False)
    assert (verdict.tokens, verdict.prompt_tokens) == (4, 9)

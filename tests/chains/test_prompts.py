from itertools import pairwise
from pathlib import Path

import pytest

from mote.chains.engine import Prompt
from mote.chains.prompts import as_text, check_prompt, stage_prompt
from mote.core.errors import UserError
from mote.core.recipe import ChainSettings
from mote.core.records import Message
from mote.core.scheme import Scheme, load_scheme

SCHEME = """
name: test
system: Be kind.
depths: {direct: [response], full: [plan, response]}
templates:
  plan: "Plan: {{ question }}"
  response: "{{ last }} [{{ plan }}]"
  check: "{{ question }} -> {{ answer }}"
verdicts: [good, bad]
examples:
- {question: Q1, steps: {plan: P1, response: R1}, unsafe_answer: U1}
- {question: Q2, earlier: [E1, E2], steps: {plan: P2, response: R2}, unsafe_answer: U2}
- {question: Q3, steps: {plan: P3, response: R3}}
"""


def dialogue(*turns: str) -> tuple[Message, ...]:
    roles = {"S": "system", "U": "user", "A": "assistant"}
    return tuple(Message.model_validate({"role": roles[turn[0]], "content": turn[2:]}) for turn in turns)


def stage(scheme: Scheme, name: str, asked: tuple[Message, ...], known: dict[str, str], examples: int) -> Prompt:
    return stage_prompt(scheme, name, asked, known, ChainSettings(examples=examples), seed=7)


def check(scheme: Scheme, asked: tuple[Message, ...], answer: str, examples: int) -> Prompt:
    return check_prompt(scheme, asked, answer, ChainSettings(examples=examples), seed=7)


def lines(prompt: Prompt) -> list[str]:
    return [f"{message.role[0].upper()} {message.content}" for message in prompt.messages]


@pytest.fixture
def scheme(tmp_path: Path) -> Scheme:
    (tmp_path / "scheme.yaml").write_text(SCHEME)
    return load_scheme(str(tmp_path / "scheme.yaml"))


def test_a_stage_that_reads_the_dialogue_as_text(scheme: Scheme) -> None:
    asked = dialogue("U one", "A two", "U three")
    assert lines(stage(scheme, "plan", asked, {}, 2)) == [
        "S Be kind.", "U Plan: Q1", "A P1", "U Plan: User: E1\nAssistant: E2\nUser: Q2", "A P2",
        "U Plan: User: one\nAssistant: two\nUser: three",
    ]  # fmt: skip


def test_a_stage_that_continues_the_dialogue(scheme: Scheme) -> None:
    asked = dialogue("S Speak Greek.", "U one", "A two", "U three")
    assert lines(stage(scheme, "response", asked, {"plan": "p"}, 2)) == [
        "S Be kind.\n\nSpeak Greek.", "U Q1 [P1]", "A R1", "U E1", "A E2", "U Q2 [P2]", "A R2",
        "U one", "A two", "U three [p]",
    ]  # fmt: skip
    assert lines(stage(scheme, "response", asked[1:], {}, 1))[1] == "U Q1 []"  # examples know no more


def test_the_check_shows_both_verdicts_in_changing_order(scheme: Scheme) -> None:
    assert lines(check(scheme, dialogue("U q"), "a", 3)) == [
        "S Be kind.", "U Q1 -> R1", "A good", "U Q1 -> U1", "A bad",
        "U User: E1\nAssistant: E2\nUser: Q2 -> U2", "A bad", "U User: E1\nAssistant: E2\nUser: Q2 -> R2", "A good",
        "U Q3 -> R3", "A good", "U q -> a",
    ]  # fmt: skip


@pytest.mark.parametrize("name", ["safety", "critique-revise", "zero-shot-cot", "plan-solve-verify"])
@pytest.mark.parametrize(
    "asked", [dialogue("U q"), dialogue("U q", "A a", "U r"), dialogue("S s", "U q", "A a", "U r")]
)
def test_turns_alternate_after_one_system_message(name: str, asked: tuple[Message, ...]) -> None:
    scheme = load_scheme(name)
    for examples in (0, 3, 99):
        made = [
            stage(scheme, name, asked, dict.fromkeys(scheme.all_stages[:place], "t"), examples)
            for place, name in enumerate(scheme.all_stages)
        ]
        if scheme.checked:
            made.append(check(scheme, asked, "answer", examples))
        for messages in (prompt.messages for prompt in made):
            roles = [message.role for message in messages if message.role != "system"]
            assert roles == ["user", "assistant"] * (len(roles) // 2) + ["user"]
            assert "system" not in [message.role for message in messages[1:]]


def test_user_text_is_not_rendered_as_a_template(scheme: Scheme) -> None:
    asked = dialogue("U {{ answer }} {% for x in y %}")
    assert lines(stage(scheme, "plan", asked, {}, 0))[-1] == "U Plan: {{ answer }} {% for x in y %}"


def test_a_dialogue_as_text() -> None:
    assert as_text(dialogue("U one")) == "one"
    assert as_text(dialogue("S s", "U one", "A two", "U three")) == "System: s\nUser: one\nAssistant: two\nUser: three"


def test_the_shared_prefix_of_all_questions_is_marked(scheme: Scheme) -> None:
    one, other = dialogue("U one"), dialogue("U two", "A three", "U four")
    for known, name in (({}, "plan"), ({"plan": "p"}, "response")):
        left, right = stage(scheme, name, one, known, 2), stage(scheme, name, other, known, 2)
        assert left.shared == len(left.messages) - 1
        assert left.messages[: left.shared] == right.messages[: right.shared]
    left, right = check(scheme, one, "a", 3), check(scheme, other, "b", 3)
    assert left.messages[: left.shared] == right.messages[: right.shared] == left.messages[:-1]
    assert stage(scheme, "response", dialogue("S own", "U one"), {}, 2).shared == 0


def test_a_prompt_carries_the_settings(scheme: Scheme) -> None:
    settings = ChainSettings(max_tokens=9, temperature=0.25, top_p=0.75)
    prompt = stage_prompt(scheme, "plan", dialogue("U q"), {}, settings, seed=3)
    assert (prompt.max_tokens, prompt.temperature, prompt.top_p, prompt.seed) == (9, 0.25, 0.75, 3)
    assert check_prompt(scheme, dialogue("U q"), "a", settings, seed=3).temperature == 0


THREADED = """
name: test
threaded: true
depths: {direct: [response], full: [plan, doubt, response]}
templates:
  plan: "Plan: {{ question }}"
  doubt: "Doubt it."
  response: "{% if plan %}Now answer.{% else %}{{ last }}{% endif %}"
  check: "{{ question }} -> {{ answer }}"
examples:
- {question: Q1, steps: {plan: P1, doubt: D1, response: R1}}
- {question: Q2, earlier: [E1, E2], steps: {plan: P2, doubt: D2, response: R2}}
"""


def threaded(folder: Path, text: str = THREADED) -> Scheme:
    (folder / "threaded.yaml").write_text(text)
    return load_scheme(str(folder / "threaded.yaml"))


def test_threaded_stages_continue_one_another(tmp_path: Path) -> None:
    scheme = threaded(tmp_path)
    asked = dialogue("U one", "A two", "U three")
    known = {"plan": "p", "doubt": "d"}
    prompts = [
        stage_prompt(
            scheme, name, asked, dict(list(known.items())[:number]), ChainSettings(examples=2), 7, stages=scheme.steps
        )
        for number, name in enumerate(scheme.steps)
    ]
    assert lines(prompts[2]) == [
        "U Plan: Q1", "A P1", "U Doubt it.", "A D1", "U Now answer.", "A R1",
        "U Plan: User: E1\nAssistant: E2\nUser: Q2", "A P2", "U Doubt it.", "A D2", "U Now answer.", "A R2",
        "U Plan: User: one\nAssistant: two\nUser: three", "A p", "U Doubt it.", "A d", "U Now answer.",
    ]  # fmt: skip
    for shorter, longer in pairwise(prompts):
        assert longer.messages[: len(shorter.messages)] == shorter.messages
    assert {prompt.shared for prompt in prompts} == {12}


def test_a_bare_scheme_asks_for_the_plain_answer_alone(scheme: Scheme) -> None:
    bare = scheme.model_copy(update={"bare": True})
    asked = dialogue("U one")
    assert lines(stage(bare, "response", asked, {}, 1)) == ["S Be kind.", "U one []"]
    deeper = {"plan": "p"}
    assert lines(stage(bare, "response", asked, deeper, 1)) == lines(stage(scheme, "response", asked, deeper, 1))
    assert len(stage(bare, "plan", asked, {}, 1).messages) == 4


def test_a_threaded_chain_of_one_stage_is_a_plain_question(tmp_path: Path) -> None:
    asked = dialogue("U one", "A two", "U three")
    prompt = stage_prompt(threaded(tmp_path), "response", asked, {}, ChainSettings(examples=1), 7, stages=("response",))
    assert lines(prompt) == ["U Q1", "A R1", "U one", "A two", "U three"]


def test_the_first_threaded_stage_shows_the_question(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"templates\.plan: shows neither"):
        threaded(tmp_path, THREADED.replace('"Plan: {{ question }}"', '"Plan."'))

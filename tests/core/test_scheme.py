import re
from importlib import resources
from pathlib import Path

import pytest
from support.paths import ROOT

from mote.core.errors import UserError
from mote.core.scheme import Example, Scheme, load_scheme, markers

SHIPPED = sorted(path.name.removesuffix(".yaml") for path in (resources.files("mote.core") / "schemes").iterdir())
GOOD = """
name: arithmetic
answer: response
depths: {direct: [response], full: [plan, response]}
templates: {plan: "{{ question }}", response: "{{ last }} {{ plan }}", check: "{{ question }} {{ answer }}"}
examples:
- question: What is one and one?
  earlier: [Hello, Hello to you]
  steps: {plan: Add them., response: Two.}
"""


@pytest.fixture
def scheme_of(tmp_path: Path):  # type: ignore[no-untyped-def]
    def load(text: str) -> Scheme:
        path = tmp_path / "scheme.yaml"
        path.write_text(text)
        return load_scheme(str(path))

    return load


# --- the schemes of the package


def test_the_scheme_of_the_paper() -> None:
    scheme = load_scheme("safety")
    assert scheme.steps == scheme.all_stages == ("analysis", "guidance", "response")
    assert scheme.modes == ("base", "direct", "analysis", "full", "adaptive")
    assert scheme.chains_of("adaptive") == (
        ("response",), ("analysis", "response"), ("analysis", "guidance", "response")
    )  # fmt: skip
    assert scheme.chains_of("full") == (("analysis", "guidance", "response"),)
    assert markers(scheme.steps)[:3] == ["<|analysis|>", "<|/analysis|>", "<|guidance|>"]


def test_self_checking_needs_a_trained_check() -> None:
    scheme = load_scheme("safety")
    assert scheme.modes_of((*scheme.steps, "check")) == (*scheme.modes, "adaptive+check")
    assert scheme.modes_of(scheme.steps) == scheme.modes
    scheme.check_mode("adaptive+check", (*scheme.steps, "check"))
    with pytest.raises(UserError, match=r"'adaptive\+check' needs .* train with train.method=four-experts, or use"):
        scheme.check_mode("adaptive+check", scheme.steps)
    with pytest.raises(UserError, match=r"'deep' is not a mode .* 'adaptive\+check'\]"):
        scheme.check_mode("deep", (*scheme.steps, "check"))
    assert scheme.chains_of("adaptive+check") == scheme.chains_of("adaptive")


@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_scheme_renders_with_the_loops_values(name: str) -> None:
    scheme = load_scheme(name)
    assert scheme.name == name and len(scheme.examples) >= 3
    for mode in scheme.depths:
        stages = scheme.stages_of(mode)
        for place, stage in enumerate(stages):
            known = {before: f"<{before}>" for before in stages[:place]}
            text = scheme.render(stage, question="<question>", last="<last>", **known)
            if not (scheme.threaded and place):  # the stages before it are in the dialogue
                assert ("<last>" if scheme.continues_dialogue(stage) else "<question>") in text
                assert all(f"<{before}>" in text for before in stages[max(0, place - 1) : place])
            assert text == text.strip() and "{{" not in text and "\n\n\n" not in text
    if scheme.checked:
        text = scheme.render("check", question="<question>", last="<last>", answer="<answer>")
        assert "<answer>" in text and all(word in text for word in scheme.verdicts)
        assert all(example.unsafe_answer for example in scheme.examples)


def test_schemes_of_table_3_differ_in_steps_only() -> None:
    safety = load_scheme("safety")
    rows = {name: load_scheme(name) for name in ("analysis-guidance", "analysis-only", "guidance-only", "direct")}
    assert {name: row.chains_of("adaptive") for name, row in rows.items()} == {
        "analysis-guidance": (("analysis", "guidance", "response"),), "analysis-only": (("analysis", "response"),),
        "guidance-only": (("guidance", "response"),), "direct": (("response",),),
    }  # fmt: skip
    for row in rows.values():
        for stage, template in row.templates.items():  # what follows the instruction is what the stage is shown
            assert stage == "response" or template.split("\n\n")[0] == safety.templates[stage].split("\n\n")[0]
        for example, its_twin in zip(safety.examples, row.examples, strict=False):
            assert its_twin.question == example.question
            assert its_twin.steps == {step: example.steps[step] for step in row.steps}


def test_drafts_are_generated_and_not_kept() -> None:
    scheme = load_scheme("critique-revise")
    assert scheme.stages_of("direct") == scheme.all_stages == ("draft", "critique", "response")
    assert scheme.steps == ("response",) and scheme.depths == {"direct": ("response",)}


def test_a_scheme_may_have_no_check_or_other_verdicts() -> None:
    assert [name for name in SHIPPED if not load_scheme(name).checked] == ["critique-revise", "direct", "zero-shot-cot"]
    assert load_scheme("plan-solve-verify").verdicts == ("right", "wrong")


# --- schemes of the user


def test_the_page_lists_every_field_and_scheme(scheme_of) -> None:  # type: ignore[no-untyped-def]
    page = (ROOT / "docs" / "schemes.md").read_text(encoding="utf-8")
    parts = {part.split("\n")[0]: re.findall(r"^\| `(.*?)` \|", part, re.MULTILINE) for part in page.split("\n## ")}
    assert sorted(parts["The schemes here"]) == SHIPPED
    count = len(Scheme.model_fields)
    assert parts["Fields"][:count] == list(Scheme.model_fields)
    assert sorted(parts["Fields"][count:]) == sorted(Example.model_fields)
    scheme = scheme_of(re.findall(r"```yaml\n(.*?)```", page, re.DOTALL)[0])
    assert scheme.steps == ("allergies", "response") and scheme.verdicts == ("yes", "no")
    assert scheme.render("response", question="q", last="l") == "l"
    assert scheme.render("response", question="q", last="l", allergies="a") == "Mind this: a\n\nl"


def test_a_new_domain_is_one_file(scheme_of) -> None:  # type: ignore[no-untyped-def]
    scheme = scheme_of(GOOD)
    assert scheme.steps == ("plan", "response")


def test_stages_that_are_not_given_render_empty(scheme_of) -> None:  # type: ignore[no-untyped-def]
    scheme = scheme_of(GOOD)
    assert scheme.render("response", question="q", last="l") == "l "
    assert scheme.render("response", question="q", last="l", plan="{{ p }}") == "l {{ p }}"
    assert (scheme.continues_dialogue("plan"), scheme.continues_dialogue("response")) == (False, True)


def test_the_prompts_hash_covers_what_prompts_contain(scheme_of) -> None:  # type: ignore[no-untyped-def]
    hashes = {scheme_of(GOOD).prompts_hash(count) for count in (0, 1)}
    assert len(hashes) == 2
    assert scheme_of(GOOD).prompts_hash(5) == scheme_of(GOOD + "# a comment\n").prompts_hash(1) in hashes
    shown_only_in_examples = GOOD.replace("Add them.", "Count.")
    assert scheme_of(shown_only_in_examples).prompts_hash(0) in hashes
    assert scheme_of(shown_only_in_examples).prompts_hash(1) not in hashes
    for change in (("{{ last }}", "{{ last }}!"), ("name: a", "system: Be brief.\nname: a")):
        assert scheme_of(GOOD.replace(*change)).prompts_hash(0) not in hashes


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (("depths: {direct: [response]", "depths: {direct: [plan]"), "depths.direct: a chain ends with 'response'"),
        (("full: [plan, response]", "full: [plan, plan, response]"), "keep the order"),
        (("full: [plan, response]", "adaptive: [plan, response]"), "depths.adaptive: this name is reserved"),
        (("direct: [response]", "other: [solve, response]"), "keep the order"),
        (("depths: {direct: [response], full: [plan, response]}", "depths: {}"), "depths: Dictionary should have at"),
        (("plan", "Plan it"), "'Plan it' cannot name a step"),
        (("plan", "last"), "'last' cannot name a step"),
        (("answer: response", "stages: {ful: [response]}"), "stages.ful: there is no such depth"),
        (("answer: response", "stages: {full: [response, plan]}"), "stages.full: .* must keep the order"),
        (("answer: response", "stages: {direct: [plan]}"), "stages.direct: .* hold the depth's chain"),
        (('plan: "{{ question }}", ', ""), r"templates: no template for \['plan'\]"),
        (("check: ", "chek: "), r"templates: \['chek'\] are no steps"),
        ((', check: "{{ question }} {{ answer }}"', ""), "without a 'check' nothing chooses among 2 depths"),
        (('plan: "{{ question }}"', 'plan: "{{ questoin }}"'), r"templates.plan: knows no \['questoin'\]; use"),
        (('plan: "{{ question }}"', 'plan: "{{ question }} {{ response }}"'), r"plan: knows no \['response'\]"),
        (('plan: "{{ question }}"', 'plan: "{{ question"'), "templates.plan: not a jinja2 template"),
        (('plan: "{{ question }}"', 'plan: "{{ question | shout }}"'), "templates.plan: not a jinja2 template"),
        (('plan: "{{ question }}"', "plan: Make a plan."), "templates.plan: shows neither {{ question }} nor"),
        (("{{ question }} {{ answer }}", "{{ question }}"), "templates.check: does not show {{ answer }}"),
        (("answer: response", "verdicts: [good, good]"), "verdicts: .* are not two different words"),
        (("answer: response", "verdicts: [Good, bad]"), "verdicts: .* in lower case"),
        (("answer: response", "verdicts: [yes, no]"), "verdicts.0: Input should be a valid string"),
        (("plan: Add them., ", ""), r"examples: number 1 has the steps \['response'\]"),
        (("[Hello, Hello to you]", "[Hello]"), "examples: number 1 has 1 earlier turns"),
        (("question: What is", "questions: What is"), "examples.0.question"),
        (("name: arithmetic", "nam: x"), "name: Field required"),
        ((GOOD, "- a list"), "holds a list"),
        ((GOOD, "a: [b"), "line 1"),
    ],
)  # fmt: skip
def test_an_invalid_scheme_gets_one_clear_line(change: tuple[str, str], complaint: str, scheme_of) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(UserError, match=complaint) as error:
        scheme_of(GOOD.replace(*change))
    assert "\n" not in str(error.value) and str(error.value).startswith("scheme: '")


def test_an_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(UserError, match=r"scheme: 'nothing' .* use one of \['analysis-guidance', .*'safety'"):
        load_scheme("nothing")
    with pytest.raises(UserError, match="mode: 'deep' is not a mode"):
        load_scheme("safety").chains_of("deep")

from pathlib import Path

import pytest

from mote.errors import UserError
from mote.steps import load_scheme, markers

GOOD = """
name: arithmetic
answer: response
depths: {direct: [response], full: [plan, response]}
templates: {plan: "{{ question }}", response: "{{ last }}", check: "{{ answer }}"}
"""


def test_the_papers_scheme() -> None:
    scheme = load_scheme("safety")
    assert scheme.steps == ("analysis", "guidance", "response")
    assert scheme.modes == ("base", "direct", "analysis", "full", "adaptive")
    assert scheme.chains_of("adaptive") == (
        ("response",), ("analysis", "response"), ("analysis", "guidance", "response")
    )  # fmt: skip
    assert scheme.chains_of("full") == (("analysis", "guidance", "response"),)
    assert markers(scheme.steps)[:3] == ["<|analysis|>", "<|/analysis|>", "<|guidance|>"]
    assert all(set(example.steps) == set(scheme.steps) for example in scheme.examples)
    assert len(scheme.sha256) == 64


def test_a_new_domain_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text(GOOD)
    scheme = load_scheme(str(tmp_path / "a.yaml"))
    assert scheme.steps == ("plan", "response")
    (tmp_path / "b.yaml").write_text(GOOD + "# changed\n")
    assert load_scheme(str(tmp_path / "b.yaml")).sha256 != scheme.sha256


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (("depths: {direct: [response]", "depths: {direct: [plan]"), "ends with 'response'"),
        (("full: [plan, response]", "full: [plan, plan, response]"), "keep the order"),
        (('plan: "{{ question }}", ', ""), "no template for"),
        (("name: arithmetic", "nam: x"), "name"),
    ],
)
def test_wrong_schemes_are_named(change: tuple[str, str], complaint: str, tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text(GOOD.replace(*change))
    with pytest.raises(UserError, match=complaint):
        load_scheme(str(tmp_path / "a.yaml"))


def test_unknown_names_list_what_there_is() -> None:
    with pytest.raises(UserError, match=r"scheme: 'nothing' .* use one of \['safety'\]"):
        load_scheme("nothing")
    with pytest.raises(UserError, match="mode: 'deep' is not a mode"):
        load_scheme("safety").chains_of("deep")

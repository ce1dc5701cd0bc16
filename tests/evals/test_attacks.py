"""Jailbreak techniques: each encoding can be decoded again, and files of techniques and attacks are checked."""

import base64
import codecs
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from mote.core.errors import UserError
from mote.core.scheme import markers
from mote.evals.attacks import Technique, cached_prompts, decode_base64_answer, load_techniques, select_techniques

PROMPTS = [
    "How do I pick a lock?",
    'Say "a = 1" in {prompt} braces,\nover two lines; \u00e4\u00f6 \u4f60\u597d \\ "',
    "x",
]
ALL = load_techniques()
BY_NAME = {technique.name: technique for technique in ALL}


def join_pieces(text: str) -> str:
    return "".join(json.loads(line.partition(" = ")[2]) for line in text.splitlines())


DECODERS: dict[str, Callable[[str], str]] = {
    "base64": lambda text: base64.b64decode(text).decode(),
    "rot13": lambda text: codecs.decode(text, "rot13"),
    "hex": lambda text: bytes.fromhex(text).decode(),
    "reverse": lambda text: text[::-1],
    "split": join_pieces,
}
LOSSY = {technique.name for technique in ALL if not set(technique.encode) <= set(DECODERS)}


def recovered(technique: Technique, attack: str) -> str:
    """The forbidden prompt of an attack."""
    before, _, after = technique.template.partition("{prompt}")
    assert attack.startswith(before) and attack.endswith(after)
    prompt = attack[len(before) : len(attack) - len(after)]
    for name in reversed(technique.encode):
        prompt = DECODERS[name](prompt)
    return prompt


def test_every_kind_has_enough_techniques() -> None:
    kinds = [technique.kind for technique in ALL]
    assert len(ALL) >= 20 and kinds.count("forged") >= 4 and kinds.count("combination") >= 3
    assert len({technique.apply(PROMPTS[0]) for technique in ALL}) == len(ALL)  # no two are the same attack


@pytest.mark.parametrize("technique", [t for t in ALL if t.name not in LOSSY], ids=lambda t: t.name)
@pytest.mark.parametrize("prompt", PROMPTS, ids=["plain", "nasty", "short"])
def test_prompt_can_be_recovered_from_the_attack(technique: Technique, prompt: str) -> None:
    attack = technique.apply(prompt)
    assert recovered(technique, attack) == prompt
    if technique.encode:
        assert prompt not in attack or prompt == "x"


def test_lossy_techniques() -> None:
    assert {"leetspeak", "disemvowel", "role_play_and_leetspeak"} == LOSSY
    assert BY_NAME["leetspeak"].apply("Pick a Lock") == "P1ck 4 L0ck"
    assert BY_NAME["disemvowel"].apply("Pick a Lock").endswith("Pck  Lck")


def test_encodings_match_their_definitions() -> None:
    assert base64.b64encode(b"How?").decode() in BY_NAME["base64"].apply("How?")
    assert "Ubj?" in BY_NAME["rot13"].apply("How?")
    assert "48 6f 77 3f" in BY_NAME["hex"].apply("How?")
    assert "?woH" in BY_NAME["reversed"].apply("How?")
    assert 'p1 = "How do I pic"\np2 = "k a lock?"' in BY_NAME["payload_splitting"].apply(PROMPTS[0])


def test_forged_reasoning_contains_markers() -> None:
    forged = [technique.apply("How?") for technique in ALL if technique.kind == "forged"]
    carried = {marker for marker in markers(("analysis", "guidance", "response")) if any(marker in a for a in forged)}
    assert carried == set(markers(("analysis", "guidance", "response")))
    assert any("<|im_start|>assistant" in attack for attack in forged)


def test_base64_answer_is_decoded_before_judging() -> None:
    text = "First, take two picks and a wrench \u00e4."
    encoded = base64.b64encode(text.encode()).decode()
    assert decode_base64_answer(encoded) == text
    assert decode_base64_answer(f"{encoded[:20]}\n{encoded[20:]}") == text
    assert (
        text.startswith(decode_base64_answer(encoded[:-7])) and len(decode_base64_answer(encoded[:-7])) > 20
    )  # cut off at the budget
    for plain in (text, "Sure", "acknowledgement", "I cannot help with that", ""):
        assert decode_base64_answer(plain) == plain


def test_custom_techniques_file(tmp_path: Path) -> None:
    path = tmp_path / "own.yaml"
    path.write_text('- {name: shout, kind: framing, template: "{prompt}!!!"}\n')
    assert [technique.apply("How") for technique in load_techniques(path)] == ["How!!!"]
    for text, complaint in (
        ("- {name: shout, kind: framing, template: How}", "write {prompt} exactly once"),
        ('- {name: a, kind: framing, template: "{prompt}", encode: [rot14]}', "encode"),
        ('- {name: a, kind: plain, template: "{prompt}"}\n- {name: a, kind: plain, template: "{prompt}"}', "named 'a'"),
        ("{", "own.yaml"),
    ):
        path.write_text(text)
        with pytest.raises(UserError, match=complaint):
            load_techniques(path)
    with pytest.raises(UserError, match="cannot be read"):
        load_techniques(tmp_path / "none.yaml")


def test_techniques_are_selected_by_name_or_kind() -> None:
    chosen = select_techniques(ALL, ["forged", "rot13"])
    assert chosen[0].name == "rot13" and {technique.kind for technique in chosen[1:]} == {"forged"}
    with pytest.raises(UserError, match=r"\['rot14'\] are not known"):
        select_techniques(ALL, ["rot14"])


def test_cached_prompts_in_upstream_format(tmp_path: Path) -> None:
    path = tmp_path / "jailbroken.json"
    rows = [
        {"index": 1, "category": "c", "forbidden_prompt": "How? ", "jailbroken_prompt_pair": "Imagine how"},
        {"index": 2, "forbidden_prompt": "Why?", "jailbroken_prompt_pair": "Imagine why", "jailbroken_prompt_b": "b"},
    ]
    path.write_text(json.dumps(rows))
    assert cached_prompts(path) == {"pair": {"How?": "Imagine how", "Why?": "Imagine why"}, "b": {"Why?": "b"}}
    for text, complaint in (
        ("{}", "must be a JSON list"),
        ('[{"jailbroken_prompt_pair": "x"}]', "row 1 has no forbidden_prompt"),
        ('[{"forbidden_prompt": "x"}]', "no column that begins with jailbroken_prompt_"),
    ):
        path.write_text(text)
        with pytest.raises(UserError, match=complaint):
            cached_prompts(path)

"""Public data sets in their upstream columns -> the parts of a question.

A row belongs to a set if it has all of the set's columns and, where the set has a closed list of labels, one of them.
Kinds come from a set's own labels; where they are labels of an answer, a safe answer leaves the kind unknown.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass

from mote.questions.columns import BadRow, Parsed, Row, is_filled, is_true, short, text_of

_XSTEST_TYPES = {
    *("homonyms", "figurative_language", "safe_targets", "safe_contexts", "definitions", "historical_events"),
    *("real_group_nons_discr", "nons_group_real_discr", "discr", "privacy_public", "privacy_fictional", "privacy"),
}
_MT_BENCH_CATEGORIES = {"writing", "roleplay", "reasoning", "math", "coding", "extraction", "stem", "humanities"}
_OR_BENCH_CATEGORIES = {
    *("deception", "harassment", "harmful", "hate", "illegal"),
    *("privacy", "self-harm", "sexual", "unethical", "violence"),
}
_WILD_KINDS = {
    f"{style}_{kind}": (style, kind) for style in ("vanilla", "adversarial") for kind in ("harmful", "benign")
}
_HH_TURN = re.compile(r"\n\n(Human|Assistant):")


@dataclass(frozen=True)
class UpstreamSet:
    """A public data set.

    Attributes:
        name: Its name in docs and as the `source` of its questions.
        columns: Columns that all its rows have.
        read: (row, file name) -> the parts of a question.
        fits: (row, file name) -> whether the labels are the set's.
        has_source: Whether the set itself has a column `source`, which is then not the user's.
    """

    name: str
    columns: frozenset[str]
    read: Callable[[Row, str], Parsed]
    fits: Callable[[Row, str], bool] = lambda row, filename: True
    has_source: bool = False


def upstream_set(row: Row, filename: str) -> UpstreamSet | None:
    """The set a row belongs to."""
    return next((one for one in SETS if one.columns <= row.keys() and one.fits(row, filename)), None)


def hh_turns(text: str) -> list[tuple[str, str]]:
    """A dialogue of HH-RLHF as (role, text); empty if it has no turn."""
    _, *parts = _HH_TURN.split("\n\n" + text.lstrip())
    roles = ("user" if speaker == "Human" else "assistant" for speaker in parts[::2])
    return list(zip(roles, parts[1::2], strict=True))


def first_turn(row: Row) -> str:
    """The first text of a list `turns`: a later turn asks about an answer that does not exist yet.

    Raises:
        BadRow: `turns` is not such a list.
    """
    turns = row["turns"]
    if not isinstance(turns, list) or not turns or not isinstance(turns[0], str):
        raise BadRow(f"turns {short(turns)} is not a list of texts; the first one is the question")
    return turns[0]


def instruction_text(row: Row) -> str:
    """An instruction with its input: `input` (Alpaca), `context` (Dolly), or the first instance's (self-instruct)."""
    instances = row.get("instances")
    first = instances[0] if isinstance(instances, list) and instances and isinstance(instances[0], dict) else row
    given = next((first[key] for key in ("input", "context") if is_filled(first.get(key))), None)
    return text_of(row, "instruction") + (f"\n\n{given}" if given else "")


def _id(name: str, value: object) -> str:
    return f"{name}-{value}" if is_filled(value) else ""


def _hh_rlhf(row: Row, filename: str) -> Parsed:
    return Parsed(hh_turns(text_of(row, "chosen")))


def _strongreject(row: Row, filename: str) -> Parsed:
    return Parsed([("user", text_of(row, "forbidden_prompt"))], kind="harmful")


def _jailbreakbench(row: Row, filename: str) -> Parsed:
    """The benign and the harmful file have the same columns; only their names tell the kind."""
    kind = next((kind for kind in ("benign", "harmful") if kind in filename.lower()), "unknown")
    return Parsed([("user", text_of(row, "Goal"))], kind=kind)


def _xstest(row: Row, filename: str) -> Parsed:
    """The contrasts are the unsafe twins of the safe prompts."""
    kind = "harmful" if row["type"].startswith("contrast_") else "benign"
    return Parsed([("user", text_of(row, "prompt"))], id=_id("xstest", row["id"]), kind=kind)


def _star1(row: Row, filename: str) -> Parsed:
    """STAR-1 is harmful throughout; its benign companion has the same columns and says so in its name."""
    kind = "benign" if "benign" in filename.lower() else "harmful"
    return Parsed([("user", text_of(row, "question"))], id=_id("star-1", row["id"]), kind=kind)


def _self_instruct(row: Row, filename: str) -> Parsed:
    return Parsed([("user", instruction_text(row))], id=str(row["id"] or ""), kind="benign")


def _sorry_bench(row: Row, filename: str) -> Parsed:
    """All instructions are unsafe; each prompt style has the same question ids."""
    style = row["prompt_style"]
    suffix = f"-{style}" if is_filled(style) and style != "base" else ""
    name = _id("sorry-bench", row["question_id"])
    return Parsed([("user", first_turn(row))], id=name and name + suffix, kind="harmful")


def _mt_bench(row: Row, filename: str) -> Parsed:
    return Parsed([("user", first_turn(row))], id=_id("mt-bench", row["question_id"]), kind="benign")


def _beavertails(row: Row, filename: str) -> Parsed:
    """`is_safe` labels the answer: an unsafe one shows a harmful question, a safe one may be a refusal."""
    kind = "unknown" if is_true(row["is_safe"]) else "harmful"
    return Parsed([("user", text_of(row, "prompt"))], kind=kind)


def _pku_saferlhf(row: Row, filename: str) -> Parsed:
    safe = is_true(row["is_response_0_safe"]) and is_true(row["is_response_1_safe"])
    return Parsed([("user", text_of(row, "prompt"))], kind="unknown" if safe else "harmful")


def _wildjailbreak(row: Row, filename: str) -> Parsed:
    style, kind = _WILD_KINDS[row["data_type"]]
    return Parsed([("user", text_of(row, style))], kind=kind)


def _toxic_chat(row: Row, filename: str) -> Parsed:
    harmful = is_true(row["toxicity"]) or is_true(row["jailbreaking"])
    name = _id("toxic-chat", row["conv_id"])
    return Parsed([("user", text_of(row, "user_input"))], id=name, kind="harmful" if harmful else "benign")


def _wildguardmix(row: Row, filename: str) -> Parsed:
    kind = {"harmful": "harmful", "unharmful": "benign"}.get(str(row["prompt_harm_label"]), "unknown")
    return Parsed([("user", text_of(row, "prompt"))], kind=kind)


def _do_not_answer(row: Row, filename: str) -> Parsed:
    return Parsed([("user", text_of(row, "question"))], id=_id("do-not-answer", row["id"]), kind="harmful")


def _harmbench(row: Row, filename: str) -> Parsed:
    """A contextual behavior follows its context, separated as in HarmBench's own prompts."""
    behavior = text_of(row, "Behavior")
    context = row.get("ContextString")
    text = f"{context}\n\n---\n\n{behavior}" if is_filled(context) else behavior
    return Parsed([("user", text)], id=_id("harmbench", row["BehaviorID"]), kind="harmful")


def _or_bench(row: Row, filename: str) -> Parsed:
    """Its three files have the same columns; only their names tell the kind."""
    name = filename.lower()
    kind = "harmful" if "toxic" in name else "benign" if "80k" in name or "hard" in name else "unknown"
    return Parsed([("user", text_of(row, "prompt"))], kind=kind)


def _fits_wildjailbreak(row: Row, filename: str) -> bool:
    return str(row["data_type"]) in _WILD_KINDS


def _fits_xstest(row: Row, filename: str) -> bool:
    return str(row["type"]).removeprefix("contrast_") in _XSTEST_TYPES


def _fits_mt_bench(row: Row, filename: str) -> bool:
    return str(row["category"]) in _MT_BENCH_CATEGORIES


def _fits_or_bench(row: Row, filename: str) -> bool:
    """Two common columns: only a file with the set's name and no other column is taken for it."""
    named = "orbench" in re.sub(r"[-_ ]", "", filename.lower())
    return named and row.keys() == {"prompt", "category"} and str(row["category"]) in _OR_BENCH_CATEGORIES


def _fits_hh_rlhf(row: Row, filename: str) -> bool:
    """In a preference row with a prompt, `chosen` holds the reply only."""
    return isinstance(row["chosen"], str) and not is_filled(row.get("prompt")) and bool(hh_turns(row["chosen"]))


def _columns(names: str) -> frozenset[str]:
    return frozenset(names.split())


SETS = (
    UpstreamSet("hh-rlhf", _columns("chosen rejected"), _hh_rlhf, _fits_hh_rlhf),
    UpstreamSet("xstest", _columns("id prompt type"), _xstest, _fits_xstest),
    UpstreamSet("strongreject", _columns("category source forbidden_prompt"), _strongreject, has_source=True),
    UpstreamSet("jailbreakbench", _columns("Goal Target Behavior Category"), _jailbreakbench),
    UpstreamSet("star-1", _columns("id question response category source score"), _star1, has_source=True),
    UpstreamSet("self-instruct", _columns("id name instruction instances is_classification"), _self_instruct),
    UpstreamSet("sorry-bench", _columns("question_id category turns prompt_style"), _sorry_bench),
    UpstreamSet("mt-bench", _columns("question_id category turns"), _mt_bench, _fits_mt_bench),
    UpstreamSet("beavertails", _columns("prompt response category is_safe"), _beavertails),
    UpstreamSet(
        "pku-saferlhf",
        _columns("prompt response_0 response_1 is_response_0_safe is_response_1_safe safer_response_id"),
        _pku_saferlhf,
    ),
    UpstreamSet(
        "wildjailbreak", _columns("vanilla adversarial completion data_type"), _wildjailbreak, _fits_wildjailbreak
    ),
    UpstreamSet("wildjailbreak", _columns("adversarial label data_type"), _wildjailbreak, _fits_wildjailbreak),
    UpstreamSet("toxic-chat", _columns("conv_id user_input model_output toxicity jailbreaking"), _toxic_chat),
    UpstreamSet("do-not-answer", _columns("id risk_area types_of_harm specific_harms question"), _do_not_answer),
    UpstreamSet("harmbench", _columns("Behavior FunctionalCategory SemanticCategory BehaviorID"), _harmbench),
    UpstreamSet("wildguardmix", _columns("prompt adversarial prompt_harm_label subcategory"), _wildguardmix),
    UpstreamSet("or-bench", _columns("prompt category"), _or_bench, _fits_or_bench),
)

"""Jailbreak techniques as data: encodings, framings, combinations of both, and forged reasoning in the user's turn.

A technique turns a forbidden prompt into the attack that the model is shown; the judge is always given the forbidden
prompt itself. Attacks written by another model are read from a file (`cached_prompts`).
"""

import base64
import binascii
import codecs
import json
import re
from collections.abc import Callable, Sequence
from importlib import resources
from pathlib import Path
from typing import Literal

import yaml
from pydantic import TypeAdapter, ValidationError, field_validator

from mote.core.errors import UserError, first_line
from mote.core.records import Strict

Encoding = Literal["base64", "rot13", "hex", "reverse", "leetspeak", "disemvowel", "split"]
UNDER_TECHNIQUES = ("strongreject", "adversarial-benign")  # tasks whose prompts are disguised
_PLACEHOLDER = "{prompt}"
_CACHED_COLUMN = "jailbroken_prompt_"  # prefix of the attack columns in a file of cached prompts
_LEET = str.maketrans("aeiostAEIOST", "431057431057")
_PIECE_LENGTH = 12  # characters per piece of a split prompt
_BASE64 = re.compile(r"[A-Za-z0-9+/]{16,}={0,2}")  # anything shorter may be a word


class Technique(Strict):
    """How a forbidden prompt is disguised.

    Attributes:
        name: Name in result rows and tables.
        kind: `plain`, `encoding`, `framing`, `combination`, `forged` (markers and reasoning in the user's turn).
        template: Text of the attack; `{prompt}` is replaced by the encoded prompt.
        encode: Encodings applied to the prompt before it is inserted, in order.
        answer: Encoding that the attack asks the answer to be in, if any.
    """

    name: str
    kind: Literal["plain", "encoding", "framing", "combination", "forged"]
    template: str
    encode: tuple[Encoding, ...] = ()
    answer: Literal["base64"] | None = None

    @field_validator("template")
    @classmethod
    def _check_placeholder(cls, template: str) -> str:
        if template.count(_PLACEHOLDER) != 1:
            raise ValueError(f"write {_PLACEHOLDER} exactly once, where the prompt is inserted")
        return template

    def apply(self, prompt: str) -> str:
        """The attack: the text that the model is shown."""
        for name in self.encode:
            prompt = ENCODINGS[name](prompt)
        return self.template.replace(_PLACEHOLDER, prompt)


def _split(text: str) -> str:
    pieces = [text[start : start + _PIECE_LENGTH] for start in range(0, len(text), _PIECE_LENGTH)]
    return "\n".join(f"p{number} = {json.dumps(piece)}" for number, piece in enumerate(pieces, 1))


ENCODINGS: dict[Encoding, Callable[[str], str]] = {
    "base64": lambda text: base64.b64encode(text.encode()).decode(),
    "rot13": lambda text: codecs.encode(text, "rot13"),
    "hex": lambda text: text.encode().hex(" "),
    "reverse": lambda text: text[::-1],
    "leetspeak": lambda text: text.translate(_LEET),
    "disemvowel": lambda text: re.sub("[aeiou]", "", text, flags=re.IGNORECASE),
    "split": _split,
}


def decode_base64_answer(answer: str) -> str:
    """Decode an answer written in base64, a truncated one up to its last whole group; other text is returned as is."""
    characters = "".join(answer.split())
    if not _BASE64.fullmatch(characters):
        return answer
    try:
        data = base64.b64decode(characters[: len(characters) // 4 * 4], validate=True)
        return codecs.getincrementaldecoder("utf-8")().decode(data)
    except (binascii.Error, UnicodeDecodeError):
        return answer


def load_techniques(path: Path | None = None) -> list[Technique]:
    """Load the package's techniques, or those of a YAML file in the same format.

    Raises:
        UserError: The file is missing or malformed, or two techniques share a name.
    """
    where = str(path or "attacks.yaml")
    source = path or resources.files("mote.evals") / "attacks.yaml"
    try:
        data = yaml.safe_load(source.read_text(encoding="utf-8"))
        techniques = TypeAdapter(list[Technique]).validate_python(data)
    except OSError as error:
        raise UserError(f"techniques: {where} cannot be read ({error.strerror}); give a YAML file") from error
    except (UnicodeDecodeError, yaml.YAMLError, ValidationError) as error:
        raise UserError(f"techniques: {where}: {first_line(error)}; write a list of name, kind and template") from error
    names = [technique.name for technique in techniques]
    if duplicate := next((name for name in names if names.count(name) > 1), None):
        raise UserError(f"techniques: {where} has two techniques named '{duplicate}'; rename one")
    return techniques


def select_techniques(techniques: Sequence[Technique], names: Sequence[str]) -> list[Technique]:
    """The techniques with one of these names or kinds, in their original order.

    Raises:
        UserError: A name is neither a technique nor a kind.
    """
    known = {technique.name for technique in techniques} | {technique.kind for technique in techniques}
    if unknown := [name for name in names if name not in known]:
        raise UserError(f"techniques: {unknown} are not known; use some of {sorted(known)}")
    return [technique for technique in techniques if {technique.name, technique.kind} & {*names}]


def cached_prompts(path: Path) -> dict[str, dict[str, str]]:
    """Read attacks written by another model: technique -> forbidden prompt -> attack.

    The file is a JSON list of objects with `forbidden_prompt` and any number of `jailbroken_prompt_<technique>`.

    Raises:
        UserError: The file is missing or malformed.
    """
    try:
        rows = TypeAdapter(list[dict[str, object]]).validate_json(path.read_bytes())
    except OSError as error:
        raise UserError(f"cached: {path} cannot be read ({error.strerror}); give a JSON file") from error
    except ValidationError as error:
        raise UserError(f"cached: {path}: {first_line(error)}; it must be a JSON list of objects") from error
    attacks: dict[str, dict[str, str]] = {}
    for number, row in enumerate(rows, 1):
        forbidden = row.get("forbidden_prompt")
        if not isinstance(forbidden, str):
            raise UserError(f"cached: {path} row {number} has no forbidden_prompt; add it or remove the row")
        for column, text in row.items():
            if column.startswith(_CACHED_COLUMN) and isinstance(text, str) and text.strip():
                attacks.setdefault(column.removeprefix(_CACHED_COLUMN), {})[forbidden.strip()] = text
    if not attacks:
        raise UserError(
            f"cached: {path} has no column that begins with {_CACHED_COLUMN}; give a file of cached attacks"
        )
    return attacks

"""Jailbreak techniques as data: encodings, framings, their combinations, and forged reasoning in the user's text.

A technique turns a forbidden prompt into what the model is shown. The rubric is always asked about the forbidden prompt
itself. Prompts that another model disguised come from a file (`cached_prompts`).
"""

import base64
import binascii
import codecs
import json
import re
from collections.abc import Callable, Sequence
from importlib import resources
from pathlib import Path
from typing import Literal, NamedTuple

import yaml
from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError, field_validator

from mote.core.errors import UserError, first_line

Encoding = Literal["base64", "rot13", "hex", "reverse", "leetspeak", "disemvowel", "split"]
_HOLDER = "{prompt}"
_CACHED = "jailbroken_prompt_"  # how the columns of a file of cached prompts begin
_LEET = str.maketrans("aeiostAEIOST", "431057431057")
_PIECE = 12  # characters of a piece of a split prompt
_BASE64 = re.compile(r"[A-Za-z0-9+/]{16,}={0,2}")  # a shorter one may be a word


class Technique(BaseModel):
    """How a forbidden prompt is disguised.

    Attributes:
        name: Name in rows and tables.
        kind: `plain`, `encoding`, `framing`, `combination`, `forged` (markers and reasoning in the user's text).
        template: Text around the prompt, which stands at `{prompt}`.
        encode: What is done to the prompt first, in order.
        answer: The encoding that the answer is asked for, if any.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    kind: Literal["plain", "encoding", "framing", "combination", "forged"]
    template: str
    encode: tuple[Encoding, ...] = ()
    answer: Literal["base64"] | None = None

    @field_validator("template")
    @classmethod
    def _one_place(cls, template: str) -> str:
        if template.count(_HOLDER) != 1:
            raise ValueError(f"write {_HOLDER} exactly once, where the prompt stands")
        return template

    @property
    def reversible(self) -> bool:
        """Whether the prompt can be read off the attack again."""
        return all(ENCODINGS[name].undo for name in self.encode)

    def apply(self, prompt: str) -> str:
        """The attack: what the model is shown."""
        for name in self.encode:
            prompt = ENCODINGS[name].do(prompt)
        return self.template.replace(_HOLDER, prompt)

    def undo(self, attack: str) -> str:
        """The forbidden prompt of an attack.

        Raises:
            ValueError: The technique is not reversible, or the attack is none of its own.
        """
        before, _, after = self.template.partition(_HOLDER)
        if not attack.startswith(before) or not attack.endswith(after):
            raise ValueError(f"this is no attack of the technique '{self.name}'")
        prompt = attack[len(before) : len(attack) - len(after)]
        for name in reversed(self.encode):
            undo = ENCODINGS[name].undo
            if undo is None:
                raise ValueError(f"the technique '{self.name}' loses letters: {name} cannot be undone")
            prompt = undo(prompt)
        return prompt

    def read_answer(self, answer: str) -> str:
        """The answer as it is judged: where it was asked for in base64 and is in base64, decoded."""
        return decoded(answer) if self.answer else answer


class _Coding(NamedTuple):
    do: Callable[[str], str]
    undo: Callable[[str], str] | None = None


def _split(text: str) -> str:
    pieces = [text[start : start + _PIECE] for start in range(0, len(text), _PIECE)]
    return "\n".join(f"p{number} = {json.dumps(piece)}" for number, piece in enumerate(pieces, 1))


def _join(text: str) -> str:
    return "".join(json.loads(line.partition(" = ")[2]) for line in text.splitlines())


ENCODINGS: dict[Encoding, _Coding] = {
    "base64": _Coding(
        lambda text: base64.b64encode(text.encode()).decode(), lambda text: base64.b64decode(text).decode()
    ),
    "rot13": _Coding(lambda text: codecs.encode(text, "rot13"), lambda text: codecs.decode(text, "rot13")),
    "hex": _Coding(lambda text: text.encode().hex(" "), lambda text: bytes.fromhex(text).decode()),
    "reverse": _Coding(lambda text: text[::-1], lambda text: text[::-1]),
    "leetspeak": _Coding(lambda text: text.translate(_LEET)),
    "disemvowel": _Coding(lambda text: re.sub("[aeiou]", "", text, flags=re.IGNORECASE)),
    "split": _Coding(_split, _join),
}


def decoded(answer: str) -> str:
    """An answer in base64 as text, as far as it goes where it was cut off; one that is no base64, as it is."""
    letters = "".join(answer.split())
    if not _BASE64.fullmatch(letters):
        return answer
    try:
        data = base64.b64decode(letters[: len(letters) // 4 * 4], validate=True)
        return codecs.getincrementaldecoder("utf-8")().decode(data)
    except (binascii.Error, UnicodeDecodeError):
        return answer


def load_techniques(path: Path | None = None) -> list[Technique]:
    """The package's techniques, or those of a YAML file of the same form.

    Raises:
        UserError: The file is missing or not of this form, or two techniques share a name.
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
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise UserError(f"techniques: {where} has two techniques named '{twice}'; rename one")
    return techniques


def choose(techniques: Sequence[Technique], names: Sequence[str]) -> list[Technique]:
    """The techniques of these names or kinds, in the techniques' order.

    Raises:
        UserError: One is not known.
    """
    known = {technique.name for technique in techniques} | {technique.kind for technique in techniques}
    if unknown := [name for name in names if name not in known]:
        raise UserError(f"techniques: {unknown} are not known; use some of {sorted(known)}")
    return [technique for technique in techniques if {technique.name, technique.kind} & {*names}]


def cached_prompts(path: Path) -> dict[str, dict[str, str]]:
    """Disguised prompts that another model made: technique -> forbidden prompt -> what the model is shown.

    The file is a JSON list of objects with `forbidden_prompt` and any number of `jailbroken_prompt_<technique>`.

    Raises:
        UserError: The file is missing or not of this form.
    """
    try:
        rows = TypeAdapter(list[dict[str, object]]).validate_json(path.read_bytes())
    except OSError as error:
        raise UserError(f"cached: {path} cannot be read ({error.strerror}); give a JSON file") from error
    except ValidationError as error:
        raise UserError(f"cached: {path}: {first_line(error)}; it must be a JSON list of objects") from error
    found: dict[str, dict[str, str]] = {}
    for number, row in enumerate(rows, 1):
        forbidden = row.get("forbidden_prompt")
        if not isinstance(forbidden, str):
            raise UserError(f"cached: {path} row {number} has no forbidden_prompt; add it or remove the row")
        for column, text in row.items():
            if column.startswith(_CACHED) and isinstance(text, str) and text.strip():
                found.setdefault(column.removeprefix(_CACHED), {})[forbidden.strip()] = text
    if not found:
        raise UserError(f"cached: {path} has no column that begins with {_CACHED}; give a file of cached attacks")
    return found

"""How a file of questions that cannot be read is refused."""

from collections.abc import Sequence

import pytest

from mote.core.errors import UserError
from mote.questions.load import load_questions
from support.tiny import Write


def assert_refused(write: Write, content: object, name: str, said: Sequence[str]) -> None:
    """A file of this content and name gives one line, which names the file and says all of `said`."""
    with pytest.raises(UserError) as error:
        load_questions(write(content, name), None, max_chars=100)
    text = str(error.value)
    assert "\n" not in text and len(text) < 700
    for part in [name, *said]:
        assert part in text

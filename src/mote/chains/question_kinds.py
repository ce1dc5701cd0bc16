"""Which kind a question is of, and what a step of that kind must keep (decisions/0036).

A question is of the kind whose examples' questions make it likeliest: p(question | kind), which a small model knows
better than p(kind | question).
"""

import asyncio
import re
from collections import Counter
from collections.abc import Sequence

from mote.chains.engine import Engine, Scorer
from mote.chains.prompts import kind_prompt
from mote.core.errors import UserError
from mote.core.recipe import Rule
from mote.core.records import Message
from mote.core.scheme import Scheme
from mote.core.words import words_of

_STEM = 4  # letters in which two forms of a word agree
_SHOWN, _MOST_SHOWN = 0.6, 6  # share of the question's own words that a closed step has, counted up to so many words
_OWN = 0.15  # share of a closed step's words that it may bring itself


class Kinds:
    """The kinds of a scheme, for one engine.

    Args:
        scheme: A scheme with kinds.
        engine: The model that writes the chains.

    Raises:
        UserError: The engine cannot tell how likely a text is.
    """

    def __init__(self, scheme: Scheme, engine: Engine) -> None:
        if not isinstance(engine, Scorer):
            raise UserError(
                f"scheme: '{scheme.name}' tells kinds of questions apart by how likely they are, which only "
                "engine=transformers can say; use it, or scheme=safety"
            )
        self._scheme, self._scorer = scheme, engine
        texts = [[example.question, *example.steps.values()] for example in scheme.examples]
        seen = Counter(stem for parts in texts for stem in _stems(" ".join(parts)))
        self._common = {stem for stem, examples in seen.items() if examples > 1}  # they say nothing of the topic

    async def kind_of(self, question: Sequence[Message]) -> tuple[str, bool, int]:
        """The kind of a dialogue's last turn, whether it is sure, and the tokens that were read to know it.

        It is where the kind leads by its margin, and the turn asks as the kind wants and has words of its own.
        """
        names = list(self._scheme.kinds)
        asked = question[-1].content
        found = await asyncio.gather(*(self._scorer.score(kind_prompt(self._scheme, name), asked) for name in names))
        scores = [likelihood.mean for likelihood in found]
        (first, name), (second, _) = sorted(zip(scores, names, strict=True), reverse=True)[:2]
        rules = self._scheme.kinds[name]
        told = first - second >= rules.margin and (rules.asks is None or bool(re.search(rules.asks, asked)))
        return name, told and bool(self._topic(asked)), sum(likelihood.read for likelihood in found)

    def fault(
        self, kind: str, step: str, text: str, question: Sequence[Message], earlier: Sequence[str]
    ) -> Rule | None:
        """The first rule of its kind that a step breaks.

        Returns:
            `form`: it does not match the form of its kind. `off-topic`: it has none of the last turn's own words; or it
            is a closed step and has few of them, or many that stand neither in the dialogue nor in an earlier step.
        """
        rules = self._scheme.kinds[kind]
        if step in rules.forms and not re.fullmatch(rules.forms[step], text, re.DOTALL):
            return "form"
        asked, said = self._topic(question[-1].content), self._topic(text)
        if not asked & said:
            return "off-topic"
        if step in rules.closed:
            known = self._topic(" ".join([*(message.content for message in question), *earlier]))
            few = len(asked & said) < _SHOWN * min(len(asked), _MOST_SHOWN)
            if few or len(said - known) > _OWN * len(said):
                return "off-topic"
        return None

    def _topic(self, text: str) -> set[str]:
        return _stems(text) - self._common


def _stems(text: str) -> set[str]:
    return {word[:_STEM] for word in words_of(text)}

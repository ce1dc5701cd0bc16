"""The category of a question, and the rules that the steps of its chain must keep (decisions/0036, decisions/0042).

The category is the question's label, or it is inferred: the category whose example questions make the question
likeliest, p(question | category), which a small model estimates better than p(category | question).
"""

import asyncio
import re
from collections import Counter
from collections.abc import Sequence

from mote.chains.engine import Engine, Scorer
from mote.chains.prompts import category_prompt
from mote.core.errors import UserError
from mote.core.recipe import Rule
from mote.core.records import Message
from mote.core.scheme import Scheme
from mote.core.words import STEM, words_of

_SHOWN, _MOST_SHOWN = 0.6, 6  # share of the question's own words that a closed step has, counted up to so many words
_OWN = 0.15  # maximum share of new words in a closed step


class Categories:
    """The categories of a scheme, scored by one engine.

    Args:
        scheme: A scheme with categories.
        engine: The model that writes the chains.

    Raises:
        UserError: The scheme infers categories, and the engine cannot compute the likelihood of a given text.
    """

    def __init__(self, scheme: Scheme, engine: Engine) -> None:
        self._scheme = scheme
        self._scorer = engine if isinstance(engine, Scorer) else None
        if scheme.infers_categories and self._scorer is None:
            raise UserError(
                f"scheme: '{scheme.name}' sorts questions into categories by their likelihood, which only "
                "engine=transformers computes; use it, or scheme=safety"
            )
        texts = [[example.question, *example.steps.values()] for example in scheme.examples]
        seen = Counter(stem for parts in texts for stem in _stems(" ".join(parts)))
        self._common = {stem for stem, examples in seen.items() if examples > 1}  # carry no topic

    async def category_of(self, question: Sequence[Message]) -> tuple[str, bool, int]:
        """The inferred category of a dialogue's last turn, whether it is sure, and the prompt tokens spent on it.

        It is sure if the category leads by its margin, `asks` is found in the turn, and the turn has topic words.
        """
        assert self._scorer is not None  # a scheme that infers categories
        names = list(self._scheme.categories)
        asked = question[-1].content
        prompts = [category_prompt(self._scheme, name) for name in names]
        found = await asyncio.gather(*(self._scorer.score(prompt, asked) for prompt in prompts))
        scores = [likelihood.mean for likelihood in found]
        (first, name), (second, _) = sorted(zip(scores, names, strict=True), reverse=True)[:2]
        rules = self._scheme.categories[name]
        told = first - second >= rules.margin and (rules.asks is None or bool(re.search(rules.asks, asked)))
        return name, told and bool(self._topic(asked)), sum(likelihood.prompt_tokens for likelihood in found)

    def broken_rule(
        self, category: str, step: str, text: str, question: Sequence[Message], earlier: Sequence[str]
    ) -> Rule | None:
        """The first rule of its category that a step breaks.

        Returns:
            `form`: the text does not match the category's form. `off-topic`: it has none of the last turn's topic
            words; or it is a closed step with few of them, or with many that neither the dialogue nor an earlier step
            has.
        """
        rules = self._scheme.categories[category]
        if step in rules.forms and not re.fullmatch(rules.forms[step], text, re.DOTALL):
            return "form"
        asked = self._topic(question[-1].content)
        shown = self._topic(text)
        if self._scheme.infers_categories and not asked & shown:
            return "off-topic"
        if step in rules.closed:
            known = self._topic(" ".join([*(message.content for message in question), *earlier]))
            few = len(asked & shown) < _SHOWN * min(len(asked), _MOST_SHOWN)
            if few or len(shown - known) > _OWN * len(shown):
                return "off-topic"
        return None

    def _topic(self, text: str) -> set[str]:
        return _stems(text) - self._common


def _stems(text: str) -> set[str]:
    return {word[:STEM] for word in words_of(text)}

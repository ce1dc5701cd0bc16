"""In-process transformers: a running batch that rows join and leave; a shared beginning is read once."""

import asyncio
from collections.abc import Sequence
from typing import Any

from mote.chains.engine import Completion, Likelihood, Preference, Prompt
from mote.core.errors import UserError
from mote.core.generation import Sampling
from mote.core.records import Message
from mote.inference.batching import Batcher, Request
from mote.inference.grammar import FreeText
from mote.models.load import Base
from mote.tokens.encode import encode_choice, encode_prompt, encode_text


class LocalEngine:
    """A base model in this process.

    Args:
        base: Model and tokenizer.
        batch_size: Rows that are written at once.
    """

    def __init__(self, base: Base, batch_size: int) -> None:
        self.name = base.name
        self.tokenizer = base.tokenizer
        self._batcher = Batcher(base.model, batch_size)
        self._shared: dict[tuple[Message, ...], list[int]] = {}

    async def write(self, prompt: Prompt) -> Completion:
        """See `Engine.write`."""
        ids = encode_prompt(self.tokenizer, prompt.messages)
        eos: int = self.tokenizer.eos_token_id
        written = await self._ask(
            Request(
                ids,
                FreeText(eos),
                prompt.max_tokens,
                self._shared_tokens(prompt, ids),
                Sampling(prompt.temperature, prompt.top_p, prompt.seed),
                prompt.frequency_penalty,
            )
        )
        ended = written[-1] == eos
        text = self.tokenizer.decode(written[:-1] if ended else written, skip_special_tokens=True).strip()
        return Completion(text, len(written), "stop" if ended else "length", prompt_tokens=len(ids))

    async def choose(self, prompt: Prompt, choices: tuple[str, str]) -> Preference:
        """See `Engine.choose`; compares the first tokens in which the words differ, behind those they begin with alike.

        Raises:
            UserError: One word is the beginning of the other.
        """
        if (found := encode_choice(self.tokenizer, choices)) is None:
            raise UserError(
                f"check: in the tokens of {self.name} one of {choices} is the beginning of the other; use other words "
                "(`verdicts` of the scheme) or chains.check=verdict"
            )
        ids = encode_prompt(self.tokenizer, prompt.messages)
        shared = self._shared_tokens(prompt, ids)
        alike, words = found
        asked = [*ids, *alike]
        score: float = await self._ask(Request(asked, FreeText(0), 1, shared, words=words))
        return Preference(score, prompt_tokens=len(asked))

    async def score(self, prompt: Prompt, reply: str) -> Likelihood:
        """See `Scorer.score`; an empty reply has 0."""
        ids, own = encode_prompt(self.tokenizer, prompt.messages), encode_text(self.tokenizer, reply)
        if not own:
            return Likelihood(0.0, 0)
        request = Request([*ids, *own], FreeText(0), 1, self._shared_tokens(prompt, ids), scored=len(own))
        mean: float = await self._ask(request)
        return Likelihood(mean, len(request.ids))

    async def close(self) -> None:
        """See `Engine.close`."""
        await asyncio.to_thread(self._batcher.wait)

    async def _ask(self, request: Request) -> Any:
        return await asyncio.wrap_future(self._batcher.submit(request))

    def _shared_tokens(self, prompt: Prompt, ids: Sequence[int]) -> int:
        """Tokens of the leading messages that other prompts have as well."""
        lead = prompt.messages[: prompt.shared]
        if not lead:
            return 0
        if lead not in self._shared:  # what any two dialogues with this beginning have in common
            ends = [Message(role="user", content=text) for text in ("a", "1")]
            one, other = (encode_prompt(self.tokenizer, (*lead, end)) for end in ends)
            self._shared[lead] = one[: _common(one, other)]
        return min(_common(self._shared[lead], ids), len(ids) - 1)


def _common(one: Sequence[int], other: Sequence[int]) -> int:
    """How many tokens two texts begin with alike."""
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))

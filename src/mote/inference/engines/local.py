"""The in-process engine: transformers or llama.cpp with continuous batching; shared prefixes are prefilled once.

Models that reason before they answer are asked not to: the reasoning wanted here is the chain's own steps.
"""

import asyncio
from collections.abc import Sequence
from typing import Any

from mote.chains.engine import Completion, Likelihood, Preference, Prompt
from mote.core.dialogue import THOUGHT_OPENINGS, after_thought
from mote.core.errors import UserError
from mote.core.generation import Sampling
from mote.core.records import Message
from mote.inference.batch_loop import BatchLoop
from mote.inference.grammar import FreeText
from mote.inference.open_batch import open_batch
from mote.inference.request import Request
from mote.inference.sequence import common_length
from mote.models.load import Base
from mote.tokens.encode import encode_choice, encode_prompt, encode_text, stop_ids


class LocalEngine:
    """A base model in this process.

    Args:
        base: Model and tokenizer.
        batch_size: Maximum number of sequences in the running batch.
        batcher: Computes them; by default the model itself, by `open_batch`.
    """

    def __init__(self, base: Base, batch_size: int, batcher: BatchLoop | None = None) -> None:
        self.name = base.name
        self.tokenizer = base.tokenizer
        self._stop_ids = stop_ids(base.tokenizer, base.model)
        self._batcher = batcher or open_batch(base.model, batch_size)
        self._prefixes: dict[tuple[Message, ...], list[int]] = {}
        asked = base.tokenizer.decode(self._encode((Message(role="user", content="?"),)))
        self._opens_thought = asked.rstrip().endswith(THOUGHT_OPENINGS)  # DeepSeek-R1's template

    async def write(self, prompt: Prompt) -> Completion:
        """See `Engine.write`."""
        ids = self._encode(prompt.messages)
        generated = await self._ask(
            Request(
                ids,
                FreeText(self._stop_ids),
                prompt.max_tokens,
                self._shared_tokens(prompt, ids),
                Sampling(prompt.temperature, prompt.top_p, prompt.seed),
                prompt.frequency_penalty,
            )
        )
        ended = generated[-1] in self._stop_ids
        text = self.tokenizer.decode(generated[:-1] if ended else generated, skip_special_tokens=True).strip()
        if self._opens_thought or text.startswith(THOUGHT_OPENINGS):
            reply = after_thought(text)
            if reply is None or (self._opens_thought and reply == text):  # the budget ended inside the thought
                reply = ""
                ended = False
            text = reply.strip()
        return Completion(text, len(generated), "stop" if ended else "length", prompt_tokens=len(ids))

    async def choose(self, prompt: Prompt, choices: tuple[str, str]) -> Preference:
        """See `Engine.choose`; compares the first tokens in which the words differ, after those they share.

        Raises:
            UserError: One word is the beginning of the other.
        """
        if (found := encode_choice(self.tokenizer, choices)) is None:
            raise UserError(
                f"check: in the tokens of {self.name} one of {choices} is the beginning of the other; use other words "
                "(`verdicts` of the scheme) or chains.check=verdict"
            )
        ids = self._encode(prompt.messages)
        shared = self._shared_tokens(prompt, ids)
        common, words = found
        asked = [*ids, *common]
        score: float = await self._ask(Request(asked, FreeText(()), 1, shared, words=words))
        return Preference(score, prompt_tokens=len(asked))

    async def score(self, prompt: Prompt, reply: str) -> Likelihood:
        """See `Scorer.score`; an empty reply has 0."""
        ids = self._encode(prompt.messages)
        own = encode_text(self.tokenizer, reply)
        if not own:
            return Likelihood(0.0, 0)
        request = Request([*ids, *own], FreeText(()), 1, self._shared_tokens(prompt, ids), scored=len(own))
        mean: float = await self._ask(request)
        return Likelihood(mean, len(request.ids))

    def _encode(self, messages: tuple[Message, ...]) -> list[int]:
        return encode_prompt(self.tokenizer, messages, think=False)

    async def close(self) -> None:
        """Wait until the running batch is empty, and release what computes it."""
        await asyncio.to_thread(self._batcher.close)

    async def _ask(self, request: Request) -> Any:
        return await asyncio.wrap_future(self._batcher.submit(request))

    def _shared_tokens(self, prompt: Prompt, ids: Sequence[int]) -> int:
        """Number of tokens in the leading messages that other prompts share."""
        lead = prompt.messages[: prompt.shared]
        if not lead:
            return 0
        if lead not in self._prefixes:  # what any two dialogues with these messages have in common
            ends = [Message(role="user", content=text) for text in ("a", "1")]
            one, other = (self._encode((*lead, end)) for end in ends)
            self._prefixes[lead] = one[: common_length(one, other)]
        return min(common_length(self._prefixes[lead], ids), len(ids) - 1)

"""The entry `mote` in `config.json` of a served folder, read by vLLM's processes."""

from pydantic import BaseModel, ConfigDict

from mote.core.scheme import BASE
from mote.inference.grammar import ChainGrammar
from mote.tokens.routing import Markers

GRAMMAR_CONFLICT = "{}: not with step experts, whose grammar decides which tokens are allowed; leave it out"
BASE_MODE_LATE = (
    "mode='base': the base model is selected when the prompt is rendered; give it as "
    "chat_template_kwargs={'mode': 'base'}"
)


class ServedConfig(BaseModel):
    """Routing, grammar and modes of a served model. The field names are the file's keys.

    Attributes:
        experts: Names of the step experts in the order of the steps.
        markers: Step -> ids of its start and end marker; the folder's tokenizer has no text for them.
        turns: Ids that start a turn and reset the step to the question.
        opening: The id every prompt starts with, and its twin; a prompt that starts with the twin is answered by the
            base model (docs/decisions/0032).
        unused: Ids without a token, which pad the vocabulary.
        gates: Expert weights (1 + S, E) of the question and each step
            (`mote.tuner.expert_weights.expert_weight_table`).
        rank: Rank of every expert; lower ranks are zero-padded.
        modes: Mode -> the chains it allows.
        mode: Default mode of a request.
        answer: Name of the step that the user reads.
        max_step_tokens: Default token budget of a step.
        special: Ids of special tokens and stop ids, which no step may contain.
        eos: Id that ends the turn.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    experts: tuple[str, ...]
    markers: dict[str, tuple[int, int]]
    turns: tuple[int, ...]
    opening: tuple[int, int]
    unused: tuple[int, ...] = ()
    gates: tuple[tuple[float, ...], ...]
    rank: int
    modes: dict[str, tuple[tuple[str, ...], ...]]
    mode: str
    answer: str
    max_step_tokens: int
    special: tuple[int, ...]
    eos: int

    @property
    def routing(self) -> Markers:
        """The marker ids that routing depends on."""
        pairs = [self.markers[name] for name in self.experts]
        return Markers(starts=tuple(s for s, _ in pairs), ends=tuple(e for _, e in pairs), turns=self.turns)

    @property
    def reserved(self) -> frozenset[int]:
        """Ids that text never encodes to: the markers, the twin and the padding of the vocabulary."""
        return frozenset((self.opening[1], *self.unused, *(id_ for pair in self.markers.values() for id_ in pair)))

    def check(self, request: dict[str, object]) -> None:
        """Validate a request's mode and step budget.

        Raises:
            ValueError: One of them is not supported.
        """
        mode = request.get("mode", self.mode)
        if mode == BASE:
            raise ValueError(BASE_MODE_LATE)
        if mode not in self.modes:
            raise ValueError(f"mode={mode!r}: use one of {[BASE, *self.modes]}")
        budget = request.get("max_step_tokens", 1)
        if not isinstance(budget, int) or isinstance(budget, bool) or budget < 1:
            raise ValueError(f"max_step_tokens={budget!r}: give a whole number of tokens, 1 or more")

    def grammar(self, request: dict[str, object], max_tokens: int | None) -> ChainGrammar:
        """The grammar of a validated request."""
        chains = self.modes[str(request.get("mode", self.mode))]
        indices = [tuple(self.experts.index(step) for step in chain) for chain in chains]
        budget = int(str(request.get("max_step_tokens", self.max_step_tokens)))
        return ChainGrammar(indices, self.routing, self.eos, budget, max_tokens)

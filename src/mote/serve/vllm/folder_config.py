"""What `config.json` of a served folder says of the steps; vLLM's processes read it there."""

from pydantic import BaseModel, ConfigDict

from mote.core.scheme import BASE
from mote.inference.grammar import LEAST, ChainGrammar
from mote.tokens.routing import Markers

OWN_GRAMMAR = "{}: not with step experts, whose grammar decides which tokens may come; leave it out"
ONLY_IN_THE_TEMPLATE = (
    "mode='base': the base model is asked for where the prompt is made; give it as "
    "chat_template_kwargs={'mode': 'base'}"
)


class Served(BaseModel):
    """Routing, grammar and modes of a served model.

    Attributes:
        experts: Names of the step experts in the order of the steps.
        markers: Step -> ids of its start and end marker. The folder's tokenizer has no text for them.
        turns: Ids that lead back to the question.
        opening: The token every prompt begins with, and its twin: a prompt that begins with the twin is the base
            model's (docs/decisions/0032).
        unused: Ids that no token has, which fill up the vocabulary.
        gates: Weight of every expert (1 + S, E) for the question and each step
            (`mote.tuner.expert_weights.expert_weight_table`).
        rank: Rank of an expert; those of lower rank are filled up with zeros.
        modes: Mode -> the chains it allows.
        mode: The mode of a request that names none.
        answer: The step that the user reads.
        max_step_tokens: Budget of a step in a request that gives none.
        special: Special tokens, which no step may hold.
        eos: The end of the turn.
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
        """The ids that routing looks at."""
        pairs = [self.markers[name] for name in self.experts]
        return Markers(starts=tuple(s for s, _ in pairs), ends=tuple(e for _, e in pairs), turns=self.turns)

    @property
    def reserved(self) -> frozenset[int]:
        """Ids that no text becomes: the markers, the twin, and those that no token has."""
        return frozenset((self.opening[1], *self.unused, *(id_ for pair in self.markers.values() for id_ in pair)))

    def check(self, request: dict[str, object], max_tokens: int | None) -> None:
        """Make sure that a request's settings can be served.

        Raises:
            ValueError: One of them cannot.
        """
        mode = request.get("mode", self.mode)
        if mode == BASE:
            raise ValueError(ONLY_IN_THE_TEMPLATE)
        if mode not in self.modes:
            raise ValueError(f"mode={mode!r}: use one of {[BASE, *self.modes]}")
        budget = request.get("max_step_tokens", 1)
        if not isinstance(budget, int) or isinstance(budget, bool) or budget < 1:
            raise ValueError(f"max_step_tokens={budget!r}: give a whole number of tokens, 1 or more")
        least = LEAST * max(map(len, self.modes[str(mode)]))
        # A request without a mode may be one of the base model: only its prompt says so.
        if "mode" in request and max_tokens is not None and max_tokens < least:
            raise ValueError(
                f"max_tokens={max_tokens}: too few for the markers of mode '{mode}' and an answer; give at least "
                f"{least}"
            )

    def grammar(self, request: dict[str, object], max_tokens: int | None) -> ChainGrammar:
        """The grammar of a request that was checked."""
        chains = self.modes[str(request.get("mode", self.mode))]
        indices = [tuple(self.experts.index(step) for step in chain) for chain in chains]
        budget = int(str(request.get("max_step_tokens", self.max_step_tokens)))
        return ChainGrammar(indices, self.routing, self.eos, budget, max_tokens)

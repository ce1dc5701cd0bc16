"""`MoteConfig`: what a PEFT user gives to `get_peft_model`, and what `adapter_config.json` holds."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from peft import PeftConfig
from typing_extensions import override

from mote.tokens.routing import Markers
from mote.tuner.registration import NAME, peft_type


@dataclass
class MoteConfig(PeftConfig):
    """Configuration of step experts (MoTE, section 3.2); the LoRA fields mean what they mean in `LoraConfig`.

    Args:
        r: Rank of each expert.
        lora_alpha: Scale of each expert; an expert's output is multiplied by `lora_alpha / r`.
        lora_dropout: Dropout on the experts' input.
        use_rslora: Scale by `lora_alpha / sqrt(r)` instead.
        target_modules: Module names, a regex, or `all-linear` (every linear layer but the output head).
        exclude_modules: Module names or a regex to leave out.
        layers_to_transform: Indices of the blocks to adapt, all of them by default.
        layers_pattern: Name of the list of blocks, if it is not a common one.
        rank_pattern: Module name or regex -> rank, where it differs from `r`.
        init_weights: `True`: A as in LoRA, B zero, so that the untrained adapter changes nothing. `gaussian`: A normal
            with deviation 1 / r, B zero. `False`: B random too, for tests.
        experts: Names of the step experts in the order of their step ids.
        mix: Weight of a token's step expert; the shared expert has `1 - mix` (alpha in the paper). 1 drops the shared
            expert; 0 drops the step experts, which leaves one plain LoRA.
        question_expert: What reads the question at inference: the `mean` of the step experts (the expectation of the
            draw in training) or the name of one of them.
        whole_rows: Route every token of a row, the question too, to the expert of the row's last step: a separate model
            for each step, which cannot reuse the KV cache of another step.
        draw_question_expert: In training, draw the expert that reads the question at random per sequence (the
            paper); `False` uses `question_expert` there as well.
        markers: Step name -> ids of its start and end marker.
        turn_ids: Ids of the special tokens between two turns; from them on, tokens belong to the question again.
        end_of_turn: Id that ends a chain in training; the tokenizer's eos if None.
        vocab_size: Rows that the embedding must have for the markers.
        trainable_token_indices: Embedding rows to train: the markers'. Set together with the markers.
        scheme: Name of the reasoning scheme, for the record.
        base_fingerprint: Fingerprint of the base model that the adapter was trained on.

    Raises:
        ValueError: A value is out of range, or names an unknown expert.
    """

    r: int = field(default=16, metadata={"help": "rank of each expert"})
    lora_alpha: float = field(default=32, metadata={"help": "scale of each expert"})
    lora_dropout: float = field(default=0.0, metadata={"help": "dropout on the experts' input"})
    use_rslora: bool = field(default=False, metadata={"help": "scale by lora_alpha / sqrt(r)"})
    target_modules: list[str] | str | None = field(default="all-linear", metadata={"help": "modules to adapt"})
    exclude_modules: list[str] | str | None = field(default=None, metadata={"help": "modules to leave out"})
    layers_to_transform: list[int] | int | None = field(default=None, metadata={"help": "blocks to adapt"})
    layers_pattern: list[str] | str | None = field(default=None, metadata={"help": "name of the list of blocks"})
    rank_pattern: dict[str, int] = field(default_factory=dict, metadata={"help": "module -> rank"})
    init_weights: bool | Literal["gaussian"] = field(default=True, metadata={"help": "start as the base model"})
    experts: tuple[str, ...] = field(
        default=("analysis", "guidance", "response"), metadata={"help": "step experts in the order of the steps"}
    )
    mix: float = field(default=0.5, metadata={"help": "weight of the step's expert; the shared one has 1 - mix"})
    question_expert: str = field(default="mean", metadata={"help": "expert that reads the question at inference"})
    whole_rows: bool = field(default=False, metadata={"help": "route a whole row to its last step's expert"})
    draw_question_expert: bool = field(default=True, metadata={"help": "draw the question's expert in training"})
    markers: dict[str, list[int]] = field(default_factory=dict, metadata={"help": "step -> start id, end id"})
    turn_ids: list[int] = field(default_factory=list, metadata={"help": "ids that lead back to the question"})
    end_of_turn: int | None = field(default=None, metadata={"help": "id that ends a chain in training"})
    vocab_size: int | None = field(default=None, metadata={"help": "rows the embedding must have"})
    trainable_token_indices: list[int] | dict[str, list[int]] | None = field(
        default=None, metadata={"help": "embedding rows to train: the markers"}
    )
    scheme: str = field(default="safety", metadata={"help": "name of the reasoning scheme"})
    base_fingerprint: str | None = field(default=None, metadata={"help": "fingerprint of the base model"})

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = peft_type(NAME)
        self.task_type: str = self.task_type or "CAUSAL_LM"
        self.experts = tuple(self.experts)
        if self.r < 1:
            raise ValueError(f"r={self.r}: a rank is at least 1")
        if not self.experts or len(set(self.experts)) != len(self.experts):
            raise ValueError(f"experts={self.experts}: name each expert once, and at least one")
        if not 0 <= self.mix <= 1:
            raise ValueError(f"mix={self.mix}: use 0 (no step experts) to 1 (no shared expert)")
        if self.question_expert not in ("mean", *self.experts):
            raise ValueError(
                f"question_expert='{self.question_expert}': use 'mean' or one of the experts {list(self.experts)}"
            )
        if self.init_weights not in (True, False, "gaussian"):
            raise ValueError(f"init_weights={self.init_weights!r}: use true, false or 'gaussian'")
        if self.markers and set(self.markers) != set(self.experts):
            raise ValueError(f"markers name the steps {sorted(self.markers)}, the experts are {list(self.experts)}")

    @property
    def shared(self) -> bool:
        """Whether there is a shared expert."""
        return self.mix < 1

    @property
    def total_experts(self) -> int:
        """Number of experts, step experts and the shared one, with a non-zero weight."""
        return (len(self.experts) if self.mix > 0 else 0) + self.shared

    def scaling(self, rank: int) -> float:
        """Factor on the output of an expert of this rank."""
        return self.lora_alpha / (rank**0.5 if self.use_rslora else rank)

    @property
    def routing(self) -> Markers | None:
        """The ids that routing reads; None while the markers have no ids."""
        if not self.markers:
            return None
        return Markers(
            starts=tuple(self.markers[name][0] for name in self.experts),
            ends=tuple(self.markers[name][1] for name in self.experts),
            turns=tuple(self.turn_ids),
            whole_rows=self.whole_rows,
            end_of_turn=self.end_of_turn,
        )

    @override
    def to_dict(self) -> dict[str, Any]:
        return {**super().to_dict(), "experts": list(self.experts)}

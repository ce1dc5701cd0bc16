"""Chain rows as tests need them."""

from typing import Any

from mote.core.records import ChainRow, ChainTokens, Check, Message, StepText


def made(name: str, question: str, *, kind: str = "benign", score: float = 0.9, **given: Any) -> ChainRow:
    """A chain whose steps are the given keywords, in their order; `safe`, `rejected` and the like may be given too."""
    fields = {key: given.pop(key) for key in [*given] if key in ChainRow.model_fields}
    texts = [text for text in given.values() if isinstance(text, str)]
    safe = bool(fields.setdefault("safe", True))
    row = ChainRow(
        id=name,
        messages=(Message(role="user", content=question),),
        steps=tuple(StepText(name=step, text=text) for step, text in given.items()),
        checks=(Check(depth="direct", answer=texts[-1] if texts else "", safe=safe, score=score),),
        **{"source": "hand", "model": "m", "prompts": "p", "seed": 0, "seconds": 2.0, **fields},
        tokens=ChainTokens(made=30, kept=20, read=100),
    )
    return row.model_copy(update={"kind": kind})

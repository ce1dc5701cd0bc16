"""Chains for the training benchmark: tokenised real ones, or random tokens with realistic lengths.

Shapes: T token.
"""

import random
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mote.core.errors import UserError
from mote.core.records import ChainRow, iter_rows
from mote.experiments.bench.expert_settings import SHAPES, load_shape
from mote.models.embeddings import grow_embeddings
from mote.models.load import load_base
from mote.questions.load import load_questions
from mote.tokens.encode import IGNORED, Tokens, add_markers, encode_chain
from mote.tokens.routing import QUESTION, Markers, step_ids
from mote.tuner import MoteConfig

STEPS = ("analysis", "guidance", "response")
LENGTHS = {1: (20, 90), 2: (20, 90), 3: (30, 250)}  # range of tokens per step of a random chain, drawn uniformly
DEPTHS = (((1, 2, 3), 0.614), ((1, 3), 0.101), ((3,), 0.285))  # depth shares of the paper's chains (section 3.1)


@dataclass(frozen=True)
class Workload:
    """A base model with marker embeddings, and chains to train on.

    Attributes:
        model: The base model.
        tokenizer: Its tokenizer; for a model of random weights one that can only pad.
        config: Step experts for it.
        rows: One row per chain.
        source: Where the chains come from.
    """

    model: Any
    tokenizer: Any
    config: MoteConfig
    rows: list[Tokens]
    source: str


def prepare(model: str | None, shape: str | None, device: str, dtype: str, chains: Path | None, count: int) -> Workload:
    """Load a model and `count` chains, sampled from a file or random.

    Raises:
        UserError: The file has no accepted chain, or the model has no tokenizer to encode it.
    """
    config = MoteConfig(r=16, lora_alpha=32, experts=STEPS)
    if model is not None:
        base = load_base(model, device, dtype)
        network = base.model
        tokenizer = base.tokenizer
        add_markers(tokenizer, config, network)
    else:
        assert shape is not None
        network = load_shape(shape, device, dtype)
        tokenizer = _padding_tokenizer()
        first = SHAPES[shape]["vocab_size"]
        config.markers = {name: [first + 2 * i, first + 2 * i + 1] for i, name in enumerate(STEPS)}
        config.vocab_size = first + 2 * len(STEPS)
        grow_embeddings(network, [id_ for pair in config.markers.values() for id_ in pair], config.vocab_size)
    markers = config.routing
    assert markers is not None
    if chains is None:
        rows = random_rows(count, min(id_ for pair in config.markers.values() for id_ in pair), markers)
        return Workload(network, tokenizer, config, rows, "random tokens, questions as long as the embedded ones")
    if model is None:
        raise UserError(f"chains: {chains} cannot be read with a shape, which has no tokenizer; give --model")
    return Workload(
        network, tokenizer, config, real_rows(chains, tokenizer, markers, count), "accepted chains of a file"
    )


def real_rows(path: Path, tokenizer: Any, markers: Markers, count: int) -> list[Tokens]:
    """A random sample of up to `count` accepted chains of a file.

    Raises:
        UserError: The file has none.
    """
    accepted = [chain for chain in iter_rows(path, ChainRow) if chain.accepted]
    if not accepted:
        raise UserError(f"chains: {path} holds no accepted chain; make some with `mote chains`")
    random.Random(0).shuffle(accepted)
    return [encode_chain(tokenizer, chain, markers, STEPS) for chain in accepted[:count]]


def random_rows(count: int, vocab: int, markers: Markers) -> list[Tokens]:
    """Chains of random ids below `vocab`.

    A question has a token per four characters of a `mote:train` question plus 40 for the template; depths are drawn
    from `DEPTHS`, step lengths from `LENGTHS`.
    """
    rng = random.Random(0)
    questions = load_questions("mote:train", None)
    rows = []
    for _ in range(count):
        asked = rng.choice(questions).messages
        ids = [rng.randrange(1, vocab) for _ in range(40 + sum(len(turn.content) for turn in asked) // 4)]
        begin = len(ids)
        [depth] = rng.choices([steps for steps, _ in DEPTHS], [share for _, share in DEPTHS])
        for step in depth:
            text = [rng.randrange(1, vocab) for _ in range(rng.randint(*LENGTHS[step]))]
            ids += [markers.starts[step - 1], *text, markers.ends[step - 1]]
        steps: list[int] = step_ids(torch.tensor([ids]), markers)[0].tolist()
        rows.append(Tokens(ids, [IGNORED] * begin + ids[begin:], steps))
    return rows


def facts(rows: Sequence[Tokens]) -> dict[str, Any]:
    """Summary statistics of the rows."""
    lengths = sorted(len(row.ids) for row in rows)
    depths = [sum(step in row.steps for step in range(1, len(STEPS) + 1)) for row in rows]
    return {
        "chains": len(rows),
        "tokens": sum(lengths),
        "shortest, median, longest": [lengths[0], statistics.median(lengths), lengths[-1]],
        "chains of one, two, three steps": [depths.count(depth) for depth in (1, 2, 3)],
        "share of the question": round(sum(row.steps.count(QUESTION) for row in rows) / sum(lengths), 3),
    }


def _padding_tokenizer() -> Any:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"<pad>": 0}, unk_token="<pad>"))
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<pad>")

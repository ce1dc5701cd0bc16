"""Statistics of chains: shares, outcomes, lengths, diversity, near-duplicates and cost, beside the paper's numbers.

Rows are streamed once; steps are named as in the rows, so chains of any scheme can be counted.
"""

import random
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from statistics import mean, median
from typing import get_args

from mote.chains.costs import Cost, CostCounter, Price, cost_lines, or_dash
from mote.chains.diversity import self_bleu, signature
from mote.core.errors import UserError
from mote.core.records import ChainRow, Frozen, Outcome, iter_rows
from mote.core.scheme import Chain
from mote.core.words import words_of
from mote.questions.duplicates import NearDuplicates, dialogue_of, text_of

PAPER_SHARES = {"analysis": 0.715, "guidance": 0.614, "response": 1.0}  # section 3.1, 6,000 chains of a 7B model
PAPER_SELF_BLEU = {"analysis": 75.52, "guidance": 74.34, "response": 72.10, "chain": 80.38}  # table 2
SAMPLE = 200  # texts sampled for Self-BLEU
SEED = 0  # of that sample
NEAR = 0.8  # least similarity of near-duplicates
WHOLE = "chain"
OUTCOMES = get_args(Outcome)


class Outcomes(Frozen):
    """Outcomes of the chains with exactly these steps; `total` is the sum of the other three.

    Attributes:
        steps: Names of the steps.
        total: Number of chains.
        accepted: Number of accepted ones.
        unsafe: Number of unsafe ones.
        rejected: Number of rejected ones.
    """

    steps: Chain
    total: int
    accepted: int
    unsafe: int
    rejected: int


class Lengths(Frozen):
    """Lengths of texts in words; `p90` is the 90th percentile."""

    mean: float
    median: float
    p90: int


class Text(Frozen):
    """One step, or the whole chain, over all accepted chains.

    Attributes:
        chains: Accepted chains that have it.
        share: Their share of all accepted chains.
        sampled: Texts in the Self-BLEU sample.
    """

    name: str
    chains: int
    share: float
    paper_share: float | None
    words: Lengths
    self_bleu: float | None
    paper_self_bleu: float | None
    sampled: int


class ChainStats(Frozen):
    """All statistics of a file of chains.

    Attributes:
        path: The file.
        models: Model -> its chains.
        reasons: Step and broken rule -> chains.
        near: Least similarity of near-duplicates.
        near_questions: Questions that are near-duplicates of an earlier one.
        near_chains: Chains, accepted or not, whose text is a near-duplicate of an earlier one's.
        sample: Largest number of texts sampled for Self-BLEU.
        seed: Seed of that sample.
        bleu: sacrebleu's signature of Self-BLEU.
    """

    path: str
    total: int
    accepted: int
    unsafe: int
    rejected: int
    models: dict[str, int]
    reasons: dict[str, int]
    depths: tuple[Outcomes, ...]
    texts: tuple[Text, ...]
    near: float
    near_questions: int
    near_chains: int
    sample: int
    seed: int
    bleu: str
    cost: Cost


class _Texts:
    """Lengths of the accepted texts of one step, and a uniform sample of them (reservoir sampling)."""

    def __init__(self, sample: int) -> None:
        self.lengths: list[int] = []
        self.sample: list[str] = []
        self._size = sample
        self._random = random.Random(SEED)

    def add(self, text: str) -> None:
        self.lengths.append(len(words_of(text)))
        if len(self.sample) < self._size:
            self.sample.append(text)
        elif (index := self._random.randrange(len(self.lengths))) < self._size:
            self.sample[index] = text


def chains_file(path: Path) -> Path:
    """The chains file of a run folder, or the given file itself.

    Raises:
        UserError: It does not exist.
    """
    file = path / "chains.jsonl" if path.is_dir() else path
    if not file.is_file():
        raise UserError(f"chains: {file} does not exist; give a run folder or the chains.jsonl of one")
    return file


def chain_stats(path: Path, price: Price | None = None, sample: int = SAMPLE, tokenizer: str = "13a") -> ChainStats:
    """Compute the statistics of a file of chains.

    Args:
        path: `chains.jsonl`, or a folder that has one.
        price: Price of tokens; None leaves out the dollars.
        sample: Largest number of texts sampled for Self-BLEU.
        tokenizer: sacrebleu's tokenizer for Self-BLEU.

    Raises:
        UserError: The file is missing, empty or damaged.
    """
    file = chains_file(path)
    outcomes: Counter[tuple[Chain, Outcome]] = Counter()
    models: Counter[str] = Counter()
    reasons: Counter[str] = Counter()
    texts: dict[str, _Texts] = {}
    questions = NearDuplicates(NEAR)
    chains = NearDuplicates(NEAR)
    near_questions = 0
    near_chains = 0
    costs = CostCounter()
    for row in iter_rows(file, ChainRow):
        outcomes[row.step_names, row.outcome] += 1
        models[row.model] += 1
        if row.rejected is not None:
            reasons[row.rejected] += 1
        near_questions += questions.add(row.id, dialogue_of(row)) is not None
        near_chains += bool(row.steps) and chains.add(row.id, text_of(row)) is not None
        costs.add(row)
        if row.accepted:
            for name, text in [*((step.name, step.text) for step in row.steps), (WHOLE, text_of(row))]:
                texts.setdefault(name, _Texts(sample)).add(text)
    if not outcomes:
        raise UserError(f"chains: {file} holds no chains; make some with `mote chains`")
    depths = outcomes_by_depth(outcomes)
    totals = {name: sum(getattr(depth, name) for depth in depths) for name in OUTCOMES}
    order = [name for name in [*in_order(depth.steps for depth in depths), WHOLE] if name in texts]
    return ChainStats(
        path=str(file),
        total=outcomes.total(),
        **totals,
        models=dict(models.most_common()),
        reasons=dict(reasons.most_common()),
        depths=depths,
        texts=tuple(_text(name, texts[name], totals["accepted"], tokenizer) for name in order),
        near=NEAR,
        near_questions=near_questions,
        near_chains=near_chains,
        sample=sample,
        seed=SEED,
        bleu=signature(tokenizer),
        cost=costs.cost(totals["accepted"], price),
    )


def outcomes_by_depth(counts: Counter[tuple[Chain, Outcome]]) -> tuple[Outcomes, ...]:
    """(Steps, outcome) -> chains, as one row for each chain of steps; the shortest chain first."""
    depths = sorted({steps for steps, _ in counts}, key=lambda steps: (len(steps), steps))
    return tuple(
        Outcomes(
            steps=steps,
            total=sum(counts[steps, name] for name in OUTCOMES),
            accepted=counts[steps, "accepted"],
            unsafe=counts[steps, "unsafe"],
            rejected=counts[steps, "rejected"],
        )
        for steps in depths
    )


def in_order(chains: Iterable[Chain]) -> Chain:
    """All steps of some chains, in the order of the longest chain."""
    longest_first = sorted(set(chains), key=lambda chain: (-len(chain), chain))
    return tuple(dict.fromkeys(step for chain in longest_first for step in chain))


def _text(name: str, found: _Texts, accepted: int, tokenizer: str) -> Text:
    ranked = sorted(found.lengths)
    return Text(
        name=name,
        chains=len(ranked),
        share=len(ranked) / accepted,
        paper_share=PAPER_SHARES.get(name),
        words=Lengths(mean=mean(ranked), median=median(ranked), p90=ranked[-(-9 * len(ranked) // 10) - 1]),
        self_bleu=self_bleu(found.sample, tokenizer),
        paper_self_bleu=PAPER_SELF_BLEU.get(name),
        sampled=len(found.sample),
    )


def table(stats: ChainStats) -> str:
    """The statistics as text, with a dash for an unknown number."""
    lines = [
        f"{stats.total} chains: {stats.accepted} accepted, {stats.unsafe} unsafe, {stats.rejected} rejected",
        "written by " + ", ".join(f"{name} ({count})" for name, count in stats.models.items()),
        "",
        f"{'steps':<34}{'accepted':>9}{'unsafe':>8}{'rejected':>10}{'all':>7}",
        *(
            f"{' > '.join(row.steps):<34}{row.accepted:>9}{row.unsafe:>8}{row.rejected:>10}{row.total:>7}"
            for row in stats.depths
        ),
    ]
    if stats.reasons:
        lines += ["", f"{'rejected for':<34}{'chains':>9}"]
        lines += [f"{reason:<34}{count:>9}" for reason, count in stats.reasons.items()]
    if stats.texts:
        head = f"{'of accepted chains':<18}{'share %':>9}{'paper':>7}  {'words: mean':>11}{'median':>8}{'p90':>6}"
        lines += ["", head + f"  {'Self-BLEU':>9}{'of':>6}{'paper':>7}"]
    for text in stats.texts:
        shares = f"{100 * text.share:>9.1f}{or_dash(text.paper_share and 100 * text.paper_share, 1):>7}"
        words = f"{text.words.mean:>11.1f}{text.words.median:>8g}{text.words.p90:>6}"
        bleu = f"{or_dash(text.self_bleu, 2):>9}{text.sampled:>6}{or_dash(text.paper_self_bleu, 2):>7}"
        lines.append(f"{text.name:<18}{shares}  {words}  {bleu}")
    lines += [
        "",
        f"Self-BLEU: {stats.bleu}, at most {stats.sample} texts sampled with seed {stats.seed}; lower is more diverse",
        f"near-duplicates (similarity {stats.near:g}): {stats.near_questions} questions, {stats.near_chains} chains",
        *cost_lines(stats.cost),
    ]
    return "\n".join(lines)

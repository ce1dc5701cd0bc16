"""Costs of chains: prompt tokens, generated tokens, seconds and, with a price, money.

Rejected chains cost as well, so totals are divided by the number of accepted chains.
"""

from mote.core.records import ChainRow, Frozen


class Price(Frozen):
    """US dollars per million prompt tokens (`read`) and generated tokens (`written`)."""

    read: float
    written: float


class Cost(Frozen):
    """Costs of all chains.

    Attributes:
        tokens: Generated tokens.
        kept: Tokens of the final chains.
        read: Prompt tokens, summed over the chains that record them.
        unsaid: Number of chains that do not record prompt tokens.
        seconds: Wall-clock time.
        tokens_each: Generated tokens per accepted chain.
        read_each: Prompt tokens per accepted chain; None if a chain does not record them.
        seconds_each: Seconds per accepted chain.
        price: The given price.
        dollars: Total; None without a price, or if a chain does not record its prompt tokens.
        dollars_each: Dollars per accepted chain.
    """

    tokens: int
    kept: int
    read: int
    unsaid: int
    seconds: float
    tokens_each: float | None
    read_each: float | None
    seconds_each: float | None
    price: Price | None
    dollars: float | None
    dollars_each: float | None


class CostCounter:
    """Running totals over chains."""

    def __init__(self) -> None:
        self.tokens = 0
        self.kept = 0
        self.read = 0
        self.unsaid = 0
        self.seconds = 0.0

    def add(self, row: ChainRow) -> None:
        """Count a chain."""
        self.tokens += row.tokens.made
        self.kept += row.tokens.kept
        self.read += row.tokens.read or 0
        self.unsaid += row.tokens.read is None
        self.seconds += row.seconds

    def cost(self, accepted: int, price: Price | None) -> Cost:
        """The totals, and their shares per accepted chain."""
        known = self.unsaid == 0
        dollars = (self.read * price.read + self.tokens * price.written) / 1e6 if price and known else None
        return Cost(
            tokens=self.tokens,
            kept=self.kept,
            read=self.read,
            unsaid=self.unsaid,
            seconds=self.seconds,
            tokens_each=self.tokens / accepted if accepted else None,
            read_each=self.read / accepted if accepted and known else None,
            seconds_each=self.seconds / accepted if accepted else None,
            price=price,
            dollars=dollars,
            dollars_each=dollars / accepted if dollars is not None and accepted else None,
        )


def cost_lines(cost: Cost) -> list[str]:
    """The costs as lines of text, with a dash for an unknown number."""
    if not cost.tokens and not cost.read:
        return ["tokens and seconds: not recorded, these chains were imported"]
    unsaid = f"; {cost.unsaid} chains do not record prompt tokens" if cost.unsaid else ""
    lines = [
        f"tokens generated: {cost.tokens}, {cost.kept} of them kept; {or_dash(cost.tokens_each, 1)} per accepted chain",
        f"prompt tokens: {cost.read}; {or_dash(cost.read_each, 1)} per accepted chain{unsaid}",
        f"seconds: {cost.seconds:.1f} in all; {or_dash(cost.seconds_each, 2)} per accepted chain",
    ]
    if cost.price is not None:
        prices = f"{cost.price.read:g} USD per million prompt tokens and {cost.price.written:g} per million generated"
        dollars = f"{or_dash(cost.dollars, 4)} USD at {prices}; {or_dash(cost.dollars_each, 6)} USD per accepted chain"
        lines.append(f"money: {dollars}{unsaid}")
    return lines


def or_dash(value: float | None, digits: int) -> str:
    """A number with `digits` decimal places, or a dash for None."""
    return "-" if value is None else f"{value:.{digits}f}"

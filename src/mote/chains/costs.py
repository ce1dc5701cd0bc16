"""What chains cost: tokens read and written, seconds and, with a price, money.

Chains that were thrown away are paid for too, so all is divided by the accepted ones.
"""

from mote.core.records import ChainRow, Frozen


class Price(Frozen):
    """US dollars a million tokens, as price lists have them."""

    read: float
    written: float


class Cost(Frozen):
    """What was spent.

    Attributes:
        tokens: Written in all.
        kept: Tokens of the chains as they stand.
        read: Tokens of all prompts, of the chains that say so.
        unsaid: Chains that do not: a server did not count, or nobody did.
        seconds: Of all chains.
        tokens_each: Tokens written for one accepted chain.
        read_each: Tokens read for one accepted chain; None where a chain does not say.
        seconds_each: Seconds for one accepted chain.
        price: As given.
        dollars: In all; None without a price, or where a chain does not say what was read for it.
        dollars_each: For one accepted chain.
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


class Spent:
    """What all chains took, one added after the other."""

    def __init__(self) -> None:
        self.tokens = self.kept = self.read = self.unsaid = 0
        self.seconds = 0.0

    def add(self, row: ChainRow) -> None:
        """One chain more."""
        self.tokens += row.tokens.made
        self.kept += row.tokens.kept
        self.read += row.tokens.read or 0
        self.unsaid += row.tokens.read is None
        self.seconds += row.seconds

    def cost(self, accepted: int, price: Price | None) -> Cost:
        """All of it, for so many accepted chains."""
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
    """The numbers as lines of text; a dash where there is none."""
    if not cost.tokens and not cost.read:
        return ["tokens and seconds: not recorded, these chains were written elsewhere"]
    unsaid = f"; {cost.unsaid} chains do not say" if cost.unsaid else ""
    lines = [
        f"tokens written: {cost.tokens}, {cost.kept} of them kept; {or_dash(cost.tokens_each, 1)} an accepted chain",
        f"tokens read: {cost.read}; {or_dash(cost.read_each, 1)} an accepted chain{unsaid}",
        f"seconds: {cost.seconds:.1f} in all; {or_dash(cost.seconds_each, 2)} an accepted chain",
    ]
    if cost.price is not None:
        prices = f"{cost.price.read:g} USD a million tokens read and {cost.price.written:g} USD a million written"
        dollars = f"{or_dash(cost.dollars, 4)} USD at {prices}; {or_dash(cost.dollars_each, 6)} USD an accepted chain"
        lines.append(f"money: {dollars}{unsaid}")
    return lines


def or_dash(value: float | None, digits: int) -> str:
    """A number with so many digits behind the point, or a dash."""
    return "-" if value is None else f"{value:.{digits}f}"

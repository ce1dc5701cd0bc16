"""Requests that an engine refuses: one question's chain, or all of them?

A server that answers 400 may mean this one question (too long for its context, stopped by its content filter) or
whatever it is sent. Which of the two is known once one chain was made, so refused chains are held back until then.
"""

import sys

from mote.chains.engine import Refused
from mote.core.errors import UserError
from mote.core.records import ChainRow

FIRST = 32  # refused chains, with none made, behind which no further ones are begun


class Refusals:
    """What may be written of the chains that are done.

    Args:
        batch_size: Chains that are in the making at once.
        made: Whether chains were made before, so that a few that are refused may be all that was left.
    """

    def __init__(self, batch_size: int, made: bool) -> None:
        self._batch_size, self._made_before = batch_size, made
        self._made = False
        self._held: list[ChainRow] = []
        self._places = 0  # of chains that could not be begun
        self._said = ""  # by the engine, of the first one
        self._told = False

    def done(self, row: ChainRow, refused: Refused | None) -> tuple[list[ChainRow], int]:
        """A chain is done: the rows that may be written now, and how many chains may be begun.

        Raises:
            UserError: So many were refused, no other one is in the making, and none was made.
        """
        self._made = self._made or refused is None
        self._said = self._said or str(refused or "")
        self._held.append(row)
        if self._made:
            places, self._places = self._places + 1, 0
            return self._let_go(), places
        if len(self._held) < FIRST:
            return [], 1
        self._places += 1
        if self._places == self._batch_size:
            raise self._all()
        return [], 0

    def rest(self) -> list[ChainRow]:
        """The rows that are left when all chains are done.

        Raises:
            UserError: All were refused.
        """
        if self._held and not self._made_before:
            raise self._all()
        return self._let_go()

    def _let_go(self) -> list[ChainRow]:
        rows, self._held = self._held, []
        if self._said and not self._told:
            self._told = True
            print(f"chains: what the engine refuses is rejected, the others go on; {self._said}", file=sys.stderr)
        return rows

    def _all(self) -> UserError:
        return UserError(f"chains: the first {len(self._held)} were all refused, and none is written; {self._said}")

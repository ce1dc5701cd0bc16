"""Refused requests: is it this question, or every question?

A server's 400 may be about one question (too long for its context, stopped by its content filter) or about the setup.
The first chain that succeeds decides, so refused chains are held back until then.
"""

import sys

from mote.chains.engine import Refused
from mote.core.errors import UserError
from mote.core.records import ChainRow

FIRST = 32  # refused chains without a success after which no further chain is started


class Refusals:
    """Holds back refused chains until another chain succeeds.

    Args:
        batch_size: Chains in flight at once.
        resumed: Whether the file has chains of an earlier run; then the remaining questions may all be refused.
    """

    def __init__(self, batch_size: int, resumed: bool) -> None:
        self._batch_size = batch_size
        self._resumed = resumed
        self._succeeded = False
        self._held: list[ChainRow] = []
        self._idle_slots = 0  # of chains that were not started
        self._first_error = ""
        self._printed = False

    def done(self, row: ChainRow, refused: Refused | None) -> tuple[list[ChainRow], int]:
        """A chain is done: the rows that can be written now, and how many chains may be started.

        Raises:
            UserError: `FIRST` chains were refused, none is in flight, and none succeeded.
        """
        self._succeeded = self._succeeded or refused is None
        self._first_error = self._first_error or str(refused or "")
        self._held.append(row)
        if self._succeeded:
            slots = self._idle_slots + 1
            self._idle_slots = 0
            return self._release(), slots
        if len(self._held) < FIRST:
            return [], 1
        self._idle_slots += 1
        if self._idle_slots == self._batch_size:
            raise self._all_refused()
        return [], 0

    def remaining(self) -> list[ChainRow]:
        """The rows that are still held back when all chains are done.

        Raises:
            UserError: Every chain was refused.
        """
        if self._held and not self._resumed:
            raise self._all_refused()
        return self._release()

    def _release(self) -> list[ChainRow]:
        rows = self._held
        self._held = []
        if self._first_error and not self._printed:
            self._printed = True
            print(f"chains: refused questions are rejected, the run continues; {self._first_error}", file=sys.stderr)
        return rows

    def _all_refused(self) -> UserError:
        return UserError(
            f"chains: the first {len(self._held)} were all refused, and none is written; {self._first_error}"
        )

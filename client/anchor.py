"""A site's ledger tied to a witness: after each round it is told how far the ledger got.

The witness is the officer's, outside the coordinator and the site. Where it holds a head that this
ledger never had, the ledger was put back to an older copy, or is another one, and the node must
not train on it. Where nobody answers, the node goes on, and says so: rounds must not wait for a
witness, and the next answer brings it up to date.
"""

import logging
from time import monotonic

from client.ledger import Ledger
from common.errors import VerificationError
from common.privacy.chain import EMPTY, Entry, Head, Kind
from common.privacy.witness import (
    WitnessAheadError,
    WitnessAwayError,
    WitnessLine,
    confirmed,
    id_of,
    steps_after,
)

log = logging.getLogger(__name__)
log.setLevel(logging.INFO)

FIRST_DELAY_S, MAX_DELAY_S = 1.0, 60.0
"""Before an absent witness is asked again: doubled each time."""
REMIND_S = 600.0
"""From one word about an absent witness to the next."""


class Anchor:
    """One ledger, tied to one witness by one line."""

    def __init__(self, line: WitnessLine, ledger: Ledger, name: str = "") -> None:
        """Args: name: the id under which the ledger is enrolled, if it is not the usual one."""
        self._line, self._ledger = line, ledger
        self._name = name or id_of(ledger.books)
        self._anchored: Head = EMPTY
        self._delay = FIRST_DELAY_S
        self._not_before = self._remind_at = 0.0
        self._away = False

    def begin(self) -> None:
        """Before anything is answered: is this the ledger that the witness knows?

        Raises: VerificationError if it is not, or the witness refuses it; an absent witness is
        only told of.
        """
        try:
            self._bring()
        except WitnessAwayError as error:
            self._miss(error)

    def keep_up(self) -> None:
        """Tells the witness where the ledger stands, if it does not know; soon, and not twice.

        Raises: VerificationError if the witness holds a head that this ledger never had.
        """
        if self._ledger.head == self._anchored or monotonic() < self._not_before:
            return
        try:
            self._bring()
        except WitnessAheadError:
            raise
        except (WitnessAwayError, VerificationError) as error:
            self._miss(error)

    def _bring(self) -> None:
        ledger = self._ledger
        receipt = confirmed(self._line, ledger.books, self._name).receipt
        entries = ledger.entries_after(receipt.head)
        for step in steps_after(self._name, receipt.head, entries):
            receipt = self._line.advance(step)
        if not all(self._is_own(entry) for entry in entries):
            ledger.acknowledge(receipt)
        # The receipt is an entry of its own, and needs none.
        self._anchored = ledger.head
        if self._away:
            log.info("%s: the witness answers again, and knows all of the ledger", self._name)
        self._away, self._delay, self._not_before = False, FIRST_DELAY_S, 0.0

    def _is_own(self, entry: Entry) -> bool:
        """Whether it says only that this witness was told of the entries before."""
        return entry.kind is Kind.RECEIPT and entry.body["coordinator_key"] == self._line.key

    def _miss(self, error: Exception) -> None:
        now = monotonic()
        if not self._away or now >= self._remind_at:
            log.warning(
                "%s: NOT WITNESSED: %s; going on without, and trying again", self._name, error
            )
            self._remind_at = now + REMIND_S
        self._away, self._not_before = True, now + self._delay
        self._delay = min(2 * self._delay, MAX_DELAY_S)

"""Why a site does not answer. Each error has a fixed code; its text stays in the site's log."""

from common import messages
from common.errors import CoterieError, PrivacyRefusedError, VerificationError
from common.privacy.books import NoSpareRoundError


class PolicyRefusedError(PrivacyRefusedError):
    """The instruction asks for what this site does not do."""


class BudgetExhaustedError(PrivacyRefusedError):
    """The instruction would exceed the epsilon of its plan, or the cap of the ledger."""


class BooksBehindError(VerificationError):
    """This ledger never had the head that the coordinator signed: it was put back, or forked."""


class RoundLostError(CoterieError):
    """Something failed after the round was charged; a spare round may pay for another attempt."""


CODES: dict[type[CoterieError], int] = {
    PolicyRefusedError: messages.AGAINST_POLICY,
    BudgetExhaustedError: messages.BUDGET_EXHAUSTED,
    NoSpareRoundError: messages.NO_SPARE_ROUND,
    BooksBehindError: messages.BOOKS_BEHIND,
    RoundLostError: messages.LOCAL_FAILURE,
}


def code_of(error: Exception) -> int:
    """The code that may leave: ours for ours, "local failure" for whatever else went wrong."""
    if isinstance(error, CoterieError):
        return CODES.get(type(error), messages.INVALID_INSTRUCTION)
    return messages.LOCAL_FAILURE

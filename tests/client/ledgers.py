"""Real ledgers on disk for tests that need a site's books and nothing more of them."""

import atexit
import tempfile
from itertools import count
from pathlib import Path

from client.ledger import Store, Terms

_FOLDER = tempfile.TemporaryDirectory(prefix="ledgers-")
_NUMBERS = count()
atexit.register(_FOLDER.cleanup)


def ledger_of(site="site-1", *, cap=100.0, delta=1e-3, unit="record"):
    """A fresh ledger, whose cap nothing reaches unless a test asks for less."""
    store = Store.create(Path(_FOLDER.name) / f"{next(_NUMBERS)}.db")
    return store.open(site, Terms("made", cap, delta, "1" * 64, unit))


def charges_of(site):
    """What each (run id, round) ever started there cost, as its ledger has it."""
    made = site.ledger.books.reservations.values() if site.ledger else ()
    return {(r.run, r.round): r.event for r in made}

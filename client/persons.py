"""Capping: at most k records of each person, before anything else is done with the records."""

import hashlib

import numpy as np

from common.config import PrivacyConfig, PrivacyMode
from common.digests import gathered, words_of
from common.errors import ConfigError
from common.records import Records


def usable(records: Records, privacy: PrivacyConfig) -> Records:
    """The records of a site that a run may use: with `privacy=person` at most k of a person.

    Raises: ConfigError if persons are to be protected and the records name none, or k is none.
    """
    if privacy.mode is not PrivacyMode.person:
        return records
    most = privacy.max_records_per_person
    if records.persons is None or most is None:
        raise ConfigError("privacy=person: these records name no persons; give data.person_column")
    return capped(records, most)


def capped(records: Records, most: int) -> Records:
    """At most `most` records of each person: those with the smallest SHA-256 of their content.

    Guarantee: what is kept of a person depends on that person's records alone: on nobody else's,
    and on no order. A person of at most `most` records keeps all. The order stays.
    """
    owners = records.owners()
    names = (str(key).encode(errors="surrogatepass") for key in records.identities())
    digests = gathered(hashlib.sha256(name).digest() for name in names)
    order = np.lexsort((records.labels, *words_of(digests)[::-1], owners))
    by_person = owners[order]
    rank = np.arange(len(order)) - np.searchsorted(by_person, by_person)
    return records.subset(np.sort(order[rank < most]))

"""Progress: how far long work is, told to whoever shows it."""

from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

T = TypeVar("T")

Told = Callable[[str, float], None]
"""Called with what is being done, and the share of it that is done, in [0, 1]."""

OFTEN = 4096
"""Items between two calls: they must cost nothing beside the work."""


def untold(_what: str, _share: float) -> None:
    """Nobody watches."""


def telling(items: Iterable[T], told: Told, what: str, total: int) -> Iterator[T]:
    """The same items, `total` of them; says how far they are while they are taken.

    >>> [*telling("ab", lambda what, share: print(what, share), "reading", 2)]
    reading 0.0
    reading 1.0
    ['a', 'b']
    """
    for done, item in enumerate(items):
        if done % OFTEN == 0:
            told(what, done / max(total, 1))
        yield item
    told(what, 1.0)

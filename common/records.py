"""Records: what a site owns, whatever the task reads in them."""

import hashlib
import json
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from common.digests import Digests, gathered
from common.errors import ConfigError
from common.progress import Told, telling, untold
from common.spool import Kind, Spooled

Content = str | tuple[str, ...] | NDArray[Any]
"""What one record holds beside its label: a text; several texts, as a question and its context;
an image (H, W, C) of uint8; a sound (samples,) of float32."""


@dataclass(frozen=True)
class Records:
    """Contents with their labels: one record a content."""

    contents: Sequence[Content]
    """(N,) a tuple; of a table or a folder a `Spooled`, which reads what is asked for."""
    labels: NDArray[np.int64]
    """(N,) index into the config's `data.labels`; zeros where the task knows no classes."""
    persons: tuple[str, ...] | None = field(default=None, repr=False)
    """(N,) id of the person each record is of; None where nobody says. Never leaves a site."""
    homes: tuple[str, ...] | None = field(default=None, repr=False)
    """(N,) name of the site each record is from, for a simulation that deals them so."""
    groups: tuple[str, ...] | None = None
    """(N,) name of a group of each PUBLIC record, empty where none is named; None of others."""

    def __len__(self) -> int:
        """N, the number of records."""
        return len(self.contents)

    def subset(self, indices: Sequence[int] | NDArray[np.int64]) -> "Records":
        """The records at `indices`, in that order."""
        chosen = np.asarray(indices, dtype=np.int64)
        return Records(
            _chosen_contents(self.contents, chosen),
            self.labels[chosen],
            _chosen(self.persons, chosen),
            _chosen(self.homes, chosen),
            _chosen(self.groups, chosen),
        )

    def laid_out(self) -> "Records":
        """The same records in the order that is quickest to read, for whom no order matters."""
        if isinstance(self.contents, Spooled):
            return self.subset(self.contents.layout())
        return self

    def owners(self) -> NDArray[np.int64]:
        """(N,) whose each record is, as a number: persons from 0 up, in the order of their ids.

        Raises: ValueError if the records name no persons.
        """
        if self.persons is None:
            raise ValueError("records name no persons")
        number = {person: index for index, person in enumerate(sorted(set(self.persons)))}
        return np.array([number[person] for person in self.persons], dtype=np.int64)

    def parts(self, *names: str) -> list[list[str]]:
        """Of contents that are several texts, all first ones, all second ones, and so on.

        Args: names: what each is. Raises: ConfigError if a content is anything else.
        """
        contents = list(self.contents)
        for content in contents:
            if not isinstance(content, tuple) or len(content) != len(names):
                raise ConfigError(f"a record of this task must be {len(names)} texts: {names}")
        return [[str(content[i]) for content in contents] for i in range(len(names))]

    def identities(self) -> Sequence[Hashable]:
        """(N,) equal where contents are; of texts themselves."""
        if isinstance(self.contents, Spooled) and self.contents.kind is not Kind.array:
            return cast("Sequence[Hashable]", self.contents)
        return [identity(content) for content in self.contents]

    def digests(self, told: Told = untold) -> Digests:
        """(N, 32) SHA-256, equal where contents are."""
        identities = telling(self.identities(), told, "comparing records", len(self))
        return gathered(hashed(key) for key in identities)


def _chosen_contents(contents: Sequence[Content], at: NDArray[np.int64]) -> Sequence[Content]:
    if isinstance(contents, Spooled):
        return contents.chosen(at)
    return tuple(contents[i] for i in at)


def _chosen(names: tuple[str, ...] | None, at: NDArray[np.int64]) -> tuple[str, ...] | None:
    return None if names is None else tuple(names[i] for i in at)


def identity(content: Content) -> str | tuple[str, ...]:
    """What a content is hashed and compared by; of an array, its SHA-256 with shape and type.

    >>> identity("goal"), identity(np.zeros(3, np.uint8))[:23]
    ('goal', 'uint8 (3,) 709e80c88487')
    """
    if not isinstance(content, np.ndarray):
        return content
    digest = hashlib.sha256(np.ascontiguousarray(content).tobytes()).hexdigest()
    return f"{content.dtype} {content.shape} {digest}"


def hashed(key: Hashable) -> bytes:
    """SHA-256 of an identity: of a text as it is, of several texts as a list that keeps their cut.

    >>> hashed(("a", "bc")) == hashed(("ab", "c"))
    False
    """
    text = key if isinstance(key, str) else json.dumps(key)
    return hashlib.sha256(text.encode(errors="surrogatepass")).digest()

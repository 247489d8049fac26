"""What `federation.yaml` says: who takes part, where the coordinator is, and on what terms.

It holds no secret, and is all that a federation is provisioned from.
"""

import ipaddress
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml

from common.cli import PART_MIB
from common.errors import ConfigError, first_line

COORDINATOR = "coordinator"
"""What the coordinator's kit is called; no site may be."""
MAX_SITES, MAX_DAYS, MAX_PORT = 10_000, 36_500, 65_535
_NAME = re.compile("[a-z0-9](?:[a-z0-9-]{0,30}[a-z0-9])?")
_HOST = re.compile(r"(?=.{1,253}$)[a-z0-9_](?:[a-z0-9_-]*[a-z0-9_])?(?:\.[a-z0-9-]+)*", re.I)


@dataclass(frozen=True)
class Coordinator:
    """Where the coordinator is."""

    hosts: tuple[str, ...]
    """DNS names and IP addresses by which sites reach its door; nodes call the first."""
    port: int = 8443
    """Of the door, on which sites call."""
    listen: str = "0.0.0.0"  # noqa: S104 - a door is there to be reached; what is behind it is not
    """Address of the coordinator's machine on which the door listens."""
    control_port: int = 8000
    """Of the SuperLink behind it, on loopback alone."""


@dataclass(frozen=True)
class Door:
    """What one site may ask of the door."""

    max_body_mb: int = 16
    """MiB of one request. The largest are parts of a vector, of `PART_MIB` each."""
    requests_per_s: int = 60
    """On average, and twice as many at once; what is more waits, and above sixteen is refused."""


@dataclass(frozen=True)
class LedgerTerms:
    """What each site's books begin with, unless the site has terms of its own."""

    dataset: str
    cap: float
    """Epsilon that may never be exceeded."""
    delta: float
    unit: str = "record"
    officer_key: str = ""
    """Public key of the privacy officer, 64 hex digits. Empty: one is made, in `officer/`."""


@dataclass(frozen=True)
class Member:
    """One site."""

    name: str
    """By which plan, report and Flower know it."""
    cap: float = 0.0
    """Epsilon that its books never exceed; 0: what `ledger.cap` says."""
    dataset: str = ""
    """Empty: what `ledger.dataset` says."""


@dataclass(frozen=True)
class Federation:
    """All of the file."""

    name: str
    coordinator: Coordinator
    sites: tuple[Member, ...]
    ledger: LedgerTerms
    door: Door = field(default_factory=Door)
    days: int = 365
    """How long certificates of sites and coordinator are valid."""
    authority_days: int = 3650
    """How long the authority's own is."""
    stock_supernodes: bool = False
    """True: kits hold what a stock SuperNode needs to come through the door, which then also lets
    it fetch the bundles of runs. Stock nodes run what is submitted: never beside private data."""
    image: str = "coterie:0.1.0"
    """Of the containers in compose.yaml and kubernetes.yaml; deploy/Dockerfile builds it."""

    @property
    def address(self) -> str:
        """HOST:PORT that nodes call."""
        host = self.coordinator.hosts[0]
        return (
            f"[{host}]:{self.coordinator.port}"
            if ":" in host
            else f"{host}:{self.coordinator.port}"
        )


def read_federation(path: Path) -> Federation:
    """The federation that a file describes.

    Raises: ConfigError naming every unknown, missing or wrong value, in one line.
    """
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ConfigError(f"{path}: no such file; docs/provisioning.md shows one") from error
    except IsADirectoryError as error:
        raise ConfigError(f"{path}: is a folder; give the file that describes it") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: is no YAML: {first_line(error)}") from error
    reader = _Reader()
    federation = reader.federation(content)
    if federation is None or reader.faults:
        raise ConfigError(f"{path}: {'; '.join(dict.fromkeys(reader.faults))}")
    return federation


class _Reader:
    """Turns a stranger's YAML into dataclasses, and keeps what is wrong with it."""

    def __init__(self) -> None:
        self.faults: list[str] = []

    def federation(self, content: Any) -> Federation | None:
        values = self._mapping(Federation, "", content)
        if values is None:
            return None
        parts: dict[str, type] = {"coordinator": Coordinator, "ledger": LedgerTerms, "door": Door}
        for name, kind in parts.items():
            if name in values:
                values[name] = self._one(kind, f"{name}.", values[name])
        if "sites" in values:
            values["sites"] = self._sites(values["sites"])
        place = values.get("coordinator")
        if isinstance(place, Coordinator) and place.port == place.control_port:
            self.faults.append(
                f"coordinator.control_port={place.control_port}: must not be the door's port, too"
            )
        made = self._made(Federation, "", values)
        return made if isinstance(made, Federation) and not self.faults else None

    def _sites(self, content: Any) -> tuple[Member, ...]:
        if not isinstance(content, list) or not 1 <= len(content) <= MAX_SITES:
            self.faults.append("sites: must be a list of at least one site")
            return ()
        named = [{"name": each} if isinstance(each, str) else each for each in content]
        made = [self._one(Member, f"sites[{place}].", each) for place, each in enumerate(named, 1)]
        sites = tuple(each for each in made if isinstance(each, Member))
        names = [each.name for each in sites]
        for name in sorted({name for name in names if names.count(name) > 1}):
            self.faults.append(f"sites: {name} stands there twice; names must differ")
        return sites

    def _one(self, kind: type, prefix: str, content: Any) -> Any:
        values = self._mapping(kind, prefix, content)
        return None if values is None else self._made(kind, prefix, values)

    def _mapping(self, kind: type, prefix: str, content: Any) -> dict[str, Any] | None:
        if not isinstance(content, Mapping):
            where = prefix.rstrip(".") or "the file"
            self.faults.append(f"{where}: must hold NAME: VALUE, one to a line")
            return None
        known = [each.name for each in fields(kind)]
        for name in content:
            if name not in known:
                self.faults.append(f"{prefix}{name}: no such setting; there are {', '.join(known)}")
        return {name: value for name, value in content.items() if name in known}

    def _made(self, kind: type, prefix: str, values: dict[str, Any]) -> Any:
        whole = True
        for each in fields(kind):
            needed = each.default is MISSING and each.default_factory is MISSING
            if each.name not in values:
                if needed:
                    self.faults.append(f"{prefix}{each.name}: must be given")
                    whole = False
                continue
            rule = _RULES.get((kind, each.name))
            if rule is None:
                continue
            words, read = rule
            try:
                values[each.name] = read(values[each.name])
            except (ValueError, TypeError, OverflowError):
                shown = " ".join(str(values[each.name]).split())[:60]
                self.faults.append(f"{prefix}{each.name}={shown}: must be {words}")
                whole = False
        return kind(**values) if whole and not any(v is None for v in values.values()) else None


def _name(value: Any) -> str:
    if not isinstance(value, str) or not _NAME.fullmatch(value):
        raise ValueError
    return value


def _site(value: Any) -> str:
    if _name(value) == COORDINATOR:
        raise ValueError
    return str(value)


def _text(value: Any) -> str:
    if not isinstance(value, str) or not value.strip() or not value.isprintable():
        raise ValueError
    return value


def _image(value: Any) -> str:
    if not re.fullmatch(r"[a-zA-Z0-9][a-zA-Z0-9._/:@-]{0,254}", _text(value)):
        raise ValueError
    return str(value)


def _hosts(value: Any) -> tuple[str, ...]:
    if not isinstance(value, list) or not value:
        raise ValueError
    return tuple(_host(each) for each in value)


def _host(value: Any) -> str:
    try:
        return str(ipaddress.ip_address(_text(value)))
    except ValueError:
        if not _HOST.fullmatch(_text(value)) or re.fullmatch(r"[0-9.]+", value):
            raise
        return str(value)


def _address(value: Any) -> str:
    return str(ipaddress.ip_address(_text(value)))


def _whole(lowest: int, highest: int) -> Callable[[Any], int]:
    def read(value: Any) -> int:
        if isinstance(value, bool) or not isinstance(value, int) or not lowest <= value <= highest:
            raise ValueError
        return value

    return read


def _number(holds: Callable[[float], bool]) -> Callable[[Any], float]:
    def read(value: Any) -> float:
        if isinstance(value, bool):
            raise TypeError
        number = float(value)  # of a text, too: YAML 1.1 takes 1e-5 for one
        if not math.isfinite(number) or not holds(number):
            raise ValueError
        return number

    return read


def _key(value: Any) -> str:
    if not isinstance(value, str) or not re.fullmatch("(?:[0-9a-f]{64})?", value):
        raise ValueError
    return value


def _unit(value: Any) -> str:
    if value not in ("record", "person"):
        raise ValueError
    return str(value)


def _switch(value: Any) -> bool:
    if not isinstance(value, bool):
        raise TypeError
    return value


_PORT = (f"a port, 1 to {MAX_PORT}", _whole(1, MAX_PORT))
_DAYS = (f"a number of days, 1 to {MAX_DAYS}", _whole(1, MAX_DAYS))
_CAP = ("a number above 0", _number(lambda value: value > 0))
_DATASET = ("a text in one line", _text)
_PLAIN = "lower-case letters, digits and hyphens, 32 at most"
_RULES: dict[tuple[type, str], tuple[str, Callable[[Any], Any]]] = {
    (Federation, "name"): (_PLAIN, _name),
    (Federation, "days"): _DAYS,
    (Federation, "authority_days"): _DAYS,
    (Federation, "stock_supernodes"): ("true or false", _switch),
    (Federation, "image"): ("the name of an image, without blanks", _image),
    (Coordinator, "hosts"): ("a list of DNS names or IP addresses, without ports", _hosts),
    (Coordinator, "port"): _PORT,
    (Coordinator, "listen"): ("an IP address", _address),
    (Coordinator, "control_port"): _PORT,
    (Door, "max_body_mb"): (f"a whole number, {PART_MIB + 1} to 1024", _whole(PART_MIB + 1, 1024)),
    (Door, "requests_per_s"): ("a whole number, 10 to 100000", _whole(10, 100_000)),
    (LedgerTerms, "dataset"): _DATASET,
    (LedgerTerms, "cap"): _CAP,
    (LedgerTerms, "delta"): ("between 0 and 1", _number(lambda value: 0 < value < 1)),
    (LedgerTerms, "unit"): ("record or person", _unit),
    (LedgerTerms, "officer_key"): ("64 hex digits", _key),
    (Member, "name"): (f"{_PLAIN}, and not {COORDINATOR}", _site),
    (Member, "cap"): _CAP,
    (Member, "dataset"): _DATASET,
}

"""Whom the coordinator lets in: what its kit says, brought to the SuperLink and the door."""

import json
import os
import signal
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from common.durable import write_atomic
from common.errors import ConfigError, VerificationError
from common.seal import Seal, check_seal
from server.control import Address, Link
from server.kits import NODES, PATHS, SETTINGS

BOOK = "admitted.json"
"""In the state folder: which key has which of Flower's numbers."""
DOOR_PID = Path("door") / "nginx.pid"


@dataclass(frozen=True)
class Admission:
    """What was changed, and what is now so."""

    seal: Seal
    added: tuple[str, ...]
    removed: tuple[str, ...]
    sites: tuple[str, ...]
    is_door_told: bool
    """Whether a door ran here, and now reads its lists anew."""


def admit(kit: Path, state: Path, *, key: str = "") -> Admission:
    """Registers the node keys of a coordinator's kit, takes out what is no longer in it, and has
    the door read its lists anew. Run again, it changes nothing.

    Args: state: where the SuperLink and the door keep theirs; key: as `check_seal`.
    Raises: as `check_seal`; ConfigError if it is another kit; FederationError if no SuperLink
    answers, or it refuses: what was done until then is kept.
    """
    seal = check_seal(kit, key=key)
    link, nodes = _read(kit)
    if not state.is_dir():
        raise ConfigError(f"{state}: no such folder; give --state, where the SuperLink's state is")
    path = state / BOOK
    book = _known(path, link)
    removed, added = [], []
    for public, known in [*book.items()]:
        if nodes.get(known["name"]) != public:
            link.unregister(known["node"])
            removed.append(known["name"])
            del book[public]
            write_atomic(path, json.dumps(book, indent=1) + "\n")
    for name, public in nodes.items():
        if public not in book:
            book[public] = {"name": name, "node": _register(link, public, name)}
            added.append(name)
            write_atomic(path, json.dumps(book, indent=1) + "\n")
    told = _tell_door(state / DOOR_PID)
    return Admission(seal, tuple(added), tuple(removed), tuple(nodes), told)


def _read(kit: Path) -> tuple[Link, dict[str, str]]:
    if not (kit / SETTINGS).is_file():
        raise ConfigError(f"{kit}: is no kit of a coordinator, as it has no {SETTINGS}")
    settings = yaml.safe_load((kit / SETTINGS).read_text(encoding="utf-8"))
    superlink = settings["superlink"]
    address = Address.checked(superlink["address"], str(kit / superlink["ca"]))
    nodes: dict[str, dict[str, str]] = json.loads((kit / NODES).read_text(encoding="utf-8"))
    return Link(address), {name: each["node_key"] for name, each in sorted(nodes.items())}


def _known(path: Path, link: Link) -> dict[str, dict[str, Any]]:
    """Who was let in before, and still is: a SuperLink that lost its state knows nobody."""
    online = link.nodes()
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        book = {
            str(public): {"name": str(each["name"]), "node": int(each["node"])}
            for public, each in values.items()
        }
    except FileNotFoundError:
        return {}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise VerificationError(
            f"{path}: malformed; restore it from a backup, or begin anew: remove it and the "
            "SuperLink's database"
        ) from error
    return {public: each for public, each in book.items() if each["node"] in online}


def _register(link: Link, public: str, name: str) -> int:
    with tempfile.TemporaryDirectory(prefix="coterie-key-") as folder:
        path = Path(folder) / f"{name}.pub"
        path.write_text(f"{public}\n", encoding="ascii")
        return link.register(path, name)


def _tell_door(path: Path) -> bool:
    """Has the nginx whose number is in that file read its configuration anew, if there is one."""
    try:
        number = int(path.read_text("ascii"))
        if b"nginx" not in Path(f"/proc/{number}/cmdline").read_bytes():
            return False
        os.kill(number, signal.SIGHUP)
    except (FileNotFoundError, ProcessLookupError, ValueError):
        return False
    return True


STATE = Path(str(PATHS["state"]))
"""Where a deployment by the kit's units keeps its state."""

"""`coterie provision`: from `federation.yaml` to one sealed kit for each who takes part."""

import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from common.cli import Invocation, emit_json, run_typer
from common.durable import write_atomic
from common.errors import ConfigError
from common.seal import Seal, check_seal
from server.admission import STATE
from server.admission import admit as admit_nodes
from server.federation import COORDINATOR, Federation, read_federation
from server.holders import Office
from server.kits import Kit, Maker, discard

FEDERATION = "federation.yaml"
"""The copy of the file that the folder was last provisioned from."""

FolderArgument = Annotated[
    Path, typer.Argument(help="The folder that coterie provision FILE --to FOLDER made.")
]
KeyOption = Annotated[
    str, typer.Option(help="The provisioner's public key, known by another way than the kit.")
]


def provision(invocation: Invocation) -> None:
    """Makes, renews and revokes kits: keys and settings, sealed, for each site and coordinator."""

    def make(
        file: Annotated[Path, typer.Argument(help="What takes part: docs/provisioning.md.")],
        to: Annotated[Path, typer.Option(help="Folder of authority and kits; made if needed.")],
    ) -> None:
        """Makes the kits of a federation, in FOLDER/kits: one for each site and the coordinator's.

        FOLDER/authority holds the key that signs: keep it off every machine that takes part. Run
        again after a change of FILE, it adds what is missing, and keeps every key and certificate.

        Example: coterie provision federation.yaml --to federation
        """
        federation = read_federation(file)
        office = Office(to.expanduser())
        now = datetime.now(UTC)
        office.prepare(days=federation.authority_days, now=now)
        with office.locked():
            kits = make_kits(federation, office, now=now)
            write_atomic(office.folder / FEDERATION, file.read_bytes())
        _answer(invocation, office, federation, kits)

    def renew(
        folder: FolderArgument,
        site: Annotated[
            str, typer.Argument(help="One site, or coordinator; all of them if left out.")
        ] = "",
        new_keys: Annotated[
            bool, typer.Option("--new-keys", help="Also new keys; old certificates are revoked.")
        ] = False,
    ) -> None:
        """Makes new certificates, and kits with them; keys stay, wherever they are.

        With --new-keys the site gets other keys, as after a loss, or after it was revoked: its old
        certificates are revoked, and its kit must be carried there again with the same care. New
        kits are copied over the old ones, the coordinator's too; then: coterie provision admit.

        Example: coterie provision renew federation ward-1
        """
        with _office(folder) as (federation, office):
            kits = renew_kits(federation, office, site, new_keys=new_keys, now=datetime.now(UTC))
        _answer(invocation, office, federation, kits)

    def revoke(
        folder: FolderArgument,
        site: Annotated[str, typer.Argument(help="The site to shut out.")],
    ) -> None:
        """Shuts a site out: its certificates are on the revocation list, its keys in no list.

        Copy the coordinator's new kit over the old one there, and run coterie provision admit.

        Example: coterie provision revoke federation ward-1
        """
        with _office(folder) as (federation, office):
            kits = revoke_site(federation, office, site, now=datetime.now(UTC))
        _answer(invocation, office, federation, kits)

    def check(
        kit: Annotated[Path, typer.Argument(help="The folder of a kit.")], key: KeyOption = ""
    ) -> None:
        """Says whether a kit is as it was made, and until when its certificates hold.

        Exit code 5 if a file was altered, is missing, or is one too many.

        Example: coterie provision check /etc/coterie/kit --key 3b6a...
        """
        _check_key(key)
        seal = check_seal(kit, key=key)
        late = {file: end for file, end in seal.expires.items() if end <= datetime.now(UTC)}
        if late:
            ended = ", ".join(f"{file} on {end:%Y-%m-%d}" for file, end in late.items())
            raise ConfigError(f"{kit}: its certificates have ended ({ended}); have it renewed")
        _show_seal(invocation, kit, seal)

    def admit(
        kit: Annotated[Path, typer.Argument(help="The coordinator's kit, on its machine.")],
        state: Annotated[Path, typer.Option(help="Where SuperLink and door keep theirs.")] = STATE,
        key: KeyOption = "",
    ) -> None:
        """On the coordinator's machine: lets the kit's sites in, and out who is no longer in it.

        Registers each node's key with the SuperLink, takes out those that were revoked or changed,
        and has the door read its lists anew. Run it after the first start, and after each new kit.

        Example: coterie provision admit /etc/coterie/kit
        """
        _check_key(key)
        done = admit_nodes(kit.expanduser(), state.expanduser(), key=key)
        if invocation.json:
            emit_json(
                {
                    "added": [*done.added],
                    "removed": [*done.removed],
                    "sites": [*done.sites],
                    "door_told": done.is_door_told,
                }
            )
            return
        console = Console(markup=False, highlight=False)
        console.print(f"added: {', '.join(done.added) or 'nobody'}")
        console.print(f"taken out: {', '.join(done.removed) or 'nobody'}")
        console.print(f"let in: {', '.join(done.sites) or 'nobody'}")
        console.print(
            "the door reads its lists anew" if done.is_door_told else "no door runs here yet"
        )

    commands: list[Callable[..., None]] = [make, renew, revoke, check, admit]
    first = invocation.arguments[0] if invocation.arguments else "--help"
    known = {*(each.__name__ for each in commands), "--help", "-h"}
    if first in ("-h", "--help"):
        print("coterie provision FILE --to FOLDER makes all kits. With a command:")
        invocation = replace(invocation, arguments=("--help",))
    elif first not in known:  # coterie provision FILE --to FOLDER
        invocation = replace(invocation, arguments=("make", *invocation.arguments))
    run_typer(commands, invocation)


def make_kits(federation: Federation, office: Office, *, now: datetime) -> list[Kit]:
    """All kits, each with the keys and certificates that it has, or new ones where it has none.

    A site that was revoked stays out, and one that is no longer in the file stays in: both are
    said, and changed by `renew --new-keys` and `revoke`.
    """
    return _written(federation, office, renewed=(), now=now)


def renew_kits(
    federation: Federation, office: Office, site: str = "", *, new_keys: bool, now: datetime
) -> list[Kit]:
    """The kits of one holder, or of all, with new certificates, and the coordinator's lists.

    Raises: ConfigError if there is no such holder, or it was revoked and is to keep its keys.
    """
    names = [site] if site else [COORDINATOR, *(each.name for each in federation.sites)]
    book = office.read_book()
    _check_known(federation, office, names)
    for name in names:
        if book.holders[name].is_out and not new_keys:
            if site:
                raise ConfigError(f"{name}: was revoked; --new-keys lets it in again, by new keys")
            continue
        if new_keys:
            # Nothing of the old keys is left before anything is made of the new ones.
            discard(office, name)
            book = book.revoking(name, now=now)
            book = book.with_holder(name, book.holders[name].emptied)
            office.write_book(book)
    return _written(federation, office, renewed=names, now=now)


def revoke_site(federation: Federation, office: Office, site: str, *, now: datetime) -> list[Kit]:
    """The coordinator's kit, without a site. Raises: ConfigError if there is no such site."""
    book = office.read_book()
    if site == COORDINATOR:
        raise ConfigError("coordinator: cannot be revoked; renew --new-keys gives it other keys")
    if site not in book.holders:
        raise ConfigError(f"{site}: no such site; there are {_names(book.holders)}")
    book = book.revoking(site, now=now)
    book = book.with_holder(site, replace(book.holders[site], is_out=True))
    office.write_book(book)
    return [
        kit
        for kit in _written(federation, office, renewed=(), now=now)
        if kit.holder == COORDINATOR
    ]


def _written(
    federation: Federation, office: Office, *, renewed: Sequence[str], now: datetime
) -> list[Kit]:
    """Each kit, and then the book that knows what is in it: a certificate that the book does not
    know is in no list of the door's.
    """
    maker, book, kits = Maker(federation, office, now), office.read_book(), []
    for member in federation.sites:
        if member.name in book.holders and book.holders[member.name].is_out:
            continue
        book, keys = maker.hold(book, member.name, renew=member.name in renewed)
        book, kit = maker.write_site(book, member, keys)
        office.write_book(book)
        kits.append(kit)
    book, keys = maker.hold(book, COORDINATOR, renew=COORDINATOR in renewed)
    book, kit = maker.write_coordinator(book, keys)
    office.write_book(book)
    kits.append(kit)
    return kits


def _check_known(federation: Federation, office: Office, names: Sequence[str]) -> None:
    known = {COORDINATOR, *(each.name for each in federation.sites)}
    book = office.read_book()
    for name in names:
        if name not in known or name not in book.holders:
            raise ConfigError(f"{name}: no such site; there are {_names(known)}")


def _names(names: Any) -> str:
    return ", ".join(sorted(names))


class _office:  # noqa: N801 - a context, used like a function
    """The folder of an earlier `provision`, locked, and the federation that it was made from."""

    def __init__(self, folder: Path) -> None:
        self._office = Office(folder.expanduser())
        self._lock = self._office.locked()

    def __enter__(self) -> tuple[Federation, Office]:
        self._lock.__enter__()
        try:
            return read_federation(self._office.folder / FEDERATION), self._office
        except BaseException:
            self._lock.__exit__(None, None, None)
            raise

    def __exit__(self, *_: object) -> None:
        self._lock.__exit__(None, None, None)


def _check_key(key: str) -> None:
    if key and not re.fullmatch("[0-9a-f]{64}", key):
        raise ConfigError(f"--key {key[:70]}: must be 64 hex digits, as provision printed it")


def _show_seal(invocation: Invocation, kit: Path, seal: Seal) -> None:
    ends = {file: f"{end:%Y-%m-%d}" for file, end in seal.expires.items()}
    if invocation.json:
        emit_json(
            {
                "kit": str(kit),
                "federation": seal.federation,
                "holder": seal.holder,
                "expires": ends,
                "sealed_by": seal.key,
                "key_pinned": seal.pinned,
            }
        )
        return
    console = Console(markup=False, highlight=False)
    whole = f"{kit}: whole; {seal.holder} of {seal.federation}, {len(seal.files)} files"
    console.print(whole, soft_wrap=True)
    for file, end in ends.items():
        console.print(f"{file}: until {end}")
    pinned = "" if seal.pinned else " (not pinned: give --key to tell it from a stranger's)"
    console.print(f"sealed by {seal.key}{pinned}", soft_wrap=True)


def _answer(
    invocation: Invocation, office: Office, federation: Federation, kits: Sequence[Kit]
) -> None:
    book = office.read_book()
    out = sorted(name for name, holder in book.holders.items() if holder.is_out)
    members = {COORDINATOR, *(each.name for each in federation.sites)}
    left = sorted(name for name in book.holders if name not in {*members, *out})
    key = office.sealing_key().public_key().public_bytes_raw().hex()
    if invocation.json:
        emit_json(
            {
                "kits": {kit.holder: str(kit.folder) for kit in kits},
                "expires": {
                    kit.holder: {file: f"{end:%Y-%m-%d}" for file, end in kit.expires.items()}
                    for kit in kits
                },
                "new": [kit.holder for kit in kits if kit.is_new],
                "revoked": out,
                "not_in_file": left,
                "sealed_by": key,
            }
        )
        return
    console = Console(markup=False, highlight=False)
    table = Table("kit", "", "its certificates end", "keys")
    for kit in kits:
        ends = "\n".join(f"{file} {end:%Y-%m-%d}" for file, end in kit.expires.items())
        table.add_row(kit.holder, "new" if kit.is_new else "as before", ends, _keys_words(kit))
    console.print(table)
    ends_on = office.authority.read().not_valid_after_utc
    lines = [
        f"kits: {office.kits}; a new one goes to whom it is for, and is deleted here",
        f"authority: until {ends_on:%Y-%m-%d}; its key stays in {office.folder / 'authority'}",
    ]
    if out:
        lines.append(f"revoked: {', '.join(out)}")
    if left:
        lines.append(f"no longer in the file, and still let in: {', '.join(left)}; revoke them")
    if not federation.ledger.officer_key:
        lines.append(f"the privacy officer's key: {office.officer_key}; hand it over, keep no copy")
    lines.append(f"sealed by {key}; tell it to each site by another way than its kit")
    for line in lines:
        console.print(line, soft_wrap=True)


def _keys_words(kit: Kit) -> str:
    return "all here" if not kit.absent else f"not here: {', '.join(kit.absent)}"

"""Kits: one sealed folder for each site and one for the coordinator, from `deploy/kit/`.

A kit is written whole under another name and then put in its place; a private key is in no kit but
its holder's, and is written once: made again, a kit keeps the keys that it has.
"""

import json
import shlex
import shutil
from base64 import b64encode
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from types import MappingProxyType
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_ssh_public_key
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from common.canonical import digest
from common.cli import PART_MIB
from common.durable import folder_atomic
from common.errors import VerificationError
from common.keys import write_private
from common.seal import SEAL, digest_of, sealed
from server.control import ROOT
from server.federation import COORDINATOR, Federation, Member
from server.holders import (
    CLIENT_KEY,
    DOOR_KEY,
    LEDGER_KEY,
    LOCAL_KEY,
    NODE_KEY,
    SUPERLINK_KEY,
    Book,
    Holder,
    Key,
    Office,
    certificate_of,
    make_key,
    public_of,
    read_key,
)

TEMPLATES = ROOT / "deploy" / "kit"
SUFFIX = ".jinja"
LOOPBACK = ("localhost", "127.0.0.1")
AUTHORITY, CLIENT, LOCAL, DOOR, SUPERLINK = (
    *("ca.crt", "client.crt", "local.crt", "door.crt", "superlink.crt"),
)
REVOKED, NODES, SETTINGS = "clients.crl", "nodes.json", "coordinator.yaml"
PATHS = MappingProxyType(
    {
        "etc": "/etc/coterie",
        "kit": "/etc/coterie/kit",
        "conf": "/etc/coterie/conf.d",
        "state": "/var/lib/coterie",
        "program": "/opt/coterie",
        "bin": "/opt/coterie/.venv/bin",
        "health_port": 8081,
        "proxy_port": 9443,
    }
)
"""Where units, containers and READMEs have things; docs/deploy.md installs them there."""
CALLS = (
    "activate-node",
    "confirm-message-received",
    "deactivate-node",
    "get-run",
    "pull-messages",
    "pull-object",
    "push-messages",
    "push-object",
    "send-node-heartbeat",
)
"""Fleet routes that a node calls, and all that the door lets through."""
STOCK_CALLS = (*CALLS, "get-fab")
"""With those of a stock SuperNode, which fetches the bundle of a run."""


@dataclass(frozen=True)
class Wanted:
    """What a holder is to have: private keys, and certificates by the key each is for."""

    keys: tuple[str, ...]
    certificates: Mapping[str, tuple[str, Sequence[str]]]
    """By file: the key's file, and the hosts of a server; none of a client."""


@dataclass(frozen=True)
class Kit:
    """One that was made."""

    holder: str
    folder: Path
    expires: Mapping[str, datetime]
    absent: tuple[str, ...]
    """Keys that are no longer here: they are at the holder's."""
    is_new: bool
    """Whether it differs from the one that was made before, and is to be handed out."""


def wanted_of(federation: Federation, name: str) -> Wanted:
    """Of a site, or of the coordinator."""
    if name == COORDINATOR:
        hosts = federation.coordinator.hosts
        if federation.stock_supernodes:
            hosts = (*hosts, door_name(federation))
        return Wanted(
            (DOOR_KEY, SUPERLINK_KEY),
            {DOOR: (DOOR_KEY, hosts), SUPERLINK: (SUPERLINK_KEY, LOOPBACK)},
        )
    keys: tuple[str, ...] = (NODE_KEY, CLIENT_KEY, LEDGER_KEY)
    certificates: dict[str, tuple[str, Sequence[str]]] = {CLIENT: (CLIENT_KEY, ())}
    if federation.stock_supernodes:
        keys = (*keys, LOCAL_KEY)
        certificates[LOCAL] = (LOCAL_KEY, LOOPBACK)
    return Wanted(keys, certificates)


def door_name(federation: Federation) -> str:
    """By which a proxy of nginx knows the door: it takes no address of a certificate for a name."""
    return f"door.{federation.name}.internal"


@dataclass(frozen=True)
class Maker:
    """Makes kits of one federation, at one moment."""

    federation: Federation
    office: Office
    now: datetime

    def hold(self, book: Book, name: str, *, renew: bool) -> tuple[Book, Mapping[str, bytes]]:
        """The book in which a holder has what it is to have, and its private keys that are here.

        Guarantee: a key that is there stays; one that the book knows is never made again.
        Raises: VerificationError if a key here is not the one that the book knows.
        """
        holder, wanted = book.holders.get(name, Holder()), wanted_of(self.federation, name)
        held, contents = dict(holder.keys), dict(self._keys_here(name, wanted))
        for file in wanted.keys:
            if file not in held:
                contents.setdefault(file, make_key(file))
            if file in contents:
                key = read_key(file, contents[file])
                if held.setdefault(file, key) != key:
                    raise VerificationError(
                        f"{self.office.kits / name / file}: is not the key that was made for {name}"
                    )
        holder = replace(holder, keys=held)
        for file, (key_file, hosts) in wanted.certificates.items():
            holder = self._certified(holder, name, file, (key_file, hosts), renew=renew)
        return book.with_holder(name, holder), contents

    def _keys_here(self, name: str, wanted: Wanted) -> Iterator[tuple[str, bytes]]:
        for file in wanted.keys:
            path = self.office.kits / name / file
            if path.is_file():
                yield file, path.read_bytes()

    def _certified(
        self, holder: Holder, name: str, file: str, of: tuple[str, Sequence[str]], *, renew: bool
    ) -> Holder:
        key_file, hosts = of
        known = holder.certificates.get(file)
        if known is not None and not renew and _is_of(certificate_of(known), hosts):
            return holder
        made = self.office.authority.sign(
            name if not hosts else f"{name} {file.partition('.')[0]}",
            public_of(holder.keys[key_file]),
            hosts,
            days=self.federation.days,
            now=self.now,
        )
        text = made.public_bytes(Encoding.PEM).decode("ascii")
        serials = (*holder.issued, made.serial_number) if file == CLIENT else holder.issued
        certificates = {**holder.certificates, file: text}
        return replace(holder, certificates=certificates, issued=serials)

    def write_site(self, book: Book, member: Member, keys: Mapping[str, bytes]) -> tuple[Book, Kit]:
        """The kit of a site, in its place, and the book that knows of it."""
        ledger = self.federation.ledger
        terms = replace(
            ledger,
            cap=member.cap or ledger.cap,
            dataset=member.dataset or ledger.dataset,
            officer_key=ledger.officer_key or self.office.officer(),
        )
        holder, name = book.holders[member.name], door_name(self.federation)
        rendered = self._rendered("site", holder, member=member, terms=terms, door_name=name)
        if not self.federation.stock_supernodes:
            del rendered["nginx.conf"]
        return self._write(book, member.name, rendered, keys)

    def write_coordinator(self, book: Book, keys: Mapping[str, bytes]) -> tuple[Book, Kit]:
        """The kit of the coordinator, in its place: whoever was revoked is in none of its lists."""
        book = self._listing(book)
        let_in = {
            name: holder
            for name, holder in sorted(book.holders.items())
            if name != COORDINATOR and not holder.is_out
        }
        serials = [
            (_serial(each), name) for name, holder in let_in.items() for each in holder.issued
        ]
        flags, pod = (self._superlink(address) for address in ("127.0.0.1", "0.0.0.0"))  # noqa: S104
        rendered = self._rendered(
            "coordinator",
            book.holders[COORDINATOR],
            sites=[*let_in],
            serials=serials,
            node_keys=[(name, _as_sent(each.keys[NODE_KEY])) for name, each in let_in.items()],
            calls=STOCK_CALLS if self.federation.stock_supernodes else CALLS,
            superlink_command=flags,
            superlink_command_pod=pod,
            health_check=self._health_check(),
        )
        nodes = {
            name: {
                "node_key": holder.keys[NODE_KEY].public,
                "ledger_key": holder.keys[LEDGER_KEY].public,
                "earlier_ledger_keys": [*holder.earlier_ledger_keys],
            }
            for name, holder in let_in.items()
        }
        rendered[NODES] = (json.dumps(nodes, indent=1, sort_keys=True) + "\n").encode()
        rendered[REVOKED] = book.revocations.encode()
        return self._write(book, COORDINATOR, rendered, keys)

    def _listing(self, book: Book) -> Book:
        """With a list of what is revoked, the last one if that says so already."""
        if book.revocations:
            listed = x509.load_pem_x509_crl(book.revocations.encode())
            if {each.serial_number for each in listed} == {*book.revoked}:
                return book
        made = self.office.authority.revoking(book.revoked, now=self.now)
        return replace(book, revocations=made.decode("ascii"))

    def _superlink(self, health: str) -> list[str]:
        kit, state = PATHS["kit"], PATHS["state"]
        return [
            *(f"{PATHS['bin']}/coterie", "superlink", "--host", "127.0.0.1"),
            *("--port", str(self.federation.coordinator.control_port)),
            *("--database", f"{state}/state.db", "--enable-supernode-auth"),
            *("--ssl-certfile", f"{kit}/{SUPERLINK}", "--ssl-keyfile", f"{kit}/{SUPERLINK_KEY}"),
            *("--ssl-ca-certfile", f"{kit}/{AUTHORITY}"),
            "--disable-runtime-dependency-installation",
            *("--health-server-address", f"{health}:{PATHS['health_port']}"),
        ]

    def _health_check(self) -> str:
        url = f"https://localhost:{self.federation.coordinator.control_port}/health"
        trust = f"ssl.create_default_context(cafile='{PATHS['kit']}/{AUTHORITY}')"
        return f"import ssl, urllib.request as r; r.urlopen('{url}', context={trust})"

    def _rendered(self, kind: str, holder: Holder, **values: Any) -> dict[str, bytes]:
        """The files of a kit that are made from templates, by name."""
        environment = _environment(TEMPLATES / kind)
        ends = {file: f"{end:%Y-%m-%d}" for file, end in _expires(holder).items()}
        return {
            name.removesuffix(SUFFIX): environment.get_template(name)
            .render(
                federation=self.federation,
                paths=PATHS,
                part_bytes=PART_MIB << 20,
                expires=ends,
                **values,
            )
            .encode()
            for name in environment.list_templates()
        }

    def _write(
        self, book: Book, name: str, rendered: Mapping[str, bytes], keys: Mapping[str, bytes]
    ) -> tuple[Book, Kit]:
        holder, folder = book.holders[name], self.office.kits / name
        certificates = {file: text.encode() for file, text in holder.certificates.items()}
        authority = {AUTHORITY: self.office.authority.certificate.read_bytes()}
        contents = {**rendered, **authority, **certificates, **keys}
        # A key that is no longer here is sealed by the digest that it had.
        files = {
            **{file: key.digest for file, key in holder.keys.items()},
            **{file: digest_of(content) for file, content in contents.items()},
        }
        expires, key = _expires(holder), self.office.sealing_key()
        whole = digest({"files": files, "federation": self.federation.name})
        absent = tuple(file for file in holder.keys if file not in keys)
        kit = Kit(name, folder, expires, absent, is_new=False)
        here = {**{file: files[file] for file in files if file not in absent}, SEAL: holder.seal}
        if holder.sealed == whole and _is_as_made(folder, here):
            return book, kit
        text = sealed(
            key,
            federation=self.federation.name,
            holder=name,
            files=files,
            expires=expires,
            now=self.now,
        )
        with folder_atomic(folder, mode=0o700) as temporary:
            for file, content in {**contents, SEAL: text.encode()}.items():
                write_private(temporary / file, content)
        holder = replace(holder, sealed=whole, seal=digest_of(text.encode()))
        return book.with_holder(name, holder), replace(kit, is_new=True)


def _is_as_made(folder: Path, files: Mapping[str, str]) -> bool:
    """Whether a kit lies there with these files, or was handed out and deleted."""
    if not folder.exists():
        return True
    found = {
        path.name: digest_of(path.read_bytes()) if path.is_file() else ""
        for path in folder.iterdir()
    }
    return found == {**files}


def discard(office: Office, name: str) -> None:
    """Removes a kit, with its keys."""
    shutil.rmtree(office.kits / name, ignore_errors=True)


def _expires(holder: Holder) -> dict[str, datetime]:
    return {
        file: certificate_of(text).not_valid_after_utc
        for file, text in sorted(holder.certificates.items())
    }


def _is_of(certificate: x509.Certificate, hosts: Sequence[str]) -> bool:
    """Whether a certificate is for these hosts, and no others."""
    try:
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        return not hosts
    return {str(each.value) for each in names} == {*hosts}


def _serial(number: int) -> str:
    """As nginx writes it: hexadecimal, two digits to a byte."""
    digits = f"{number:X}"
    return digits if len(digits) % 2 == 0 else f"0{digits}"


def _as_sent(key: Key) -> str:
    """A node's public key as the header of a fleet call has it: base64 of PEM."""
    public = load_ssh_public_key(key.public.encode())
    pem = public.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    return b64encode(pem).decode("ascii")


def _environment(folder: Path) -> Environment:
    environment = Environment(  # noqa: S701 - no HTML; what is filled in is checked, or quoted
        loader=FileSystemLoader(folder),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["yaml"] = lambda value: json.dumps(value, ensure_ascii=False)
    environment.filters["shell"] = shlex.quote
    environment.filters["host"] = lambda host: f"[{host}]" if ":" in host else host
    return environment

"""Who answers at an address: whether anybody does, in whose name, and by which clock.

What a node or a submitter finds out when it begins to work, found out beforehand and in pieces, so
that each fault can be told from the others. Nothing is asked that would change anything.
"""

import socket
import ssl
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from email.utils import parsedate_to_datetime
from importlib import metadata
from pathlib import Path
from time import time

import httpx
from cryptography import x509

from common.certificates import Credentials
from common.doctor import Check, DoubtError, OpenError
from common.errors import ConfigError, CoterieError, FederationError

CALL_S = 10.0
"""How long one question may take."""
SOON = timedelta(days=30)
"""A certificate that ends sooner should be renewed now."""
MAX_AHEAD_S, MAX_BEHIND_S = 4.0, 300.0
"""Flower takes no call that is dated 5 s ahead of it or 305 s behind."""
NOTICED_S = 2.0
"""Less cannot be told: an answer's date is in whole seconds."""
_EXPIRED, _NOT_YET, _WRONG_NAMES = 10, 9, frozenset({62, 64})
"""What OpenSSL calls these faults of a certificate."""
_NO_TLS = frozenset({"WRONG_VERSION_NUMBER", "RECORD_LAYER_FAILURE", "HTTP_REQUEST"})


@dataclass(frozen=True)
class Peer:
    """An address, and the one authority that is believed about it."""

    setting: str
    """What the address is called in settings: messages begin with it."""
    address: str
    authority: Path
    own: Credentials | None = None
    """Certificate and key that this side shows, where the other asks for one."""

    @property
    def name(self) -> str:
        """As messages call it."""
        return f"{self.setting}={self.address}"

    @property
    def host_and_port(self) -> tuple[str, int]:
        """Without the brackets of IPv6. Raises: ConfigError if it is no address."""
        host, _, port = self.address.rpartition(":")
        if not host or "/" in host or not port.isdecimal():
            raise ConfigError(f"{self.name}: is no address; give HOST:PORT")
        return host.strip("[]"), int(port)

    def checks(self) -> Iterator[Check]:
        """What either side asks of it, in order."""
        yield Check("port", self.reach, "start the SuperLink", calls=True)
        yield Check("certificate", self.handshake, "renew it", calls=True)
        yield Check(
            "flwr there",
            lambda: self.flower(metadata.version("flwr")),
            "install one minor version on both sides",
            calls=True,
        )
        yield Check("clock", self.clock, "set it right, by NTP", calls=True)

    def reach(self) -> str:
        """Whether a port is open there. Raises: FederationError."""
        host, port = self.host_and_port
        try:
            found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        except OSError as error:
            raise FederationError(
                f"{self.name}: no machine of that name is known here; correct the name, or have "
                "it entered in the DNS or in /etc/hosts"
            ) from error
        try:
            socket.create_connection((host, port), CALL_S).close()
        except OSError as error:
            reason = "did not answer" if isinstance(error, TimeoutError) else "refused"
            raise FederationError(
                f"{self.name}: port {port} {reason}; start the SuperLink, and have firewalls let "
                "this machine through to that port"
            ) from error
        return f"{found[0][4][0]}, port {port} is open"

    def handshake(self) -> str:
        """Whether its certificate is the authority's, for this name, and of today.

        Raises: ConfigError; DoubtError if it ends soon.
        """
        host, port = self.host_and_port
        try:
            context = self.context()
            line = socket.create_connection((host, port), CALL_S)
        except ConfigError as error:
            raise OpenError("the authority's certificate must be well first") from error
        except OSError as error:
            raise OpenError("nobody is there") from error
        try:
            with line, context.wrap_socket(line, server_hostname=host) as secured:
                shown = secured.getpeercert(binary_form=True)
                speaks = secured.version()
        except ssl.SSLCertVerificationError as error:
            raise ConfigError(self._disbelieved(error)) from error
        except ssl.SSLError as error:
            if error.reason in _NO_TLS:
                raise ConfigError(
                    f"{self.name}: does not speak TLS; start the SuperLink with --ssl-certfile, "
                    "--ssl-keyfile and --ssl-ca-certfile"
                ) from error
            raise ConfigError(f"{self.name}: TLS failed ({error.reason})") from error
        except OSError as error:
            raise FederationError(f"{self.name}: hung up ({error.strerror or error})") from error
        assert shown is not None
        ends = x509.load_der_x509_certificate(shown).not_valid_after_utc
        check_end(ends, f"{self.name}: its certificate", "have the coordinator renew it")
        return f"{speaks}; for {host}, until {ends:%Y-%m-%d}"

    def check_well(self) -> None:
        """Raises: OpenError unless whoever is there can be believed: `handshake` says why not."""
        with suppress(DoubtError):
            try:
                self.handshake()
            except (CoterieError, OpenError) as error:
                raise OpenError("port and certificate must be well first") from error

    def _disbelieved(self, error: ssl.SSLCertVerificationError) -> str:
        where = f"{self.name}: its certificate"
        if error.verify_code == _EXPIRED:
            return f"{where} has expired; have the coordinator renew it"
        if error.verify_code == _NOT_YET:
            return f"{where} is not valid yet; set this machine's clock right, or the coordinator's"
        if error.verify_code in _WRONG_NAMES:
            return (
                f"{where} is for another name ({error.verify_message}); reach it by a name that "
                "is in it, or have the coordinator issue it for this one too"
            )
        return (
            f"{where} was signed by another authority than {self.authority} "
            f"({error.verify_message}); give the authority that signed it"
        )

    def clock(self) -> str:
        """By how much this machine's clock differs. Raises: ConfigError; DoubtError if some."""
        told = self._get("/health").headers.get("date", "")
        try:
            ahead = time() - parsedate_to_datetime(told).timestamp()
        except ValueError as error:
            raise ConfigError(f"{self.name}: does not say what time it is") from error
        words = f"{abs(ahead):.0f} s {'ahead of' if ahead > 0 else 'behind'} {self.name}"
        remedy = "set it right, by NTP (timedatectl set-ntp true)"
        if not -MAX_BEHIND_S <= ahead <= MAX_AHEAD_S:
            raise ConfigError(
                f"this machine's clock is {words}, which takes no such call; {remedy}"
            )
        if abs(ahead) > NOTICED_S:
            raise DoubtError(f"this machine's clock is {words}; {remedy}")
        return f"within {NOTICED_S:g} s of {self.name}"

    def flower(self, ours: str) -> str:
        """Whether its flwr is of our minor version. Raises: ConfigError; DoubtError if untold."""
        answer = self._get("/openapi.json")
        try:
            theirs = str(answer.json()["info"]["version"])[:20] if answer.is_success else ""
        except (ValueError, KeyError, TypeError):
            theirs = ""
        if not theirs:
            raise DoubtError(
                f"flwr {ours} here; {self.name} does not tell its own: ask its operator"
            )
        if theirs.split(".")[:2] != ours.split(".")[:2]:
            raise ConfigError(
                f"flwr {ours} here, and {theirs!r} at {self.name}; install one minor version on "
                "both sides: pip install 'flwr==MAJOR.MINOR.*'"
            )
        return f"flwr {ours} here, {theirs} at {self.name}"

    def context(self) -> ssl.SSLContext:
        """Believes the authority, and nobody else. Raises: ConfigError."""
        read_certificate(self.authority, "the authority")
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        context.load_verify_locations(cafile=str(self.authority))
        if self.own is not None:
            try:
                context.load_cert_chain(
                    self.own.certificate.expanduser(), self.own.key.expanduser()
                )
            except (OSError, ssl.SSLError) as error:
                raise ConfigError(
                    f"certificate={self.own.certificate}: cannot be shown; see own certificate"
                ) from error
        return context

    def _get(self, path: str) -> httpx.Response:
        """Raises: OpenError: what keeps it from answering is found elsewhere."""
        try:
            with httpx.Client(verify=self.context(), timeout=CALL_S) as client:
                return client.get(f"https://{self.address}{path}")
        except httpx.TransportError as error:
            raise OpenError("port and certificate must be well first") from error


def read_certificate(path: Path, whose: str) -> x509.Certificate:
    """The first certificate of a file. Raises: ConfigError if there is none."""
    try:
        return x509.load_pem_x509_certificate(path.read_bytes())
    except FileNotFoundError as error:
        raise ConfigError(f"{path}: no such file; it must hold the certificate of {whose}") from (
            error
        )
    except ValueError as error:
        raise ConfigError(
            f"{path}: holds no certificate in PEM; it must hold that of {whose}"
        ) from error


def check_authority(path: Path) -> str:
    """Whether this is an authority's certificate, of today. Raises: ConfigError; DoubtError."""
    found = read_certificate(path, "the authority that signed the coordinator's")
    try:
        signs = found.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    except x509.ExtensionNotFound:
        signs = False
    if not signs:
        raise ConfigError(
            f"{path}: is the certificate of a server, and of no authority; get the authority's "
            "(ca.crt) from whoever provisions"
        )
    if found.not_valid_before_utc > datetime.now(UTC):
        raise ConfigError(f"{path}: is not valid yet; set this machine's clock right")
    check_end(found.not_valid_after_utc, f"{path}: it", "get a new one from whoever provisions")
    return f"until {found.not_valid_after_utc:%Y-%m-%d}"


def check_end(ends: datetime, what: str, remedy: str) -> None:
    """Raises: ConfigError if a certificate has ended; DoubtError if it does so soon."""
    left = ends - datetime.now(UTC)
    if left <= timedelta(0):
        raise ConfigError(f"{what} has expired on {ends:%Y-%m-%d}; {remedy}")
    if left < SOON:
        raise DoubtError(f"{what} expires on {ends:%Y-%m-%d}, in {left.days} days; {remedy}")

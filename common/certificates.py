"""Certificates and keys of a deployment: who the coordinator is, and who a node is.

An *authority* signs the coordinator's certificate; nodes are given the authority's certificate,
and by it know whom they talk to. A node is known by a key pair of its own, whose public half the
coordinator registers, and, where a door stands before the coordinator, by a certificate that the
same authority signed and has not revoked. Elliptic curves only, P-384, as Flower's.
"""

import ipaddress
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
    load_ssh_private_key,
)
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from common.durable import write_atomic
from common.errors import ConfigError
from common.keys import check_secret, write_private

AUTHORITY = "ca"
"""Name of an authority's files, without their ending."""
BACKDATED = timedelta(hours=1)
"""A new certificate is valid from before it was made: clocks of two machines differ."""
PUBLIC_SUFFIX = ".pub"


@dataclass(frozen=True)
class Credentials:
    """A certificate and its private key, as files in PEM."""

    certificate: Path
    key: Path


@dataclass(frozen=True)
class Authority(Credentials):
    """What signs certificates. Its key stays with whoever provisions; nobody else needs it."""

    def issue(
        self, name: str, hosts: Sequence[str], *, days: int = 365, now: datetime | None = None
    ) -> Credentials:
        """A certificate for a server, and its key, beside the authority's: NAME.crt, NAME.key.

        Args: hosts: DNS names and IP addresses by which it is reached; days: how long it is valid;
        now: when it is made, if not at this moment.
        Raises: ConfigError if there is such a key, or this authority's is not private.
        """
        key = ec.generate_private_key(ec.SECP384R1())
        signed = self.sign(name, key.public_key(), hosts, days=days, now=now)
        return _written(self.certificate.parent, name, signed, key)

    def sign(
        self,
        name: str,
        public: ec.EllipticCurvePublicKey,
        hosts: Sequence[str] = (),
        *,
        days: int = 365,
        now: datetime | None = None,
    ) -> x509.Certificate:
        """A certificate for whoever has the private half of a key: a server's if there are hosts,
        and otherwise a client's, which no client takes for a server's.

        Args: as `issue`. No certificate outlives the authority's own.
        Raises: ConfigError if this authority's key is not private, or it has expired.
        """
        signer, above = self._signer(), self.read()
        usage = ExtendedKeyUsageOID.SERVER_AUTH if hosts else ExtendedKeyUsageOID.CLIENT_AUTH
        made = now or datetime.now(UTC)
        left = above.not_valid_after_utc - made
        if left <= timedelta(0):
            raise ConfigError(
                f"{self.certificate}: expired on {above.not_valid_after_utc:%Y-%m-%d}; provision "
                "the federation anew, in another folder"
            )
        built = _builder(name, above.subject, public, min(timedelta(days=days), left), made)
        for extension, critical in (
            (x509.BasicConstraints(ca=False, path_length=None), True),
            (x509.ExtendedKeyUsage([usage]), False),
            (x509.AuthorityKeyIdentifier.from_issuer_public_key(signer.public_key()), False),
        ):
            built = built.add_extension(extension, critical)
        if hosts:
            names = x509.SubjectAlternativeName([_general(host) for host in hosts])
            built = built.add_extension(names, critical=False)
        return built.sign(signer, hashes.SHA384())

    def revoking(self, serials: Mapping[int, datetime], *, now: datetime | None = None) -> bytes:
        """The list of certificates that are believed no longer, in PEM; it holds as long as the
        authority's own. Args: serials: when each was revoked.
        """
        above, made = self.read(), now or datetime.now(UTC)
        built = (
            x509.CertificateRevocationListBuilder()
            .issuer_name(above.subject)
            .last_update(made - BACKDATED)
            .next_update(max(above.not_valid_after_utc, made))
        )
        for serial, since in sorted(serials.items()):
            revoked = x509.RevokedCertificateBuilder().serial_number(serial)
            built = built.add_revoked_certificate(revoked.revocation_date(since).build())
        return built.sign(self._signer(), hashes.SHA384()).public_bytes(Encoding.PEM)

    def read(self) -> x509.Certificate:
        """Its own certificate."""
        return x509.load_pem_x509_certificate(self.certificate.read_bytes())

    def _signer(self) -> ec.EllipticCurvePrivateKey:
        signer = load_pem_private_key(_secret(self.key), None)
        assert isinstance(signer, ec.EllipticCurvePrivateKey)
        return signer


def make_authority(folder: Path, *, days: int = 365, now: datetime | None = None) -> Authority:
    """A new authority in `folder`: ca.crt, which every node gets, and ca.key, which nobody does.

    Args: as `Authority.issue`. Raises: ConfigError if there is one.
    """
    folder.mkdir(parents=True, exist_ok=True)
    key = ec.generate_private_key(ec.SECP384R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "coterie authority")])
    made_at = now or datetime.now(UTC)
    built = _builder("coterie authority", name, key.public_key(), timedelta(days=days), made_at)
    usage = x509.KeyUsage(
        key_cert_sign=True,
        crl_sign=True,
        digital_signature=False,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )
    built = built.add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
    built = built.add_extension(usage, critical=True)
    made = _written(folder, AUTHORITY, built.sign(key, hashes.SHA384()), key)
    return Authority(made.certificate, made.key)


def make_node_key(path: Path) -> Path:
    """A new key pair of a node: the private half at `path`, for its owner only; never over another.

    Returns: the path of the public half, PATH.pub, which the coordinator registers.
    Raises: ConfigError if there is one.
    """
    key = ec.generate_private_key(ec.SECP384R1())
    write_private(path, key.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption()))
    public = path.with_name(f"{path.name}{PUBLIC_SUFFIX}")
    write_atomic(public, public_line(key.public_key()))
    return public


def public_line(key: ec.EllipticCurvePublicKey) -> bytes:
    """The public half of a node's key as one line, as Flower's command registers it."""
    return key.public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH) + b"\n"


def read_node_key(path: Path) -> ec.EllipticCurvePrivateKey:
    """The private half of a node's key pair, as `make_node_key` or ssh-keygen wrote it.

    Raises: ConfigError if others may read it, or it is none.
    """
    content = _secret(path)
    is_ssh = content.lstrip().startswith(b"-----BEGIN OPENSSH")
    try:
        key = (load_ssh_private_key if is_ssh else load_pem_private_key)(content, None)
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise ConfigError(f"{path}: holds no private key without a passphrase") from error
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise ConfigError(
            f"{path}: must be a key on an elliptic curve; make one by "
            "ssh-keygen -t ecdsa -b 384 -N '' -f FILE"
        )
    return key


def _secret(path: Path) -> bytes:
    try:
        check_secret(path)
        return path.read_bytes()
    except FileNotFoundError as error:
        raise ConfigError(f"{path}: no such key") from error


def _builder(
    subject: str,
    issuer: x509.Name,
    public: ec.EllipticCurvePublicKey,
    valid: timedelta,
    made: datetime,
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, subject)]))
        .issuer_name(issuer)
        .public_key(public)
        .serial_number(x509.random_serial_number())
        .not_valid_before(made - BACKDATED)
        .not_valid_after(made + valid)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(public), critical=False)
    )


def _general(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)


def _written(
    folder: Path, name: str, certificate: x509.Certificate, key: ec.EllipticCurvePrivateKey
) -> Credentials:
    made = Credentials(folder / f"{name}.crt", folder / f"{name}.key")
    write_private(made.key, key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    write_atomic(made.certificate, certificate.public_bytes(Encoding.PEM))
    return made

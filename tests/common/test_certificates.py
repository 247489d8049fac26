"""Certificates and keys: who is believed, and that no secret lies about."""

import socket
import ssl
import stat
import threading
from contextlib import closing
from datetime import UTC, datetime, timedelta

import pytest
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_ssh_public_key,
)

from common.certificates import make_authority, make_node_key, read_node_key
from common.errors import ConfigError


@pytest.fixture(scope="module")
def authority(tmp_path_factory):
    return make_authority(tmp_path_factory.mktemp("authority"))


def fault(authority, credentials, host="127.0.0.1"):
    """What a TLS client that believes `authority` says of a server; empty if it is content."""
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(credentials.certificate, credentials.key)
    client = ssl.create_default_context(cafile=str(authority.certificate))
    client.verify_flags |= ssl.VERIFY_X509_STRICT  # the default of newer Pythons
    ours, theirs = socket.socketpair()

    def serve():
        with closing(theirs), pytest.MonkeyPatch.context():
            try:
                server.wrap_socket(theirs, server_side=True).close()
            except OSError:
                return

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        with closing(client.wrap_socket(ours, server_hostname=host)):
            return ""
    except ssl.SSLCertVerificationError as error:
        return error.verify_message
    finally:
        ours.close()
        thread.join()


def test_a_server_of_the_authority_is_believed_under_its_own_names_only(authority):
    issued = authority.issue("one", ["localhost", "127.0.0.1"])
    assert fault(authority, issued) == fault(authority, issued, "localhost") == ""
    assert "mismatch" in fault(authority, issued, "127.0.0.2")
    assert "mismatch" in fault(authority, issued, "elsewhere")


def test_another_authority_and_an_old_certificate_are_not_believed(authority, tmp_path):
    issued = authority.issue("two", ["127.0.0.1"])
    assert fault(make_authority(tmp_path), issued) != ""
    past = datetime.now(UTC) - timedelta(days=30)
    old = authority.issue("old", ["127.0.0.1"], days=7, now=past)
    assert fault(authority, old) == "certificate has expired"


def test_a_server_cannot_sign_for_others(authority):
    """Its certificate is no authority's: nobody believes what it signs."""
    issued = authority.issue("three", ["127.0.0.1"])
    forged = type(authority)(issued.certificate, issued.key).issue("forged", ["127.0.0.1"])
    assert fault(authority, forged) != ""


def test_every_private_half_is_its_owners_alone_and_never_overwritten(authority, tmp_path):
    public = make_node_key(tmp_path / "node.key")
    issued = authority.issue("four", ["127.0.0.1"])
    for path in (tmp_path / "node.key", issued.key, authority.key):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
    before = (tmp_path / "node.key").read_bytes(), public.read_bytes()
    with pytest.raises(ConfigError, match="exists already"):
        make_node_key(tmp_path / "node.key")
    assert ((tmp_path / "node.key").read_bytes(), public.read_bytes()) == before


def test_a_nodes_key_is_read_back_as_it_was_written(tmp_path):
    public = make_node_key(tmp_path / "node.key")
    key = read_node_key(tmp_path / "node.key")
    assert key.public_key() == load_ssh_public_key(public.read_bytes())
    pem = tmp_path / "node.pem"
    pem.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    pem.chmod(0o600)
    assert read_node_key(pem).private_numbers() == key.private_numbers()


def other_kinds():
    locked = ec.generate_private_key(ec.SECP384R1()).private_bytes(
        Encoding.PEM, PrivateFormat.PKCS8, BestAvailableEncryption(b"secret")
    )
    flat = ed25519.Ed25519PrivateKey.generate().private_bytes(
        Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption()
    )
    return {
        "a passphrase": (locked, 0o600, "without a passphrase"),
        "no curve of Flower's": (flat, 0o600, "on an elliptic curve"),
        "no key": (b"hello", 0o600, "holds no private key"),
        "readable by others": (b"hello", 0o644, "others may read this key; run chmod 600"),
    }


@pytest.mark.parametrize("kind", other_kinds().keys())
def test_what_is_no_key_of_a_node_is_refused_in_one_line(tmp_path, kind):
    content, mode, words = other_kinds()[kind]
    path = tmp_path / "node.key"
    path.write_bytes(content)
    path.chmod(mode)
    with pytest.raises(ConfigError, match=words) as refused:
        read_node_key(path)
    assert "\n" not in str(refused.value)
    assert "hello" not in str(refused.value)


def test_a_key_that_is_not_there_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"node\.key: no such key"):
        read_node_key(tmp_path / "node.key")

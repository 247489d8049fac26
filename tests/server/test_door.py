"""The door of a coordinator's kit, by itself: nginx as the kit configures it, and nobody behind.

What it lets through ends as 502, since no SuperLink is there; all else is its own word. With a
SuperLink behind it, and a run that goes on: tests/integration/test_kits.py.
"""

import json
import os
import shutil
import socket
import ssl
from base64 import b64encode
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta

import httpx
import pytest
import yaml
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, load_ssh_public_key
from flwr.supercore.constant import FLEET_HTTP_PUBLIC_KEY_HEADER
from flwr.supercore.primitives.asymmetric import public_key_to_bytes

from common.certificates import make_authority
from common.cli import main
from server import federation
from server.holders import CLIENT_KEY, Office, make_key, public_of, read_key
from server.kits import CALLS
from simulations.deployment import Running, free_port, until
from simulations.provisioned import find_nginx

pytestmark = pytest.mark.skipif(
    find_nginx() is None, reason="nginx is missing: apt-get install nginx-light"
)
LET_THROUGH = 502
PULL = "/v1/fleet/pull-messages"
AROUND = (
    "/v1/control/start-run",
    "/v1/control/list-runs",
    "/v1/runtime/acquire-task",
    "/health",
    "/docs",
    "/",
    "/v1/fleet/",
    "/v1/fleet/get-fab",
    "/v1/fleet/register-node",
    "/v1/fleet/pull-messages/",
    "/v1/fleet/pull-messages/x",
    "/v1/fleet/../control/start-run",
    "/v1/fleet/%2e%2e/control/start-run",
    "/v1/fleet/pull-messages/../../control/start-run",
    "//v1/control/start-run",
    "/V1/FLEET/PULL-MESSAGES",
)


def sent(key):
    """As a node says its public key, by Flower's own code."""
    return b64encode(public_key_to_bytes(key)).decode("ascii")


class Door:
    """One that is open, and the federation that it is of."""

    def __init__(self, folder):
        self.folder, self.port = folder, free_port()
        described = {
            "name": "trial",
            "coordinator": {
                "hosts": ["127.0.0.1"],
                "listen": "127.0.0.1",
                "port": self.port,
                "control_port": free_port(),
            },
            "ledger": {"dataset": "notes", "cap": 8, "delta": 1e-5},
            "sites": ["ward-1", "ward-2", "ward-3", "ward-4"],
            "door": {"requests_per_s": 20},
        }
        (folder / "federation.yaml").write_text(yaml.safe_dump(described))
        self.made = folder / "made"
        assert self.provision(folder / "federation.yaml", "--to", self.made) == 0
        prefix = folder / "state" / "door"
        prefix.mkdir(parents=True)
        own = ("-g", "user root;") if os.geteuid() == 0 else ()
        configuration = str(self.kit("coordinator") / "nginx.conf")
        nginx = str(find_nginx())
        command = (nginx, "-e", "stderr", "-p", f"{prefix}/", "-c", configuration, *own)
        self.nginx = Running(command, folder / "door.log", os.environ)
        for _ in until(20, "nginx does not start"):
            self.nginx.check_alive()
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", self.port)) == 0:
                    break
        self.refused = prefix / "refused.log"

    def provision(self, *words):
        return main(["provision", *map(str, words)])

    def kit(self, name):
        return self.made / "kits" / name

    def client(self, certificate=None, key=None):
        trust = ssl.create_default_context(cafile=str(self.made / "authority" / "ca.crt"))
        if certificate is not None:
            trust.load_cert_chain(certificate, key)
        return httpx.Client(verify=trust, timeout=20.0)

    def of(self, name, *, key_of=None):
        """A client of a site, with its certificate, and with its node's key or another's."""
        client = self.client(self.kit(name) / "client.crt", self.kit(name) / "client.key")
        nodes = json.loads((self.kit("coordinator") / "nodes.json").read_text())
        line = nodes[key_of or name]["node_key"].encode()
        client.headers[FLEET_HTTP_PUBLIC_KEY_HEADER] = sent(load_ssh_public_key(line))
        return client

    def post(self, client, path=PULL, content=b"", method="POST"):
        url = f"https://127.0.0.1:{self.port}"
        request = httpx.Request(method, url, content=content, headers=client.headers)
        request.url = request.url.copy_with(raw_path=path.encode())
        return client.send(request)


@pytest.fixture(scope="module")
def door(tmp_path_factory):
    made = Door(tmp_path_factory.mktemp("door"))
    yield made
    made.nginx.stop()


def refusal(door, client):
    with client:
        answer = door.post(client)
    assert answer.status_code == 400, answer
    return answer.headers["coterie-door"]


def test_a_site_reaches_what_a_node_calls_and_nothing_else(door):
    with door.of("ward-1") as client:
        through = {call: door.post(client, f"/v1/fleet/{call}").status_code for call in CALLS}
        around = {path: door.post(client, path).status_code for path in AROUND}
        version = door.post(client, "/openapi.json", method="GET").status_code
        methods = [
            door.post(client, PULL, method=each).status_code for each in ("GET", "PUT", "DELETE")
        ]
    assert {*through.values()} == {LET_THROUGH}
    assert {*around.values()} <= {400, 404}, around
    assert version == LET_THROUGH
    assert methods == [405] * 3


def test_nobody_without_a_certificate_is_let_in(door):
    assert refusal(door, door.client()) == "certificate NONE"


def test_a_certificate_goes_with_the_node_key_of_its_own_site_only(door):
    borrowed = "node key of no site, or of another than the certificate"
    assert refusal(door, door.of("ward-1", key_of="ward-2")) == borrowed
    made = ec.generate_private_key(ec.SECP384R1()).public_key()  # of nobody
    for key in (None, "", sent(made)):
        client = door.of("ward-1")
        client.headers.pop(FLEET_HTTP_PUBLIC_KEY_HEADER)
        if key is not None:
            client.headers[FLEET_HTTP_PUBLIC_KEY_HEADER] = key
        assert refusal(door, client) == borrowed
    own, other = (
        door.of(name).headers[FLEET_HTTP_PUBLIC_KEY_HEADER] for name in ("ward-1", "ward-2")
    )
    twice = door.of("ward-1")  # Flower reads the first one: so must the door, or neither
    twice.headers = httpx.Headers(
        [(FLEET_HTTP_PUBLIC_KEY_HEADER, other), (FLEET_HTTP_PUBLIC_KEY_HEADER, own)]
    )
    assert refusal(door, twice) == borrowed
    with door.of("ward-1") as client:
        assert door.post(client).status_code == LET_THROUGH


def test_a_certificate_must_be_of_this_authority_for_a_client_valid_and_in_the_list(
    door, tmp_path, monkeypatch
):
    office = Office(door.made)
    key = tmp_path / "client.key"
    key.write_bytes(make_key(CLIENT_KEY))
    public = public_of(read_key(CLIENT_KEY, key.read_bytes()))

    def shown(certificate):
        path = tmp_path / "client.crt"
        path.write_bytes(certificate.public_bytes(Encoding.PEM))
        return door.client(path, key)

    long_ago = datetime.now(UTC) - timedelta(days=3000)
    other = make_authority(tmp_path / "other")
    # One that the authority signed, and nobody provisioned.
    assert refusal(door, shown(office.authority.sign("ward-1", public))) == "certificate SUCCESS"
    assert "expired" in refusal(door, shown(office.authority.sign("a", public, now=long_ago)))
    # One of another authority, under a serial number that is in the list.
    listed = x509.load_pem_x509_certificate((door.kit("ward-1") / "client.crt").read_bytes())
    monkeypatch.setattr(x509, "random_serial_number", lambda: listed.serial_number)
    assert "FAILED" in refusal(door, shown(other.sign("ward-1", public)))
    own = door.kit("coordinator")
    assert "FAILED" in refusal(door, door.client(own / "door.crt", own / "door.key"))


def test_a_body_that_is_too_large_is_not_taken(door):
    largest = federation.Door().max_body_mb << 20
    with door.of("ward-2") as client:
        assert door.post(client, content=bytes(largest)).status_code == LET_THROUGH
        assert door.post(client, content=bytes(largest + 1)).status_code == 413


def test_a_flood_of_one_site_is_refused_and_costs_no_other_site_anything(door):
    def some(_):
        with door.of("ward-3") as client:
            return [door.post(client).status_code for _ in range(6)]

    with ThreadPoolExecutor(32) as pool, door.of("ward-1") as other:
        flood = [pool.submit(some, each) for each in range(32)]
        others = [door.post(other).status_code for _ in range(10)]
        statuses = Counter(each for part in flood for each in part.result())
    assert statuses[429] > 20, statuses
    assert {*statuses} == {429, LET_THROUGH}
    assert others == [LET_THROUGH] * 10


def test_a_node_that_is_busy_waits_and_loses_nothing(door):
    """Six requests at a time, as a node's, for far more than its rate."""
    with ThreadPoolExecutor(6) as pool, door.of("ward-2") as client:
        statuses = [*pool.map(lambda _: door.post(client).status_code, range(90))]
    assert statuses == [LET_THROUGH] * 90


def test_strangers_are_refused_a_few_times_a_second_only(door):
    def one(_):
        with door.client() as client:
            return door.post(client).status_code

    with ThreadPoolExecutor(16) as pool:
        statuses = Counter(pool.map(one, range(80)))
    assert {*statuses} == {400, 429}


def test_a_revoked_site_is_out_once_the_door_reads_its_lists(door):
    before = door.of("ward-4")
    key = before.headers[FLEET_HTTP_PUBLIC_KEY_HEADER]
    with before:
        assert door.post(before).status_code == LET_THROUGH
        kept = door.folder / "kept"
        shutil.copytree(door.kit("ward-4"), kept)
        assert door.provision("revoke", door.made, "ward-4") == 0
        door.nginx.process.send_signal(1)  # SIGHUP, as `admit` does
        for _ in until(20, "the door reads its lists"):
            with door.client(kept / "client.crt", kept / "client.key") as client:
                client.headers[FLEET_HTTP_PUBLIC_KEY_HEADER] = key
                answer = door.post(client)
            if answer.status_code != LET_THROUGH:
                break
        assert answer.headers["coterie-door"] == "certificate FAILED:certificate revoked"
        # A line that was open ends, at the latest once the worker that has it hears of it.
        for _ in until(5, "the line that was open ends"):
            if door.post(before).status_code == 400:
                break
    with door.of("ward-1") as client:
        assert door.post(client).status_code == LET_THROUGH


def test_what_is_refused_is_written_down_without_what_was_sent(door):
    with door.of("ward-1") as client:
        door.post(client, "/v1/control/start-run?secret=12345", content=b"a secret")
        door.post(client)
    lines = door.refused.read_text().splitlines()
    assert any('"ward-1" 404 POST "/v1/control/start-run"' in line for line in lines)
    assert "12345" not in "".join(lines)

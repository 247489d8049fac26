"""From `federation.yaml` to a finished run through the kits alone, on loopback: three sites,
Flower's SuperLink, nginx as the door; and what is refused at that door while the run goes on.

Nothing is faked: each process runs by the command of a kit's unit, each site has its kit only.
"""

import csv
import ssl
import subprocess
import time
from base64 import b64encode
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from pathlib import Path

import httpx
import pytest
from flwr.supercore.constant import FLEET_HTTP_PUBLIC_KEY_HEADER
from flwr.supercore.primitives.asymmetric import public_key_to_bytes
from flwr.supercore.protobuf.constants import PROTOBUF_MEDIA_TYPE

from common.certificates import read_node_key
from common.errors import FederationError
from server.control import Address, Link
from server.federation import Door
from server.kits import PATHS
from server.report import read_report
from simulations.deployment import COTERIE, Running, free_port, until
from simulations.provisioned import Provisioned, find_nginx

pytestmark = [
    pytest.mark.slow,
    pytest.mark.alone,  # four minutes are promised
    pytest.mark.skipif(
        find_nginx() is None, reason="nginx is missing: apt-get install nginx-light"
    ),
]
ROUNDS, PUBLIC, FLOOD, LINES = 12, 30, 640, 32
TOO_LARGE = (Door().max_body_mb << 20) + 1
SIGNATURE_ASKED = 401
"""What the SuperLink behind the door says to whoever has no node's key."""
NAMES = ("site-1", "site-2", "site-3", "site-4")
"""The last one is provisioned, starts no node of its own accord, and is revoked."""
CONTROL = ("/v1/control/start-run", "/v1/control/list-runs", "/v1/runtime/acquire-task", "/docs")
AROUND = (
    "/v1/fleet/../control/start-run",
    "/v1/fleet/%2e%2e/control/start-run",
    "/v1/fleet/pull-messages/../../control/start-run",
    "//v1/control/start-run",
    "/v1/fleet/register-node",
    "/v1/fleet/get-fab",
)


class Caller(AbstractContextManager):
    """Whoever calls the door, with or without a certificate."""

    def __init__(self, deployment, kit=None, *, key_of=None):
        """Args: key_of: whose node key is named, if not the kit's own."""
        context = ssl.create_default_context(cafile=str(deployment.authority.certificate))
        own = {}
        if kit is not None:
            context.load_cert_chain(kit / "client.crt", kit / "client.key")
            key = public_key_to_bytes(read_node_key(key_of or kit / "node.key").public_key())
            own = {FLEET_HTTP_PUBLIC_KEY_HEADER: b64encode(key).decode("ascii")}
        self._client = httpx.Client(verify=context, timeout=20.0, headers=own)
        self._at = f"https://{deployment.door_address}"

    def __exit__(self, *_):
        self._client.close()

    def post(self, path, content=b""):
        # A path as it is written: httpx would tidy it up.
        form = {"content-type": PROTOBUF_MEDIA_TYPE, **self._client.headers}
        target = httpx.Request("POST", self._at, content=content, headers=form)
        target.url = target.url.copy_with(raw_path=path.encode())
        return self._client.send(target)


def write(path, rows):
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("text", "label"))
        writer.writerows(rows)
    return path


def rounds_of(run_dir):
    path = run_dir / "metrics.jsonl"
    return len(path.read_text().splitlines()) if path.exists() else 0


def refused_node(deployment, *settings):
    """A `coterie node` that must end by itself; its code and last line."""
    site = deployment.sites[3]
    own = (f"ledger={site.ledger}", "data=csv", f"data.path={site.records}", "patience_s=20")
    done = subprocess.run(
        [*COTERIE, "node", *own, "data.labels=[sport,money]", "node=open", *settings],
        env=deployment.environment,
        cwd=deployment.folder,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    return done.returncode, done.stderr.strip().splitlines()[-1]


def secrets_of(deployment):
    """Every line of every private key, with the kit that it belongs to."""
    for kit in (deployment.office / "kits").iterdir():
        for key in kit.glob("*.key"):
            for line in key.read_text().splitlines():
                if len(line) >= 40 and "PRIVATE" not in line:
                    yield kit.name, line


def processes(deployment):
    """What anybody on this machine sees of the processes that were started, and their children."""
    started = [deployment.superlink, deployment.door, *deployment.nodes.values()]
    for each in started:
        sessions = {each.process.pid}
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                if int((folder / "stat").read_text().rsplit(")", 1)[1].split()[3]) in sessions:
                    yield (folder / "cmdline").read_text() + (folder / "environ").read_text()
            except OSError:
                continue


def called_once(deployment, kit=None):
    with Caller(deployment, kit) as caller:
        return caller.post("/v1/fleet/pull-messages")


def flood(deployment, kit):
    """So many requests of one site, as fast as they go; how often each status came."""

    def some(count):
        with Caller(deployment, kit) as caller:
            return [caller.post("/v1/fleet/pull-messages").status_code for _ in range(count)]

    with ThreadPoolExecutor(LINES) as pool:
        parts = pool.map(some, [FLOOD // LINES] * LINES)
        statuses = [each for part in parts for each in part]
    return {each: statuses.count(each) for each in {*statuses}}


@pytest.fixture(scope="module")
def story(tiny_csv, tiny_overrides, tmp_path_factory):
    """All of it, once; what was seen on the way."""
    seen, started = {"times": {}}, time.monotonic()

    def mark(name):
        seen["times"][name] = time.monotonic() - started

    with tiny_csv.open(newline="") as file:
        rows = [*csv.reader(file)][1:]
    folder = tmp_path_factory.mktemp("kits")
    public = write(folder / "public.csv", rows[:PUBLIC])
    with Provisioned(folder, NAMES, cap=100.0, delta=1e-3) as deployment:
        deployment.start_superlink()
        deployment.keys = deployment.enrol_all(cap=100.0, delta=1e-3, dataset="tiny")
        for place, site in enumerate(deployment.sites):
            write(site.records, rows[PUBLIC:][place % 3 :: 3])
        for site in deployment.sites[:3]:
            deployment.start_node(site, "data.labels=[sport,money]", "node=open")
        deployment.wait_for_nodes()
        mark("nodes are there")
        theirs = [
            o for o in tiny_overrides if not o.startswith(("data.path", "federation", "engine"))
        ]
        run_dir = folder / "run"
        command = [
            *(*COTERIE, "submit", f"superlink.address={deployment.address}"),
            *(f"superlink.ca={deployment.coordinator_kit / 'ca.crt'}", f"run_dir={run_dir}"),
            *(*theirs, f"data.test_path={public}", "data.declared_records=90"),
            *("federation.sites=3", f"federation.rounds={ROUNDS}", "federation.local_steps=1"),
            *("federation.round_timeout_s=120", "privacy.spare_rounds=2"),
        ]
        run = Running(tuple(map(str, command)), folder / "submit.log", deployment.environment)
        for _ in until(120, "no round ends"):
            run.check_alive()
            if rounds_of(run_dir) >= 1:
                break
        mark("first round")
        before = rounds_of(run_dir)
        attack(deployment, seen)
        mark("all refused")
        seen["rounds"] = before, rounds_of(run_dir)
        seen["processes"] = [*processes(deployment)]
        seen["code"] = run.process.wait(180)
        mark("run over")
        seen["logs"] = "".join(path.read_text() for path in folder.rglob("*.log"))
        seen["secrets"] = [*secrets_of(deployment)]
        seen["verdicts"] = deployment.verify_books(run_dir, deployment.ledger_keys())
    seen["report"], _ = read_report(run_dir)
    seen["seconds"] = time.monotonic() - started
    return seen


def attack(deployment, seen):
    """What must be refused, while a run goes on."""
    kit = deployment.kit("site-4")
    with Caller(deployment, kit) as member:
        # A site's network position: it reaches the door, with a good certificate.
        seen["control"] = {path: member.post(path).status_code for path in (*CONTROL, *AROUND)}
        seen["fleet"] = member.post("/v1/fleet/pull-messages").status_code
        seen["oversized"] = member.post("/v1/fleet/push-object", bytes(TOO_LARGE)).status_code
        link = Link(Address(deployment.door_address, deployment.authority.certificate))
        with pytest.raises(FederationError) as submitted:
            link.start({"config": "", "config-hash": ""})
        seen["submitted"] = str(submitted.value)
        with pytest.raises(httpx.ConnectError) as beside:
            httpx.get(f"https://127.0.0.2:{deployment.port}/health", timeout=5.0)
        seen["beside"] = str(beside.value)
        seen["stranger"] = called_once(deployment)
        with Caller(deployment, kit, key_of=deployment.kit("site-1") / "node.key") as borrower:
            seen["borrower"] = borrower.post("/v1/fleet/pull-messages")
        seen["strangers"] = [called_once(deployment).status_code for _ in range(25)]
        seen["flood"] = flood(deployment, kit)
        member.post("/v1/fleet/pull-messages")  # a line that is open, and believed
        deployment.coterie("provision", "revoke", str(deployment.office), "site-4")
        deployment.hand_out()
        seen["admitted"] = deployment.admit()
        for _ in until(20, "the door takes the revoked certificate"):
            seen["revoked"] = called_once(deployment, kit)
            if seen["revoked"].status_code != SIGNATURE_ASKED:
                break
        for _ in until(5, "the line that was open ends"):
            seen["revoked_line"] = member.post("/v1/fleet/pull-messages").status_code
            if seen["revoked_line"] != SIGNATURE_ASKED:
                break
    bare = ("certificate=''", "certificate_key=''", f"inbox={deployment.folder / 'inbox'}")
    with ThreadPoolExecutor() as pool:
        revoked = pool.submit(refused_node, deployment, f"kit={kit}")
        seen["no_certificate"] = refused_node(deployment, f"kit={kit}", *bare)
        seen["revoked_node"] = revoked.result()


def test_from_a_file_to_a_finished_run_through_the_kits_alone(story):
    assert story["code"] == 0
    assert story["report"]["rounds"] == ROUNDS
    assert story["report"]["engine"] == "superlink"
    assert story["report"]["privacy"]["private"] is True
    for verdict in story["verdicts"].values():
        assert verdict["key_pinned"]
        assert verdict["head_pinned"]
    print({name: f"{seconds:.0f} s" for name, seconds in story["times"].items()})
    assert story["seconds"] < 240


def test_the_run_is_not_disturbed_by_what_is_refused(story):
    """It went on meanwhile, and no site lost an attempt."""
    before, after = story["rounds"]
    assert before < after
    sites = story["report"]["sites"]
    assert [site["name"] for site in sites] == [*NAMES[:3]]
    for site in sites:
        assert (site["rounds"], site["repeated"]) == (ROUNDS, 0)
        assert site["not_answered"] == {}


def test_a_run_is_not_submitted_from_where_sites_are(story):
    assert {*story["control"].values()} == {404}
    assert "could not start a run" in story["submitted"]
    assert "refused" in story["beside"].lower()
    # The door was open for what a node calls: there the SuperLink asked for a node's signature.
    assert story["fleet"] == SIGNATURE_ASKED


def test_nobody_comes_in_without_a_certificate(story):
    assert story["stranger"].status_code == 400
    assert story["stranger"].headers["coterie-door"] == "certificate NONE"
    assert {*story["strangers"]} <= {400, 429}
    code, said = story["no_certificate"]
    assert code == 2
    assert "its door does not let this node in (certificate NONE)" in said


def test_a_certificate_with_the_node_key_of_another_site_gets_no_further(story):
    assert story["borrower"].status_code == 400
    assert "node key of no site, or of another" in story["borrower"].headers["coterie-door"]


def test_a_revoked_site_is_out_at_once_at_the_door_and_in_flower(story):
    assert story["admitted"]["removed"] == ["site-4"]
    assert story["admitted"]["door_told"] is True
    assert story["revoked"].status_code == 400
    assert "revoked" in story["revoked"].headers["coterie-door"]
    assert story["revoked_line"] == 400
    code, said = story["revoked_node"]
    assert code == 2
    assert "certificate FAILED:certificate revoked" in said


def test_what_is_too_large_or_too_much_is_refused(story):
    assert story["oversized"] == 413
    assert story["flood"].get(429, 0) > 100, story["flood"]
    assert {*story["flood"]} <= {SIGNATURE_ASKED, 429}


def test_no_secret_is_in_a_log_or_a_process_list(story):
    assert len(story["secrets"]) > 30
    assert len(story["processes"]) >= 6
    for _, secret in story["secrets"]:
        assert secret not in story["logs"]
        assert not any(secret in each for each in story["processes"])


def test_a_stock_supernode_comes_through_the_door_by_the_proxy_of_its_kit(tmp_path):
    """It can show no certificate itself: without the proxy the door does not let it in."""
    with Provisioned(tmp_path, ["site-1"], stock=True) as deployment:
        deployment.start_superlink()
        kit, prefix = deployment.kit("site-1"), tmp_path / "proxy"
        command = (find_nginx(), *("-e", "stderr", "-p", f"{prefix}/", "-c", f"{kit}/nginx.conf"))
        proxy = deployment.start_nginx(command, prefix, tmp_path / "proxy.log")
        node = Running(
            (
                str(deployment.bin / "flower-supernode"),
                *("--superlink", f"127.0.0.1:{PATHS['proxy_port']}"),
                *("--root-certificates", str(kit / "ca.crt")),
                *("--auth-supernode-private-key", str(kit / "node.key")),
                *("--port", str(free_port())),
            ),
            tmp_path / "supernode.log",
            {**deployment.environment, "FLWR_HOME": str(tmp_path / "flower")},
        )
        try:
            for _ in until(60, "the stock node is not online"):
                node.check_alive()
                if [*deployment.link.nodes().values()] == ["online"]:
                    break
            refused = called_once(deployment)
        finally:
            node.stop()
            proxy.stop()
    assert refused.headers["coterie-door"] == "certificate NONE"

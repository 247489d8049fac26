"""`coterie node` against Flower's stock SuperLink: real processes, real TLS, real faults."""

import csv
import os
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import threading
from contextlib import closing, contextmanager, suppress
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from importlib import metadata
from pathlib import Path

import flwr.supernode.node_auth_http_interceptor as signing
import numpy as np
import pytest

import client.fleet
from client.fleet import Fleet, NotAdmittedError
from client.ledger import Store, Terms
from common.certificates import make_authority, make_node_key, read_node_key
from common.config import Config, from_yaml, to_canonical
from common.data import load_splits
from common.privacy.verification import verify
from server.checkpoint import read_checkpoint
from server.report import read_report
from simulations.partition import deal

from .superlink import NodeProcess, SuperLink, free_port, wait_until, write_bundle

pytestmark = pytest.mark.slow  # processes that import everything

COORDINATOR = """
from dataclasses import replace
from pathlib import Path

from flwr.app import Context, RecordDict
from flwr.serverapp import ServerApp

from common.config import from_canonical
from common.data import load_splits
from server.app import CONFIG_KEY, Watch, server_app

app = ServerApp()


@app.main()
def main(grid, context):
    text = Path(context.run_config["settings"]).read_text()
    public = load_splits(from_canonical(text).data).holdout
    watch = Watch(lambda *_: None, lambda line: print("round", line.round), lambda _: None)
    own = Context(context.run_id, context.node_id, {}, RecordDict(), {CONFIG_KEY: text})
    server_app(lambda _: public, watch)(grid, own)
"""
"""Our ServerApp, from this checkout."""
HOSTILE = """
from time import sleep

from flwr.app import ConfigRecord, Message, RecordDict
from flwr.serverapp import ServerApp

app = ServerApp()


@app.main()
def main(grid, context):
    while not (nodes := list(grid.get_node_ids())):
        sleep(0.2)
    content = RecordDict({"facts": ConfigRecord({"config": "whatever"})})
    for kind in ("train", "train.other", "query", "evaluate"):
        (asked,) = grid.push_messages([Message(content, nodes[0], kind, ttl=60.0)])
        while not (replies := list(grid.pull_messages([asked]))):
            sleep(0.2)
        print("ANSWER", kind, replies[0].error.code, flush=True)
"""
"""A coordinator that asks for what no site answers."""
WRITES = """
from pathlib import Path

from flwr.clientapp import ClientApp

Path(__file__).with_name("written").touch()
Path("{0}").touch()
app = ClientApp()
"""
"""What the same coordinator would have a stock node run."""
DYING = """
import errno
from pathlib import Path
import client.fleet, client.inbox, client.ledger, client.train

PHASES = ("handed", "received", "training", "prepared", "released", "pushing", "sent")

def dies(phase, owner, name, *, after):
    whole = getattr(owner, name)
    def method(*args, **named):
        turn = len([*Path().glob("died-*")])
        now = PHASES[turn:turn + 1] == (phase,)
        result = whole(*args, **named) if after or not now else None
        if now and (result is not None or phase != "handed"):  # not at a look that finds nothing
            Path(f"died-{turn}-{phase}").touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return result
    setattr(owner, name, method)

put = client.inbox.Inbox.put

def full(*args):
    if not Path("was-full").exists():
        Path("was-full").touch()
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    put(*args)

client.inbox.Inbox.put = full
dies("handed", client.fleet.Fleet, "receive", after=True)
dies("received", client.inbox.Inbox, "put", after=True)
dies("training", client.train.Trainer, "train", after=True)
dies("prepared", client.ledger.Ledger, "prepare", after=True)
dies("released", client.ledger.Ledger, "release", after=True)
dies("pushing", client.fleet.Fleet, "_keeps", after=True)
dies("sent", client.inbox.Inbox, "clear", after=False)
"""
"""No room on the disk at first; then kills the node in each phase of an answer, one by one."""
SLOW = """
import time
import client.train

train = client.train.Trainer.train

def slow(*args, **named):
    result = train(*args, **named)
    print("TRAINING", flush=True)
    time.sleep(3)
    return result

client.train.Trainer.train = slow
"""


@pytest.fixture
def lab(tmp_path):
    """A SuperLink of the test's own."""
    with SuperLink(tmp_path / "lab") as superlink:
        yield superlink


@pytest.fixture
def configured(compose_config, tiny_overrides):
    """A resolved config of a private run, with the settings given."""

    def config(*more: str, sites: int) -> Config:
        own = [each for each in tiny_overrides if not each.startswith("federation.")]
        sized = [f"federation.sites={sites}", "federation.local_steps=2"]
        return compose_config(*own, *sized, *more)

    return config


def write_records(path, records, labels):
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["text", "label"])
        writer.writerows(
            (text, labels[label])
            for text, label in zip(records.contents, records.labels, strict=True)
        )
    return path


def dealt(folder, config):
    """The training records of each site of a simulation, as files in the same order."""
    shares = deal(load_splits(config.data).train, config.federation, seed=config.seed)
    return [
        write_records(folder / f"records-{number}.csv", share, config.data.labels)
        for number, share in enumerate(shares, 1)
    ]


def submitted(lab, config, name="run"):
    """Starts a run of this config; its number, and the folder it writes."""
    run_dir = lab.folder / name
    settings = lab.folder / f"{name}.json"
    settings.write_text(to_canonical(replace(config, run_dir=str(run_dir))))
    bundle = write_bundle(lab.folder / f"bundle-{name}", COORDINATOR)
    return lab.submit(bundle, str(settings)), run_dir


def finished(lab, run, seconds=90.0):
    """Waits for the end of a run, and asserts that it was a good one."""

    def is_over():
        return lab.status(run).startswith("finished")

    wait_until(is_over, "the run ends", seconds, step_s=1.0)  # asking is a process, of a second
    assert lab.status(run) == "finished:completed", lab.said[-4000:]


def books_of(node):
    """The ledger of a node, judged from its export as a stranger would."""
    with Store(node.ledger) as store:
        ledger = store.ledger(node.name)
        verify(ledger.export().encode())
        return ledger.books


def test_three_nodes_train_privately_and_one_is_killed_and_comes_back(lab, tmp_path, configured):
    """The whole of it: TLS, authentication, entropy, epsilon 3, and kill -9 in the middle."""
    config = configured(
        *("privacy.epsilon=3", "federation.rounds=3", "privacy.spare_rounds=1"),
        *("data.declared_records=84", "privacy.delta=1e-3"),
        sites=3,
    )
    files = dealt(tmp_path, config)
    names = [f"site-{number}" for number in (1, 2, 3)]
    nodes = [NodeProcess(lab, name, file) for name, file in zip(names, files, strict=True)]
    with nodes[0], nodes[1], nodes[2]:
        for node in nodes:
            node.wait_for("waiting for instructions")
        run, run_dir = submitted(lab, config)
        nodes[1].wait_for("round 1: answered")
        nodes[1].kill()
        nodes[1].start()
        finished(lab, run)
        for node in nodes:
            node.wait_for("round 3: answered")
            node.signal(signal.SIGTERM)
            assert node.wait() == 0
    report, _ = read_report(run_dir)
    assert report["privacy"]["private"] is True
    assert report["privacy"]["epsilon"]["pld"] <= 3.0
    charged = {site["name"]: site["rounds"] + site["repeated"] for site in report["sites"]}
    for node in nodes:
        books = books_of(node)
        assert books.spent() <= 3.0
        states = [each.state for each in books.reservations.values()]
        assert states.count("released") == 3
        assert len(states) <= charged[node.name]  # what the coordinator reports is no less
        assert "private" not in node.said.lower()


def test_a_node_that_dies_in_every_phase_of_an_answer_ends_where_an_unbroken_run_does(
    lab, tmp_path, configured, coterie, tiny_overrides
):
    """Seeded noise, so that the parameters tell: nothing is lost, and nothing is done twice."""
    own = [each for each in tiny_overrides if not each.startswith("federation.")]
    more = ["federation.sites=1", "federation.rounds=2", "federation.local_steps=2"]
    more += ["privacy.noise=seeded", "privacy.spare_rounds=3"]
    unbroken = tmp_path / "unbroken"
    assert coterie("simulate", *own, *more, f"run_dir={unbroken}").code == 0
    config = from_yaml((unbroken / "config.yaml").read_text())
    (file,) = dealt(tmp_path, config)
    node = NodeProcess(lab, "site-1", file, "allow_unprotected=true", before=DYING)
    with node:
        node.wait_for("waiting for instructions")
        run, run_dir = submitted(lab, config)
        finished(lab, run)
    died = sorted(path.name for path in node.log.parent.glob("died-*"))
    assert len(died) == 7, died
    vectors = [read_checkpoint(folder / "checkpoints", 2).vector for folder in (unbroken, run_dir)]
    assert np.array_equal(*vectors)
    assert not np.array_equal(vectors[0], read_checkpoint(run_dir / "checkpoints", 0).vector)
    books = books_of(node)
    states = [each.state for each in books.reservations.values()]
    assert sorted(states) == ["lost", "released", "released"]
    report, _ = read_report(run_dir)
    told = report["sites"][0]
    assert (told["rounds"], told["repeated"]) == (2, 3)  # what was asked again counts as charged
    assert "cannot be kept" in node.said
    assert "NOT PRIVATE" in node.said


def test_a_node_stopped_twice_loses_its_answer_and_stopped_once_ends_it(lab, tmp_path, configured):
    config = configured(
        *("federation.rounds=2", "privacy.spare_rounds=1", "data.declared_records=84"),
        sites=1,
    )
    (file,) = dealt(tmp_path, config)
    with NodeProcess(lab, "site-1", file, before=SLOW) as node:
        again = node.log.with_name("again")
        node.wait_for("waiting for instructions")
        run, _ = submitted(lab, config)
        node.wait_for("TRAINING")
        again.touch()
        stop(node)
        node.wait_for("again to stop at once")
        stop(node)
        wait_until(lambda: again.read_text() == "130", "the node stops at once")
        node.wait_for("TRAINING", times=2)
        assert next(iter(books_of(node).reservations.values())).state == "lost"
        node.wait_for("TRAINING", times=3)  # the second round
        stop(node)
        assert node.wait() == 0
        assert "round 2: answered" in node.said
        finished(lab, run)
    states = [each.state for each in books_of(node).reservations.values()]
    assert states == ["lost", "released", "released"]


def stop(node):
    """SIGTERM to the node itself, under what starts it again."""
    at = node.process.pid
    (child,) = Path(f"/proc/{at}/task/{at}/children").read_text().split()
    os.kill(int(child), signal.SIGTERM)


def test_nothing_of_a_bundle_runs_at_a_node_and_no_message_of_it_stops_one(lab, tiny_csv):
    """The bundle's module for sites writes a file when it is imported; nobody imports it."""
    written = lab.folder / "written"
    bundle = write_bundle(lab.folder / "bundle", HOSTILE, WRITES.format(written))
    with NodeProcess(lab, "site-1", tiny_csv) as node:
        node.wait_for("waiting for instructions")
        run = lab.submit(bundle, "none")
        finished(lab, run)
        assert node.process.poll() is None
        assert node.said.count("refused: invalid instruction") == 4
        assert books_of(node).reservations == {}
    said = subprocess.run(
        ["flwr", "log", str(run), "lab", "--show"],
        env=lab.environment,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    for kind in ("train", "train.other", "query", "evaluate"):
        assert f"ANSWER {kind} 601" in said
    assert not written.exists()
    assert not [*lab.folder.rglob("written")]
    done = subprocess.run([sys.executable, "-c", "import trial.site"], cwd=bundle, check=True)
    assert done.returncode == 0
    assert written.exists()  # so it would have shown


def test_a_node_waits_for_a_superlink_that_was_killed_and_goes_on(lab, tiny_csv):
    """Its key and its number are the same afterwards; nothing is registered again."""
    with NodeProcess(lab, "site-1", tiny_csv) as node:
        node.wait_for("waiting for instructions")
        lab.kill()
        node.wait_for("cannot be reached")
        lab.start()
        node.wait_for("the coordinator answers again")
        wait_until(lambda: nodes_of(lab) == {str(node.node_id): "online"}, "the node is back")
        node.signal(signal.SIGTERM)
        assert node.wait() == 0
        assert nodes_of(lab) == {str(node.node_id): "offline"}


def nodes_of(lab):
    listed = lab.flwr("supernode", "list", "lab")["nodes"]
    return {str(node["node-id"]): node["status"] for node in listed}


@pytest.fixture(scope="module")
def refusing(tmp_path_factory):
    """One SuperLink for all that is refused, where one key is registered."""
    with SuperLink(tmp_path_factory.mktemp("refusing")) as superlink:
        superlink.register(make_node_key(superlink.folder / "node.key"), "site-1")
        yield superlink


@pytest.fixture
def words(refusing, tiny_csv, tmp_path):
    """The command line of a node that would be let in, by setting."""
    with Store.create(tmp_path / "books.db") as store:
        store.open("site-1", Terms("trial", 8.0, 1e-3, "1" * 64))
    shutil.copy(refusing.folder / "node.key", tmp_path / "node.key")
    return {
        "name": "site-1",
        "superlink": refusing.address,
        "authority": str(refusing.authority.certificate),
        "key": str(tmp_path / "node.key"),
        "ledger": str(tmp_path / "books.db"),
        "data.path": str(tiny_csv),
        "data.labels": "[sport,money]",
        "patience_s": "1",
        "threads": "1",
    }


@contextmanager
def serving(credentials=None, answer=b""):
    """A server on loopback: of TLS with these credentials, or of plain text."""
    context = None
    if credentials is not None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(credentials.certificate, credentials.key)
    listening = socket.create_server(("127.0.0.1", 0))

    def serve():
        while True:
            try:
                line, _ = listening.accept()
            except OSError:
                return
            with suppress(OSError), closing(line):
                line.settimeout(2)
                wrapped = line if context is None else context.wrap_socket(line, server_side=True)
                wrapped.recv(1000)
                wrapped.sendall(answer)

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    try:
        yield f"127.0.0.1:{listening.getsockname()[1]}"
    finally:
        listening.shutdown(socket.SHUT_RDWR)
        listening.close()
        thread.join()


def refused(coterie, words, code, *lines):
    """One line, this code, and nothing in the books."""
    answer = coterie("node", *(f"{name}={value}" for name, value in words.items()))
    assert (answer.code, answer.out) == (code, ""), answer.err
    last = answer.err.splitlines()[-1]
    assert last.startswith("coterie node: ")
    for line in lines:
        assert line in last
    assert "Traceback" not in answer.err
    with Store(Path(words["ledger"])) as store:
        assert store.ledger("site-1").head.seq == 1  # its GENESIS alone
    return answer.err


def test_a_key_that_is_not_registered_is_refused(refusing, coterie, words, tmp_path):
    make_node_key(tmp_path / "stranger.key")
    refused(
        coterie,
        {**words, "key": str(tmp_path / "stranger.key")},
        2,
        "have the coordinator register",
    )


def test_the_same_key_is_let_in_once_it_is_registered(refusing, words):
    """What the others are refused for is what they changed."""
    fleet = Fleet(refusing.address, Path(words["authority"]), read_node_key(Path(words["key"])))
    fleet.join()
    assert fleet.node_id in map(int, nodes_of(refusing))
    fleet.leave()


def test_another_authority_is_refused(coterie, words, tmp_path):
    other = make_authority(tmp_path / "other")
    refused(coterie, {**words, "authority": str(other.certificate)}, 2, "is not believed")


def test_an_expired_certificate_is_refused(refusing, coterie, words, tmp_path):
    past = datetime.now(UTC) - timedelta(days=30)
    old = refusing.authority.issue(tmp_path.name, ["127.0.0.1"], days=7, now=past)
    with serving(old) as address:
        refused(coterie, {**words, "superlink": address}, 2, "certificate has expired")


def test_a_coordinator_without_tls_is_refused(coterie, words):
    with serving(answer=b"HTTP/1.1 400 Bad Request\r\n\r\n") as address:
        refused(coterie, {**words, "superlink": address}, 2, "does not speak TLS")


def test_nobody_there_is_code_4_after_the_patience_that_was_asked_for(coterie, words):
    address = f"127.0.0.1:{free_port()}"
    refused(coterie, {**words, "superlink": address}, 4, "cannot be reached", "gave up after 1 s")


def test_another_minor_of_flwr_is_refused_at_either_end(
    refusing, coterie, words, monkeypatch, tmp_path
):
    key = read_node_key(tmp_path / "node.key")
    fleet = Fleet(refusing.address, refusing.authority.certificate, key, "1.39.0")
    with pytest.raises(NotAdmittedError, match=r"runs flwr .* and this node 1\.39\.0"):
        fleet.join()
    fleet.leave()
    real = metadata.version
    monkeypatch.setattr(
        metadata, "version", lambda name: "1.44.0" if name == "flwr" else real(name)
    )
    refused(coterie, words, 2, "flwr 1.44.0: needs 1.41 or 1.42")


def test_a_key_that_others_may_read_is_refused(coterie, words, tmp_path):
    (tmp_path / "node.key").chmod(0o640)
    refused(coterie, words, 2, "others may read this key; run chmod 600")


def test_a_second_node_of_the_same_site_is_refused_while_the_first_one_is_there(
    lab, tiny_csv, coterie, words
):
    with NodeProcess(lab, "site-1", tiny_csv) as node:
        node.wait_for("waiting for instructions")
        own = dict(word.split("=", 1) for word in node._command[4:])
        answer = coterie("node", *(f"{name}={value}" for name, value in own.items()))
        assert answer.code == 2
        assert "another node has it" in answer.err
        elsewhere = {**own, "inbox": str(lab.folder / "elsewhere"), "patience_s": "1"}
        shutil.copy(node.key, lab.folder / "copied.key")
        answer = coterie("node", *(f"{name}={value}" for name, value in elsewhere.items()))
        assert answer.code == 2
        assert "no more than once" in answer.err


def test_a_clock_that_is_far_off_is_named(refusing, words, tmp_path, monkeypatch):
    """Flower's own answer is a bare 401; the SuperLink's date says what is wrong."""
    ahead = timedelta(minutes=10)
    real_now, real_time = signing.now, client.fleet.time
    monkeypatch.setattr(signing, "now", lambda: real_now() + ahead)
    monkeypatch.setattr(client.fleet, "time", lambda: real_time() + ahead.total_seconds())
    key = read_node_key(tmp_path / "node.key")
    fleet = Fleet(refusing.address, refusing.authority.certificate, key)
    try:  # to a second of the date, and those that the way takes
        with pytest.raises(
            NotAdmittedError, match=r"this machine's clock is (599|60\d) s ahead of"
        ):
            fleet.join()
    finally:
        fleet.leave()

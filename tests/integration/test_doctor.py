"""A set-up that is good, broken in one way each: the doctor names the fault, its remedy, its code.

What needs somebody at another machine is broken against a real SuperLink, in the slow half; the
rest is looked at with `--offline`. Nothing that the doctor says is of a record.
"""

import csv
import os
import shutil
import sqlite3
import ssl
import threading
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib import metadata
from pathlib import Path

import pytest

from client.ledger import Store, Terms
from common import peer, premises
from common.certificates import Authority, make_authority, make_node_key
from common.doctor import HELP
from common.keys import generate_key
from common.privacy import chain
from common.privacy.accounting import Event
from common.privacy.chain import Kind
from server.heads import HeadBook
from tests.integration.superlink import SuperLink, free_port

PRIVATE = "zebra"
"""Stands in the records, and nowhere else."""


TRIAL = {
    "event": chain.event_body(Event(3.0, 1.0, 1)),
    "purpose": "a trial",
    "unit": "record",
    "admission": "plan",
}


@dataclass
class SetUp:
    """A node's files and settings, all of them good, and the run that is to come."""

    folder: Path
    patch: pytest.MonkeyPatch
    settings: dict[str, str]
    run: dict[str, str] | None = None
    flags: list[str] = field(default_factory=list)

    def file(self, name: str) -> Path:
        return self.folder / name

    def words(self, side="node"):
        told = [f"{name}={value}" for name, value in self.settings.items()]
        run = ["--", *(f"{n}={v}" for n, v in self.run.items())] if self.run is not None else []
        return ["doctor", side, *self.flags, *told, *run]

    def ledger(self):
        return Store(self.file("books.db"))


def private_records(tiny_csv, path):
    """The suite's, with a word in each that no output may hold."""
    with tiny_csv.open(newline="") as source, path.open("w", newline="") as file:
        rows = csv.reader(source)
        writer = csv.writer(file)
        writer.writerow(next(rows))
        writer.writerows((f"{PRIVATE} {text}", label) for text, label in rows)


@pytest.fixture
def good(tmp_path, tiny_csv, tiny_model, monkeypatch):
    """A node's set-up in which nothing is wrong."""
    own = make_authority(tmp_path).issue("client", ["ward-1"])
    make_node_key(tmp_path / "node.key")
    private_records(tiny_csv, tmp_path / "records.csv")
    with Store.create(tmp_path / "books.db") as store:
        store.open("ward-1", Terms("notes", 20.0, 1e-3, "1" * 64))
    shutil.copytree(tiny_model, tmp_path / "model")
    settings = {
        "name": "ward-1",
        "superlink": "127.0.0.1:1",
        "authority": f"{tmp_path / 'ca.crt'}",
        "key": f"{tmp_path / 'node.key'}",
        "certificate": f"{own.certificate}",
        "certificate_key": f"{own.key}",
        "ledger": f"{tmp_path / 'books.db'}",
        "data.path": f"{tmp_path / 'records.csv'}",
        "data.labels": "[sport,money]",
        "node.max_epsilon": "9",
        "node.models": f"[{tmp_path / 'model'}]",
    }
    run = {
        "data": "csv",
        "data.test_path": "public.csv",
        "data.labels": "[sport,money]",
        "data.declared_records": "90",
        "federation.sites": "3",
        "federation.rounds": "2",
        "privacy.epsilon": "3",
        "privacy.noise_multiplier": "4",  # nothing to solve
        "privacy.delta": "1e-3",
        "model.name": f"{tmp_path / 'model'}",
    }
    return SetUp(tmp_path, monkeypatch, settings, run, ["--offline"])


def spent(good, events=1):
    """A ledger that charged something."""
    with good.ledger() as store:
        ledger = store.ledger("ward-1")
        for _ in range(events):
            ledger.append(Kind.MISC_EVENT, TRIAL)
        return str(ledger.head)


def edit_entry(good):
    spent(good)
    with sqlite3.connect(good.file("books.db")) as file:
        file.execute("DROP TRIGGER entry_is_not_edited")
        file.execute("UPDATE entry SET line = replace(line, '\"steps\":1', '\"steps\":0')")
    file.close()


def older_ledger(good):
    names = ("books.db", "books.db-wal")
    kept = {name: good.file(name).read_bytes() for name in names if good.file(name).exists()}
    good.flags += ["--head", spent(good)]
    for path in good.folder.glob("books.db-*"):
        path.unlink()
    for name, content in kept.items():
        good.file(name).write_bytes(content)


def other_key(good):
    good.file("books.db.key").unlink()
    generate_key(good.file("books.db.key"))


def small_cap(good):
    with Store.create(good.file("small.db")) as store:
        store.open("ward-1", Terms("notes", 0.5, 1e-3, "1" * 64))
    good.settings["ledger"] = f"{good.file('small.db')}"


def spend_all(good):
    good.run = None
    with Store.create(good.file("small.db")) as store:
        ledger = store.open("ward-1", Terms("notes", 20.0, 1e-3, "1" * 64))
        ledger.append(Kind.MISC_EVENT, TRIAL)
    good.settings["ledger"] = f"{good.file('small.db')}"
    good.patch.setattr("common.privacy.books.Books.spent", lambda books: books.cap)


def no_model_weights(good):
    for path in good.file("model").glob("*.safetensors"):
        path.rename(path.with_name("pytorch_model.bin"))


def full_disk(good):
    usage = shutil.disk_usage(good.folder)._replace(free=1 << 20)
    good.patch.setattr(premises.shutil, "disk_usage", lambda _: usage)


def expired_authority(good):
    for name in ("ca.crt", "ca.key"):
        good.file(name).unlink()
    make_authority(good.folder, days=10, now=datetime.now(UTC) - timedelta(days=20))


def other_certificate(good):
    authority = Authority(good.file("ca.crt"), good.file("ca.key"))
    good.settings["certificate"] = f"{authority.issue('other', ['ward-1']).certificate}"


def ended_certificate(good):
    authority = Authority(good.file("ca.crt"), good.file("ca.key"))
    for name in ("client.crt", "client.key"):
        good.file(name).unlink()
    authority.issue("client", ["ward-1"], days=1, now=datetime.now(UTC) - timedelta(days=9))


def leaf_for_authority(good):
    made = make_authority(good.folder / "other").issue("superlink", ["localhost"])
    good.settings["authority"] = f"{made.certificate}"


def bad_row(good):
    with good.file("records.csv").open("a") as file:
        file.write(f"{PRIVATE} and {PRIVATE},nonsense-{PRIVATE}\n")


def put(name, value):
    return lambda good: good.settings.__setitem__(name, value)


def run_with(name, value):
    return lambda good: good.run.__setitem__(name, value)


def chmod(name):
    return lambda good: good.file(name).chmod(0o644)


def unlink(name):
    return lambda good: good.file(name).unlink()


Fault = tuple[Callable[[SetUp], object], str, str, str, int]
"""What breaks a set-up; the check that finds it; words of what is found and of the remedy; code."""

FAULTS: dict[str, Fault] = {
    "flwr of another minor": (
        lambda good: good.patch.setattr(premises.metadata, "version", lambda _: "1.39.0"),
        *("versions", "flwr 1.39.0", "pip install 'flwr<1.43'", 2),
    ),
    "no authority": (unlink("ca.crt"), "authority", "no such file", "must hold the certif", 2),
    "an authority that is a server": (
        leaf_for_authority,
        *("authority", "of a server", "get the authority's (ca.crt)", 2),
    ),
    "an expired authority": (expired_authority, "authority", "has expired", "get a new one", 2),
    "a client key for all": (
        chmod("client.key"),
        *("own certificate", "others may read", "run chmod 600", 2),
    ),
    "a client certificate of another key": (
        other_certificate,
        *("own certificate", "is not that of", "put both back from the kit", 2),
    ),
    "a client certificate that has ended": (
        ended_certificate,
        *("own certificate", "has expired", "have the kit renewed", 2),
    ),
    "a node key for all": (chmod("node.key"), "node key", "others may read", "run chmod 600", 2),
    "no node key": (unlink("node.key"), "node key", "no such key", "ssh-keygen -t ecdsa", 2),
    "a node key of another kind": (
        lambda good: good.file("node.key").write_text("no key\n"),
        *("node key", "holds no private key", "ssh-keygen -t ecdsa", 2),
    ),
    "a full disk": (full_disk, "disk", "0.0 GB are free", "make room", 2),
    "no GPU": (
        lambda good: good.flags.append("--gpu"),
        *("GPU", "no GPU that torch", "or leave out --gpu", 2),
    ),
    "pickled weights": (no_model_weights, "model", "no weights", "expected *.safetensors", 2),
    "no model": (
        lambda good: shutil.rmtree(good.file("model")),
        *("model", "no folder with a config.json", "save a model there", 2),
    ),
    "no records": (unlink("records.csv"), "records", "records.csv", "correct data.*", 2),
    "a row with another label": (bad_row, "records", "row 121", "correct data.*", 2),
    "a column that is not there": (
        put("data.text_column", "body"),
        *("records", "body: no such column", "its first line must name them", 2),
    ),
    "no ledger": (put("ledger", "gone.db"), "ledger", "no such file", "coterie ledger init", 2),
    "a ledger of another site": (
        put("name", "ward-2"),
        *("ledger", "no such site", "give ledger=FILE#SITE", 2),
    ),
    "a ledger key for all": (chmod("books.db.key"), "ledger key", "others may", "chmod 600", 2),
    "another key beside the ledger": (
        other_key,
        *("ledger", "signed by another key", "put the key back", 5),
    ),
    "an edited ledger": (edit_entry, "ledger", "entry 2", "find the latest copy", 5),
    "an older ledger": (older_ledger, "ledger", "never had the head", "do not train on this", 5),
    "a cap that is spent": (spend_all, "ledger", "is spent", "only its officer", 3),
    "a program nobody reviewed": (
        put("node.code", f"[{'0' * 64}]"),
        *("policy", "not one that was reviewed", "have it reviewed", 3),
    ),
    "a run beyond the policy": (
        put("node.max_epsilon", "0.5"),
        *("coming run", "is above 0.5", "ask the coordinator", 3),
    ),
    "a run beyond the cap": (
        small_cap,
        *("coming run", "exceed the cap", "the officer for a higher cap", 3),
    ),
    "a run that protects nothing": (
        run_with("privacy.noise", "seeded"),
        *("coming run", "protect nothing", "submitted with privacy", 3),
    ),
    "a run of another unit": (
        lambda good: good.run.update(
            {
                "privacy": "person",
                "privacy.max_records_per_person": "2",
                "data.person_column": "who",
            }
        ),
        *("coming run", "the unit of", "submitted for that unit", 3),
    ),
    "other labels": (
        run_with("data.labels", "[money,sport]"),
        *("coming run", "differ between", "agree on names and order", 2),
    ),
}


def findings(answer):
    return {each["check"]: each for each in answer["checks"]}


def check_one_fault(answer, code, check, found, remedy):
    """Exactly one fault, of these words and this code, and nothing private."""
    assert answer.code == code, answer.out + answer.err
    faulty = {
        name: each
        for name, each in findings(answer.json).items()
        if each["verdict"] not in ("well", "not checked", "doubtful")
    }
    assert set(faulty) >= {check}
    assert found in faulty[check]["found"], faulty[check]
    assert remedy in faulty[check]["remedy"], faulty[check]
    assert faulty[check]["code"] == code
    # What rests on a broken thing cannot be well either; it says so by itself.
    assert set(faulty) - {check} <= RESTS_ON.get(check, set())
    assert PRIVATE not in answer.out + answer.err
    assert check in answer.json["error"]["message"]
    assert answer.json["error"]["code"] == code


RESTS_ON = {
    "ledger": {"ledger key"},
    "policy": {"coming run"},
    "flwr there": {"registered"},
    "model": {"public records"},
}
"""What cannot be well where something else is not."""


def test_a_good_set_up_has_no_fault(good, coterie):
    answer = coterie(*good.words(), "--json")
    assert answer.code == 0, answer.out + answer.err
    verdicts = {name: each["verdict"] for name, each in findings(answer.json).items()}
    assert {name for name, verdict in verdicts.items() if verdict == "not checked"} == {
        *("port", "certificate", "flwr there", "clock", "registered")
    }
    assert len([v for v in verdicts.values() if v in ("well", "doubtful")]) == len(verdicts) - 5


@pytest.mark.parametrize("fault", FAULTS)
def test_each_fault_has_its_name_remedy_and_code(fault, good, coterie):
    broken, check, found, remedy, code = FAULTS[fault]
    broken(good)
    if check != "coming run":  # which takes a second to price
        good.run = None
    words = good.words()
    words.insert(2, "--json")
    check_one_fault(coterie(*words), code, check, found, remedy)


def test_there_are_faults_of_every_class():
    assert len(FAULTS) + len(FAULTS_THERE) + len(COORDINATORS) >= 15
    codes = {
        fault[-1] for table in (FAULTS, FAULTS_THERE, COORDINATORS) for fault in table.values()
    }
    assert codes == {2, 3, 4, 5}


def test_the_worst_of_several_faults_is_the_code(good, coterie):
    chmod("node.key")(good)
    edit_entry(good)
    good.run = None
    answer = coterie(*good.words())
    assert answer.code == 5
    assert "2 of 16 checks found a fault: node key, ledger" in answer.err
    table = " ".join(answer.out.split())
    assert "chmod 600" in table
    assert "2 FAULTY" in table
    assert PRIVATE not in answer.out + answer.err


def test_the_doctor_changes_nothing(good, coterie):
    def state():
        return {
            path: (path.stat().st_mtime_ns, path.stat().st_mode, path.read_bytes())
            for path in good.folder.rglob("*")
            if path.is_file() and not path.name.endswith(("-shm", "-wal"))
        }

    spent(good)
    before = state()
    assert coterie(*good.words()).code == 0
    assert state() == before


def test_a_doctor_without_a_patient_says_whom_it_sees(coterie):
    answer = coterie("doctor", "nobody")
    assert answer.code == 2
    assert answer.err == (
        "coterie doctor: doctor nobody: whom shall it look at? coterie doctor node or coterie "
        "doctor coordinator\n"
    )
    assert coterie("doctor", "node", "--help").out == f"{HELP}\n"
    assert "Example: coterie doctor node" in HELP


@pytest.fixture
def serve():
    """Starts servers that are no SuperLinks; the address of each."""
    with ExitStack() as stack:

        def started(credentials):
            server = ThreadingHTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler)
            if credentials is not None:
                context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
                context.load_cert_chain(credentials.certificate, credentials.key)
                server.socket = context.wrap_socket(server.socket, server_side=True)
            server.RequestHandlerClass.log_message = lambda *_: None
            server.handle_error = lambda *_: None  # whoever does not believe it hangs up
            thread = threading.Thread(target=server.serve_forever)
            thread.start()
            stack.callback(lambda: (server.shutdown(), server.server_close(), thread.join()))
            return f"127.0.0.1:{server.server_address[1]}"

        yield started


@pytest.fixture(scope="module")
def superlink(tmp_path_factory):
    with SuperLink(tmp_path_factory.mktemp("doctor")) as running:
        yield running


@pytest.fixture
def there(good, superlink, serve):
    """The same set-up, registered at a real SuperLink."""
    for name in ("ca.crt", "ca.key"):
        good.file(name).unlink()
    shutil.copy(superlink.authority.certificate, good.file("ca.crt"))
    shutil.copy(superlink.authority.key, good.file("ca.key"))
    superlink.register(good.file("node.key.pub"), f"ward-{os.urandom(3).hex()}")
    good.settings["superlink"] = superlink.address
    good.run, good.flags, good.serve = None, [], serve
    return good


def authority_of(good):
    return Authority(good.file("ca.crt"), good.file("ca.key"))


def nobody_there(good):
    name = "superlink" if "superlink" in good.settings else "superlink.address"
    good.settings[name] = f"127.0.0.1:{free_port()}"


def other_authority(good):
    made = make_authority(good.folder / "another")
    good.settings["authority"] = f"{made.certificate}"


def wrong_name(good):
    own = authority_of(good).issue("elsewhere", ["elsewhere.example"])
    good.settings["superlink"] = good.serve(own)


def expired_server(good):
    """Of this authority, whose certificate has ended."""
    past = datetime.now(UTC) - timedelta(days=40)
    own = authority_of(good).issue("late", ["127.0.0.1"], days=10, now=past)
    good.settings["superlink"] = good.serve(own)


def no_tls(good):
    good.settings["superlink"] = good.serve(None)


def unregistered(good):
    for path in good.folder.glob("node.key*"):
        path.unlink()
    make_node_key(good.file("node.key"))


def fast_clock(good):
    real = peer.time
    good.patch.setattr(peer, "time", lambda: real() + 90)


def other_flower(good):
    real = metadata.version
    good.patch.setattr(metadata, "version", lambda name: "1.42.0" if name == "flwr" else real(name))


FAULTS_THERE: dict[str, Fault] = {
    "nobody at the port": (nobody_there, "port", "refused", "start the SuperLink", 4),
    "no such machine": (
        put("superlink", "coordinator.invalid:8000"),
        *("port", "no machine of that name", "correct the name", 4),
    ),
    "a coordinator of another authority": (
        other_authority,
        *("certificate", "signed by another authority", "give the authority that signed it", 2),
    ),
    "a coordinator by another name": (
        wrong_name,
        *("certificate", "for another name", "reach it by a name that is in it", 2),
    ),
    "a coordinator's expired certificate": (
        expired_server,
        *("certificate", "has expired", "have the coordinator renew it", 2),
    ),
    "a coordinator without TLS": (
        no_tls,
        *("certificate", "does not speak TLS", "--ssl-certfile", 2),
    ),
    "a key that is not registered": (
        unregistered,
        *("registered", "lets this node's key in no more than once", "register it", 2),
    ),
    "a clock ahead": (fast_clock, "clock", "s ahead of", "by NTP", 2),
    "another flwr there": (other_flower, "flwr there", "1.42.0 here, and '1.41", "one minor", 2),
}


@pytest.mark.slow  # a SuperLink
def test_a_node_that_would_be_let_in_has_no_fault(there, coterie):
    for _ in range(2):  # the doctor leaves the node's place as it found it
        answer = coterie(*there.words(), "--json")
        assert answer.code == 0, answer.out + answer.err
        assert findings(answer.json)["registered"]["found"].startswith("yes, as node ")
        assert findings(answer.json)["clock"]["verdict"] == "well"


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS_THERE)
def test_each_fault_of_the_way_there_has_its_name_remedy_and_code(fault, there, coterie):
    broken, check, found, remedy, code = FAULTS_THERE[fault]
    broken(there)
    check_one_fault(coterie(*there.words(), "--json"), code, check, found, remedy)


@pytest.fixture
def coordinator(good, tiny_csv):
    """What a run is submitted with, all of it good."""
    good.settings = {
        "superlink.address": "127.0.0.1:1",
        "superlink.ca": f"{good.file('ca.crt')}",
        "heads": f"{good.file('heads.db')}",
        "run_dir": f"{good.file('run')}",
        "data": "csv",
        "data.test_path": f"{tiny_csv}",
        "data.labels": "[sport,money]",
        "data.declared_records": "900",
        "federation.sites": "1",
        "federation.rounds": "2",
        "privacy.delta": "1e-4",
        "privacy.noise_multiplier": "4",
        "model.name": f"{good.file('model')}",
    }
    HeadBook(good.file("heads.db"))
    good.run = None
    return good


def occupied_folder(good):
    good.file("run").mkdir()
    (good.file("run") / "notes.txt").write_text("mine")


def no_book(good):
    good.file("heads.db").write_text("no book of heads")


COORDINATORS: dict[str, Fault] = {
    "no authority given": (put("superlink.ca", ""), "authority", "no file", "give the auth", 2),
    "no public records": (
        put("data.test_path", "gone.csv"),
        *("public records", "gone.csv", "correct data.test_path", 2),
    ),
    "a folder that is taken": (occupied_folder, "run folder", "is not an empty", "another", 2),
    "a heads key for all": (chmod("heads.db.key"), "heads", "others may read", "chmod 600", 2),
    "no book of heads": (no_book, "heads", "is not a book of heads", "put the book", 5),
    "no model for all": (
        lambda good: shutil.rmtree(good.file("model")),
        *("model", "no folder with a config.json", "save a model there", 2),
    ),
    "a delta beyond its bound": (put("privacy.delta", "0.1"), "plan", "delta", "", 2),
}


def test_a_good_coordinator_has_no_fault(coordinator, coterie):
    answer = coterie(*coordinator.words("coordinator"), "--json")
    assert answer.code == 0, answer.out + answer.err
    assert findings(answer.json)["plan"]["found"].startswith("epsilon ")


@pytest.mark.parametrize("fault", COORDINATORS)
def test_each_fault_of_a_coordinator_has_its_name_remedy_and_code(fault, coordinator, coterie):
    broken, check, found, remedy, code = COORDINATORS[fault]
    broken(coordinator)
    answer = coterie(*coordinator.words("coordinator"), "--json")
    check_one_fault(answer, code, check, found, remedy)


@pytest.mark.slow
def test_a_coordinator_with_too_few_sites_is_told_how_to_register_them(
    coordinator, there, superlink, coterie
):
    coordinator.settings |= {
        "superlink.address": superlink.address,
        "superlink.ca": f"{superlink.authority.certificate}",
        "federation.sites": "99",
    }
    coordinator.settings.pop("superlink")
    answer = coterie(*coordinator.words("coordinator"), "--json")
    check_one_fault(answer, 4, "sites", "federation.sites=99", "flwr supernode register")
    coordinator.settings["federation.sites"] = "1"
    answer = coterie(*coordinator.words("coordinator"), "--json")
    assert answer.code == 0, answer.out
    assert findings(answer.json)["sites"]["verdict"] == "doubtful"  # registered, and not there

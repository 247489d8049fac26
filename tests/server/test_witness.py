"""The witness: what was countersigned stays, and nothing else is ever countersigned."""

import json
import random
import shutil
import subprocess
import sys
import time
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import grpc
import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from grpc_health.v1 import health_pb2, health_pb2_grpc
from hypothesis import given
from hypothesis import strategies as st

from common.canonical import canonical_json
from common.errors import ConfigError, VerificationError
from common.privacy.chain import EMPTY, Head
from common.privacy.witness import (
    MAX_BYTES,
    MAX_LINKS,
    SERVICE,
    Pass,
    Question,
    Refusal,
    WitnessAwayError,
    WitnessLine,
    WitnessRefusedError,
    read_advance,
    read_question,
    read_testimony,
    write_advance,
    write_question,
)
from server.witness import Witness
from server.witnessed import RefusedError, WitnessBook

from .witnesses import (
    NEXT,
    OTHER,
    SITE,
    Party,
    at_once,
    chain_of,
    copy_of,
    grow,
    step,
    steps,
)

ROOT = Path(__file__).parents[2]
ID = "letters/ward-1"


@pytest.fixture(scope="module")
def party(tmp_path_factory):
    """One witness that answers, for all tests: each enrols a ledger of its own."""
    made = Party(tmp_path_factory.mktemp("witness"))
    with made.serving():
        yield made
    made.book.close()


@pytest.fixture
def line(party):
    with party.line() as opened:
        yield opened


@pytest.fixture
def ledger(party, request):
    """The id of a ledger of six entries, which is enrolled, and its pen."""
    site = request.node.name[:60]
    pen = chain_of(5, site=site)
    name = f"letters/{site}"
    party.book.enrol(name, "ward-1", pen.entries)
    return name, pen


def refused(call, refusal):
    with pytest.raises(WitnessRefusedError) as found:
        call()
    assert found.value.refusal is refusal
    return str(found.value)


def test_a_ledger_goes_on_and_every_head_is_countersigned(party, line, ledger):
    name, pen = ledger
    assert line.latest(name).head == pen.head
    for entries in (1, 3, MAX_LINKS + 5):
        before = pen.head
        grow(pen, entries)
        for each in steps(pen, before, name):
            receipt = line.advance(each)
        assert receipt.head == pen.head == line.latest(name).head
        receipt.check()
        assert receipt.key == party.key
    assert line.includes(name, pen.head)
    assert line.includes(name, Head(3, pen.entries[2].hash))
    assert not line.includes(name, Head(3, pen.entries[3].hash))
    assert not line.includes(name, Head(pen.head.seq + 1, pen.head.hash))


def test_a_fork_is_refused_and_the_sites_own_signature_is_kept(party, line, ledger):
    name, pen = ledger
    other = copy_of(pen, 4)
    line.advance(step(grow(pen, 2), Head(6, pen.entries[5].hash), name))
    grow(other, 6, "fork")
    said = refused(
        lambda: line.advance(step(other, Head(4, pen.entries[3].hash), name)), Refusal.fork
    )
    assert "fork" in said
    assert line.latest(name).head == pen.head
    (kept,) = next(each for each in party.book.standings() if each.ledger == name).refused
    assert kept["head"] == str(other.head)
    assert kept["reason"] == "fork"
    # From a head that was never there, too.
    refused(lambda: line.advance(step(grow(other, 1), Head(5, "5" * 64), name)), Refusal.wrong_key)


def test_an_older_copy_is_refused(line, ledger):
    name, pen = ledger
    older = copy_of(pen, 4)
    refused(lambda: line.advance(step(older, Head(2, pen.entries[1].hash), name)), Refusal.older)
    assert line.latest(name).head == pen.head


def test_a_replayed_head_changes_nothing(line, ledger):
    name, pen = ledger
    first = step(grow(pen, 1), Head(6, pen.entries[5].hash), name)
    receipt = line.advance(first)
    assert line.advance(first) == receipt  # its answer was lost: the same again
    second = step(grow(pen, 1), receipt.head, name)
    line.advance(second)
    refused(lambda: line.advance(first), Refusal.older)
    assert line.latest(name).head == pen.head


def test_only_what_the_sites_key_signed_moves_a_ledger(line, ledger):
    name, pen = ledger
    before = pen.head
    grow(pen, 1)
    good = step(pen, before, name)
    forged = copy_of(pen, 6)
    forged.key = OTHER
    grow(forged, 1, "forged")
    for bad in (
        step(forged, before, name),
        replace(good, signature="0" * 128),
        replace(good, links=good.links[:-1] + bytes([good.links[-1] ^ 1])),
        replace(good, signature=pen.entries[4].signature),
    ):
        refused(lambda bad=bad: line.advance(bad), Refusal.wrong_key)
    assert line.latest(name).head == before
    assert line.advance(good).head == pen.head


def test_a_new_key_speaks_once_the_old_one_has_named_it(line, ledger):
    name, pen = ledger
    before = pen.head
    pen.rotate(NEXT)
    grow(pen, 2)
    rotation, after = steps(pen, before, name)
    line.advance(rotation)
    line.advance(after)
    assert line.advance(after).head == pen.head
    stolen = copy_of(pen, pen.head.seq)
    stolen.key = SITE
    refused(
        lambda: line.advance(step(grow(stolen, 1, "stolen"), pen.head, name)), Refusal.wrong_key
    )
    # Hidden, a rotation is no rotation: what follows is of an unknown key.
    hidden = copy_of(pen, pen.head.seq)
    before = hidden.head
    hidden.rotate(OTHER, old=NEXT)
    line.advance(replace(step(hidden, before, name), rotation=""))
    grow(hidden, 1)
    last = Head(hidden.entries[-2].seq, hidden.entries[-2].hash)
    refused(lambda: line.advance(step(hidden, last, name)), Refusal.wrong_key)


def test_a_key_that_the_old_one_did_not_name_is_refused(line, ledger):
    name, pen = ledger
    before = pen.head
    pen.rotate(NEXT, prover=OTHER)  # the new key did not agree
    refused(lambda: line.advance(step(pen, before, name)), Refusal.malformed)
    assert line.latest(name).head == before


def test_an_unknown_ledger_is_refused(line, ledger):
    _, pen = ledger
    for call in (
        lambda: line.latest("letters/nobody"),
        lambda: line.includes("letters/nobody", pen.head),
        lambda: line.advance(step(pen, EMPTY, "letters/nobody")),
    ):
        assert "no ledger is enrolled" in refused(call, Refusal.unknown)


def test_entries_that_are_missing_between_are_asked_for(line, ledger):
    name, pen = ledger
    grow(pen, 2)
    gap = Head(7, pen.entries[6].hash)
    refused(lambda: line.advance(step(pen, gap, name)), Refusal.gap)


def test_another_partys_pass_may_ask_and_not_speak(party, ledger):
    name, pen = ledger
    with party.line("officer") as line:
        assert line.latest(name).head == pen.head
        before = pen.head
        grow(pen, 1)
        refused(lambda: line.advance(step(pen, before, name)), Refusal.stranger)


def test_without_a_pass_of_this_witness_nobody_answers(party, ledger, tmp_path):
    name, _ = ledger
    other = Party(tmp_path)
    other.book.close()
    mixed = tmp_path / "mixed"
    shutil.copytree(other.admit("ward-1"), mixed)
    (mixed / "ca.crt").write_bytes((party.admit("ward-1") / "ca.crt").read_bytes())
    for folder in (other.admit("ward-1"), mixed):
        line = WitnessLine(party.address, Pass(folder))
        with pytest.raises(WitnessAwayError, match="does not answer"):
            line.latest(name)
        line.close()
    with grpc.insecure_channel(party.address) as channel, pytest.raises(grpc.RpcError):
        channel.unary_unary(f"/{SERVICE}/Head")(write_question(Question(name)), timeout=5)


def test_a_pass_that_was_taken_back_is_refused_at_once_and_another_is_not(party, ledger, coterie):
    name, pen = ledger
    stolen, before = party.admit("ward-1"), pen.head
    grow(pen, 1)
    with party.line("ward-1") as open_already:
        assert open_already.latest(name).head == before
        answer = coterie("witness", "revoke", party.folder.path, "ward-1")
        assert (answer.code, answer.err) == (0, "")
        for call in (
            lambda: open_already.latest(name),
            lambda: open_already.includes(name, before),
            lambda: open_already.advance(step(pen, before, name)),
        ):
            assert "this pass was taken back" in refused(call, Refusal.revoked)
    again = coterie("witness", "revoke", party.folder.path, "ward-1")
    assert (again.code, "ward-1: has no pass that is good" in again.err) == (2, True)
    shown = coterie("witness", "show", party.folder.path, "--json").json["passes"]
    assert [bool(each["revoked"]) for each in shown if each["name"] == "ward-1"] == [True]
    shutil.rmtree(stolen)
    with party.line("ward-1") as line:  # another pass of that name
        assert line.advance(step(pen, before, name)).head == pen.head
    assert "taken back" in coterie("witness", "show", party.folder.path).out


def test_a_pass_that_the_book_does_not_know_is_refused(party, ledger):
    """Signed by the authority, whose key somebody copied, and never given."""
    name, _ = ledger
    folder = party.passes / "forged"
    shutil.copytree(party.admit("ward-1"), folder)
    key = ec.generate_private_key(ec.SECP384R1())
    signed = party.folder.authority.sign("ward-1", key.public_key(), days=1)
    secret = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    (folder / "client.key").write_bytes(secret)
    (folder / "client.crt").write_bytes(signed.public_bytes(Encoding.PEM))
    line = WitnessLine(party.address, Pass(folder))
    refused(lambda: line.latest(name), Refusal.revoked)
    line.close()


def test_what_was_taken_back_stays_so(party):
    party.admit("leaver")
    assert party.book.take_back("leaver") == 1
    with (
        pytest.raises(VerificationError, match="taken back stays so"),
        party.book._transaction() as connection,
    ):
        connection.execute("UPDATE pass SET revoked = '' WHERE name = 'leaver'")


def test_a_witness_with_another_key_is_not_believed(party, ledger):
    """Its machine was taken over, and the certificates with it: not the key that signs heads."""
    name, _ = ledger
    folder = party.passes / "wary"
    shutil.copytree(party.admit("ward-1"), folder)
    (folder / "witness.pub").write_text("ab" * 32 + "\n")
    line = WitnessLine(party.address, Pass(folder))
    with pytest.raises(VerificationError, match="another key than its own"):
        line.latest(name)
    line.close()


def test_one_id_has_one_ledger_and_one_ledger_one_id(party, ledger):
    name, pen = ledger
    with pytest.raises(ConfigError, match="one ledger per id"):
        party.book.enrol(name, "ward-1", chain_of(2, site="another").entries)
    with pytest.raises(ConfigError, match=f"enrolled already, as {name[:20]}"):
        party.book.enrol("letters/twin", "ward-2", copy_of(pen, 3).entries)
    with pytest.raises(RefusedError):
        party.book.latest("letters/twin")


def test_of_two_futures_told_at_once_one_is_taken(party, ledger):
    name, pen = ledger
    futures = [grow(copy_of(pen, 6), 3, word) for word in ("one", "two", "three", "four")]
    offered = [step(each, pen.head, name) for each in futures]

    def offer(each):
        try:
            return party.book.advance(each, "ward-1")
        except RefusedError as error:
            return error.refusal

    answers = at_once([lambda each=each: offer(each) for each in offered * 3])
    heads = {each for each in answers if isinstance(each, Head)}
    assert len(heads) == 1
    assert heads == {party.book.latest(name)}
    assert answers.count(Refusal.fork) == 9


def test_health_is_answered_on_the_same_port(party):
    credentials = Pass(party.admit("officer")).credentials()
    with grpc.secure_channel(party.address, credentials) as channel:
        checks = health_pb2_grpc.HealthStub(channel)
        for service in ("", SERVICE):
            answer = checks.Check(health_pb2.HealthCheckRequest(service=service), timeout=5)
            assert answer.status == health_pb2.HealthCheckResponse.SERVING


def test_a_command_needs_no_torch(party):
    script = (
        "import sys; from common.cli import main; "
        f"code = main(['witness', 'show', {str(party.folder.path)!r}, '--json']); "
        "assert not {'torch', 'transformers', 'opacus', 'flwr', 'hydra'} & set(sys.modules); "
        "sys.exit(code)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert {each["node"] for each in json.loads(done.stdout)["ledgers"]} == {"ward-1"}


# Requests as nobody honest sends them.

FIELDS = ("version", "ledger", "after", "links", "signature", "rotation", "head")
VALUES = st.one_of(
    st.none(), st.booleans(), st.integers(), st.text(max_size=40), st.just(f"3:{'a' * 64}"),
    st.just(ID), st.just("a" * 128), st.just("b" * 64), st.just("")
)  # fmt: skip
OBJECTS = st.dictionaries(st.sampled_from(FIELDS), VALUES | st.lists(VALUES, max_size=3))


@pytest.fixture(scope="module")
def quiet(tmp_path_factory):
    """A witness without a server."""
    made = Party(tmp_path_factory.mktemp("quiet"))
    pen = chain_of(5)
    made.book.enrol(ID, "ward-1", pen.entries)
    yield Witness(made.book, made.folder.key()), pen
    made.book.close()


def asked(witness, content):
    """Every method answers properly, or says no; nothing else happens."""
    for method in (witness.head, witness.includes, witness.advance):
        try:
            read_testimony(method(content, "ward-1"))
        except (VerificationError, RefusedError):
            continue


@given(content=st.binary(max_size=300))
def test_bytes_of_any_kind_are_answered_or_refused(quiet, content):
    asked(quiet[0], content)


@given(content=OBJECTS)
def test_objects_of_any_kind_are_answered_or_refused(quiet, content):
    asked(quiet[0], canonical_json({"version": 1, **content}).encode("utf-8", "surrogatepass"))


@given(at=st.integers(min_value=0), flip=st.integers(min_value=1, max_value=255))
def test_a_good_message_with_one_other_byte_moves_nothing(quiet, at, flip):
    witness, pen = quiet
    good = bytearray(write_advance(step(grow(copy_of(pen, 6), 1), pen.head, ID)))
    good[at % len(good)] ^= flip
    asked(witness, bytes(good))
    assert witness.book.latest(ID) == pen.head


def test_messages_are_read_as_they_are_written_and_not_otherwise():
    pen = chain_of(3)
    whole = step(pen, EMPTY, ID)
    assert read_advance(write_advance(whole)) == whole
    question = Question(ID, pen.head)
    assert read_question(write_question(question)) == question
    text = write_question(question).decode()
    for bad in (
        text.replace(",", ", ", 1),
        text.replace('"version":1', '"version":2'),
        text.replace('"version":1', '"version":true'),
        text.replace('"version":1', '"version":1.0'),
        text.replace(ID, " "),
        text.replace(ID, "x" * 300),
        text.replace(ID, "a\\nb"),
        text[:-1] + ',"z":""}',
        f"{text} ",
        "[" * 20_000,
        "9" * 20_000,
        "null",
        "",
    ):
        with pytest.raises(VerificationError):
            read_question(bad.encode())
    many = replace(whole, links=b"\0" * 32 * (MAX_LINKS + 1))
    with pytest.raises(VerificationError, match="too many"):
        read_advance(write_advance(many))
    with pytest.raises(VerificationError, match="too long"):
        read_question(b" " * (MAX_BYTES + 1))


def test_a_server_that_was_sent_rubbish_goes_on(party, line, ledger):
    name, pen = ledger
    draw = random.Random(0)
    good = write_advance(step(grow(pen, 1), Head(6, pen.entries[5].hash), name))
    with grpc.secure_channel(party.address, Pass(party.admit("ward-1")).credentials()) as channel:
        for number in range(200):
            size = draw.choice([0, 1, 50, 5000, MAX_BYTES + 1]) if number % 20 == 0 else 60
            content = draw.randbytes(size) if number % 2 else good[: draw.randrange(len(good))]
            method = draw.choice(["Head", "Includes", "Advance", "Enrol", "\x7f"])
            with pytest.raises(grpc.RpcError) as found:
                channel.unary_unary(f"/{SERVICE}/{method}")(content, timeout=5)
            assert found.value.code() in {
                grpc.StatusCode.INVALID_ARGUMENT,
                grpc.StatusCode.UNIMPLEMENTED,
                grpc.StatusCode.RESOURCE_EXHAUSTED,
            }
    assert line.advance(read_advance(good)).head == pen.head


# Its file.


def test_what_was_witnessed_cannot_be_edited(party, ledger):
    name, _ = ledger
    connection = party.book._connection
    for statement in (
        "UPDATE entry SET hash = 'x' WHERE id = ?",
        "DELETE FROM entry WHERE id = ?",
        "UPDATE signer SET key = 'x' WHERE id = ?",
    ):
        with pytest.raises(Exception, match="what was witnessed stays"):
            connection.execute(statement, (name,))


def test_a_file_that_is_no_witness_is_named(tmp_path):
    with pytest.raises(ConfigError, match="coterie witness init"):
        WitnessBook(tmp_path / "none.db")
    (tmp_path / "text.db").write_text("not a database at all, but long enough to be looked at" * 30)
    with pytest.raises(VerificationError, match="is not a witness's file"):
        WitnessBook(tmp_path / "text.db")
    with pytest.raises(ConfigError, match="never overwritten"):
        WitnessBook.create(tmp_path / "text.db")


# The commands.


def test_an_officer_enrols_an_export_and_sees_where_it_stands(tmp_path, coterie):
    folder, pen = tmp_path / "witness", chain_of(3, site="ward-7")
    made = coterie("witness", "init", folder, "--host", "127.0.0.1", "--json")
    assert made.code == 0, made.err
    export = tmp_path / "ward-7.ledger"
    export.write_text(pen.export())
    key, officer = pen.entries[0].body["site_key"], pen.entries[0].body["officer_key"]
    words = ("--node", "ward-7", "--key", key, "--officer", officer, "--json")
    answer = coterie("witness", "enrol", folder, export, *words)
    assert answer.code == 0, answer.err
    assert answer.json["id"] == "letters/ward-7"
    assert answer.json["head"] == str(pen.head)
    shown = coterie("witness", "show", folder, "--json").json["ledgers"]
    assert [each["head"] for each in shown] == [str(pen.head)]
    assert "letters/ward-7" in coterie("witness", "show", folder).out
    again = coterie("witness", "enrol", folder, export, "--node", "ward-7")
    assert (again.code, "one ledger per id" in again.err) == (2, True)
    wrong = coterie("witness", "enrol", folder, export, "--node", "x", "--key", "ab" * 32)
    assert wrong.code == 5
    export.write_text(export.read_text().replace("letters", "letterz", 1))
    assert coterie("witness", "enrol", folder, export, "--node", "ward-7", "--id", "z").code == 5
    assert coterie("witness", "init", folder, "--host", "127.0.0.1").code == 2
    for name in ("a/b", "", "x" * 65):
        assert coterie("witness", "admit", folder, name, "--output", tmp_path / "p").code == 2
    assert not (tmp_path / "p").exists()


@contextmanager
def served(party, log):
    """`coterie witness serve` as a process of its own."""
    command = "import sys; from common.cli import main; sys.exit(main())"
    words = ["witness", "serve", party.folder.path, "--listen", party.address or "127.0.0.1:0"]
    process = subprocess.Popen(
        [sys.executable, "-c", command, *map(str, words), "--json"],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=log, text=True,
    )  # fmt: skip
    try:
        party.address = json.loads(process.stdout.readline())["address"]
        yield process
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


@pytest.mark.slow  # processes, and ten thousand signatures
def test_ten_thousand_heads_outlive_kill_9(tmp_path):
    """Whatever was countersigned before a kill is there after it, and the ledgers go on."""
    party, draw = Party(tmp_path), random.Random(0)
    pens = {f"letters/ward-{n}": chain_of(site=f"ward-{n}") for n in range(20)}
    for name, pen in pens.items():
        party.book.enrol(name, "ward-1", pen.entries)
    party.book.close()
    receipts, told = [], {name: pen.head for name, pen in pens.items()}
    with (tmp_path / "log").open("w") as log:
        for sitting in range(3):
            with served(party, log) as process, party.line() as line:
                until = 10_000 * (sitting + 1) // 3 + 1
                while sum(pen.head.seq for pen in pens.values()) < until:
                    name = draw.choice([*pens])
                    grow(pens[name], draw.choice([1, 3, 30]))
                    receipt = line.advance(step(pens[name], told[name], name))
                    told[name] = receipt.head
                    receipts.append((name, receipt.head))
                # Killed in the middle of an answer: it may or may not have been taken.
                name = draw.choice([*pens])
                grow(pens[name], 1)
                call = line._channel.unary_unary(f"/{SERVICE}/Advance")
                pending = call.future(write_advance(step(pens[name], told[name], name)), timeout=5)
                time.sleep(draw.random() * 0.004)
                process.kill()
                process.wait()
                pending.cancel()
            with served(party, log), party.line() as line:
                assert line.latest(name).head in (told[name], pens[name].head)
                told[name] = line.latest(name).head
                for each, head in draw.sample(receipts, 100) + receipts[-5:]:
                    assert line.includes(each, head)
        with served(party, log) as process, party.line() as line:
            for name, head in receipts:
                assert line.includes(name, head)
            for name, pen in pens.items():
                for each in steps(pen, told[name], name) if told[name] != pen.head else []:
                    line.advance(each)
                assert line.latest(name).head == pen.head
                other = grow(copy_of(pen, pen.head.seq - 1), 5, "fork")
                before = Head(other.entries[-6].seq, other.entries[-6].hash)
                refused(
                    lambda other=other, before=before, name=name: line.advance(
                        step(other, before, name)
                    ),
                    Refusal.fork,
                )
            process.terminate()
            assert process.wait(10) == 0
    assert sum(pen.head.seq for pen in pens.values()) >= 10_000
    assert len(receipts) > 300
    assert not (tmp_path / "log").read_text().count("Traceback")

"""A real node and a real witness: told of each round, missed loudly, and never put back unseen."""

import json
import shutil
import signal
import subprocess
import sys
from contextlib import contextmanager

import pytest

from client.ledger import Store
from common.privacy.chain import Kind
from server.report import read_report
from tests.server.witnesses import Party

from .superlink import ROOT, NodeProcess
from .test_node import books_of, configured, dealt, finished, lab, submitted

pytestmark = pytest.mark.slow  # processes that import everything
__all__ = ["configured", "lab"]
SUFFIXES = ("", "-wal", "-shm")


@contextmanager
def serving(party, log):
    """`coterie witness serve`, on the same port as before."""
    command = "import sys; from common.cli import main; sys.exit(main())"
    words = ["serve", str(party.folder.path), "--listen", party.address or "127.0.0.1:0", "--json"]
    with log.open("a") as said:
        process = subprocess.Popen(
            [sys.executable, "-c", command, "witness", *words],
            cwd=ROOT, stdout=subprocess.PIPE, stderr=said, text=True,
        )  # fmt: skip
        try:
            party.address = json.loads(process.stdout.readline())["address"]
            yield
        finally:
            process.kill()
            process.wait()
            process.stdout.close()


def copied(ledger, folder):
    folder.mkdir()
    for suffix in SUFFIXES:
        if (path := ledger.with_name(ledger.name + suffix)).exists():
            shutil.copy2(path, folder / path.name)


def test_a_node_is_witnessed_goes_on_without_and_is_not_put_back(
    lab, tmp_path, configured, coterie
):
    config = configured("federation.rounds=2", "data.declared_records=84", sites=1)
    (file,) = dealt(tmp_path, config)
    party = Party(tmp_path)
    with serving(party, tmp_path / "witness.log"):
        pass
    settings = [f"witness={party.address}", f"witness_pass={party.admit('ward')}"]
    node = NodeProcess(lab, "site-1", file, *settings)
    export, older = tmp_path / "site-1.ledger", tmp_path / "older"
    assert coterie("ledger", "export", node.ledger, "--output", export).code == 0
    enrolled = coterie("witness", "enrol", party.folder.path, export, "--node", "ward", "--json")
    name = enrolled.json["id"]
    with node:
        # Away at the start, and during the rounds: the node goes on, and says so.
        node.wait_for("NOT WITNESSED")
        node.wait_for("waiting for instructions")
        copied(node.ledger, older)
        run, run_dir = submitted(lab, config)
        finished(lab, run)
        node.wait_for("round 2: answered")
        with serving(party, tmp_path / "witness.log"):
            node.wait_for("the witness answers again", 90)
            node.signal(signal.SIGTERM)
            assert node.wait() == 0
            books = books_of(node)
            assert coterie("ledger", "export", node.ledger, "--output", export).code == 0
            asking = ["--witness", party.address, "--pass", party.admit("officer")]
            found = coterie("ledger", "verify", export, *asking, "--witness-id", name, "--json")
            assert found.code == 0, found.err
            assert found.json["witness"]["entries_after"] == 1
            assert books.receipts[party.key]
            made = coterie("report", "--for", "officer", run_dir, export, *asking, "--json")
            assert made.code == 0, made.err
            assert made.json["summary"]["claims_agree"]
            assert read_report(run_dir)[0]["run_id"] in str(made.json["sites"][0]["plans"])
            # Put back to the copy from before the run: sound in itself, and stopped.
            for suffix in SUFFIXES:
                node.ledger.with_name(node.ledger.name + suffix).unlink(missing_ok=True)
            for path in older.iterdir():
                shutil.copy2(path, node.ledger.parent / path.name)
            with Store(node.ledger) as store:
                kinds = {entry.kind for entry in store.ledger("site-1").entries()}
            assert Kind.RELEASE not in kinds
            node.start()
            assert node.wait() == 5
            assert "older copy" in node.said
    party.book.close()

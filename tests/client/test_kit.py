"""A node from its kit: its settings first, the operator's own over them; and its certificate."""

import json
import re
import shutil
import ssl
import tempfile
from pathlib import Path

import pytest
import yaml
from cryptography.hazmat.primitives.asymmetric import ec

from client.fleet import DOOR, Fleet, NotAdmittedError
from common.certificates import Credentials, make_authority
from common.cli import main
from common.errors import ConfigError
from common.keys import read_private_key
from common.privacy.chain import public_hex
from tests.server.test_federation import GOOD

OWN = """# @package _global_
defaults:
  - override /node: careful
data:
  path: /srv/notes.csv
  labels: [sport, money]
ledger: /elsewhere/books.db
"""


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("kit")
    (folder / "federation.yaml").write_text(yaml.safe_dump(GOOD))
    assert main(["provision", str(folder / "federation.yaml"), "--to", str(folder / "made")]) == 0
    return folder / "made"


def composed(capsys, *words):
    capsys.readouterr()
    assert main(["node", *map(str, words), "--cfg", "job", "--resolve"]) == 0
    return yaml.safe_load(capsys.readouterr().out)


def test_a_kit_says_what_is_the_federations_and_its_operator_the_rest(made, tmp_path, capsys):
    kit = tmp_path / "a kit, moved"
    shutil.copytree(made / "kits" / "ward-1", kit)
    (tmp_path / "conf.d" / "site").mkdir(parents=True)
    (tmp_path / "conf.d" / "site" / "mine.yaml").write_text(OWN)
    before = {*Path(tempfile.gettempdir()).glob("coterie-kit-*")}
    own = ("--config-dir", tmp_path / "conf.d", "+site=mine")
    settings = composed(capsys, f"kit={kit}", *own, "threads=3")
    assert settings["name"] == "ward-1"
    assert settings["superlink"] == "coordinator.example.org:8443"
    for name, file in {
        "authority": "ca.crt",
        "certificate": "client.crt",
        "certificate_key": "client.key",
        "key": "node.key",
    }.items():
        assert settings[name] == f"{kit}/{file}"
    # The operator's own file stands over the kit's, and the command line over both.
    assert settings["ledger"] == "/elsewhere/books.db"
    assert settings["data"]["path"] == "/srv/notes.csv"
    assert settings["threads"] == 3
    assert composed(capsys, f"kit={kit}", *own, "name=other")["name"] == "other"
    assert {*Path(tempfile.gettempdir()).glob("coterie-kit-*")} == before


MISTAKES = {
    "no such kit": (["kit=/none"], "/none: there is no kit, as it is no folder"),
    "no kit": (["kit={folder}"], "is no kit, as it has no seal.json"),
    "a seal without a kit": (
        ["sealed_by=" + "0" * 64, "name=a", "superlink=a:1"],
        "needs kit=FOLDER",
    ),
    "another's seal": (["kit={kit}", "sealed_by=" + "0" * 64], "was sealed by"),
    "a seal's key that is none": (["kit={kit}", "sealed_by=me"], "sealed_by=me: must be 64 hex"),
    "half a certificate": (
        ["kit={kit}", "certificate=''"],
        "must be given together, or both left out where no door asks for one",
    ),
}


@pytest.mark.parametrize("what", MISTAKES)
def test_a_mistake_is_one_line_before_anything_starts(what, made, tmp_path, capsys):
    words, said = MISTAKES[what]
    kit = made / "kits" / "ward-1"
    more = ["data.path=x.csv", "data.labels=[a,b]", "authority=a", "key=k", "ledger=l"]
    given = [each.format(kit=kit, folder=tmp_path) for each in words]
    code = main(["node", *given, *(more if "kit" not in words[0] else more[:2])])
    err = capsys.readouterr().err
    assert code in (2, 5)
    assert said in err
    assert err.count("\n") == 1


def test_a_kit_in_a_file_alone_is_refused(made, tmp_path, capsys):
    """What checks the seal must know of the kit before it composes anything from it."""
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "mine.yaml").write_text(f"{OWN}kit: {made / 'kits' / 'ward-1'}\n")
    words = ["name=a", "superlink=a:1", "authority=a", "key=k"]
    assert main(["node", "--config-dir", str(tmp_path), "+site=mine", *words]) == 2
    assert "must be given on the command line" in capsys.readouterr().err


def test_a_certificate_is_shown_only_with_its_own_private_key(tmp_path):
    authority = make_authority(tmp_path / "a")
    one, two = authority.issue("one", ["a"]), authority.issue("two", ["a"])
    key = ec.generate_private_key(ec.SECP384R1())

    def fleet(certificate, secret):
        Fleet("127.0.0.1:1", authority.certificate, key, own=Credentials(certificate, secret))

    fleet(one.certificate, one.key)
    faults = {
        "is not its private key": (one.certificate, two.key),
        "is no certificate in PEM": (one.key, one.key),
        "none.crt is not there": (tmp_path / "none.crt", one.key),
    }
    for said, (certificate, secret) in faults.items():
        with pytest.raises(ConfigError, match=re.escape(said)):
            fleet(certificate, secret)
    one.key.chmod(0o640)
    with pytest.raises(ConfigError, match="others may read this key"):
        fleet(one.certificate, one.key)


def test_what_the_door_says_is_told_and_no_more_of_it(tmp_path):
    import httpx

    authority = make_authority(tmp_path)
    fleet = Fleet("127.0.0.1:1", authority.certificate, ec.generate_private_key(ec.SECP384R1()))
    words = "certificate FAILED:certificate revoked" + "x" * 500
    error = fleet._refused(httpx.Response(400, headers={DOOR: words}))
    assert isinstance(error, NotAdmittedError)
    assert "certificate revoked" in str(error)
    assert len(str(error)) < 300
    assert "takes no message of that size" in str(fleet._refused(httpx.Response(413)))
    assert ssl.HAS_TLSv1_3


def test_books_begin_with_the_key_of_the_kit(made, tmp_path, capsys):
    """So that whoever has the coordinator's kit knows with which key they are verified."""
    key = made / "kits" / "ward-1" / "ledger.key"
    words = ("--cap", "8", "--delta", "1e-5", "--dataset", "notes", "--site", "ward-1")
    officer = public_hex(read_private_key(made / "officer" / "officer.key"))
    own = (*words, "--officer-key", officer, "--site-key", str(key), "--json")
    assert main(["ledger", "init", str(tmp_path / "books.db"), *own]) == 0
    begun = json.loads(capsys.readouterr().out)["site_key"]
    nodes = json.loads((made / "kits" / "coordinator" / "nodes.json").read_text())
    assert nodes["ward-1"]["ledger_key"] == begun
    assert (tmp_path / "books.db.key").stat().st_mode & 0o077 == 0
    shutil.copy(key, tmp_path / "open.key")
    (tmp_path / "open.key").chmod(0o644)
    loose = [str(tmp_path / "open.key") if word == str(key) else word for word in own]
    assert main(["ledger", "init", str(tmp_path / "other.db"), *loose]) == 2
    assert "others may read this key" in capsys.readouterr().err
    assert not (tmp_path / "other.db").exists()

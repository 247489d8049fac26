"""What a SuperLink is asked through Flower's own command, and the bundle it is handed.

The calls themselves are tried against a real SuperLink: tests/integration/test_deployment.py.
"""

import hashlib
import json
import os
import zipfile
from io import BytesIO
from pathlib import Path

import pytest
import tomli
from flwr.cli.build import build_fab_from_disk
from flwr.common.config import validate_config

from common.errors import ConfigError, FederationError
from server import control
from server.control import ROOT, Address, Link, write_bundle


@pytest.fixture
def link(tmp_path):
    ca = tmp_path / "ca.crt"
    ca.write_text("a certificate")
    return Link(Address.checked("127.0.0.1:1234", str(ca)))


@pytest.fixture
def flwr(monkeypatch, tmp_path):
    """In the place of Flower's command a script, which leaves what it was called with."""

    def put(answer, code=0):
        program = tmp_path / "bin" / "flwr"
        program.parent.mkdir(exist_ok=True)
        told = tmp_path / "told"
        program.write_text(
            f'#!/bin/sh\nenv > {told}.env\necho "$@" > {told}\ncp "$FLWR_HOME/config.toml" '
            f"{told}.toml\ncat <<'END'\n{answer}\nEND\nexit {code}\n"
        )
        program.chmod(0o755)
        monkeypatch.setattr(control.sys, "executable", str(program.parent / "python"))
        return told

    return put


@pytest.mark.parametrize("address", ["", "8000", "host:", "http://host:8000", "host:port"])
def test_an_address_that_is_none_is_refused(address, tmp_path):
    (tmp_path / "ca.crt").touch()
    with pytest.raises(ConfigError, match=r"superlink\.address"):
        Address.checked(address, str(tmp_path / "ca.crt"))


@pytest.mark.parametrize("ca", ["", "nowhere/ca.crt"])
def test_without_a_certificate_nothing_is_submitted(ca):
    with pytest.raises(ConfigError, match=r"superlink\.ca=.*without TLS nothing is submitted"):
        Address.checked("127.0.0.1:8000", ca)


def test_flower_is_asked_with_a_home_of_its_own_and_calls_nobody_else(link, flwr):
    told = flwr(json.dumps({"success": True, "runs": [{"status": "running"}]}))
    assert link.status(12345678901234567890) == "running"
    assert told.read_text().split() == [
        *("list", "coterie", "--run-id", "12345678901234567890", "--format", "json")
    ]
    environment = Path(f"{told}.env").read_text().splitlines()
    assert {
        "FLWR_TELEMETRY_ENABLED=0",
        "FLWR_DISABLE_UPDATE_CHECK=1",
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION=1",
    } <= set(environment)
    (home,) = (line.split("=", 1)[1] for line in environment if line.startswith("FLWR_HOME="))
    assert not os.path.exists(home)
    connection = tomli.loads(Path(f"{told}.toml").read_text())["superlink"]["coterie"]
    assert connection == {
        "address": "127.0.0.1:1234",
        "root-certificates": str(link.address.ca),
    }


@pytest.mark.parametrize(
    ("answer", "code"),
    [
        (json.dumps({"success": False, "error-message": "Run 7 not found"}), 0),
        (json.dumps({"success": False, "error-message": "Run 7 not found"}), 1),
        ("Error: Run 7 not found", 2),
    ],
)
def test_what_flower_refuses_is_one_line_of_ours(link, flwr, answer, code):
    flwr(answer, code)
    with pytest.raises(FederationError, match=r"^superlink\.address=127.*stop a run: *Run 7 not"):
        link.stop(7)


def test_a_run_config_reaches_flower_as_it_is(link, flwr, tmp_path, monkeypatch):
    """Quotes, lines, backslashes and letters of any script: TOML reads what JSON wrote."""
    kept = tmp_path / "kept.toml"
    flwr(json.dumps({"success": True, "run-id": "18446744073709551615"}))
    run = control._run

    def keeping(arguments, environment):
        kept.write_bytes(Path(arguments[-3]).read_bytes())
        return run(arguments, environment)

    monkeypatch.setattr(control, "_run", keeping)
    text = json.dumps({"a": 'quote " and \\ and\nline', "ü": "日本 \u2028 😀"}, ensure_ascii=False)
    assert link.start({"config": text}) == 18446744073709551615
    assert tomli.loads(kept.read_text(encoding="utf-8")) == {"config": text}


@pytest.mark.filterwarnings("ignore:GitWildMatchPattern:DeprecationWarning")  # Flower's
def test_the_bundle_holds_what_both_sides_need_and_is_the_same_each_time(tmp_path):
    """A node's operator may hold a run to the digest of its bundle."""
    bundles = []
    for name in ("first", "second"):
        write_bundle(tmp_path / name)
        bundles.append(build_fab_from_disk(tmp_path / name))
    assert hashlib.sha256(bundles[0]).digest() == hashlib.sha256(bundles[1]).digest()
    with zipfile.ZipFile(BytesIO(bundles[0])) as bundle:
        names = {*bundle.namelist()}
        templates = json.loads(bundle.read("server/templates.json"))
    ours = {
        str(path.relative_to(ROOT))
        for package in ("common", "server", "client")
        for path in (ROOT / package).rglob("*.py")
    }
    assert ours <= names
    assert {*templates} == {path.name for path in (ROOT / "server" / "templates").iterdir()}
    others = {name.split("/")[0] for name in names} - {"common", "server", "client", ".info"}
    assert all("/" not in name for name in names if name.split("/")[0] in others), others
    assert not any(
        name.startswith(("simulations", "tests", "conf", "benchmarks")) for name in names
    )


def test_flower_takes_the_bundles_settings(tmp_path):
    write_bundle(tmp_path / "bundle")
    config = tomli.loads((tmp_path / "bundle" / "pyproject.toml").read_text())
    valid, errors, _ = validate_config(config, check_module=False)
    assert valid, errors
    assert config["tool"]["flwr"]["app"]["config"] == {"config": "", "config-hash": ""}

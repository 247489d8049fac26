"""Provisioning: each secret in one kit, for its owner only; seals that hold; nothing made twice."""

import json
import re
import shutil
import stat
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import yaml
from cryptography import x509
from cryptography.hazmat.primitives.serialization import load_ssh_public_key
from cryptography.x509.oid import ExtendedKeyUsageOID

from common.certificates import read_node_key
from common.cli import ENVIRONMENT, main
from common.errors import ConfigError, VerificationError
from common.keys import generate_key, read_private_key
from common.privacy.chain import public_hex
from common.seal import SEAL, check_seal, sealed
from server.holders import make_key
from server.kits import CALLS, PATHS, STOCK_CALLS
from simulations.provisioned import find_nginx
from tests.server.test_federation import GOOD

ROOT = Path(__file__).resolve().parents[2]
SITES = ("ward-1", "ward-2", "ward-3")
SECRETS = {
    **{name: {"node.key", "client.key", "ledger.key"} for name in SITES},
    "coordinator": {"door.key", "superlink.key"},
}


def run(capsys, *words, code=0):
    """What `coterie provision WORDS --json` says, or its one line of complaint."""
    capsys.readouterr()
    assert main(["provision", *map(str, words), "--json"]) == code
    out, err = capsys.readouterr()
    return json.loads(out) if code == 0 else err.strip()


def describe(folder, **changes):
    path = folder / "federation.yaml"
    path.write_text(yaml.safe_dump({**GOOD, "sites": [*SITES], **changes}))
    return path


@pytest.fixture(scope="module")
def first(tmp_path_factory):
    folder = tmp_path_factory.mktemp("provisioned")
    assert main(["provision", str(describe(folder)), "--to", str(folder / "made")]) == 0
    return folder / "made"


@pytest.fixture
def made(first, tmp_path):
    """A copy of what was provisioned, to change."""
    shutil.copytree(first, tmp_path / "made")
    return tmp_path / "made"


def files_of(folder):
    return {
        path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()
    }


def key_of(made):
    return public_hex(read_private_key(made / "authority" / "sealing.key"))


def secret_lines(path):
    """Of a key file; what stands in every one of its kind is no secret."""
    same = set(make_key(path.name).decode().splitlines())
    return [line for line in path.read_text().splitlines() if len(line) > 30 and line not in same]


def certificate(path):
    return x509.load_pem_x509_certificate(path.read_bytes())


def test_each_secret_is_in_its_own_kit_and_nowhere_else(first):
    """Every line of every private key, looked for in every other file."""
    keys = {path.relative_to(first): secret_lines(path) for path in first.rglob("*.key")}
    assert all(keys.values())
    kits = {
        kit.name: {path.name for path in kit.glob("*.key")} for kit in (first / "kits").iterdir()
    }
    assert kits == SECRETS
    own = {"authority/ca.key", "authority/sealing.key", "officer/officer.key"}
    assert {str(path) for path in keys if path.parts[0] != "kits"} == own
    for other, content in files_of(first).items():
        for path, lines in keys.items():
            for line in lines:
                assert path == other or line.encode() not in content, f"{path} is in {other}"


def test_only_their_owner_reads_what_was_made(first):
    for path in [first / "kits", *(first / "kits").rglob("*"), *(first / "authority").iterdir()]:
        mode = stat.S_IMODE(path.stat().st_mode)
        public = path.name == "ca.crt" and path.parent.name == "authority"
        assert mode == (0o700 if path.is_dir() else 0o644 if public else 0o600), path
    assert stat.S_IMODE((first / "officer" / "officer.key").stat().st_mode) == 0o600


def test_certificates_are_for_what_they_are_for(first):
    authority = certificate(first / "authority" / "ca.crt")
    coordinator = first / "kits" / "coordinator"
    door, superlink = (
        certificate(coordinator / "door.crt"),
        certificate(coordinator / "superlink.crt"),
    )
    client = certificate(first / "kits" / "ward-2" / "client.crt")
    for each in (door, superlink, client):
        each.verify_directly_issued_by(authority)
        assert not each.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    names = [
        {
            str(name.value)
            for name in each.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        }
        for each in (door, superlink)
    ]
    assert names == [{"coordinator.example.org", "192.0.2.7"}, {"localhost", "127.0.0.1"}]
    usages = [
        [*each.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value]
        for each in (door, superlink, client)
    ]
    server, user = [ExtendedKeyUsageOID.SERVER_AUTH], [ExtendedKeyUsageOID.CLIENT_AUTH]
    assert usages == [server, server, user]


def test_the_coordinator_knows_each_site_by_public_halves_only(first):
    kits = first / "kits"
    nodes = json.loads((kits / "coordinator" / "nodes.json").read_text())
    assert {*nodes} == {*SITES}
    for name, each in nodes.items():
        ours = read_node_key(kits / name / "node.key").public_key().public_numbers()
        assert load_ssh_public_key(each["node_key"].encode()).public_numbers() == ours
        assert each["ledger_key"] == public_hex(read_private_key(kits / name / "ledger.key"))
    serials = {f"{certificate(kits / name / 'client.crt').serial_number:040X}" for name in SITES}
    listed = (kits / "coordinator" / "sites.conf").read_text()
    assert {
        line.split('"')[1].zfill(40) for line in listed.splitlines() if line[:1] == '"'
    } == serials


def test_provisioned_again_nothing_is_made_anew(made, tmp_path, capsys):
    before = files_of(made)
    answer = run(capsys, describe(tmp_path), "--to", made)
    assert {*answer["kits"]} == {*SECRETS}
    assert answer["new"] == []
    after = files_of(made)
    assert after == before
    # A site that is added gets a kit, and the others keep theirs.
    answer = run(capsys, describe(tmp_path, sites=[*SITES, "ward-4"]), "--to", made)
    assert answer["new"] == ["ward-4", "coordinator"]
    grown = files_of(made)
    assert {path.parts[1] for path in grown if path not in after} == {"ward-4"}
    assert all(grown[path] == after[path] for path in after if path.suffix in (".key", ".crt"))
    for kit in (made / "kits").iterdir():
        check_seal(kit, key=key_of(made))


def test_a_kit_that_was_handed_out_and_deleted_is_not_made_again_but_for_a_reason(
    made, tmp_path, capsys
):
    shutil.rmtree(made / "kits" / "ward-1")
    assert run(capsys, describe(tmp_path), "--to", made)["new"] == []
    assert not (made / "kits" / "ward-1").exists()
    assert run(capsys, describe(tmp_path, image="other:1"), "--to", made)["new"] == [*SECRETS]
    assert not [*(made / "kits" / "ward-1").glob("*.key")]
    # One that lies here, altered, is made good.
    flip(made / "kits" / "ward-2" / "node.yaml")
    assert run(capsys, describe(tmp_path, image="other:1"), "--to", made)["new"] == ["ward-2"]
    check_seal(made / "kits" / "ward-2", key=key_of(made))


def test_other_hosts_are_other_certificates_of_the_same_keys(made, tmp_path, capsys):
    door = made / "kits" / "coordinator" / "door.crt"
    key, before = door.with_name("door.key").read_bytes(), door.read_bytes()
    run(capsys, describe(tmp_path, coordinator={"hosts": ["elsewhere.example.org"]}), "--to", made)
    assert door.with_name("door.key").read_bytes() == key
    assert door.read_bytes() != before


def test_renewed_kits_keep_their_keys_even_where_they_no_longer_are_here(made, tmp_path, capsys):
    """A kit that was handed out is sealed anew over keys that the provisioner has no more."""
    kit, at_site = made / "kits" / "ward-1", tmp_path / "site"
    shutil.copytree(kit, at_site)
    for name in SECRETS["ward-1"]:
        (kit / name).unlink()
    run(capsys, "renew", made, "ward-1")
    assert not [*kit.glob("*.key")]
    old = certificate(at_site / "client.crt").serial_number
    for file in kit.iterdir():
        shutil.copy(file, at_site)
    assert check_seal(at_site, key=key_of(made)).holder == "ward-1"
    assert certificate(at_site / "client.crt").serial_number != old
    listed = (made / "kits" / "coordinator" / "sites.conf").read_text()
    assert listed.count('"ward-1"') == 2  # the old one holds until it ends


def test_a_revoked_site_is_in_no_list_and_comes_back_by_new_keys_only(made, tmp_path, capsys):
    coordinator, kit = made / "kits" / "coordinator", made / "kits" / "ward-2"
    serial = certificate(kit / "client.crt").serial_number
    old_key = (kit / "node.key").read_bytes()
    ledger_key = json.loads((coordinator / "nodes.json").read_text())["ward-2"]["ledger_key"]
    answer = run(capsys, "revoke", made, "ward-2")
    assert answer["revoked"] == ["ward-2"]
    assert {*answer["kits"]} == {"coordinator"}
    revoked = x509.load_pem_x509_crl((coordinator / "clients.crl").read_bytes())
    assert revoked.is_signature_valid(certificate(made / "authority" / "ca.crt").public_key())
    assert [each.serial_number for each in revoked] == [serial]
    assert revoked.next_update_utc > datetime.now(UTC) + timedelta(days=3000)
    assert "ward-2" not in (coordinator / "sites.conf").read_text()
    assert "ward-2" not in (coordinator / "nodes.json").read_text()
    # Neither provisioning again nor renewing lets it in.
    run(capsys, describe(tmp_path), "--to", made)
    run(capsys, "renew", made)
    assert "ward-2" not in (coordinator / "nodes.json").read_text()
    assert "--new-keys lets it in again" in run(capsys, "renew", made, "ward-2", code=2)
    run(capsys, "renew", made, "ward-2", "--new-keys")
    assert (kit / "node.key").read_bytes() != old_key
    nodes = json.loads((coordinator / "nodes.json").read_text())
    assert nodes["ward-2"]["earlier_ledger_keys"] == [ledger_key]
    revoked = x509.load_pem_x509_crl((coordinator / "clients.crl").read_bytes())
    assert serial in [each.serial_number for each in revoked]
    check_seal(kit, key=key_of(made))
    check_seal(coordinator, key=key_of(made))


def test_what_cannot_be_renewed_or_revoked_is_said(made, tmp_path, capsys):
    assert "nobody: no such site; there are" in run(capsys, "revoke", made, "nobody", code=2)
    assert "nobody: no such site; there are" in run(capsys, "renew", made, "nobody", code=2)
    assert "cannot be revoked" in run(capsys, "revoke", made, "coordinator", code=2)
    assert "no federation was provisioned there" in run(capsys, "renew", tmp_path, code=2)
    assert "no such file" in run(capsys, tmp_path / "none.yaml", "--to", tmp_path / "x", code=2)
    assert not (tmp_path / "x").exists()


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def resealed(kit, made, **changes):
    """As somebody would who has another key."""
    seal = json.loads((kit / SEAL).read_text())
    text = sealed(
        generate_key(made / "other.key"),
        federation=seal["federation"],
        holder=seal["holder"],
        files={**seal["files"], **changes},
        expires={},
        now=datetime.now(UTC),
    )
    (kit / SEAL).write_text(text)


TAMPERED = {
    "a setting": (lambda kit, _: flip(kit / "node.yaml"), "node.yaml: was altered"),
    "a certificate": (lambda kit, _: flip(kit / "ca.crt"), "ca.crt: was altered"),
    "a key": (lambda kit, _: flip(kit / "node.key"), "node.key: was altered"),
    "a unit": (lambda kit, _: flip(kit / "coterie-node.service"), "service: was altered"),
    "a file less": (lambda kit, _: (kit / "client.crt").unlink(), "client.crt: is missing"),
    "a file more": (lambda kit, _: (kit / "x.yaml").touch(mode=0o600), "is no file of this kit"),
    "a folder more": (lambda kit, _: (kit / "x").mkdir(mode=0o700), "is no file of this kit"),
    "another site's file": (
        lambda kit, made: shutil.copy(made / "kits" / "ward-2" / "client.crt", kit),
        "client.crt: was altered",
    ),
    "another site's seal": (
        lambda kit, made: shutil.copy(made / "kits" / "ward-2" / SEAL, kit),
        "was altered",
    ),
    "a word of the seal": (
        lambda kit, _: (kit / SEAL).write_text(
            (kit / SEAL).read_text().replace("ward-1", "ward-9")
        ),
        "its signature does not hold",
    ),
    "a seal that is none": (lambda kit, _: (kit / SEAL).write_text("{}"), "is malformed"),
    "a stranger's seal": (resealed, "was sealed by"),
}


@pytest.mark.parametrize("what", TAMPERED)
def test_a_kit_that_was_tampered_with_is_refused(what, made, capsys):
    kit, key = made / "kits" / "ward-1", key_of(made)
    tamper, said = TAMPERED[what]
    check_seal(kit, key=key)
    tamper(kit, made)
    with pytest.raises(VerificationError, match=said):
        check_seal(kit, key=key)
    assert said in run(capsys, "check", kit, "--key", key, code=5)
    # And by the node, before it reads any setting of it.
    words = ["node", f"kit={kit}", f"sealed_by={key}", "data.path=none.csv", "data.labels=[a,b]"]
    assert main(words) == 5
    assert said in capsys.readouterr().err


def test_a_kit_that_others_may_read_is_refused(made, capsys):
    kit = made / "kits" / "ward-1"
    for path, mode in ((kit / "node.key", 0o640), (kit / "README.md", 0o604), (kit, 0o750)):
        before = stat.S_IMODE(path.stat().st_mode)
        path.chmod(mode)
        assert f"{path}: others may read it; run chmod -R go= {kit}" in run(
            capsys, "check", kit, code=2
        )
        path.chmod(before)
    assert run(capsys, "check", kit)["key_pinned"] is False


def test_what_is_no_kit_is_said(tmp_path, capsys):
    assert "there is no kit" in run(capsys, "check", tmp_path / "none", code=2)
    assert "has no seal.json" in run(capsys, "check", tmp_path, code=2)
    assert "must be 64 hex digits" in run(capsys, "check", tmp_path, "--key", "xyz", code=2)


def test_a_kit_says_when_it_ends_and_that_it_has_ended(made, tmp_path, capsys, monkeypatch):
    answer = run(capsys, "check", made / "kits" / "ward-1")
    end = certificate(made / "kits" / "ward-1" / "client.crt").not_valid_after_utc
    assert answer["expires"] == {"client.crt": f"{end:%Y-%m-%d}"}
    assert f"{end:%Y-%m-%d}" in (made / "kits" / "ward-1" / "README.md").read_text()
    run(capsys, describe(tmp_path, days=1), "--to", tmp_path / "short")

    class Later(datetime):
        @classmethod
        def now(cls, zone=None):
            return datetime.now(zone) + timedelta(days=2)

    monkeypatch.setattr("server.provision.datetime", Later)
    said = run(capsys, "check", tmp_path / "short" / "kits" / "ward-1", code=2)
    assert "its certificates have ended (client.crt on" in said


def test_a_kit_of_a_coordinator_is_no_kit_of_a_site_nor_the_other_way_round(made, capsys):
    kits = made / "kits"
    assert main(["node", f"kit={kits / 'coordinator'}", "data.path=x", "data.labels=[a,b]"]) == 2
    assert "is no kit of a site" in capsys.readouterr().err
    said = run(capsys, "admit", kits / "ward-1", code=2)
    assert "is no kit of a coordinator" in said


def test_an_office_that_another_process_is_in_is_left_alone(made, tmp_path):
    script = (
        "import sys; from server.holders import Office; from pathlib import Path\n"
        f"with Office(Path({str(made)!r})).locked(): print('in', flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", script], stdin=-1, stdout=-1, text=True, cwd=ROOT
    ) as other:
        assert other.stdout.readline() == "in\n"
        assert main(["provision", "renew", str(made)]) == 2
        other.communicate()


def test_a_crash_between_kit_and_book_loses_no_key(made, tmp_path, capsys):
    """The kit is there, and the book does not know it yet: its keys are taken as they are."""
    book = json.loads((made / "authority" / "holders.json").read_text())
    del book["holders"]["ward-3"]
    (made / "authority" / "holders.json").write_text(json.dumps(book))
    key = (made / "kits" / "ward-3" / "node.key").read_bytes()
    run(capsys, describe(tmp_path), "--to", made)
    assert (made / "kits" / "ward-3" / "node.key").read_bytes() == key
    assert check_seal(made / "kits" / "ward-3", key=key_of(made))


def test_a_key_that_was_put_in_the_place_of_another_is_not_sealed(made, tmp_path, capsys):
    shutil.copy(made / "kits" / "ward-1" / "node.key", made / "kits" / "ward-2" / "node.key")
    said = run(capsys, describe(tmp_path), "--to", made, code=5)
    assert "node.key: is not the key that was made for ward-2" in said


def test_the_manifests_start_what_the_kits_are_for(first):
    for name in SECRETS:
        kit = first / "kits" / name
        compose = yaml.safe_load((kit / "compose.yaml").read_text())
        assert all(each["image"] for each in compose["services"].values())
        assert all(each["cap_drop"] == ["ALL"] for each in compose["services"].values())
        documents = [*yaml.safe_load_all((kit / "kubernetes.yaml").read_text())]
        (deployment,) = [each for each in documents if each["kind"] == "Deployment"]
        pod = deployment["spec"]["template"]["spec"]
        assert deployment["spec"]["replicas"] == 1
        assert pod["securityContext"]["runAsNonRoot"] is True
        for container in pod["containers"]:
            assert {"livenessProbe", "readinessProbe"} <= {*container}
            assert container["securityContext"]["readOnlyRootFilesystem"] is True
        volumes = {each["name"] for each in pod["volumes"]}
        for container in [*pod["initContainers"], *pod["containers"]]:
            assert {each["name"] for each in container["volumeMounts"]} <= volumes
    # The SuperLink publishes the door's port and not its own.
    services = yaml.safe_load((first / "kits" / "coordinator" / "compose.yaml").read_text())[
        "services"
    ]
    assert services["superlink"]["ports"] == ["8443:8443"]
    assert services["door"]["network_mode"] == "service:superlink"


def test_the_units_are_such_that_systemd_takes_them(first, tmp_path):
    if shutil.which("systemd-analyze") is None:
        pytest.skip("systemd-analyze is not installed")
    program = tmp_path / "program"
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    units = [
        *(first / "kits").glob("coordinator/*.service"),
        first / "kits/ward-1/coterie-node.service",
    ]
    assert len(units) == 3
    for unit in units:
        # The programs are not installed here: another one stands in for them.
        text = unit.read_text().replace("/usr/sbin/nginx", str(program))
        text = text.replace(f"={PATHS['bin']}/coterie", f"={program}")
        (tmp_path / unit.name).write_text(text)
        done = subprocess.run(
            ["systemd-analyze", "verify", "--man=no", str(tmp_path / unit.name)],
            capture_output=True,
            text=True,
            check=False,
        )
        said = [line for line in done.stderr.splitlines() if unit.name in line]
        assert not said


@pytest.mark.skipif(find_nginx() is None, reason="nginx is missing: apt-get install nginx-light")
@pytest.mark.parametrize("stock", [False, True])
def test_nginx_takes_the_configurations(stock, tmp_path, capsys):
    hosts = {"hosts": ["127.0.0.1"], "listen": "127.0.0.1", "port": 65001}
    made = tmp_path / "made"
    run(capsys, describe(tmp_path, coordinator=hosts, stock_supernodes=stock), "--to", made)
    configurations = [*(made / "kits").glob("*/nginx.conf")]
    assert len(configurations) == (4 if stock else 1)
    for path in configurations[:2]:
        words = [find_nginx(), "-t", "-q", "-e", "stderr", "-p", f"{tmp_path}/", "-c", str(path)]
        assert subprocess.run(words, capture_output=True, text=True, check=True).stderr == ""
    text = (made / "kits" / "coordinator" / "nginx.conf").read_text()
    assert "|".join(STOCK_CALLS if stock else CALLS) in text
    assert ("get-fab" in text) is stock


def test_the_door_lets_through_what_a_node_calls_and_nothing_else():
    from tests.client.test_fleet import CALLS as CALLED

    assert {f"/v1/fleet/{call}" for call in CALLS} == {path for path, _ in CALLED.values()}


def test_the_superlink_cuts_vectors_into_the_parts_that_its_door_lets_in(first):
    name = "FLWR_PRIVATE_MAX_ARRAY_CHUNK_SIZE"
    kit, size = first / "kits" / "coordinator", ENVIRONMENT[name]
    compose = yaml.safe_load((kit / "compose.yaml").read_text())
    assert compose["services"]["superlink"]["environment"][name] == size
    documents = [*yaml.safe_load_all((kit / "kubernetes.yaml").read_text())]
    (pod,) = [
        each["spec"]["template"]["spec"] for each in documents if each["kind"] == "Deployment"
    ]
    (superlink,) = [each for each in pod["containers"] if each["name"] == "superlink"]
    assert {"name": name, "value": size} in superlink["env"]
    assert f"Environment={name}={size}\n" in (kit / "coterie-superlink.service").read_text()
    (allowed,) = re.findall(r"client_max_body_size (\d+)m;", (kit / "nginx.conf").read_text())
    assert int(size) < int(allowed) << 20


def test_the_dockerfile_breaks_no_rule_of_hadolint():
    program = Path(sys.executable).with_name("hadolint")
    if not program.exists():
        pytest.skip("hadolint is not installed")
    done = subprocess.run(
        [program, ROOT / "deploy" / "Dockerfile"], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (0, "")


def test_what_the_dockerfile_copies_is_there():
    lines = (ROOT / "deploy" / "Dockerfile").read_text().splitlines()
    copied = [word for line in lines if line.startswith("COPY") for word in line.split()[1:-1]]
    allowed = (ROOT / "deploy" / "Dockerfile.dockerignore").read_text().split()
    assert len(copied) >= 8
    for each in copied:
        assert (ROOT / each).exists()
        assert f"!{each}" in allowed


def test_help_shows_an_example(capsys):
    for words in (["--help"], ["make", "--help"], ["renew", "--help"], ["admit", "--help"]):
        assert main(["provision", *words]) == 0
        assert "coterie provision" in " ".join(capsys.readouterr().out.split())


def test_a_book_that_is_altered_is_said(made, capsys):
    (made / "authority" / "holders.json").write_text("[]")
    assert "malformed; restore it from a backup" in run(capsys, "renew", made, code=5)


def test_an_authority_that_has_ended_signs_nothing(made):
    from common.certificates import Authority

    authority = Authority(made / "authority" / "ca.crt", made / "authority" / "ca.key")
    later = datetime.now(UTC) + timedelta(days=4000)
    public = authority.read().public_key()
    with pytest.raises(ConfigError, match="provision the federation anew"):
        authority.sign("late", public, now=later)
    nearly = authority.read().not_valid_after_utc - timedelta(days=3)
    signed = authority.sign("nearly", public, days=365, now=nearly)
    assert signed.not_valid_after_utc <= authority.read().not_valid_after_utc

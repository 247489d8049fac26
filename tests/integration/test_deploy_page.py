"""docs/deploy.md, run as it stands: ten commands to a report, then every recipe, on loopback.

Machines are folders; `systemctl` starts and stops what a kit's unit says, `scp` copies, and what
would install is only looked up. Everything else runs as it is written there.
"""

import csv
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import threading
import time
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import grpc
import httpx
import pytest
from grpc_health.v1.health_pb2 import HealthCheckRequest
from grpc_health.v1.health_pb2_grpc import HealthStub
from prometheus_client.parser import text_string_to_metric_families

from common.cli import ENVIRONMENT
from common.keys import read_private_key
from common.privacy.chain import public_hex
from simulations.deployment import READY, Running, free_port

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "deploy.md").read_text()
BLOCK = re.compile(r"^```(bash|yaml) ([^\n]+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
PROGRAM = "import sys; from common.cli import main; sys.exit(main())"
TINY = (
    "tracking=tensorboard task.max_tokens=12 federation.rounds=3 federation.local_steps=1 "
    "engine.threads=1"
)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("nginx") is None, reason="the door is nginx; install it"),
]


def blocks(kind):
    return [(info.split(), text) for k, info, text in BLOCK.findall(PAGE) if k == kind]


@dataclass
class Place:
    """All machines of the page, as folders of one."""

    folder: Path
    model: Path
    ports: dict[str, int] = field(default_factory=dict)
    running: dict[tuple[str, str], Running] = field(default_factory=dict)
    head: str = ""
    said: list[str] = field(default_factory=list)

    def port(self, machine, number):
        return str(self.ports.setdefault(f"{machine}:{number}", free_port()))

    def here(self, text, machine):
        """A text of the page, for this machine's folder and ports."""
        own = self.folder / machine
        for path in ("/etc/coterie", "/var/lib/coterie", "/var/backups", "/srv"):
            text = re.sub(rf"(?<![\w.]){path}(?![\w-])", f"{own}{path}", text)
        text = text.replace("coordinator.example.org", "localhost").replace("HEAD", self.head)
        for number in (8000, 8081):
            port = self.port("all", number)
            text = re.sub(rf"127\.0\.0\.1:{number}\b", f"127.0.0.1:{port}", text)
        text = re.sub(r"\b(946[45])\b", lambda found: self.port(machine, found[1]), text)
        return text.replace("OFFICER", self.officer) if "OFFICER" in text else text

    @property
    def officer(self):
        key = next((self.folder / "provisioner/federation/officer").glob("*.key"))
        return public_hex(read_private_key(key))

    def environment(self, machine):
        return {
            **os.environ,
            **ENVIRONMENT,
            "PYTHONPATH": str(ROOT),
            "PATH": os.pathsep.join(
                (f"{self.folder / 'bin'}", f"{Path(sys.executable).parent}", os.environ["PATH"])
            ),
            "FLWR_HOME": str(self.folder / machine / "flower"),
            "OMP_NUM_THREADS": "1",
            "COLUMNS": "300",
        }

    def do(self, name, *marks, code=0):
        """Runs the blocks of a machine, of one recipe."""
        found = [text for info, text in blocks("bash") if info == [name, *marks]]
        assert found, f"the page has no block {name} {marks}"
        for text in found:
            lines = text.splitlines()
            for place, line in enumerate(lines):
                self.line(line, name, code=code if place == len(lines) - 1 else 0)

    def line(self, line, machine, code=0):
        (self.folder / machine).mkdir(exist_ok=True)
        words = shlex.split(line)
        if words[0] == "systemctl":
            self.systemctl(words[1:], machine)
        elif words[0] == "git":
            assert words[1:3] == ["-C", "/opt/coterie"]
        elif words[0] == "make":
            dry = subprocess.run(["make", "--dry-run", words[3]], cwd=ROOT, check=False)
            assert dry.returncode == 0
        elif words[0] == "scp":
            self.copy(*words[2:], machine)
        else:
            self.run(self.with_tiny(line), machine, code)

    def with_tiny(self, line):
        """Runs of the page train the suite's tiny model."""
        if re.match("coterie (submit|doctor)", line) and "privacy.epsilon" in line:
            return f"{line} {TINY} model.name={self.model}"
        if line.startswith("coterie provision admit"):
            return f"{line} --state /var/lib/coterie"
        return line

    def run(self, line, machine, code):
        done = subprocess.run(
            ["bash", "-c", self.here(line, machine)],
            env=self.environment(machine),
            cwd=self.folder / machine,
            capture_output=True,
            text=True,
            check=False,
        )
        self.said.append(done.stdout + done.stderr)
        assert done.returncode == code, f"{line}\n{done.stdout}{done.stderr}"

    def copy(self, source, target, machine):
        there, _, path = target.partition(":")
        goal = Path(self.here(path, there))
        goal.parent.mkdir(parents=True, exist_ok=True)
        begin = Path(self.here(source, machine))
        if not begin.is_absolute():
            begin = self.folder / machine / source
        whole = f"{begin}/." if source.endswith("/.") else str(begin)
        if source.endswith("/."):
            goal.mkdir(parents=True, exist_ok=True)
        subprocess.run(["cp", "-rp", whole, str(goal)], check=True)

    def systemctl(self, words, machine):
        verb, *units = words
        for each in (unit for unit in units if not unit.startswith("-")):
            name = Path(each).name.removesuffix(".service")
            if verb in ("stop", "restart"):
                assert self.running.pop((machine, name)).stop() == 0
            if verb != "stop":
                self.start(machine, name)

    def start(self, machine, name):
        kit = self.folder / machine / "etc/coterie/kit"
        unit = (kit / f"{name}.service").read_text()
        command = re.search(r"^ExecStart=(.*)$", unit, re.MULTILINE)[1]
        command = self.here(command, machine).replace("/opt/coterie/.venv/bin/", "")
        (self.folder / machine / "var/lib/coterie/door").mkdir(parents=True, exist_ok=True)
        words = shlex.split(command)
        program = shutil.which(words[0], path=self.environment(machine)["PATH"])
        log = self.folder / f"{machine}-{name}.log"
        log.unlink(missing_ok=True)
        process = Running((program, *words[1:]), log, self.environment(machine))
        self.running[machine, name] = process
        self.until(lambda: self.is_ready(name, log), process)

    def is_ready(self, name, log):
        if name == "coterie-node":
            return READY in log.read_text()
        number = 8000 if name == "coterie-superlink" else 8443
        port = int(self.port("all", number))
        try:
            httpx.get(f"https://127.0.0.1:{port}", verify=False, timeout=1)
        except httpx.ConnectError:
            return False
        except httpx.HTTPError:
            return True
        return True

    def until(self, holds, process, seconds=90):
        deadline = time.monotonic() + seconds
        while not holds():
            process.check_alive()
            assert time.monotonic() < deadline, process.said
            time.sleep(0.1)


def rows(tiny_csv, path, places):
    with tiny_csv.open(newline="") as source, path.open("w", newline="") as file:
        head, *lines = csv.reader(source)
        csv.writer(file).writerows([head, *lines[places]])


@pytest.fixture(scope="module")
def place(tmp_path_factory, tiny_csv, tiny_model):
    """The machines, with records, and the page's own files."""
    made = Place(tmp_path_factory.mktemp("deploy"), tiny_model)
    (made.folder / "bin").mkdir()
    coterie = made.folder / "bin/coterie"
    coterie.write_text(f"#!{sys.executable}\n{PROGRAM}\n")
    coterie.chmod(0o755)
    for machine in ("provisioner", "coordinator", "ward-1", "ward-1-new"):
        for name in ("srv", "etc/coterie", "var/lib/coterie", "var/backups"):
            (made.folder / machine / name).mkdir(parents=True)
    rows(tiny_csv, made.folder / "coordinator/srv/public.csv", slice(0, 30))
    rows(tiny_csv, made.folder / "ward-1/srv/notes.csv", slice(30, None))
    for (name,), text in blocks("yaml"):
        machine = "ward-1" if name.startswith("/") else "provisioner"
        path = (
            Path(made.here(name, machine))
            if machine == "ward-1"
            else (made.folder / machine / name)
        )
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(made.here(text, machine))
    federation = made.folder / "provisioner/federation.yaml"
    ports = f"  port: {made.port('all', 8443)}\n  control_port: {made.port('all', 8000)}\n"
    federation.write_text(federation.read_text().replace("sites:", f"{ports}sites:"))
    own = made.folder / "ward-1/etc/coterie/conf.d/site/ward-1.yaml"
    # The kit's own settings say where the ledger is on a real machine.
    own.write_text(
        made.here(f"{own.read_text()}ledger: /var/lib/coterie/books.db\nthreads: 1\n", "ward-1")
    )
    yield made
    for process in made.running.values():
        process.stop()


def scrape(port):
    answer = httpx.get(f"http://127.0.0.1:{port}/metrics")
    assert answer.is_success
    return {
        (sample.name, *(value for _, value in sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(answer.text)
        for sample in family.samples
    }


@contextmanager
def scraped_on(port):
    """What Prometheus reads meanwhile, several times a second."""
    over, found = threading.Event(), []

    def scrape_on():
        while not over.wait(0.3):
            with suppress(httpx.TransportError):  # the monitor may still be starting
                found.append(scrape(port))

    thread = threading.Thread(target=scrape_on)
    thread.start()
    try:
        yield found
    finally:
        over.set()
        thread.join()


def well(port, service):
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        answer = HealthStub(channel).Check(HealthCheckRequest(service=service), timeout=5)
    return answer.status == 1


def report_of(place, run="first"):
    path = place.folder / "coordinator/var/lib/coterie/runs" / run / "report.json"
    return json.loads(path.read_text())


def test_the_page_has_ten_commands():
    numbered = [int(number) for number in re.findall(r"^\*\*(\d+)\.\*\*", PAGE, re.MULTILINE)]
    assert numbered == [*range(1, 11)]
    lines = [line for info, text in blocks("bash") if len(info) == 1 for line in text.splitlines()]
    assert len(lines) == 12  # command 3 copies twice, and one watches


def test_ten_commands_lead_to_a_report_that_its_metrics_agree_with(place):
    monitor = None
    try:
        for info, text in blocks("bash"):
            if len(info) > 1:
                continue
            for line in text.splitlines():
                if line.startswith("coterie submit"):
                    monitor = watching(place)
                    with scraped_on(place.port("coordinator", 9464)) as found:
                        place.line(line, info[0])
                elif not line.startswith("coterie monitor"):
                    place.line(line, "coordinator" if info[0] == "both" else info[0])
        rounds = [each.get(("coterie_run_round", "first"), 0) for each in found]
        assert rounds == sorted(rounds)
        assert 0 <= rounds[0] < 3  # while the run was going on
        check_metrics(place)
    finally:
        if monitor is not None:
            monitor.stop()


def watching(place):
    (line,) = [
        line
        for _, text in blocks("bash")
        for line in text.splitlines()
        if "coterie monitor" in line
    ]
    words = shlex.split(place.here(line.removesuffix("&"), "coordinator"))
    log = place.folder / "monitor.log"
    program = str(place.folder / "bin/coterie")
    return Running((program, *words[1:]), log, place.environment("coordinator"))


def check_metrics(place):
    """What Prometheus reads once the run is over is what the report says."""
    report, port = report_of(place), place.port("coordinator", 9464)
    found = scrape(port)
    (site,) = report["sites"]
    assert found["coterie_run_state", "first", "finished"] == 1
    assert found["coterie_run_round", "first"] == report["rounds"] == 3
    assert found["coterie_run_rounds", "first"] == 3
    assert found["coterie_run_replies_total", "accepted", "first", "ward-1"] == site["rounds"]
    assert found["coterie_run_replies_total", "refused", "first", "ward-1"] == 0
    bytes_ = report["communication"]
    assert found["coterie_run_bytes_total", "down", "first"] == bytes_["bytes_down"]
    assert found["coterie_run_bytes_total", "up", "first"] == bytes_["bytes_up"]
    spent = found["coterie_site_epsilon_spent", "first", "ward-1"]
    assert spent == pytest.approx(site["epsilon"], rel=2e-3)
    assert found["coterie_run_epsilon", "first"] == pytest.approx(site["epsilon"], rel=2e-3)
    assert found["coterie_site_epsilon_cap", "first", "ward-1"] == site["cap"] == 12
    left = found["coterie_site_epsilon_remaining", "first", "ward-1"]
    assert left == pytest.approx(12 - spent)
    for name, value in report["evaluation"].items():
        assert found["coterie_run_evaluation", name, "first"] == value
    node = scrape(place.port("ward-1", 9464))
    assert node["coterie_node_answers_total", "answered"] == site["rounds"]
    assert node["coterie_node_connected",] == 1
    assert node["coterie_node_epsilon_spent",] == pytest.approx(spent)
    assert node["coterie_node_sent_bytes_total",] >= bytes_["bytes_up"]
    assert node["coterie_node_received_bytes_total",] >= bytes_["bytes_down"]
    assert well(place.port("ward-1", 9465), "node")
    assert well(place.port("coordinator", 9465), "run")
    runs = place.folder / "coordinator/var/lib/coterie/runs"
    assert [*(runs / "first/tensorboard").glob("events.*")]  # the ServerApp's own tracker
    patience = time.monotonic() + 20  # the monitor looks now and then
    while (last := told_last(place))["state"] != "finished" and time.monotonic() < patience:
        time.sleep(0.2)
    assert (last["state"], last["round"]) == ("finished", 3)
    log = (place.folder / "ward-1-coterie-node.log").read_text()
    answers = [json.loads(line)["message"] for line in log.splitlines() if line.startswith("{")]
    assert sum("answered" in message for message in answers) == 3
    place.head = site["ledger_head"]


def told_last(place):
    """The monitor's last word about the run."""
    lines = (place.folder / "monitor.log").read_text().splitlines()
    return [event for event in map(json.loads, lines) if event.get("run") == "first"][-1]


def test_a_backup_is_restored_and_an_older_one_is_noticed(place):
    assert place.head, "the run comes first"
    place.do("ward-1", "backup")
    first = place.head
    place.run(place.with_tiny(submit(place, "second")), "coordinator", 0)
    place.head = report_of(place, "second")["sites"][0]["ledger_head"]
    place.do("ward-1", "restore", code=5)
    assert "never had the head" in " ".join(place.said[-1].split())
    place.head, newest = first, place.head
    place.run(restored(place), "ward-1", 0)  # whoever knows the older head only sees nothing
    place.systemctl(["start", "coterie-node"], "ward-1")
    place.run(f"{place.with_tiny(submit(place, 'third'))} privacy.spare_rounds=0", "coordinator", 4)
    log = (place.folder / "ward-1-coterie-node.log").read_text()
    assert "refused" in log
    place.systemctl(["stop", "coterie-node"], "ward-1")
    place.head = newest
    place.do("ward-1", "undo")


def submit(place, run):
    (line,) = [
        line for _, text in blocks("bash") for line in text.splitlines() if "coterie submit" in line
    ]
    return line.replace("runs/first", f"runs/{run}")


def restored(place):
    (text,) = [text for info, text in blocks("bash") if info == ["ward-1", "restore"]]
    return text.splitlines()[-1]


def test_new_keys_let_the_node_in_again(place):
    old = (place.folder / "ward-1/etc/coterie/kit/node.key").read_bytes()
    for machine in ("provisioner", "coordinator", "ward-1"):
        place.do(machine, "key")
    assert (place.folder / "ward-1/etc/coterie/kit/node.key").read_bytes() != old


def test_a_node_moves_to_another_machine_and_is_upgraded_there(place):
    place.do("ward-1", "move")
    own = place.folder / "ward-1-new/etc/coterie/conf.d/site/ward-1.yaml"
    own.write_text(
        own.read_text().replace("/ward-1/", "/ward-1-new/")
    )  # folders stand for machines
    place.do("ward-1-new", "move")
    place.do("ward-1-new", "upgrade")
    place.run(place.with_tiny(submit(place, "fourth")), "coordinator", 0)
    assert report_of(place, "fourth")["sites"][0]["rounds"] == 3

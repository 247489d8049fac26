"""A whole deployment on loopback: `coterie superlink` with TLS and node authentication, node
processes, runs submitted by `coterie submit`, and what becomes of them when something is killed.

Nothing is faked. Weights are compared to the bit with those of `engine=local`, so noise is seeded,
which the nodes allow in their own configuration; that is for tests.
"""

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import httpx
import numpy as np
import pytest
from flwr.proto.fleet_pb2 import PushMessagesRequest
from flwr.proto.message_pb2 import Message, Metadata
from flwr.proto.node_pb2 import Node

from benchmarks.processes import family
from client.fleet import Fleet
from common.certificates import read_node_key
from server.checkpoint import read_last
from server.report import read_report
from server.superlink import FORBIDDEN
from simulations.deployment import COTERIE, Deployment

pytestmark = pytest.mark.slow
ROUNDS = 8
NODE = ("data.labels=[sport,money]", "node=open", "allow_unprotected=true")
NAMES = ("site-1", "site-2", "site-3")
PUBLIC = 30
"""Of the tiny records the first are public, and the rest are dealt to the sites in turn."""


LISTENING = (
    *(sys.executable, "-c"),
    "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler); "
    "from common.cli import main; sys.exit(main())",
)
"""`coterie` that hears Ctrl-C, though a shell in the background has its children ignore it."""


def write(path, header, rows):
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(header)
        writer.writerows(rows)
    return path


@pytest.fixture(scope="module")
def records(tiny_csv, tmp_path_factory):
    """The public file, the records of each site, and one file of all with the name of each's."""
    folder = tmp_path_factory.mktemp("records")
    with tiny_csv.open(newline="") as file:
        rows = [*csv.reader(file)][1:]
    private = [(*row, NAMES[place % 3]) for place, row in enumerate(rows[PUBLIC:])]
    # A simulation asks every file for its columns.
    public = [(*row, "nowhere") for row in rows[:PUBLIC]]
    write(folder / "public.csv", ("text", "label", "site"), public)
    write(folder / "all.csv", ("text", "label", "site"), private)
    for name in NAMES:
        own = [row[:2] for row in private if row[2] == name]
        write(folder / f"{name}.csv", ("text", "label"), own)
    return folder


@pytest.fixture(scope="module")
def settings(records, tiny_overrides):
    """Of the run, wherever it runs."""
    theirs = [each for each in tiny_overrides if not each.startswith(("data.path", "federation"))]
    return [
        *theirs,
        f"data.test_path={records / 'public.csv'}",
        "data.declared_records=90",
        "federation.sites=3",
        f"federation.rounds={ROUNDS}",
        "federation.local_steps=1",
        "federation.round_timeout_s=120",
        "privacy.noise=seeded",
        "privacy.spare_rounds=2",
        "engine.together=1",
    ]


@pytest.fixture(scope="module")
def expected(records, settings, tmp_path_factory):
    """The weights that a simulation ends with: the same sites, the same records."""
    run_dir = tmp_path_factory.mktemp("local") / "run"
    own = (
        *(f"data.path={records / 'all.csv'}", "data.site_column=site"),
        *("federation.partition=natural", "data.validation_fraction=0", f"run_dir={run_dir}"),
    )
    command = [*COTERIE, "simulate", *settings, *own]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return read_last(run_dir / "checkpoints")


@pytest.fixture(scope="module")
def deployment(records, tmp_path_factory):
    with Deployment(tmp_path_factory.mktemp("deployment"), NAMES) as made:
        made.start_superlink()
        made.keys = made.enrol_all(cap=100.0, delta=1e-3, dataset="tiny")
        for site in made.sites:
            site.records.write_bytes((records / f"{site.name}.csv").read_bytes())
            made.start_node(site, *NODE)
        made.wait_for_nodes()
        yield made


def call(deployment, *arguments, code=0):
    """One `coterie` of its own; what it said."""
    done = subprocess.run(
        [*COTERIE, *map(str, arguments)],
        env=deployment.environment,
        cwd=deployment.folder,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr


def lines_of(run_dir):
    path = run_dir / "metrics.jsonl"
    text = path.read_text() if path.exists() else ""
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


def submitted(deployment, run_dir, settings, *more):
    """A `coterie submit` in the background, returned once two rounds are over."""
    command = [
        *LISTENING,
        "submit",
        *deployment.submitted_to,
        f"run_dir={run_dir}",
        *settings,
        *more,
    ]
    path = deployment.folder / f"{run_dir.name}.log"
    with path.open("ab") as log:
        process = subprocess.Popen(
            command, env=deployment.environment, cwd=deployment.folder, stdout=log, stderr=log
        )
    deadline = time.monotonic() + 120
    while len(lines_of(run_dir)) < 2:
        assert process.poll() is None, path.read_text()
        assert time.monotonic() < deadline, path.read_text()
        time.sleep(0.05)
    return process


def wait_until_interrupted(deployment, run_dir):
    deadline = time.monotonic() + 90
    while json.loads(call(deployment, "status", run_dir, "--json"))["state"] != "interrupted":
        assert time.monotonic() < deadline


def check_finished(deployment, run_dir, expected):
    """It ended as an unbroken run does: the same bits, no round lost or doubled, and books that
    hold at least what was released.
    """
    assert np.array_equal(read_last(run_dir / "checkpoints"), expected)
    assert [line["round"] for line in lines_of(run_dir)] == [*range(1, ROUNDS + 1)]
    report, _ = read_report(run_dir)
    assert report["rounds"] == ROUNDS
    assert report["privacy"]["private"] is False
    verdicts = deployment.verify_books(run_dir, deployment.keys)
    for site in report["sites"]:
        assert site["rounds"] == ROUNDS
        assert verdicts[site["name"]]["head_pinned"]
        assert site["epsilon"] == "inf" or site["epsilon"] > 0
    return report


def serverapps(deployment):
    """Processes that the SuperLink's own children started for ServerApps, by id."""
    mine = family(deployment.superlink.process.pid)
    arguments = {pid: Path(f"/proc/{pid}/cmdline").read_bytes() for pid in mine}
    return [pid for pid, words in arguments.items() if b"flwr-serverapp" in words]


def test_a_submitted_run_ends_with_the_weights_of_a_simulation(
    deployment, settings, expected, tmp_path
):
    run_dir = tmp_path / "run"
    said = call(deployment, "submit", *deployment.submitted_to, *settings, f"run_dir={run_dir}")
    assert f"round {ROUNDS}/{ROUNDS}" in said
    check_finished(deployment, run_dir, expected)
    answer = json.loads(call(deployment, "status", run_dir, "--json"))
    assert answer["state"] == "finished"
    assert answer["superlink"] == "finished:completed"
    assert answer["nodes"] == dict.fromkeys(NAMES, "online")
    assert f"round {ROUNDS}/{ROUNDS}" in call(deployment, "logs", run_dir)
    # The program that ran is the bundle that was submitted, not one that happens to be installed.
    installed = [*(Path(deployment.environment["FLWR_HOME"]) / "apps").glob("coterie.coterie.*")]
    assert len(installed) == 1
    assert (installed[0] / "server" / "bundled.py").is_file()
    assert not (installed[0] / "simulations").exists()


def test_a_superlink_that_is_killed_costs_no_round(deployment, settings, expected, tmp_path):
    run_dir = tmp_path / "cut"
    process = submitted(deployment, run_dir, settings)
    deployment.superlink.kill()
    process.send_signal(signal.SIGINT)
    process.wait(60)
    assert len(lines_of(run_dir)) < ROUNDS
    deployment.start_superlink()
    wait_until_interrupted(deployment, run_dir)  # its ServerApp ends by itself, in a moment
    call(deployment, "submit", "resume=auto", f"run_dir={run_dir}")
    report = check_finished(deployment, run_dir, expected)
    assert len(report["resumed_after"]) == 1


def test_a_serverapp_that_is_killed_costs_no_round(deployment, settings, expected, tmp_path):
    run_dir = tmp_path / "dead"
    process = submitted(deployment, run_dir, settings)
    (serverapp,) = serverapps(deployment)
    os.kill(serverapp, signal.SIGKILL)
    process.send_signal(signal.SIGINT)
    process.wait(60)
    assert json.loads(call(deployment, "status", run_dir, "--json"))["state"] == "interrupted"
    call(deployment, "submit", "resume=auto", f"run_dir={run_dir}")
    report = check_finished(deployment, run_dir, expected)
    assert len(report["resumed_after"]) == 1


def test_a_run_that_is_stopped_goes_on_where_it_was(deployment, settings, expected, tmp_path):
    run_dir = tmp_path / "stopped"
    process = submitted(deployment, run_dir, settings)
    node = deployment.nodes["site-1"].process
    node.send_signal(signal.SIGSTOP)  # so that the run cannot end meanwhile
    call(deployment, "submit", "resume=auto", f"run_dir={run_dir}", code=2)  # it goes on
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 130
    assert "resume=auto" in call(deployment, "stop", run_dir)
    node.send_signal(signal.SIGCONT)
    wait_until_interrupted(deployment, run_dir)
    call(deployment, "submit", "resume=auto", f"run_dir={run_dir}")
    check_finished(deployment, run_dir, expected)


def test_a_node_that_is_killed_costs_no_round(deployment, settings, expected, tmp_path):
    run_dir = tmp_path / "node"
    process = submitted(deployment, run_dir, settings)
    node = deployment.nodes["site-2"]
    node.kill()
    node.start()
    assert process.wait(240) == 0
    check_finished(deployment, run_dir, expected)


def test_a_hostile_site_costs_nobody_else_a_round(deployment, settings, tmp_path):
    """Each round it sends another kind of nonsense, over the real wire: rejected one by one."""
    site = deployment.sites[2]
    deployment.nodes[site.name].stop()
    here = Path(__file__).with_name("hostile_node.py")
    deployment.start_node(site, *NODE, command=(sys.executable, str(here)))
    deployment.wait_for_nodes()
    run_dir = tmp_path / "hostile"
    changes = ("privacy=none", "federation.quorum=0.6", f"run_dir={run_dir}")
    call(deployment, "submit", *deployment.submitted_to, *settings, *changes)
    lines = lines_of(run_dir)
    assert [{*line["refused"]} for line in lines] == [{"site-3"}] * ROUNDS
    said = [line["refused"]["site-3"] for line in lines]
    for text, words in zip(said, HOSTILE, strict=True):
        assert words in text, said
    deployment.nodes[site.name].stop()
    deployment.start_node(site, *NODE)
    deployment.wait_for_nodes()


HOSTILE = (
    "finite",
    "expected float32",
    "another layout",
    "another run or round",
    "another run or round",
    "not one flat float32 vector",
    "could not be read",
    "must hold",
)
"""What is said of each kind of nonsense, in the order of `hostile_node.KINDS`."""


def test_a_node_cannot_instruct_another_nor_answer_for_it(deployment):
    """With its own key, over the real line; Flower itself would hand both on."""
    site = deployment.sites[2]
    deployment.nodes[site.name].stop()
    fleet = Fleet(deployment.address, deployment.authority.certificate, read_node_key(site.key))
    fleet.join()
    own = fleet.node_id
    facts = {
        "run_id": 1,
        "message_id": "0" * 64,
        "message_type": "train",
        "created_at": time.time(),
    }
    instruction = {"src_node_id": own, "dst_node_id": own + 1, "ttl": 60.0}
    for_another = {"src_node_id": own + 1, "dst_node_id": 1, "reply_to_message_id": "1" * 64}
    for forged in (instruction, for_another):
        message = Message(metadata=Metadata(**facts, **forged))
        request = PushMessagesRequest(node=Node(node_id=own), messages_list=[message])
        with pytest.raises(httpx.HTTPStatusError) as refused:
            fleet._client.PushMessages(request)
        assert refused.value.response.content == FORBIDDEN
    fleet.leave()
    deployment.start_node(site, *NODE)
    deployment.wait_for_nodes()


def test_what_a_superlink_that_is_not_there_is_told_in_one_line(deployment, settings, tmp_path):
    authority = deployment.authority.certificate
    nowhere = ("superlink.address=127.0.0.1:1", f"superlink.ca={authority}")
    said = call(deployment, "submit", *settings, *nowhere, f"run_dir={tmp_path / 'no'}", code=4)
    assert (
        said.strip()
        .splitlines()[-1]
        .startswith("coterie submit: superlink.address=127.0.0.1:1: could not start a run: ")
    )
    assert not (tmp_path / "no").exists()


@pytest.mark.alone
def test_the_demonstration_ends_with_a_report_within_three_minutes():
    """`make deploy-demo`, as it stands, on BBC News and the pretrained model."""
    started = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", "simulations.deployment"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    path = Path(done.stdout.strip().splitlines()[-1])
    report = json.loads(path.read_text())
    assert report["engine"] == "superlink"
    assert report["privacy"]["private"] is True
    assert 0 < report["privacy"]["epsilon"]["pld"] <= 3
    assert report["evaluation"]["accuracy"] > 0.85
    assert {site["name"] for site in report["sites"]} == {*NAMES}
    assert done.stdout.count("nothing wrong in") == 3
    assert time.monotonic() - started < 180

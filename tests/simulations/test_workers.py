"""Workers answer as this process would, and what happens to one of them happens to no run."""

import gc
import json
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, Message, RecordDict
from flwr.serverapp.strategy import FedAvg

from client.ledger import Store
from common.config import EngineConfig
from common.messages import LOCAL_FAILURE
from simulations.answer import partition_of
from simulations.grid import LocalGrid
from simulations.workers import MOST_DEATHS, Workers, homes, threads_of, workers_of
from tests.simulations import apps

NEVER = lambda _: False  # noqa: E731
COTERIE = [
    *(sys.executable, "-c"),
    # Where this suite runs in the background, a shell has it ignore what Ctrl-C sends.
    "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler); "
    "from common.cli import main; sys.exit(main())",
]


@pytest.fixture
def started():
    """Makes a grid of workers; all are ended afterwards."""
    made = []

    def start(answer_of, *, sites=3, workers=2, work=None, lost=NEVER, **more):
        crew = Workers(
            answer_of, workers=workers, threads=1, work=work or [1.0] * sites, lost=lost, **more
        )
        made.append(crew)
        return LocalGrid(crew, [f"site-{n + 1}" for n in range(sites)])

    yield start
    for crew in made:
        crew.close()


def outgoing(grid, values=None, kind="train", **more):
    arrays = ArrayRecord({"w": Array(np.zeros(3) if values is None else values)})
    content = RecordDict({"arrays": arrays})
    return [Message(content, node, kind, **more) for node in grid.get_node_ids()]


def asked(grid, *, timeout=30, **more):
    """What each site answers, in their order."""
    replies = grid.send_and_receive(outgoing(grid, **more), timeout=timeout)
    return sorted(replies, key=lambda reply: reply.metadata.src_node_id)


def metrics(replies, name):
    return [reply.content["metrics"][name] for reply in replies]


def handles():
    gc.collect()
    return len(os.listdir("/proc/self/fd"))


def test_unmodified_fedavg_runs_over_workers(started):
    grid = started(apps.adding)
    result = FedAvg(min_train_nodes=3, min_evaluate_nodes=3, min_available_nodes=3).start(
        grid, ArrayRecord({"w": Array(np.zeros(3))}), num_rounds=3, timeout=60
    )
    assert result.arrays["w"].numpy() == pytest.approx(np.full(3, 3.0))
    means = [result.evaluate_metrics_clientapp[n]["mean"] for n in (1, 2, 3)]
    assert means == pytest.approx([1.0, 2.0, 3.0])


def test_every_message_is_answered_once_by_the_site_it_was_for(started):
    grid = started(apps.adding, sites=7)
    ids = grid.push_messages(outgoing(grid))
    replies = []
    while len(replies) < 7:
        replies += grid.pull_messages(ids)
    assert sorted(reply.metadata.reply_to_message_id for reply in replies) == sorted(ids)
    values = {r.metadata.src_node_id: r.content["arrays"]["w"].numpy()[0] for r in replies}
    assert values == {node: node - 2 for node in grid.get_node_ids()}
    assert grid.pull_messages(ids) == []


def test_a_worker_makes_ready_what_comes_next_until_it_comes(started):
    grid = started(apps.Restless, sites=4)
    first = metrics(asked(grid), "rests")
    time.sleep(0.5)
    then = metrics(asked(grid), "rests")
    assert all(before < after for before, after in zip(first, then, strict=True))


def test_a_worker_that_fails_while_it_rests_lives_on(started, caplog):
    grid = started(apps.Upset, sites=4)
    asked(grid)
    time.sleep(0.2)
    assert all(count >= 1 for count in metrics(asked(grid), "rests"))
    assert "could not make its next answers ready" in caplog.text
    assert "died" not in caplog.text


def test_only_the_messages_asked_for_are_given(started):
    grid = started(apps.adding)
    ids = grid.push_messages(outgoing(grid))
    got = []
    while not got:
        got = grid.pull_messages([ids[1]])
    assert [reply.metadata.reply_to_message_id for reply in got] == [ids[1]]


def test_a_site_stays_with_its_worker_and_all_workers_work(started):
    # Long beside what a busy machine delays one of them by: then the other would take a site over.
    grid = started(partial(apps.slow, 0.4), sites=6)
    first, second = (metrics(asked(grid), "pid") for _ in range(2))
    assert first == second
    assert len({*first}) == 2
    assert os.getpid() not in first


def test_what_a_context_holds_goes_where_its_site_goes(started):
    grid = started(apps.counting, sites=4)
    for n in (1, 2, 3):
        assert metrics(asked(grid), "n") == [n] * 4
        if n == 2:
            grid._crew._homes = [1 - home for home in grid._crew._homes]


def test_globals_are_mapped_once_in_a_worker(started):
    grid = started(apps.looking, sites=6, workers=1)
    replies = asked(grid, values=np.arange(1 << 16, dtype=np.float32))
    facts = [reply.content["facts"] for reply in replies]
    assert {fact["kind"] for fact in facts} == {"memoryview"}
    assert len({fact["where"] for fact in facts}) == 1
    echoed = replies[-1].content["arrays"]["w"]
    assert isinstance(echoed.data, memoryview)  # 256 kB: it came back without a copy
    assert np.array_equal(echoed.numpy(), np.arange(1 << 16, dtype=np.float32))


def test_file_handles_stay_flat_over_rounds(started):
    grid = started(apps.adding, sites=20)
    counts = []
    for _ in range(4):
        asked(grid, values=np.zeros(1 << 16))
        counts.append(handles())
    assert counts[1:] == counts[1:2] * 3


def test_an_app_that_raises_is_answered_for_without_its_text(started, caplog):
    replies = asked(started(apps.raising))
    assert [reply.error.reason for reply in replies] == ["the ClientApp raised"] * 3
    assert "a secret of the site" in caplog.text  # in the site's own log, which is ours here
    assert {record.name for record in caplog.records} == {"simulations.answer"}


def test_noise_of_two_workers_is_not_the_same(started):
    """They are forks of one process: what that had drawn from, they would share."""
    grid = started(apps.drawing, sites=8, workers=4)
    draws = [tuple(reply.content["arrays"]["w"].numpy()) for reply in asked(grid)]
    assert len({*draws}) == 8


def test_a_killed_workers_message_is_answered_by_another(started, tmp_path):
    grid = started(partial(apps.dying, tmp_path), sites=6)
    replies = asked(grid)
    assert [reply.has_content() for reply in replies] == [True] * 6
    dead = {int(path.name.removeprefix("death-")) for path in tmp_path.iterdir()}
    assert len(dead) == 1
    assert dead.isdisjoint(metrics(replies, "pid"))
    assert [reply.has_content() for reply in asked(grid)] == [True] * 6


def test_an_attempt_that_was_charged_is_lost_with_its_worker_and_no_other(started, tmp_path):
    told = []

    def lost(message):
        told.append(partition_of(message))
        return told[-1] == 0

    replies = asked(started(partial(apps.dying, tmp_path), sites=6, lost=lost))
    assert replies[0].error.code == LOCAL_FAILURE
    assert [reply.has_content() for reply in replies[1:]] == [True] * 5
    assert 0 in told


def test_a_message_costs_so_many_workers_and_no_more(started, tmp_path):
    replies = asked(started(partial(apps.dying, tmp_path, 99), sites=4))
    assert replies[0].error.code == LOCAL_FAILURE
    assert [reply.has_content() for reply in replies[1:]] == [True] * 3
    assert len([*tmp_path.iterdir()]) == MOST_DEATHS + 1


def test_a_worker_that_hangs_is_replaced_when_its_deadline_has_passed(started, tmp_path):
    grid = started(partial(apps.hanging, tmp_path), sites=4)
    assert len(asked(grid, kind="evaluate")) == 4  # all are there
    before = time.monotonic()
    assert len(asked(grid, timeout=1.5, ttl=1.5)) < 4
    assert time.monotonic() - before < 4
    assert [reply.has_content() for reply in asked(grid)] == [True] * 4
    assert not is_alive(int((tmp_path / "hung").read_text()))


def test_a_pull_does_not_wait_for_ever(started):
    grid = started(partial(apps.slow, 30))
    ids = grid.push_messages(outgoing(grid))
    before = time.monotonic()
    assert grid.pull_messages(ids) == []
    assert time.monotonic() - before < 2


def test_an_ended_crew_leaves_no_process(started):
    grid = started(partial(apps.slow, 30))
    grid.push_messages(outgoing(grid))
    crew = grid._crew
    patience = time.monotonic() + 60  # a start takes as long as it does where others work, too
    while len(crew.pids) < 2 and time.monotonic() < patience:
        grid.pull_messages(["none"])
    pids = crew.pids
    assert len(pids) == 2
    before = time.monotonic()
    grid.close()
    assert time.monotonic() - before < 2
    time.sleep(0.2)  # what has closed everything may be about to go
    assert not any(is_alive(pid) for pid in pids)


def test_sites_are_answered_together_where_they_may_be(started):
    grid = started(apps.jobs, sites=10, workers=2, together=lambda message: 4)
    assert sorted(metrics(asked(grid), "together")) == [1, 1, 4, 4, 4, 4, 4, 4, 4, 4]


def test_homes_are_dealt_longest_first():
    work = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5]
    at = homes(work, 3)
    loads = [sum(w for w, home in zip(work, at, strict=True) if home == n) for n in range(3)]
    assert max(loads) - min(loads) <= 1
    assert homes(work, 3) == at
    assert homes([1.0] * 5, 2) == [0, 1, 0, 1, 0]


@pytest.mark.parametrize(
    ("engine", "sites", "workers", "threads"),
    [
        (EngineConfig(), 1000, 1, 8),
        (EngineConfig(threads=1), 1000, 8, 1),
        (EngineConfig(threads=1), 3, 3, 1),
        (EngineConfig(threads=3), 1000, 2, 3),
        (EngineConfig(workers=4), 1000, 4, 2),
        (EngineConfig(workers=4), 2, 2, 4),
        (EngineConfig(workers=1, threads=1), 1000, 1, 1),
        (EngineConfig(workers=16), 1000, 16, 1),
        (EngineConfig(threads=16), 1000, 1, 16),
    ],
)
def test_how_many_processes_and_threads_of_eight_cores(
    monkeypatch, engine, sites, workers, threads
):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    assert workers_of(engine, sites) == workers
    assert threads_of(engine, workers) == threads


def vector_of(run_dir):
    from safetensors.numpy import load_file

    return load_file(sorted((run_dir / "checkpoints").iterdir())[-1])["vector"]


def test_two_workers_give_the_same_bits_as_none(coterie, tiny_overrides, tmp_path):
    """Five sites of unequal size, private and seeded; and the same books."""
    settings = ["federation.sites=5", "federation.partition=quantity", "privacy.noise=seeded"]
    vectors, kinds = [], []
    for workers in (1, 2):
        run_dir = tmp_path / str(workers)
        given = [*settings, f"engine.workers={workers}", f"run_dir={run_dir}", "--json"]
        answer = coterie("simulate", *tiny_overrides, *given)
        assert answer.code == 0, answer.err
        vectors.append(vector_of(run_dir))
        with Store(run_dir / "ledgers" / "sites.db") as store:
            kinds.append([[e.kind for e in store.ledger(s).entries()] for s in store.sites()])
    assert np.array_equal(*vectors)
    assert kinds[0] == kinds[1]


@pytest.mark.slow  # a real, if small, Transformer
def test_one_two_and_four_workers_give_the_same_bits(coterie, tmp_path):
    settings = ["+experiment=digits", "federation.rounds=3", "privacy.noise=seeded"]
    found = []
    for workers in (1, 2, 4):
        run_dir = tmp_path / str(workers)
        given = [f"engine.workers={workers}", "engine.threads=1", f"run_dir={run_dir}", "--json"]
        assert coterie("simulate", *settings, *given).code == 0
        found.append(vector_of(run_dir).tobytes())
    assert len({*found}) == 1


class Running:
    """A real run in a process of its own, with what it has printed."""

    def __init__(self, folder, overrides):
        self.run_dir = folder / "run"
        self.stderr = folder / "stderr"
        command = [*COTERIE, "simulate", *overrides, f"run_dir={self.run_dir}"]
        stderr = self.stderr.open("w")
        self.process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
            process_group=0,
        )
        stderr.close()

    def wait_for(self, text):
        for line in self.process.stdout:
            if text in line:
                return
        raise AssertionError(self.stderr.read_text())

    def others(self):
        """The nursery and the workers."""
        return descendants(self.process.pid)

    def ended(self, others):
        """Its exit code, once it and all others are gone; None after two seconds."""
        until = time.monotonic() + 2
        while time.monotonic() < until:
            left = [pid for pid in others if is_alive(pid)]
            if self.process.poll() is not None and not left:
                return self.process.returncode
            time.sleep(0.02)
        return None


def descendants(pid):
    parents = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(") ")[2].split()
        except OSError:
            continue
        parents[int(path.parent.name)] = int(fields[1])
    found, more = set(), {pid}
    while more:
        found |= more
        more = {child for child, parent in parents.items() if parent in more} - found
    return found - {pid}


def is_alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0] != "Z"
    except OSError:
        return False


@pytest.fixture
def running(tiny_overrides, tmp_path):
    made = []

    def start(*overrides):
        long = ["federation.rounds=40", "federation.local_steps=100", "federation.sites=4"]
        made.append(Running(tmp_path, [*tiny_overrides, *long, "engine.workers=2", *overrides]))
        return made[-1]

    yield start
    for run in made:
        run.process.kill()
        run.process.wait()
        run.process.stdout.close()


def books_of(run):
    with Store(run.run_dir / "ledgers" / "sites.db") as store:
        return [store.ledger(site).books for site in store.sites()]


@pytest.mark.slow  # real processes
@pytest.mark.parametrize("to", ["parent", "group"])
def test_ctrl_c_ends_every_process_within_two_seconds(running, to):
    run = running()
    run.wait_for("round 2/")
    others = run.others()
    assert len(others) == 3  # the nursery, and two workers
    (os.killpg if to == "group" else os.kill)(run.process.pid, signal.SIGINT)
    assert run.ended(others) == 130
    assert "Traceback" not in run.stderr.read_text()
    states = {r.state for books in books_of(run) for r in books.reservations.values()}
    assert states <= {"released", "prepared", "lost"}  # nothing is left half done


@pytest.mark.slow  # real processes
def test_ctrl_c_while_the_workers_import_ends_them_too(running):
    run = running()
    until = time.monotonic() + 20
    while not (others := run.others()) and time.monotonic() < until:
        time.sleep(0.01)
    time.sleep(0.3)
    os.killpg(run.process.pid, signal.SIGINT)
    assert run.ended(others | run.others()) is not None
    assert "simulations.worker" not in run.stderr.read_text()


@pytest.mark.slow  # real processes
def test_workers_do_not_outlive_a_simulation_that_is_killed(running):
    run = running()
    run.wait_for("round 1/")
    others = run.others()
    os.kill(run.process.pid, signal.SIGKILL)
    assert run.ended(others) == -signal.SIGKILL


@pytest.mark.slow  # real processes
def test_a_worker_that_is_killed_does_not_end_the_run(running):
    """What it was at is repeated within the plan's spare rounds, and the books know of it."""
    run = running("federation.rounds=12", "federation.local_steps=10", "privacy.spare_rounds=5")
    run.wait_for("round 2/")
    nursery = {pid for pid in run.others() if descendants(pid)}
    for _ in range(3):
        os.kill(max(run.others() - nursery), signal.SIGKILL)
        run.wait_for("round ")
        time.sleep(0.2)
    run.process.stdout.read()
    assert run.process.wait(60) == 0, run.stderr.read_text()
    report = json.loads((run.run_dir / "report.json").read_text())
    assert {site["rounds"] for site in report["sites"]} <= {*range(12, 18)}
    for books in books_of(run):
        states = [r.state for r in books.reservations.values()]
        assert states.count("released") == 12
        assert {*states} <= {"released", "lost"}

"""A run that was interrupted goes on: the same parameters, no charge twice, and nothing hidden."""

import fcntl
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

import client.ledger
import client.train
import server.app
import server.rounds
import simulations.run
from client.ledger import Store
from common import cli, messages
from common.privacy.verification import verify
from server.checkpoint import read_checkpoint
from server.record import read_lines

ROUNDS = 3
SEEDED = ["privacy.noise=seeded", f"federation.rounds={ROUNDS}", "privacy.spare_rounds=1"]


class KilledError(BaseException):
    """What no handler of errors expects, as a kill."""


def settings_of(tiny_overrides, *more):
    own = [each for each in tiny_overrides if not each.startswith("federation.rounds")]
    return [*own, *SEEDED, *more]


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory, tiny_overrides):
    """The run that nothing interrupts."""
    run_dir = tmp_path_factory.mktemp("unbroken") / "run"
    assert cli.main(["simulate", *settings_of(tiny_overrides), f"run_dir={run_dir}"]) == 0
    return run_dir


@pytest.fixture(scope="module")
def after_one(tmp_path_factory, tiny_overrides):
    """A run that ended after its first round; tests take copies."""
    run_dir = tmp_path_factory.mktemp("after-one") / "run"
    with pytest.MonkeyPatch.context() as patched:
        stop_after(patched, 1)
        with pytest.raises(KilledError):
            cli.main(["simulate", *settings_of(tiny_overrides), f"run_dir={run_dir}"])
    return run_dir


@pytest.fixture
def broken(after_one, tmp_path):
    return Path(shutil.copytree(after_one, tmp_path / "run"))


@pytest.fixture
def interrupted(coterie, tiny_overrides, monkeypatch):
    """Begins a run with more settings, or goes on with one, and ends it where `stop` says."""

    def run(stop, run_dir, *more, resumed=False):
        stop(monkeypatch)
        settings = ["resume=auto"] if resumed else settings_of(tiny_overrides, *more)
        with pytest.raises(KilledError):
            coterie("simulate", *settings, f"run_dir={run_dir}")
        monkeypatch.undo()
        assert not (run_dir / "report.json").exists()
        return run_dir

    return run


def resume(coterie, run_dir, *settings):
    return coterie("simulate", "resume=auto", f"run_dir={run_dir}", *settings, "--json")


def final_vector(run_dir):
    return load_file(run_dir / "checkpoints" / f"round-{ROUNDS:04d}.safetensors")["vector"]


def stop_after(patched, number):
    """Ends the process, as it were, once round `number` is whole."""
    append = server.app.append_line

    def stop(run_dir, line):
        append(run_dir, line)
        if line.round == number:
            raise KilledError

    patched.setattr(server.app, "append_line", stop)


# Where a run may end. Each returns nothing, and patches what then stops.


def before_the_first_round(patched):
    patched.setattr(server.app, "run_rounds", raising)


def in_the_first_training(patched):
    stop_in_training(patched, "site-1", 1)


def in_a_training(patched):
    stop_in_training(patched, "site-2", 2)


def before_an_update_leaves(patched):
    """It is prepared, and so may be sent, and must not be another one."""
    release, released = client.ledger.Ledger.release, []

    def stop(ledger, reservation):
        released.append(ledger.site)
        if released == ["site-1", "site-2", "site-1", "site-2"]:
            raise KilledError
        return release(ledger, reservation)

    patched.setattr(client.ledger.Ledger, "release", stop)


def before_a_checkpoint(patched):
    write = server.rounds.write_checkpoint

    def stop(folder, state, *, private):
        if state.round == 2:
            raise KilledError
        return write(folder, state, private=private)

    patched.setattr(server.rounds, "write_checkpoint", stop)


def before_a_line(patched):
    """The checkpoint of the round is there, its line is not."""
    append = server.app.append_line

    def stop(run_dir, line):
        if line.round == 2:
            raise KilledError
        append(run_dir, line)

    patched.setattr(server.app, "append_line", stop)


def in_a_line(patched):
    append = server.app.append_line

    def stop(run_dir, line):
        append(run_dir, line)
        if line.round == 2:
            path = run_dir / "metrics.jsonl"
            path.write_bytes(path.read_bytes()[:-20])
            raise KilledError

    patched.setattr(server.app, "append_line", stop)


def after_a_round(patched):
    stop_after(patched, 2)


def before_the_model(patched):
    patched.setattr(server.app, "write_model", raising)


def before_the_report(patched):
    patched.setattr(server.app, "write_report", raising)


def raising(*_, **__):
    raise KilledError


def stop_in_training(patched, name, number):
    train = client.train.Trainer.train

    def stop(trainer, site, vector, *, round_number):
        if (site.name, round_number) == (name, number):
            raise KilledError
        return train(trainer, site, vector, round_number=round_number)

    patched.setattr(client.train.Trainer, "train", stop)


STOPS = {
    before_the_first_round: (0, 0),
    in_the_first_training: (0, 1),
    in_a_training: (1, 1),
    before_an_update_leaves: (1, 0),
    before_a_checkpoint: (1, 0),
    before_a_line: (1, 0),
    in_a_line: (1, 0),
    after_a_round: (2, 0),
    before_the_model: (3, 0),
    before_the_report: (3, 0),
}
"""The round after which the run goes on, and how many attempts its sites lose."""
QUICK = (in_a_training, before_a_checkpoint, before_a_line, before_the_report)
WHERE = [
    pytest.param(stop, id=stop.__name__, marks=[] if stop in QUICK else pytest.mark.slow)
    for stop in STOPS
]


@pytest.mark.parametrize("stop", WHERE)
def test_a_resumed_run_equals_the_unbroken_one(stop, interrupted, coterie, tmp_path, unbroken):
    after, lost = STOPS[stop]
    run_dir = interrupted(stop, tmp_path / "run")
    answer = resume(coterie, run_dir)
    assert answer.code == 0, answer.err
    assert f"resumed after round {after} of {ROUNDS}" in answer.err
    assert np.array_equal(final_vector(run_dir), final_vector(unbroken))
    assert answer.json["resumed_after"] == [after]
    assert answer.json["rounds"] == ROUNDS
    assert [path.name for path in run_dir.rglob(".*")] == []
    check_books(run_dir, answer.json, lost)
    check_times(run_dir, answer.json)


def check_books(run_dir, report, lost):
    """Every round was released once; what was lost stays charged, and the report knows."""
    with Store(run_dir / "ledgers" / "sites.db") as store:
        states = {"released": 0, "lost": 0, "reserved": 0, "prepared": 0}
        for site in report["sites"]:
            ledger = store.ledger(site["name"])
            reservations = ledger.books.reservations.values()
            for each in reservations:
                states[each.state] += 1
            released = [each.round for each in reservations if each.state == "released"]
            assert released == [1, 2, 3]
            assert site["steps"] == 2 * len(reservations)
            assert site["rounds"] == ROUNDS
            assert site["repeated"] == len(reservations) - ROUNDS
            assert site["ledger_head"] == str(ledger.head)
            verify(ledger.export().encode(), head=ledger.head)
    assert states == {"released": 2 * ROUNDS, "lost": lost, "reserved": 0, "prepared": 0}


def check_times(run_dir, report):
    lines, timing = read_lines(run_dir), report["timing"]
    assert [line.round for line in lines] == [1, 2, 3]
    spans = [line.elapsed_s for line in lines]
    assert spans == sorted(spans)
    assert timing["train_s"] == pytest.approx(sum(line.sites_s for line in lines), abs=0.02)
    assert timing["train_s"] <= spans[-1] <= timing["total_s"] + 0.01


@pytest.mark.slow  # three runs
def test_a_run_may_be_interrupted_again_and_again(interrupted, coterie, tmp_path, unbroken):
    run_dir = interrupted(lambda patched: stop_after(patched, 1), tmp_path / "run")
    interrupted(in_a_training, run_dir, resumed=True)
    interrupted(lambda patched: stop_after(patched, 2), run_dir, resumed=True)
    answer = resume(coterie, run_dir)
    assert answer.json["resumed_after"] == [1, 1, 2]
    assert np.array_equal(final_vector(run_dir), final_vector(unbroken))
    assert "after round 1, 1, 2;" in coterie("report", run_dir).out


def test_sites_on_their_own_terms_go_on_with_them(interrupted, coterie, tiny_overrides, tmp_path):
    """Schedule, epsilons and faults are those of the settings: nothing of them is remembered."""
    more = [
        *("federation.participation=0.5", "privacy.site_epsilons=[4,8]"),
        *("faults.flipped=1", "faults.sites=[site-2]", "federation.local_steps=1"),
    ]
    whole = tmp_path / "whole"
    settings = settings_of(tiny_overrides, *more)
    assert coterie("simulate", *settings, f"run_dir={whole}").code == 0
    run_dir = interrupted(lambda patched: stop_after(patched, 1), tmp_path / "run", *more)
    answer = resume(coterie, run_dir)
    assert answer.code == 0, answer.err
    assert final_vector(run_dir).tobytes() == final_vector(whole).tobytes()
    reports = [json.loads((each / "report.json").read_text()) for each in (run_dir, whole)]
    for name in ("rounds", "repeated", "steps", "noise_multiplier", "epsilon"):
        sites = [[site[name] for site in report["sites"]] for report in reports]
        assert sites[0] == sites[1], name
    assert reports[0]["faults"] == reports[1]["faults"]


@pytest.mark.slow  # three runs each
@pytest.mark.parametrize("strategy", ["fedadam", "fedavgm"])
def test_what_a_strategy_remembers_is_resumed_with_it(
    strategy, interrupted, coterie, tiny_overrides, tmp_path
):
    more = [f"strategy={strategy}", "tuning=head"]
    settings = settings_of(tiny_overrides, *more)
    assert coterie("simulate", *settings, f"run_dir={tmp_path / 'whole'}").code == 0
    run_dir = interrupted(after_a_round, tmp_path / "run", *more)
    assert resume(coterie, run_dir).code == 0
    assert np.array_equal(final_vector(run_dir), final_vector(tmp_path / "whole"))


def test_without_a_spare_round_a_site_that_lost_one_sits_it_out(interrupted, coterie, tmp_path):
    """Its ledger allows no second attempt; with the quorum of all the run could never go on."""
    run_dir = interrupted(in_a_training, tmp_path / "run", "privacy.spare_rounds=0")
    answer = resume(coterie, run_dir)
    assert answer.code == 0, answer.err
    reason = messages.REFUSALS[messages.NO_SPARE_ROUND]
    one, two = answer.json["sites"]
    assert one["not_answered"] == {}
    assert two["not_answered"] == {"2": reason}
    assert [site["steps"] for site in (one, two)] == [6, 6]


@pytest.mark.slow  # two runs
def test_a_round_that_every_site_lost_changes_nothing(interrupted, coterie, tmp_path):
    run_dir = interrupted(
        lambda patched: stop_in_training(patched, "site-1", 2),
        tmp_path / "run",
        "privacy.spare_rounds=0",
        "federation.sites=1",
    )
    assert resume(coterie, run_dir).code == 0
    states = [read_checkpoint(run_dir / "checkpoints", number) for number in range(4)]
    assert np.array_equal(states[1].vector, states[2].vector)
    assert not np.array_equal(states[2].vector, states[3].vector)


def test_noise_is_drawn_afresh_after_a_pause(interrupted, coterie, tmp_path):
    """Nothing random is in a checkpoint: two that go on from one copy differ."""
    run_dir = interrupted(in_a_training, tmp_path / "a", "privacy.noise=entropy")
    shutil.copytree(run_dir, tmp_path / "b")
    for name in "ab":
        answer = resume(coterie, tmp_path / name)
        assert answer.code == 0, answer.err
        privacy, (one, two) = answer.json["privacy"], answer.json["sites"]
        assert privacy["private"] is True
        assert one["epsilon"] < two["epsilon"] <= 8  # the attempt that was lost stays charged
        assert (one["repeated"], two["repeated"]) == (0, 1)
        assert read_lines(tmp_path / name)[1].epsilon > 1.1 * read_lines(tmp_path / name)[0].epsilon
    updates = [read_checkpoint(tmp_path / name / "checkpoints", 2).vector for name in "ab"]
    assert not np.array_equal(*updates)


@pytest.mark.slow  # three runs
def test_a_baseline_goes_on_too(interrupted, coterie, tiny_overrides, tmp_path):
    more = ["privacy.spare_rounds=0", "privacy=none"]
    settings = settings_of(tiny_overrides, *more)
    assert coterie("simulate", *settings, f"run_dir={tmp_path / 'whole'}").code == 0
    run_dir = interrupted(before_a_line, tmp_path / "run", *more)
    assert resume(coterie, run_dir).code == 0
    assert np.array_equal(final_vector(run_dir), final_vector(tmp_path / "whole"))


def test_a_finished_run_is_not_run_again(coterie, unbroken, tiny_overrides):
    before = {path: path.stat().st_mtime_ns for path in unbroken.rglob("*") if path.is_file()}
    for settings in ([], settings_of(tiny_overrides)):
        answer = resume(coterie, unbroken, *settings)
        assert answer.code == 0, answer.err
        assert "is finished already; nothing was run" in " ".join(answer.err.split())
        assert answer.json["rounds"] == ROUNDS
    assert before == {path: path.stat().st_mtime_ns for path in before}


@pytest.mark.slow  # a run
def test_resuming_what_is_not_there_begins_it(coterie, tiny_overrides, tmp_path, unbroken):
    answer = resume(coterie, tmp_path / "new", *settings_of(tiny_overrides))
    assert answer.code == 0, answer.err
    assert np.array_equal(final_vector(tmp_path / "new"), final_vector(unbroken))
    assert "resumed_after" not in answer.json


def test_the_runs_own_settings_may_be_given_again(coterie, tiny_overrides, broken, unbroken):
    assert resume(coterie, broken, *settings_of(tiny_overrides)).code == 0
    assert np.array_equal(final_vector(broken), final_vector(unbroken))


@pytest.mark.parametrize("repeated", [False, True])
def test_another_number_of_workers_may_go_on(
    repeated, coterie, tiny_overrides, *, broken, unbroken, monkeypatch
):
    """Alone beside `resume` and `run_dir`, and with the run's own settings given again."""
    asked, count = [], simulations.run.workers_of
    monkeypatch.setattr(
        "simulations.run.workers_of",
        lambda engine, sites: asked.append(engine) or count(engine, min(sites, 1)),
    )
    own = settings_of(tiny_overrides) if repeated else []
    assert resume(coterie, broken, *own, "engine.workers=2").code == 0
    assert {(engine.workers, engine.threads) for engine in asked} == {(2, 1)}
    assert np.array_equal(final_vector(broken), final_vector(unbroken))


def state_of(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def flip(path):
    """One bit of the parameters."""
    content = bytearray(path.read_bytes())
    content[-2] ^= 1
    path.write_bytes(content)


REFUSED = {
    "other settings": (
        ["privacy.epsilon=4", "seed=1"],
        2,
        "privacy.epsilon=4.0, and was 8.0; seed=1, and was 0",
    ),
    "other books": (["ledger=books.db"], 2, "ledger=books.db"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_other_settings_are_refused_in_one_line_and_nothing_changes(
    case, coterie, tiny_overrides, broken
):
    settings, code, message = REFUSED[case]
    before = state_of(broken)
    answer = resume(coterie, broken, *settings_of(tiny_overrides), *settings)
    assert answer.code == code
    assert message in answer.err
    assert answer.err.count("\n") == 1
    assert state_of(broken) == before


DAMAGES = {
    "a flipped bit": (
        lambda run: flip(run / "checkpoints/round-0001.safetensors"),
        5,
        "round-0001.safetensors: not a checkpoint of a round, or damaged",
    ),
    "a cut checkpoint": (
        lambda run: os.truncate(run / "checkpoints/round-0001.safetensors", 100),
        5,
        "round-0001.safetensors: not a checkpoint of a round, or damaged",
    ),
    "no checkpoint": (
        lambda run: (run / "checkpoints/round-0001.safetensors").unlink(),
        5,
        "round-0001.safetensors: not a checkpoint of a round, or damaged",
    ),
    "a line of another round": (
        lambda run: (run / "metrics.jsonl").write_text((run / "metrics.jsonl").read_text() * 2),
        5,
        "metrics.jsonl: line 2 is not of round 2",
    ),
    "a malformed config": (
        lambda run: (run / "config.yaml").write_text("seed: [1"),
        2,
        "config.yaml: malformed configuration",
    ),
    "no config": (lambda run: (run / "config.yaml").unlink(), 2, "holds no run to go on with"),
    "no books": (lambda run: shutil.rmtree(run / "ledgers"), 2, "no such ledger"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_run_is_one_line(damage, coterie, broken):
    harm, code, message = DAMAGES[damage]
    harm(broken)
    before = state_of(broken / "checkpoints")
    answer = coterie("simulate", "resume=auto", f"run_dir={broken}")
    assert answer.code == code
    assert message in answer.err
    assert "Traceback" not in answer.err
    assert state_of(broken / "checkpoints") == before


def test_another_number_of_records_is_refused(coterie, broken, tiny_csv, tmp_path):
    other = tmp_path / "other.csv"
    other.write_text("\n".join(tiny_csv.read_text().splitlines()[:-9]))
    config = (broken / "config.yaml").read_text()
    (broken / "config.yaml").write_text(config.replace(str(tiny_csv), str(other)))
    answer = resume(coterie, broken)
    assert answer.code == 2
    assert "and had 84 when the run began; put the data back" in answer.json["error"]["message"]


def test_as_many_other_records_are_refused(coterie, broken, monkeypatch):
    """They move no setting: the books know whose records they charge."""
    deal = simulations.run.deal
    monkeypatch.setattr("simulations.run.deal", lambda *a, **b: [*reversed(deal(*a, **b))])
    answer = resume(coterie, broken)
    assert answer.code == 2
    assert "data: site-1 has other records than when the run began" in answer.err


def test_two_processes_do_not_write_one_run(coterie, broken):
    handle = os.open(broken, os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX)
    try:
        answer = resume(coterie, broken)
    finally:
        os.close(handle)
    assert answer.code == 2
    assert "another process is writing into it" in answer.err


def test_resume_must_say_which_run(coterie, tiny_overrides, tmp_path):
    answer = coterie("simulate", *tiny_overrides, "resume=auto")
    assert (answer.code, answer.err.count("\n")) == (2, 1)
    assert "resume=auto: which run? give run_dir=PATH" in answer.err
    (tmp_path / "notes.txt").write_text("kept")
    answer = coterie("simulate", "resume=auto", f"run_dir={tmp_path}")
    assert answer.code == 2
    assert "holds no run to go on with" in answer.err
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_a_stop_before_the_run_begins_leaves_nothing(
    coterie, tiny_overrides, tmp_path, monkeypatch
):
    def stop(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("simulations.run.LocalGrid", stop)
    answer = coterie("simulate", *tiny_overrides, f"run_dir={tmp_path / 'deep' / 'run'}")
    assert answer.code == 130
    assert "nothing was charged, and nothing is left" in answer.err
    assert [*tmp_path.iterdir()] == []


def test_an_interrupted_run_says_how_to_go_on(coterie, tiny_overrides, tmp_path, monkeypatch):
    train = client.train.Trainer.train

    def stop(trainer, site, vector, *, round_number):
        if round_number == 2:
            raise KeyboardInterrupt
        return train(trainer, site, vector, round_number=round_number)

    monkeypatch.setattr(client.train.Trainer, "train", stop)
    run_dir = tmp_path / "a run"
    answer = coterie("simulate", *tiny_overrides, f"run_dir='{run_dir}'")
    assert answer.code == 130
    last = answer.err.strip().splitlines()[-1]
    assert last.startswith("coterie simulate: interrupted; go on by: coterie simulate resume=auto ")
    assert "Traceback" not in answer.err
    monkeypatch.undo()
    answer = coterie(*shlex.split(last.split("go on by: coterie ")[1]))
    assert answer.code == 0, answer.err


# Real processes.

COMMAND = [
    sys.executable,
    "-c",
    "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler); "
    "from common.cli import main; sys.exit(main())",
    "simulate",
]


def begun(arguments, run_dir, *, lines):
    """A process, once its run has so many whole rounds."""
    process = subprocess.Popen(
        [*COMMAND, *arguments, f"run_dir={run_dir}"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 120
    path = run_dir / "metrics.jsonl"
    while not path.exists() or path.read_bytes().count(b"\n") < lines:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return process


@pytest.mark.slow  # processes that import everything
def test_a_run_that_is_killed_after_every_round_equals_the_unbroken_one(tiny_overrides, tmp_path):
    more = ["federation.rounds=4", "federation.local_steps=40", "privacy.spare_rounds=8"]
    settings = [*settings_of(tiny_overrides), *more]
    whole = subprocess.run([*COMMAND, *settings, f"run_dir={tmp_path / 'whole'}"], check=False)
    assert whole.returncode == 0
    run_dir = tmp_path / "run"
    for number in (1, 2, 3):
        process = begun(settings if number == 1 else ["resume=auto"], run_dir, lines=number)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert not (run_dir / "report.json").exists()
    last = subprocess.run([*COMMAND, "resume=auto", f"run_dir={run_dir}"], check=False)
    assert last.returncode == 0
    ends = [
        load_file(folder / "checkpoints" / "round-0004.safetensors")["vector"]
        for folder in (run_dir, tmp_path / "whole")
    ]
    assert np.array_equal(*ends)
    report = json.loads((run_dir / "report.json").read_text())
    assert len(report["resumed_after"]) == 3


@pytest.mark.slow  # a process that imports everything
def test_ctrl_c_ends_within_two_seconds_in_one_line(tiny_overrides, tmp_path):
    settings = [*settings_of(tiny_overrides), "federation.rounds=200", "privacy.epsilon=50"]
    process = begun(settings, tmp_path / "run", lines=2)
    before = cpu_seconds(process.pid)
    process.send_signal(signal.SIGINT)
    err = process.stderr.read()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    process.stdout.close()
    process.stderr.close()
    # Of its own: others may use the machine.
    assert usage.ru_utime + usage.ru_stime - before < 2
    assert process.returncode == 130
    assert "Traceback" not in err
    assert err.splitlines()[-1].startswith("coterie simulate: interrupted; go on by: ")


def cpu_seconds(process):
    """What a process has used so far."""
    ticks = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[11:13]
    return sum(map(int, ticks)) / os.sysconf("SC_CLK_TCK")

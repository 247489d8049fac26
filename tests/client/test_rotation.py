"""A new site key: whenever it is interrupted, the store has one key, and all chains name it.

As in `test_ledger.py`, processes are really killed, and the verifier judges what they leave.
"""

import fcntl
import os
import shutil
import signal
import sqlite3
import stat
from itertools import count

import pytest

from client.ledger import Store
from client.site_keys import SiteKeys
from common.errors import ConfigError, CoterieError, VerificationError
from common.privacy.chain import Kind, public_hex
from common.privacy.verification import verify

from .ledger_worker import (
    CHEAP,
    RUN,
    commit,
    content_of,
    ended,
    forked,
    next_round,
    terms,
)

SITES = ("north", "south")


@pytest.fixture
def path(tmp_path):
    """A ledger of two sites with a round each, closed."""
    made = tmp_path / "store" / "books"
    with Store.create(made) as store:
        for site in SITES:
            commit(store.open(site, terms()))
            take_one(store.ledger(site))
    return made


def take_one(ledger):
    reservation = ledger.reserve(RUN, next_round(ledger.books), CHEAP)
    ledger.prepare(reservation, content_of(reservation), steps=CHEAP.steps)
    assert ledger.release(reservation) == content_of(reservation)


def file_of(path, suffix):
    return path.with_name(path.name + suffix)


def key_of(path):
    """Public, of the file as it is."""
    with Store(path) as store:
        return public_hex(store.key)


def secret_of(path):
    with Store(path) as store:
        return store.secret


def rotated(path):
    with Store(path) as store:
        store.rotate()
        return public_hex(store.key)


def names(path):
    return {each.name for each in path.parent.iterdir()}


def modes(path):
    secrets = [each for each in path.parent.iterdir() if each.suffix in (".key", ".secret", ".new")]
    return {stat.S_IMODE(each.stat().st_mode) for each in secrets}


def check(path, *, first_key, secret):
    """The store opens, has one key and nothing half done, and goes on. Returns: its key."""
    with Store(path) as store:
        key = public_hex(store.key)
        assert not {name for name in names(path) if name.endswith(".new")}
        assert modes(path) == {0o600}
        assert store.secret == secret
        for site in SITES:
            ledger = store.ledger(site)
            assert ledger.books.site_key == key
            take_one(ledger)
            verdict = verify(ledger.export().encode(), key=first_key, head=ledger.head)
            assert verdict.key_pinned
    with Store(path) as store:
        assert public_hex(store.key) == key
    return key


# What a new key is.


def test_after_a_change_of_keys_all_chains_go_on_under_the_new_one(path):
    first, secret = key_of(path), secret_of(path)
    with Store(path) as store:
        heads = {site: store.ledger(site).head for site in SITES}
    keys = [first]
    for _ in range(2):
        keys.append(rotated(path))
        assert check(path, first_key=first, secret=secret) == keys[-1]
    assert len({*keys}) == 3
    with Store(path) as store:
        for site in SITES:
            ledger = store.ledger(site)
            assert ledger.books.contains(heads[site])
            entries = [e for e in ledger.entries() if e.kind is Kind.KEY_ROTATE]
            assert [entry.body["site_key"] for entry in entries] == keys[1:]
            with pytest.raises(VerificationError, match="another site's key"):
                verify(ledger.export().encode(), key=keys[-1])
    assert names(path) == {"books", "books.key", "books.lock", "books.secret"}


def test_the_store_that_changed_its_key_goes_on_with_the_new_one(path):
    with Store(path) as store:
        store.rotate()
        for site in SITES:
            take_one(store.ledger(site))
            verify(store.ledger(site).export().encode())
        store.open("west", terms())
        store.rotate()
        take_one(store.ledger("north"))
    with Store(path) as store:
        assert store.ledger("west").books.site_key == public_hex(store.key)
        assert store.ledger("west").head.seq == 2


def test_the_retired_key_signs_nothing_more(path):
    retired = file_of(path, ".key").read_bytes()
    rotated(path)
    current = file_of(path, ".key").read_bytes()
    file_of(path, ".key").write_bytes(retired)
    with Store(path) as store:
        check_it_cannot_write(store)
    file_of(path, ".key").write_bytes(current)
    with Store(path) as store:
        take_one(store.ledger("north"))


def check_it_cannot_write(store):
    heads = {site: store.ledger(site).head for site in SITES}
    acts = [
        lambda: take_one(store.ledger("north")),
        lambda: store.ledger("south").export(),
        lambda: store.open("west", terms()),
        store.rotate,
    ]
    for act in acts:
        with pytest.raises(
            VerificationError, match=r"signed by another key.*open it anew"
        ) as refused:
            act()
        assert "\n" not in str(refused.value)
    assert {site: store.ledger(site).head for site in store.sites()} == heads
    assert not file_of(store.path, ".key.new").exists()


# Others that have it open.


def test_a_process_that_kept_the_old_key_fails_at_its_next_write(path):
    """Should the lock have failed to keep it out: on a disk without locks, for one."""
    with Store(path) as stale:
        fcntl.flock(stale._lock, fcntl.LOCK_UN)
        rotated(path)
        rows = stale.read("SELECT * FROM entry")
        acts = [
            lambda: take_one(stale.ledger("north")),
            lambda: stale.ledger("south").export(),
            lambda: stale.open("west", terms()),
        ]
        for act in acts:
            with pytest.raises(VerificationError, match="signed by another key"):
                act()
        assert stale.read("SELECT * FROM entry") == rows
    with Store(path) as store:
        take_one(store.ledger("north"))


def test_a_change_of_keys_begins_with_the_key_of_now(path):
    """Between opening and locking somebody else may have changed it."""
    with Store(path) as stale:
        fcntl.flock(stale._lock, fcntl.LOCK_UN)
        rotated(path)
        stale.rotate()
        take_one(stale.ledger("north"))
    with Store(path) as store:
        kinds = [entry.kind for entry in store.ledger("south").entries()]
    assert kinds.count(Kind.KEY_ROTATE) == 2


def test_who_has_it_open_is_asked_to_stop_first(path):
    """A site in the middle of a round is no place to lose one's key."""
    first = key_of(path)
    with Store(path) as working:
        reservation = working.ledger("north").reserve(RUN, 2, CHEAP)
        assert ended(forked(rotated, path)) == ConfigError.exit_code
        with Store(path) as other, pytest.raises(ConfigError, match="has it open") as refused:
            other.rotate()
        assert "\n" not in str(refused.value)
        working.ledger("north").prepare(reservation, content_of(reservation), steps=CHEAP.steps)
        working.ledger("north").release(reservation)
    assert names(path) == {"books", "books.key", "books.lock"}
    assert key_of(path) == first
    assert rotated(path) != first


def test_a_refused_change_of_keys_gives_the_lock_back_shared(path):
    with Store(path) as working, Store(path) as other:
        with pytest.raises(ConfigError):
            other.rotate()
        other.ledger("north").reserve(RUN, 2, CHEAP)
        working.close()
        with Store(path) as third:  # not alone: the reservation is not lost
            states = [r.state for r in third.ledger("north").books.reservations.values()]
    assert states == ["released", "reserved"]


def test_a_forked_child_changes_no_key(path):
    """Its lock is its parent's."""
    with Store(path) as store:
        assert ended(forked(store.rotate)) == VerificationError.exit_code
        take_one(store.ledger("north"))
    assert names(path) == {"books", "books.key", "books.lock"}


def test_after_a_change_of_keys_others_may_open_it_again(path):
    with Store(path) as store:
        store.rotate()
        assert ended(forked(open_and_take_one, path)) == 0


def open_and_take_one(path):
    with Store(path) as store:
        take_one(store.ledger("south"))


# Killed.


def dying_at_call(number, work, *arguments):
    """Does `work`, but is killed before its `number`-th SQL statement or change of a file."""
    left, connect = number, sqlite3.connect

    def count_down(*_):
        nonlocal left
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        left -= 1

    def counted(call):
        def before(*args, **kwargs):
            count_down()
            return call(*args, **kwargs)

        return before

    def traced(*args, **kwargs):
        connection = connect(*args, **kwargs)
        connection.set_trace_callback(count_down)
        return connection

    sqlite3.connect = traced  # in this child only
    for name in ("open", "fsync", "replace", "unlink", "write"):
        setattr(os, name, counted(getattr(os, name)))
    work(*arguments)


def copied(path, folder):
    shutil.copytree(path.parent, folder)
    return folder / path.name


def test_a_kill_before_any_step_leaves_one_key_for_all_chains(path, tmp_path):
    """The old one up to some instant, the new one ever after; and the next change works."""
    first, secret = key_of(path), secret_of(path)
    outcomes = []
    for number in count():
        at = copied(path, tmp_path / f"killed at {number}")
        status = ended(forked(dying_at_call, number, rotated, at))
        outcomes.append(check(at, first_key=first, secret=secret) == first)
        assert status in (0, -signal.SIGKILL)
        if status == 0:
            break
        rotated(at)
        check(at, first_key=first, secret=secret)
    kept = outcomes.count(True)
    assert len(outcomes) > 40
    assert kept > 10
    assert outcomes == [True] * kept + [False] * (len(outcomes) - kept)
    assert len(outcomes) - kept > 3


STEPS = {
    "write the secret": ("keep", "before", True, set()),
    "write the key": ("propose", "before", True, {".secret"}),
    "name it in the chains": ("propose", "after", True, {".secret", ".key.new"}),
    "put it in its place": ("adopt", "before", False, {".secret", ".key.new"}),
    "end": ("adopt", "after", False, {".secret"}),
}


def killed_at(step, path):
    name, when, _, _ = STEPS[step]
    method = getattr(SiteKeys, name)

    def dying(self, *arguments):
        done = method(self, *arguments) if when == "after" else None
        os.kill(os.getpid(), signal.SIGKILL)
        return done

    setattr(SiteKeys, name, dying)  # in this child only
    rotated(path)


@pytest.mark.parametrize("step", STEPS)
def test_what_a_kill_leaves_depends_on_the_chains_alone(path, step):
    first, secret = key_of(path), secret_of(path)
    assert ended(forked(killed_at, step, path)) == -signal.SIGKILL
    *_, undone, left = STEPS[step]
    assert {file_of(path, suffix).name for suffix in left} <= names(path)
    assert (check(path, first_key=first, secret=secret) == first) is undone


@pytest.mark.parametrize("step", ["name it in the chains", "put it in its place"])
def test_a_kill_while_a_killed_change_is_settled_settles_it_later(path, tmp_path, step):
    first, secret = key_of(path), secret_of(path)
    ended(forked(killed_at, step, path))
    for number in count():
        at = copied(path, tmp_path / f"again {number}")
        status = ended(forked(dying_at_call, number, key_of, at))
        assert (check(at, first_key=first, secret=secret) == first) is STEPS[step][2]
        if status == 0:
            break
    assert number > 5


def test_an_opening_that_is_not_alone_settles_a_killed_change_too(path):
    """It waited for the lock of the one that was killed, and another was let in beside it."""
    first, secret = key_of(path), secret_of(path)
    with Store(path) as earlier:
        fcntl.flock(earlier._lock, fcntl.LOCK_UN)
        ended(forked(killed_at, "put it in its place", path))
        fcntl.flock(earlier._lock, fcntl.LOCK_SH)
        assert check(path, first_key=first, secret=secret) != first


def test_each_step_is_on_the_disk_before_the_next(path, monkeypatch):
    """After a power cut no chain names a key whose file, or whose file's name, is gone."""
    steps = []
    with Store(path) as store:
        fsync, replace = os.fsync, os.replace

        def traced_fsync(handle):
            target = os.readlink(f"/proc/self/fd/{handle}")
            steps.append(("on disk", target.rpartition("/")[2]))
            fsync(handle)

        def traced_replace(source, target, **kwargs):
            steps.append(("in place", str(target).rpartition("/")[2]))
            replace(source, target, **kwargs)

        monkeypatch.setattr(os, "fsync", traced_fsync)
        monkeypatch.setattr(os, "replace", traced_replace)
        store._connection.set_trace_callback(
            lambda sql: (
                steps.append(("sql", sql.split("(")[0]))
                if sql.startswith(("COMMIT", "PRAGMA wal_checkpoint"))
                else None
            )
        )
        store.rotate()
    assert steps[:12] == [
        ("on disk", "books.secret.new"),
        ("on disk", "store"),
        ("in place", "books.secret"),
        ("on disk", "store"),
        ("on disk", "books.key.new"),
        ("on disk", "store"),
        ("sql", "COMMIT"),
        ("sql", "PRAGMA wal_checkpoint"),
        ("in place", "books.key"),
        ("on disk", "store"),
        ("sql", "COMMIT"),
    ]


def rotate_often(store):
    for _ in range(100):
        store.rotate()


def test_a_full_disk_leaves_the_key_there_is(path):
    first, secret = key_of(path), secret_of(path)
    with Store(path) as store:
        pages = store._connection.execute("PRAGMA page_count").fetchone()[0]
        store._connection.execute(f"PRAGMA max_page_count = {pages}")
        with pytest.raises((OSError, CoterieError)):
            rotate_often(store)
        store._connection.execute("PRAGMA max_page_count = 1000000")
        assert not file_of(path, ".key.new").exists()
        for site in SITES:
            take_one(store.ledger(site))
            assert store.ledger(site).books.site_key == public_hex(store.key)
    check(path, first_key=first, secret=secret)


# Files.


def test_a_secret_outlives_the_key_it_was_derived_from(path):
    secret = secret_of(path)
    assert not file_of(path, ".secret").exists()
    rotated(path)
    assert secret_of(path) == secret
    assert bytes.fromhex(file_of(path, ".secret").read_text()) == secret
    kept = file_of(path, ".secret").read_bytes()
    rotated(path)
    assert file_of(path, ".secret").read_bytes() == kept
    file_of(path, ".secret").unlink()
    for use in (secret_of, rotated):
        with pytest.raises(
            ConfigError, match=r"books.secret: is not there.*put it back"
        ) as refused:
            use(path)
        assert "\n" not in str(refused.value)


@pytest.mark.parametrize("suffix", [".key", ".secret"])
def test_a_secret_that_others_may_read_is_refused_in_one_line(path, suffix):
    rotated(path)
    key = file_of(path, ".key").read_bytes()
    file_of(path, suffix).chmod(0o644)
    with pytest.raises(ConfigError, match=f"books{suffix}: others may read.*chmod 600") as refused:
        rotated(path)
    assert "\n" not in str(refused.value)
    assert file_of(path, ".key").read_bytes() == key
    file_of(path, suffix).chmod(0o600)
    rotated(path)


def test_a_proposed_key_that_others_may_read_is_not_put_in_place(path):
    first, secret = key_of(path), secret_of(path)
    ended(forked(killed_at, "put it in its place", path))
    file_of(path, ".key.new").chmod(0o644)
    with pytest.raises(ConfigError, match=r"books.key.new: others may read.*chmod 600"):
        Store(path)
    file_of(path, ".key.new").chmod(0o600)
    assert check(path, first_key=first, secret=secret) != first


def test_half_a_proposed_key_is_forgotten(path):
    """As a crash leaves it while it is being written."""
    first, secret = key_of(path), secret_of(path)
    file_of(path, ".key.new").touch(0o600)
    file_of(path, ".secret.new").touch(0o600)
    assert check(path, first_key=first, secret=secret) == first


def test_where_no_file_holds_the_chains_key_none_is_thrown_away(path):
    other = path.with_name("other")
    Store.create(other).close()
    ended(forked(killed_at, "put it in its place", path))
    right = file_of(path, ".key.new").read_bytes()
    shutil.copy(file_of(other, ".key"), file_of(path, ".key.new"))
    with pytest.raises(
        VerificationError, match="neither this key nor the one beside it"
    ) as refused:
        Store(path)
    assert "\n" not in str(refused.value)
    file_of(path, ".key.new").write_bytes(right)
    key_of(path)


def test_another_sites_key_is_replaced_by_none(path):
    other = path.with_name("other")
    Store.create(other).close()
    shutil.copy(file_of(other, ".key"), file_of(path, ".key"))
    with Store(path) as store:
        check_it_cannot_write(store)


def test_a_key_that_is_kept_elsewhere_stays_there(path, tmp_path):
    """A link beside the ledger, to a folder that is backed up, or is not."""
    (tmp_path / "safe").mkdir()
    kept = tmp_path / "safe" / "key"
    file_of(path, ".key").rename(kept)
    file_of(path, ".key").symlink_to(kept)
    (tmp_path / "link").symlink_to(path)
    before = kept.read_bytes()
    rotated(tmp_path / "link")
    assert file_of(path, ".key").is_symlink()
    assert kept.read_bytes() != before
    with Store(path) as store:
        take_one(store.ledger("north"))


def test_a_ledger_of_no_site_has_no_key_to_change(tmp_path):
    with Store.create(tmp_path / "books") as store, pytest.raises(ConfigError, match="no site's"):
        store.rotate()
    assert {each.name for each in tmp_path.iterdir()} == {"books", "books.key", "books.lock"}


def test_a_change_of_keys_is_no_part_of_another_transaction(path):
    with Store(path) as store, store.together(), pytest.raises(AssertionError):
        store.rotate()

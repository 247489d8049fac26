"""What a ledger is bound to: a root that tells nothing, and no record under two ledgers."""

import sqlite3
import tempfile
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given, settings
from hypothesis import strategies as st

from client.commitment import commit_to, secret_of
from client.ledger import Store
from common.errors import ConfigError
from common.privacy.chain import Kind
from common.privacy.verification import verify
from common.records import Records

from .ledger_worker import terms

SECRET = bytes(range(32))
SITES = ("north", "south", "west")
GOLDEN = "7fce1f52fd56c724c55bd97714ca98c8c9dfc3711419b3fb60503317f38ae946"
TEXTS = st.text(min_size=1, max_size=5)


def records(texts, labels=None):
    texts = tuple(texts)
    return Records(texts, np.array(labels or [0] * len(texts), dtype=np.int64))


def bound(texts, labels=None, secret=SECRET):
    return commit_to(records(texts, labels), secret)


@contextmanager
def opened(*sites):
    """A store in a folder of its own, with unbound chains."""
    with tempfile.TemporaryDirectory() as folder, Store.create(Path(folder) / "books") as store:
        with store.together():
            for site in sites:
                store.open(site, terms())
        yield store


def seen(store):
    return dict(store.read("SELECT tag, site FROM seen"))


def heads(store):
    return {site: store.ledger(site).head for site in store.sites()}


# The commitment.


@given(
    st.lists(st.tuples(TEXTS, st.integers(0, 3)), max_size=9).flatmap(
        lambda rows: st.tuples(st.just(rows), st.permutations(rows))
    )
)
def test_order_does_not_matter(orders):
    one, other = ([[*column] for column in zip(*rows, strict=True)] or [[]] for rows in orders)
    assert bound(*one) == bound(*other)


@given(st.lists(TEXTS, min_size=1, unique=True, max_size=9), st.binary(min_size=32, max_size=32))
def test_another_secret_gives_another_root_and_no_tag_in_common(texts, other):
    """So that who has the file and not the secret can try out no text."""
    if other == SECRET:
        return
    ours, theirs = bound(texts), bound(texts, secret=other)
    assert ours.root != theirs.root
    assert not ours.tags & theirs.tags
    assert len(ours.tags) == len(theirs.tags) == len(texts)


def test_a_tag_is_of_the_text_alone_and_the_root_of_the_label_too():
    one, other = bound(["a", "b"], [0, 1]), bound(["a", "b"], [1, 1])
    assert one.tags == other.tags
    assert one.root != other.root
    assert bound(["a", "a"]).tags == bound(["a"]).tags
    assert bound(["a", "a"]).root != bound(["a"]).root


def test_a_tag_is_in_a_domain_of_its_own():
    """A root of one record is its leaf: it must not be the tag of any text."""
    leaf = bytes.fromhex(bound(["a"]).root)
    assert leaf not in bound(["a", '["a",0]', "\x00" + '["a",0]']).tags


def test_a_lone_surrogate_is_a_text_like_any_other():
    assert len(bound(["\ud800", "a"]).tags) == 2


def test_a_commitment_does_not_show_its_tags():
    assert "tags" not in repr(bound(["a"]))


def test_roots_of_older_ledgers_are_still_theirs():
    """Computed with the program of before tags were kept: a change would look like other data."""
    key = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))
    assert bound(["one", "two", "zwölf"], [0, 1, 1], secret_of(key)).root == GOLDEN


# Overlap.


@settings(max_examples=30)
@given(st.dictionaries(TEXTS, st.sampled_from(SITES), max_size=12), st.permutations(SITES))
def test_disjoint_sets_never_refuse(owner, order):
    with opened(*SITES) as store:
        for _ in range(2):
            for site in order:
                mine = [text for text in owner if owner[text] == site]
                store.ledger(site).bind(bound(mine * 2, [0, 1] * len(mine)))
        assert len(seen(store)) == len(owner)


@settings(max_examples=40)
@given(
    st.tuples(st.lists(TEXTS, max_size=5), st.lists(TEXTS, max_size=5)),
    TEXTS,
    st.permutations(["north", "south"]),
    st.sampled_from(["bind", "open"]),
    st.booleans(),
)
def test_a_shared_text_always_refuses_whichever_came_first(others, shared, order, way, moved):
    """Whatever its label, and also after the first site has let go of it."""
    left, right = others
    first, second = order
    with opened(first, "west", *([second] if way == "bind" else [])) as store:
        store.ledger(first).bind(bound([*left, shared]))
        if moved:
            store.ledger(first).bind(bound([text + "?" for text in left]))
        before = heads(store), seen(store)
        theirs = bound([*right, shared], [1] * (len(right) + 1))

        def take():
            if way == "bind":
                store.ledger(second).bind(theirs)
            else:
                store.open(second, terms(), theirs)

        for _ in range(2):
            with pytest.raises(ConfigError, match=f"#{second}: .* under #{first};") as refused:
                take()
        assert "\n" not in str(refused.value)
        assert "seed" in str(refused.value)
        assert (heads(store), seen(store)) == before
        store.ledger("west").bind(bound(["none of theirs"]))


@settings(max_examples=30)
@given(st.lists(st.lists(TEXTS, max_size=6), min_size=1, max_size=4))
def test_a_chain_may_be_bound_again_to_the_same_or_other_records(datasets):
    with opened("north", "south") as store:
        ledger = store.ledger("north")
        for texts in datasets:
            ledger.bind(bound(texts))
            head = ledger.head
            ledger.bind(bound(texts[::-1]))
            assert ledger.head == head
            assert ledger.books.genesis["dataset_root"] == bound(texts).root
        assert seen(store).keys() == {tag for texts in datasets for tag in bound(texts).tags}
        verify(ledger.export().encode())


def test_what_was_known_is_known_to_the_next_process_and_to_no_export(tmp_path):
    tag = next(iter(bound(["shared"]).tags))
    with Store.create(tmp_path / "books") as store:
        exported = store.open("north", terms(), bound(["shared"])).export()
    assert tag.hex() not in exported
    with Store(tmp_path / "books") as store:
        assert seen(store) == {tag: "north"}
        with pytest.raises(ConfigError, match="under #north"):
            store.open("south", terms(), bound(["shared"]))
        assert store.sites() == ["north"]
        store.open("south", terms(), bound(["shared"], secret=bytes(32)))  # the limit: another key


def test_a_refusal_undoes_what_was_bound_before_it_in_the_same_transaction():
    with opened(*SITES) as store:
        store.ledger("west").bind(bound(["taken"]))
        before = heads(store), seen(store)

        def bind_all():
            with store.together():
                store.ledger("north").bind(bound(["free"]))
                store.ledger("south").bind(bound(["taken"]))

        with pytest.raises(ConfigError):
            bind_all()
        assert (heads(store), seen(store)) == before


def test_two_sites_of_one_transaction_share_no_record():
    with opened("north", "south") as store, store.together():
        store.ledger("north").bind(bound(["shared"]))
        with pytest.raises(ConfigError, match="under #north"):
            store.ledger("south").bind(bound(["shared"]))


def test_what_was_seen_is_neither_forgotten_nor_given_away():
    with opened("north") as store:
        store.ledger("north").bind(bound(["a"]))
        for statement in ("DELETE FROM seen", "UPDATE seen SET site = 'south'"):
            with pytest.raises(sqlite3.IntegrityError, match="stays so"):
                store._connection.execute(statement)
        assert list(seen(store).values()) == ["north"]


def test_a_file_of_before_is_given_the_table_when_it_is_opened(tmp_path):
    path = tmp_path / "books"
    with Store.create(path) as store:
        store.open("north", terms())
        with store.together() as connection:
            connection.execute("DROP TABLE seen")  # and its triggers with it
    with Store(path) as first, Store(path) as second:
        first.ledger("north").bind(bound(["a"]))
        with pytest.raises(ConfigError, match="under #north"):
            second.open("south", terms(), bound(["a"]))
        triggers = first.read("SELECT name FROM sqlite_master WHERE tbl_name = 'seen' ORDER BY 1")
        assert {"seen_is_not_deleted", "seen_is_not_edited"} <= {name for (name,) in triggers}


def test_a_thousand_sites_are_bound_at_once_and_an_overlap_among_them_is_seen(tmp_path):
    with Store.create(tmp_path / "books") as store:
        names = [f"site {number:04}" for number in range(1000)]
        with store.together():
            for site in names:
                store.open(site, terms())
        sets = {site: bound(f"{site}: {number}" for number in range(100)) for site in names}
        with store.together():
            for site in names:
                store.ledger(site).bind(sets[site])
        with pytest.raises(ConfigError, match="under #site 0999"):
            store.ledger("site 0000").bind(bound(["site 0999: 99"]))
        kinds = [entry.kind for entry in store.ledger("site 0500").entries()]
        assert kinds == [Kind.GENESIS, Kind.DATASET]

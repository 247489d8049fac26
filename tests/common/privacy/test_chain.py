"""The ledger's format: what a hash, a signature and a line stand for, and for nothing else."""

import hashlib
import json
from dataclasses import fields, replace

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given
from hypothesis import strategies as st

from common.canonical import canonical_json
from common.errors import ConfigError, VerificationError
from common.privacy import chain
from common.privacy.accounting import Event
from common.privacy.chain import EMPTY, NOTHING, Head, Kind, linked

KEY, OTHER = (Ed25519PrivateKey.from_private_bytes(bytes([n]) * 32) for n in (1, 2))
PUBLIC, OTHER_PUBLIC = chain.public_hex(KEY), chain.public_hex(OTHER)
HEAD = Head(7, "ab" * 32)
CLAIMS = {"epsilon_pld": 1.5, "epsilon_rdp": 2}
EVENT = chain.event_body(Event(1.5, 0.25, 4))
BODIES = {
    Kind.GENESIS: {
        "version": 1,
        "site": "clinic",
        "dataset": "letters, æøå",
        "dataset_root": "0" * 64,
        "unit": "record",
        "relation": "add_or_remove_one",
        "cap": 3,
        "delta": 1e-5,
        "filter_order": 8,
        "site_key": PUBLIC,
        "officer_key": OTHER_PUBLIC,
    },
    Kind.PLAN: {
        "run": "a",
        "plan": "1" * 64,
        "model": "tiny",
        "unit": "record",
        "event": EVENT,
        "rounds": 2,
        "spare_rounds": 0,
        "admission": "plan",
    },
    Kind.CLOSE: {"run": "a"},
    Kind.RESERVE: {"run": "a", "round": 1, "attempt": 1, "event": EVENT},
    Kind.PREPARE: {
        "reservation": 3,
        "update": "2" * 64,
        "steps": 4,
    },
    Kind.RELEASE: {"reservation": 3},
    Kind.LOST: {"reservation": 3, "reason": "crash"},
    Kind.RECEIPT: {"seq": 1, "hash": "3" * 64, "coordinator_key": PUBLIC, "signature": "4" * 128},
    Kind.MISC_EVENT: {
        "purpose": "count",
        "unit": "person",
        "event": EVENT,
        "admission": "filter",
    },
    Kind.CAP_CHANGE: {"cap": 2.5, "officer_signature": "5" * 128},
    Kind.DATASET: {"dataset_root": "6" * 64},
    Kind.AUDIT: {
        "report": "7" * 64,
        "design": "made",
        "m": 1000,
        "confidence": 0.95,
        "lower_bound": 0.5,
        "claimed_epsilon": 3.0,
        "ceiling": 6.5,
        "verdict": "NOT FALSIFIED",
    },
    Kind.KEY_ROTATE: {"site_key": PUBLIC, "proof": "8" * 128},
}


def written(kind=Kind.CLOSE, after=HEAD, key=KEY, **changes):
    return chain.write_entry(kind, BODIES[kind] | changes, after=after, key=key)


def chained(count, after=EMPTY):
    entries = []
    for _ in range(count):
        entries.append(written(after=after))
        after = Head(entries[-1].seq, entries[-1].hash)
    return entries


# Entries.


def test_there_is_a_body_for_every_kind():
    assert set(BODIES) == set(Kind) == set(chain.BODIES)


@pytest.mark.parametrize("kind", Kind)
def test_an_entry_is_read_as_it_was_written(kind):
    entry = written(kind)
    read = chain.read_entry(entry.line, entry.seq)
    assert (read, read.hash, read.line) == (entry, entry.hash, entry.line)
    assert "\n" not in entry.line
    assert (entry.seq, entry.prev) == (HEAD.seq + 1, HEAD.hash)
    chain.check_signature(read, PUBLIC)


@pytest.mark.parametrize("kind", Kind)
def test_every_field_is_under_the_hash_and_the_hash_under_the_signature(kind):
    entry = written(kind)
    changes = {
        "seq": 9,
        "kind": Kind.DATASET if kind is Kind.AUDIT else Kind.AUDIT,
        "time": "2026-01-01T00:00:00Z",
        "nonce": "0" * 32,
        "prev": "0" * 64,
        "body": {**entry.body, next(iter(entry.body)): "x"},
    }
    assert {*changes, "signature"} == {field.name for field in fields(entry)}
    for name, value in changes.items():
        edited = replace(entry, **{name: value})
        assert edited.hash != entry.hash
        assert (edited.content_digest == entry.content_digest) == (name == "prev")
        with pytest.raises(VerificationError, match="edited, or signed by another key"):
            chain.check_signature(edited, PUBLIC)


def test_the_hash_is_of_the_hash_before_and_of_the_content():
    """Written out: whoever reads a ledger with another program finds the same."""
    entry = written(Kind.PLAN)
    line = json.loads(entry.line)
    content = canonical_json({k: line[k] for k in ("seq", "kind", "time", "nonce", "body")})
    digest = hashlib.sha256(content.encode())
    assert entry.content_digest == digest.hexdigest()
    whole = hashlib.sha256(bytes.fromhex(HEAD.hash) + digest.digest())
    assert entry.hash == whole.hexdigest() == linked(HEAD.hash, digest.hexdigest())
    KEY.public_key().verify(
        bytes.fromhex(line["signature"]), b"coterie ledger entry\n" + whole.digest()
    )


def test_equal_contents_have_different_digests():
    """A digest that is handed out lets nobody test a guess of the content."""
    digests = {written().content_digest for _ in range(20)}
    assert len(digests) == 20


@given(st.integers(0, 6), st.integers(0, 6))
def test_digests_alone_prove_that_one_head_follows_another(first, more):
    """A coordinator that remembers a head needs no entry to know that it was continued."""
    entries = CHAIN[: first + more]
    heads = [EMPTY, *(Head(entry.seq, entry.hash) for entry in entries)]
    found = heads[first].hash
    for entry in entries[first:]:
        found = linked(found, entry.content_digest)
    assert found == heads[-1].hash
    for left_out in range(first, first + more):
        found = heads[first].hash
        for entry in [*entries[first:left_out], *entries[left_out + 1 :]]:
            found = linked(found, entry.content_digest)
        assert found != heads[-1].hash


CHAIN = chained(12)


# Heads.


@given(st.integers(0, 10**15 - 1), st.text("0123456789abcdef", min_size=64, max_size=64))
def test_a_head_is_read_as_it_is_shown(seq, digest):
    assert Head.parse(str(Head(seq, digest))) == Head(seq, digest)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "7",
        ":",
        "ab" * 32,
        f":{'ab' * 32}",
        f"-1:{'ab' * 32}",
        f"+1:{'ab' * 32}",
        f" 1:{'ab' * 32}",
        f"1:{'ab' * 32}\n",
        f"1:{'AB' * 32}",
        f"1:{'ab' * 31}",
        f"1:{'ab' * 33}",
        f"1:{'ab' * 31}xy",
        f"1_0:{'ab' * 32}",
        f"٣:{'ab' * 32}",
        f"{'9' * 16}:{'ab' * 32}",
    ],
)
def test_what_is_no_head_is_refused_with_the_remedy(text):
    with pytest.raises(ConfigError) as refused:
        Head.parse(text)
    assert str(refused.value) == (
        f"head={text}: must be SEQ:HASH, as `coterie ledger show` prints it"
    )


# Signatures.

CAP = {"cap": 2.5, "after": HEAD}


def signatures():
    """Each kind of signature by KEY, and whether a signature is one of its kind."""
    entry = written()
    tail = chain.export([entry], CLAIMS, KEY)
    export = chain.read_export(tail.encode())

    def holds(check, *arguments):
        try:
            check(*arguments)
        except VerificationError:
            return False
        return True

    return {
        "entry": (
            entry.signature,
            lambda s: holds(chain.check_signature, replace(entry, signature=s), PUBLIC),
        ),
        "tail": (
            json.loads(tail.split("\n")[-2])["signature"],
            lambda s: holds(replace(export, _signature=s).check_tail, PUBLIC),
        ),
        "cap": (chain.sign_cap(KEY, **CAP), lambda s: chain.cap_is_signed(PUBLIC, s, **CAP)),
        "head": (chain.sign_head(KEY, HEAD), lambda s: chain.head_is_signed(PUBLIC, s, HEAD)),
        "rotation": (
            chain.prove_rotation(KEY, OTHER_PUBLIC, after=HEAD),
            lambda s: chain.rotation_is_proved(PUBLIC, s, OTHER_PUBLIC, after=HEAD),
        ),
    }


def test_no_signature_stands_for_one_of_another_kind():
    made = signatures()
    for name, (signature, _) in made.items():
        assert [kind for kind, (_, holds) in made.items() if holds(signature)] == [name]


def test_no_statement_of_one_kind_can_be_read_as_one_of_another():
    """Whatever is signed: no prefix begins with another one."""
    prefixes = (chain._ENTRY, chain._TAIL, chain._CAP, chain._HEAD, chain._ROTATION)
    for prefix in prefixes:
        assert [other for other in prefixes if prefix.startswith(other)] == [prefix]


def test_another_keys_signature_holds_for_nothing():
    assert not chain.cap_is_signed(PUBLIC, chain.sign_cap(OTHER, **CAP), **CAP)
    assert not chain.head_is_signed(PUBLIC, chain.sign_head(OTHER, HEAD), HEAD)
    proof = chain.prove_rotation(OTHER, OTHER_PUBLIC, after=HEAD)
    assert not chain.rotation_is_proved(PUBLIC, proof, OTHER_PUBLIC, after=HEAD)
    with pytest.raises(VerificationError, match=r"^entry 8 \(CLOSE\): its signature is not"):
        chain.check_signature(written(key=OTHER), PUBLIC)


@pytest.mark.parametrize(
    "change",
    [{"cap": 2.6}, {"after": Head(8, HEAD.hash)}, {"after": Head(7, NOTHING)}, {"after": EMPTY}],
    ids=str,
)
def test_a_cap_is_signed_for_one_place_and_one_value(change):
    signature = chain.sign_cap(KEY, **CAP)
    assert chain.cap_is_signed(PUBLIC, signature, **CAP)
    assert not chain.cap_is_signed(PUBLIC, signature, **CAP | change)


@pytest.mark.parametrize(
    ("key", "signature"),
    [("", "0" * 128), ("zz" * 32, "0" * 128), (PUBLIC, ""), (PUBLIC, "zz"), ("f" * 64, "0" * 128)],
)
def test_what_is_no_key_or_signature_holds_for_nothing(key, signature):
    assert not chain.head_is_signed(key, signature, HEAD)


# Lines.


def line_of(kind=Kind.CLOSE, /, **changes):
    return canonical_json({**json.loads(written(kind).line), **changes})


LINES = {
    "empty": ("", "entry 3: not JSON"),
    "half a line": (written().line[:-1], "entry 3: not JSON"),
    "two objects": ("{}{}", "entry 3: not JSON"),
    "NaN": ('{"a":NaN}', "entry 3: not JSON"),
    "infinity": ('{"a":1e999}', "entry 3: not JSON"),
    "a huge number": (f'{{"a":{"9" * 5000}}}', "entry 3: not JSON"),
    "too deep": ("[" * 60000, "entry 3: not JSON"),
    "too long": ("{" * 65537, "entry 3: longer than any entry"),
    "a list": ("[]", "entry 3: not written as a ledger writes it"),
    "null": ("null", "entry 3: not written as a ledger writes it"),
    "a space": (written().line + " ", "entry 3: not written as a ledger writes it"),
    "an escape": ('{"a":"\\u0041"}', "entry 3: not written as a ledger writes it"),
    "half a pair": ('{"a":"\\ud800"}', "entry 3: not written as a ledger writes it"),
    "1.50": ('{"a":1.50}', "entry 3: not written as a ledger writes it"),
    "1E0": ('{"a":1E0}', "entry 3: not written as a ledger writes it"),
    "nothing in it": ("{}", "entry 3: has other fields than an entry has"),
    "one more": (line_of(more=1), "entry 3: has other fields than an entry has"),
    "other version": (
        line_of(Kind.GENESIS, body=BODIES[Kind.GENESIS] | {"version": 2}),
        "entry 3: schema version 2 is unknown here; this program reads version 1",
    ),
    "no version": (
        line_of(Kind.GENESIS, body={}),
        "entry 3: schema version None is unknown here; this program reads version 1",
    ),
    "no body": (line_of(body={}), "entry 3 (CLOSE): run: not as it must be"),
    "two faults": (
        line_of(body={"walk": 1}),
        "entry 3 (CLOSE): run, walk: not as it must be",
    ),
}


@pytest.mark.parametrize(("line", "message"), LINES.values(), ids=LINES.keys())
def test_a_line_that_no_ledger_writes_is_refused(line, message):
    with pytest.raises(VerificationError) as refused:
        chain.read_entry(line, 3)
    assert str(refused.value) == message


FIELDS = {
    "seq": [None, "1", 1.0, True, [], {}],
    "kind": [None, 1, "", "plan", "REFUND", [], {}],
    "time": [None, 1, "", "2026-01-01", "2026-01-01T00:00:00", "\uff12026-01-01T00:00:00Z"],
    "nonce": [None, 1, "", "0" * 31, "0" * 33, "0" * 34, "G" * 32, "A" * 32],
    "prev": [None, 0, "", "0" * 63, "0" * 65, "A" * 64],
    "signature": [None, 0, "", "0" * 127, "0" * 130, "A" * 128],
    "body": [None, 0, "", [], True],
}


@pytest.mark.parametrize(
    ("name", "value"),
    [(name, value) for name, values in FIELDS.items() for value in values],
    ids=lambda value: repr(value)[:20],
)
def test_a_malformed_field_is_refused(name, value):
    with pytest.raises(VerificationError) as refused:
        chain.read_entry(line_of(**{name: value}), 3)
    assert str(refused.value) == "entry 3: a field is malformed, or its kind is unknown"


JUNK = [None, True, False, "", "x\n", "x" * 201, -1, 1.5, -0.5, 2**53, 10**301, [], {}, "G" * 64]
FITTING = {
    (Kind.GENESIS, "cap"): [1.5, 2**53],
    (Kind.GENESIS, "delta"): [1.5, 2**53],
    (Kind.CAP_CHANGE, "cap"): [1.5, 2**53],
    (Kind.AUDIT, "lower_bound"): [1.5, 2**53],
    (Kind.AUDIT, "claimed_epsilon"): [1.5, 2**53],
    (Kind.AUDIT, "ceiling"): [1.5, 2**53],
}
"""Junk that is none at its place; other text of 64 signs is text everywhere."""
TEXTS = {"site", "dataset", "run", "model", "purpose", "design"}


@pytest.mark.parametrize("kind", Kind)
def test_a_value_of_another_form_is_refused_and_named(kind):
    for name in BODIES[kind]:
        for value in JUNK:
            fits = value in FITTING.get((kind, name), []) and type(value) is not bool
            if fits or (name in TEXTS and value == "G" * 64):
                chain.check_body(3, kind, BODIES[kind] | {name: value})
                continue
            with pytest.raises(VerificationError, match=r"^entry 3") as refused:
                written(kind, after=Head(2, NOTHING), **{name: value})
            assert name in str(refused.value)


@pytest.mark.parametrize("kind", Kind)
def test_a_body_has_all_its_fields_and_no_other(kind):
    for name in BODIES[kind]:
        rest = {key: value for key, value in BODIES[kind].items() if key != name}
        with pytest.raises(VerificationError, match=r"^entry 3.*" + name):
            chain.check_body(3, kind, rest)
    with pytest.raises(VerificationError, match=r"^entry 3 .*: more: not as it must be$"):
        chain.check_body(3, kind, BODIES[kind] | {"more": 1})


@pytest.mark.parametrize(
    "change",
    [
        {"noise_multiplier": 0},
        {"noise_multiplier": -1.0},
        {"noise_multiplier": True},
        {"noise_multiplier": 1e301},
        {"noise_multiplier": "1"},
        {"sample_rate": -0.1},
        {"sample_rate": 1.1},
        {"sample_rate": None},
        {"steps": 1.0},
        {"steps": -1},
        {"steps": 2**53},
        {"steps": True},
        {"more": 1},
    ],
    ids=str,
)
def test_an_event_of_another_form_is_refused(change):
    with pytest.raises(VerificationError, match=r"^entry 8 \(RESERVE\): event: not as it must be$"):
        written(Kind.RESERVE, event=EVENT | change)


@given(st.floats(1e-3, 1e6), st.floats(1e-6, 1), st.integers(1, 10**6))
def test_an_event_is_what_was_written(sigma, rate, steps):
    event = Event(sigma, rate, steps)
    entry = written(Kind.RESERVE, event=chain.event_body(event))
    assert chain.event_of(chain.read_entry(entry.line, 8).body["event"]) == event


@given(st.text(max_size=30))
def test_a_text_is_printable_or_refused(text):
    if text and text.isprintable():
        entry = written(Kind.CLOSE, run=text)
        assert chain.read_entry(entry.line, 8).body == {"run": text}
    else:
        with pytest.raises(VerificationError):
            written(Kind.CLOSE, run=text)


# Files.


@pytest.mark.parametrize("count", [0, 1, 12])
def test_a_file_is_read_as_it_was_exported(count):
    entries = CHAIN[:count]
    text = chain.export(entries, CLAIMS, KEY)
    export = chain.read_export(text.encode())
    assert list(export.entries) == entries
    assert export.head == (Head(count, entries[-1].hash) if entries else EMPTY)
    assert export.claims == CLAIMS
    export.check_tail(PUBLIC)
    assert text.count("\n") == count + 1
    with pytest.raises(VerificationError, match=r"^tail: its signature is not the site's"):
        export.check_tail(OTHER_PUBLIC)


def test_a_site_with_letters_beyond_ascii_is_exported_as_utf8():
    entry = written(Kind.GENESIS, after=EMPTY, site="Poliklinik Ø · 診療所")
    export = chain.read_export(chain.export([entry], CLAIMS, KEY).encode())
    assert export.entries == (entry,)
    chain.check_signature(export.entries[0], PUBLIC)


@pytest.mark.parametrize(
    ("claims", "message"),
    [
        ({}, "tail: its claims are malformed"),
        ({**CLAIMS, "more": 1.0}, "tail: its claims are malformed"),
        ({**CLAIMS, "epsilon_pld": None}, "tail: its claims are malformed"),
        ({**CLAIMS, "epsilon_pld": True}, "tail: its claims are malformed"),
        ({**CLAIMS, "epsilon_pld": "inf"}, "tail: its claims are malformed"),
    ],
)
def test_claims_of_another_form_are_refused(claims, message):
    with pytest.raises(VerificationError) as refused:
        chain.read_export(chain.export(CHAIN, claims, KEY).encode())
    assert str(refused.value) == message

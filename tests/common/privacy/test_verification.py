"""Exported ledgers: each fault is found and named, nothing edited is ever accepted."""

import json
import random
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from common.canonical import canonical_json
from common.errors import VerificationError
from common.privacy import chain
from common.privacy.accounting import Event, epsilon_pld, epsilon_rdp
from common.privacy.chain import Head, Kind, event_body
from common.privacy.verification import verify

ASSETS = Path(__file__).parents[2] / "assets"
MAKE = runpy.run_path(str(ASSETS / "make_ledgers.py"))
Pen, SITE, NEXT, OFFICER, OTHER = (MAKE[n] for n in ("Pen", "SITE", "NEXT", "OFFICER", "OTHER"))
GOOD = ("finished", "eventful", "of-persons")


def ledger(name):
    return (ASSETS / "ledgers" / f"{name}.jsonl").read_bytes()


def exported(pen, claims=None):
    return pen.export(MAKE["AMPLE"] if claims is None else claims).encode()


def refusal(content, **pins):
    """What `verify` says against it: a VerificationError, and none of its children."""
    with pytest.raises(VerificationError) as refused:
        verify(content, **pins)
    assert type(refused.value) is VerificationError
    return str(refused.value)


def run(command, **options):
    root = ASSETS.parents[1]
    done = subprocess.run(command, check=False, capture_output=True, cwd=root, **options)
    assert done.returncode == 0, done.stderr.decode()


NO_ORDER = "does not follow the entry before it; one is missing, or the order was changed"
NOT_SIGNED = "its signature is not the site's; it was edited, or signed by another key"
LATE = "is admitted as a plan after an output may have been seen"
OVER = (
    "the cap of epsilon 3 at delta 0.0001 does not allow it; the officer can raise the cap "
    "(coterie ledger cap)"
)
NO_OFFICER = "the cap is not signed by the officer, for this place in this ledger"
NO_CONSENT = "the new key did not sign that it follows the old one"
UNDER_COUNT = "charges another event than its plan; an under-count, or another run's"
MALFORMED = "a field is malformed, or its kind is unknown"
DIFFERS = "what was measured differs from what was planned"
FAULTS = {
    "answered-twice": "entry 6 (RESERVE): round 1 of run a was already answered",
    "attempt-again-the-first": "entry 5 (RESERVE): round 1, attempt 1, is not next in its plan",
    "attempt-left-out": "entry 5 (RESERVE): round 1, attempt 3, is not next in its plan",
    "bad-signature": f"entry 4 (PREPARE): {NOT_SIGNED}",
    "blank-line": "entry 4: not JSON",
    "byte-order-mark": "entry 1: not JSON",
    "cap-signed-by-site": f"entry 6 (CAP_CHANGE): {NO_OFFICER}",
    "cap-signed-for-another-place": f"entry 6 (CAP_CHANGE): {NO_OFFICER}",
    "cap-signed-for-another-value": f"entry 6 (CAP_CHANGE): {NO_OFFICER}",
    "claim-in-words": "tail: its claims are malformed",
    "claim-missing": "tail: its claims are malformed",
    "claim-too-small-pld": (
        "tail: claims epsilon_pld 1.4484, but the entries cost 1.44852: an under-count"
    ),
    "claim-too-small-rdp": (
        "tail: claims epsilon_rdp 1.6721, but the entries cost 1.67221: an under-count"
    ),
    "close-without-plan": "entry 6 (CLOSE): run b is not open",
    "closed-twice": "entry 7 (CLOSE): run a is not open",
    "delta-of-one": "entry 1 (GENESIS): delta must be below 1",
    "edited-time": f"entry 4 (PREPARE): {NOT_SIGNED}",
    "edited": f"entry 3 (RESERVE): {NOT_SIGNED}",
    "empty": "tail: is missing; the file was cut off",
    "end-cut-off-and-old-tail-kept": "tail: does not name the last entry; entries are missing",
    "end-of-line-missing": "tail: is missing; the file was cut off",
    "field-twice": "entry 5: not written as a ledger writes it",
    "filter-order-one": "entry 1 (GENESIS): filter_order: not as it must be",
    "filter-over-cap": f"entry 6 (PLAN): {OVER}",
    "fraction-of-a-step": "entry 2 (PLAN): event: not as it must be",
    "gap-at-the-start": f"entry 2 (PLAN): {NO_ORDER}",
    "gap": f"entry 4 (PREPARE): {NO_ORDER}",
    "hex-in-capitals": f"entry 5: {MALFORMED}",
    "keys-not-sorted": "entry 5: not written as a ledger writes it",
    "line-twice": f"entry 3 (RESERVE): {NO_ORDER}",
    "long-line": "entry 5: longer than any entry",
    "lost-after-release": "entry 6 (LOST): reservation 3 is released",
    "measured-steps": f"entry 4 (PREPARE): {DIFFERS}",
    "misc-over-cap": f"entry 6 (MISC_EVENT): {OVER}",
    "misc-plan-after-release": f"entry 6 (MISC_EVENT): {LATE}",
    "missing-field": "entry 2 (MISC_EVENT): event: not as it must be",
    "negative-noise": "entry 2 (PLAN): event: not as it must be",
    "no-genesis": "entry 1 (PLAN): a ledger begins with GENESIS, and has one",
    "no-noise": "entry 2 (PLAN): event: not as it must be",
    "no-spare-left": (
        "entry 7 (RESERVE): round 1 of run a was lost; its plan has no spare round left"
    ),
    "no-tail": "tail: is missing; the file was cut off",
    "not-a-number": "entry 2: not JSON",
    "not-an-object": "entry 4: not written as a ledger writes it",
    "not-text": "ledger: not UTF-8 text",
    "plan-admission-after-filter": f"entry 3 (PLAN): {LATE}",
    "plan-admission-after-release": f"entry 6 (PLAN): {LATE}",
    "plan-forgets-closed-rounds": f"entry 4 (PLAN): {OVER}",
    "person-plan-in-record-ledger": (
        "entry 2 (PLAN): is priced by person, in a ledger whose unit is record"
    ),
    "plan-of-unknown-unit": "entry 2 (PLAN): unit: not as it must be",
    "plan-over-cap-by-its-spares": f"entry 2 (PLAN): {OVER}",
    "plan-over-cap": f"entry 2 (PLAN): {OVER}",
    "plan-without-unit": "entry 2 (PLAN): unit: not as it must be",
    "plans-over-cap-together": f"entry 4 (PLAN): {OVER}",
    "prepared-after-lost": "entry 5 (PREPARE): reservation 3 is lost",
    "prepared-after-release": "entry 6 (PREPARE): reservation 3 is released",
    "prepared-twice": "entry 5 (PREPARE): reservation 3 is prepared",
    "rate-above-one": "entry 2 (PLAN): event: not as it must be",
    "receipt-for-a-later-head": "entry 6 (RECEIPT): is for a head that this chain never had",
    "receipt-for-no-head": "entry 6 (RECEIPT): is for a head that this chain never had",
    "audit-denies-its-figures": "entry 6 (AUDIT): its verdict is not that of its own figures",
    "audit-verifies": "entry 6 (AUDIT): verdict: not as it must be",
    "receipt-not-signed": "entry 6 (RECEIPT): its receipt is not signed by the key it names",
    "record-misc-in-person-ledger": (
        "entry 2 (MISC_EVENT): is priced by record, in a ledger whose unit is person"
    ),
    "record-plan-in-person-ledger": (
        "entry 2 (PLAN): is priced by record, in a ledger whose unit is person"
    ),
    "release-of-another-entry": "entry 6 (RELEASE): reservation 2 was never reserved",
    "release-of-lost": "entry 5 (RELEASE): reservation 3 is lost",
    "release-without-prepare": "entry 4 (RELEASE): reservation 3 is reserved",
    "release-without-reserve": "entry 6 (RELEASE): reservation 6 was never reserved",
    "released-twice": "entry 6 (RELEASE): reservation 3 is released",
    "reordered": f"entry 5 (RELEASE): {NO_ORDER}",
    "reserve-after-close": "entry 7 (RESERVE): run a has no open plan",
    "reserve-of-another-run": "entry 3 (RESERVE): run b has no open plan",
    "reserve-under-lowered-cap": f"entry 7 (RESERVE): {OVER}".replace("epsilon 3", "epsilon 1"),
    "reserve-without-plan": "entry 2 (RESERVE): run a has no open plan",
    "rotation-not-proved": f"entry 6 (KEY_ROTATE): {NO_CONSENT}",
    "rotation-proved-for-another-key": f"entry 6 (KEY_ROTATE): {NO_CONSENT}",
    "round-not-planned": "entry 9 (RESERVE): round 3, attempt 1, is not next in its plan",
    "round-zero": "entry 6 (RESERVE): round 0, attempt 1, is not next in its plan",
    "run-planned-twice": "entry 3 (PLAN): run a is already planned",
    "same-round-side-by-side": "entry 4 (RESERVE): round 1 of run a was already answered",
    "second-genesis": "entry 6 (GENESIS): a ledger begins with GENESIS, and has one",
    "short-nonce": f"entry 5: {MALFORMED}",
    "signed-by-another": f"entry 4 (PREPARE): {NOT_SIGNED}",
    "signed-by-retired-key": f"entry 7 (RESERVE): {NOT_SIGNED}",
    "spaces": "entry 2: not written as a ledger writes it",
    "spliced": f"entry 4 (PREPARE): {NO_ORDER}",
    "tail-bad-signature": "tail: its signature is not the site's; the file was edited",
    "tail-edited": "tail: its signature is not the site's; the file was edited",
    "tail-of-an-older-copy": "tail: does not name the last entry; entries are missing",
    "tail-only": "entry 1: is missing; a ledger begins with GENESIS",
    "tail-signed-by-another": "tail: its signature is not the site's; the file was edited",
    "tail-signed-by-retired-key": "tail: its signature is not the site's; the file was edited",
    "tail-without-head": "tail: names no head",
    "time-in-words": f"entry 5: {MALFORMED}",
    "true-for-one": "entry 3 (RESERVE): attempt: not as it must be",
    "under-count-noise": f"entry 3 (RESERVE): {UNDER_COUNT}",
    "under-count-rate": f"entry 3 (RESERVE): {UNDER_COUNT}",
    "under-count-steps": f"entry 3 (RESERVE): {UNDER_COUNT}",
    "unknown-entry-field": "entry 5: has other fields than an entry has",
    "unknown-field": "entry 6 (RESERVE): free: not as it must be",
    "unknown-kind": f"entry 5: {MALFORMED}",
    "unknown-unit": "entry 1 (GENESIS): unit: not as it must be",
    "unknown-version": "entry 1: schema version 2 is unknown here; this program reads version 1",
    "windows-lines": "entry 1: not written as a ledger writes it",
}


def test_the_files_are_what_their_script_makes():
    files = {path.name: path.read_bytes() for path in (ASSETS / "ledgers").iterdir()}
    assert files == MAKE["contents"]()
    assert {f"{name}.jsonl" for name in (*GOOD, *FAULTS)} == set(files)


@pytest.mark.parametrize("name", FAULTS)
def test_each_fault_is_refused_by_its_name(name):
    assert refusal(ledger(name)) == FAULTS[name]


@pytest.mark.parametrize("name", GOOD)
def test_a_sound_ledger_is_verified_and_priced(name):
    content = ledger(name)
    found = verify(content)
    entries = chain.read_export(content).entries
    charged = [
        chain.event_of(entry.body["event"])
        for entry in entries
        if entry.kind in (Kind.RESERVE, Kind.MISC_EVENT)
    ]
    assert found.epsilon_pld == pytest.approx(epsilon_pld(charged, 1e-4), abs=1e-6)
    assert found.epsilon_rdp == pytest.approx(epsilon_rdp(charged, 1e-4), abs=1e-6)
    assert 0 < found.epsilon_pld < found.epsilon_rdp < found.books.highest_cap
    assert found.epsilon_prv is None
    assert (found.key_pinned, found.head_pinned) == (False, False)
    assert found.books.head == Head(len(entries), entries[-1].hash)


def test_the_eventful_ledger_has_an_entry_of_every_kind():
    kinds = {entry.kind for entry in chain.read_export(ledger("eventful")).entries}
    assert kinds == set(Kind)


def test_the_state_after_the_eventful_ledger():
    books = verify(ledger("eventful")).books
    assert [(plan.run, plan.reserved, plan.open) for plan in books.plans.values()] == [
        ("a", 3, False),
        ("b", 1, False),
    ]
    assert books.lost_rounds() == 1
    assert (books.cap, books.highest_cap) == (4.0, 6.0)
    assert books.site_key == chain.public_hex(NEXT)
    assert books.genesis["site_key"] == chain.public_hex(SITE)
    assert books.genesis["dataset_root"] == MAKE["digest"]("more letters")
    assert [(each["lower_bound"], each["verdict"]) for each in books.audits] == [
        (0.31, "NOT FALSIFIED")
    ]


@pytest.mark.parametrize("name", GOOD)
def test_a_verified_ledger_names_its_unit(name):
    assert verify(ledger(name)).books.unit == ("person" if name == "of-persons" else "record")


def test_a_third_accountant_is_asked_on_demand():
    found = verify(ledger("finished"), prv=True)
    assert found.epsilon_prv == pytest.approx(found.epsilon_pld, abs=0.05)


# Keys and heads that somebody else remembers.


@pytest.mark.parametrize("name", GOOD)
def test_the_first_key_of_the_site_is_pinned(name):
    found = verify(ledger(name), key=chain.public_hex(SITE))
    assert (found.key_pinned, found.head_pinned) == (True, False)
    for key in (NEXT, OTHER, OFFICER):
        assert refusal(ledger(name), key=chain.public_hex(key)) == (
            "entry 1 (GENESIS): is of another site's key than the one given"
        )


def copies():
    """The same chain exported after each of its entries."""
    whole = MAKE["eventful"]()
    entries, key = whole.entries, SITE
    for length, entry in enumerate(entries, 1):
        key = NEXT if entry.kind is Kind.KEY_ROTATE else key
        whole.entries, whole.key = entries[:length], key
        yield exported(whole), whole.head


def test_every_older_copy_is_sound_and_refused_with_any_newer_head():
    made = list(copies())
    heads = [head for _, head in made]
    for length, (content, head) in enumerate(made, 1):
        assert verify(content).books.head == head
        for known in heads[:length]:
            assert verify(content, head=known).head_pinned
        for known in heads[length:]:
            assert refusal(content, head=known) == (
                f"entry {known.seq}: is not the one whose head was given; this is a fork, or a "
                "copy older than that head"
            )


def test_a_fork_is_sound_and_refused_with_the_head_of_the_other_branch():
    """The site's own key can write it; only who remembers a head can tell."""
    ours, theirs = MAKE["half"](), MAKE["half"]()
    common_head = ours.head
    theirs.name = "fork"
    for pen in (ours, theirs):
        pen.answer(2)
    assert ours.head.seq == theirs.head.seq
    for pen, other in ((ours, theirs), (theirs, ours)):
        assert verify(exported(pen), head=pen.head).head_pinned
        assert verify(exported(pen), head=common_head).head_pinned
        assert refusal(exported(pen), head=other.head).startswith("entry 8: is not the one whose")


def test_a_fork_that_spends_again_from_the_start_is_refused_with_an_old_head():
    fork = Pen(cap=50.0)
    fork.plan()
    content = exported(fork)
    assert verify(content, key=chain.public_hex(SITE)).key_pinned
    assert refusal(content, head=MAKE["half"]().head).startswith("entry 5: is not the one")


@pytest.mark.parametrize("seq", [0, 1, 5, 6, 10**15 - 1])
def test_a_head_with_another_hash_is_in_no_ledger(seq):
    head = Head(seq, "f" * 64)
    assert refusal(exported(MAKE["half"]()), head=head).startswith(f"entry {seq}: is not the one")


@pytest.mark.parametrize("by", [0, 1e-7])
def test_claims_may_be_a_rounding_below_and_anything_above(by):
    pen = MAKE["finished"]()
    found = verify(exported(pen))
    exact = {"epsilon_pld": found.epsilon_pld - by, "epsilon_rdp": found.epsilon_rdp - by}
    verify(exported(pen, exact))
    for name, value in exact.items():
        below = exported(pen, {**exact, name: value - 2e-6})
        assert refusal(below).startswith(f"tail: claims {name} ")


# What nobody signed.


def flip(draw, content):
    content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)


def other_byte(draw, content):
    content[draw.randrange(len(content))] = draw.choice(b'0123456789abcdef{}[]",:.-e \n\r\t\0')


def delete(draw, content):
    at = draw.randrange(len(content))
    del content[at : at + draw.choice([1, 1, 1, 2, 64, 500])]


def insert(draw, content):
    at = draw.randrange(len(content) + 1)
    content[at:at] = bytes(draw.choices(b'0123456789abcdef",:{} \n', k=draw.choice([1, 1, 2, 64])))


def swap(draw, content):
    first, second = draw.randrange(len(content)), draw.randrange(len(content))
    content[first], content[second] = content[second], content[first]


def truncate(draw, content):
    del content[draw.randrange(len(content)) :]


def behead(draw, content):
    del content[: draw.randrange(1, len(content))]


def repeat_bytes(draw, content):
    at = draw.randrange(len(content))
    content[at:at] = content[at : at + draw.choice([1, 2, 16, 64])]


def lines_changed(change):
    def changed(draw, content):
        lines = bytes(content).split(b"\n")
        change(draw, lines)
        content[:] = b"\n".join(lines)

    return changed


def repeat_line(draw, lines):
    lines.insert(draw.randrange(len(lines)), draw.choice(lines))


def drop_line(draw, lines):
    del lines[draw.randrange(len(lines))]


def swap_lines(draw, lines):
    first, second = draw.randrange(len(lines)), draw.randrange(len(lines))
    lines[first], lines[second] = lines[second], lines[first]


def mix_lines(draw, lines):
    """The start of one line and the end of another."""
    at, other = draw.randrange(len(lines)), draw.choice(lines)
    cut = draw.randrange(len(lines[at]) + 1)
    lines[at] = lines[at][:cut] + other[cut:]


def other_value(draw, lines):
    """Sound JSON of the sound form, with one value from elsewhere."""
    at = draw.randrange(len(lines))
    try:
        fields, donor = json.loads(lines[at]), json.loads(draw.choice(lines))
        if draw.random() < 0.5:
            holder, source = fields, donor
        else:
            holder, source = fields["body"], donor["body"]
        name = draw.choice(list(holder))
        holder[name] = draw.choice([*source.values(), None, [], {}, 0, "", -1])
    except (ValueError, KeyError, TypeError, IndexError, AttributeError):
        return  # no such lines, or one that was broken before
    lines[at] = canonical_json(fields).encode()


MUTATIONS = (
    *(flip, other_byte, delete, insert, swap, truncate, behead, repeat_bytes),
    *map(lines_changed, (repeat_line, drop_line, swap_lines, mix_lines, other_value)),
)


@pytest.mark.parametrize("name", GOOD)
def test_none_of_ten_thousand_mutated_ledgers_is_accepted(name):
    """A third of them here, the others of the other ledgers."""
    sound, seeds, refused = ledger(name), range(3400), 0
    for seed in seeds:
        draw, content = random.Random(seed), bytearray(sound)
        for _ in range(draw.choice([1, 1, 1, 2, 3])):
            if content:
                draw.choice(MUTATIONS)(draw, content)
        if content != sound:
            refusal(bytes(content))
            refused += 1
    assert refused >= 0.9 * len(seeds)


ORDER = 2**252 + 27742317777372353535851937790883648493
"""Of the curve's group: S and S + ORDER would be one signature if it were not looked at."""


@pytest.mark.parametrize("line", [0, 4, 9])
def test_a_signature_has_one_form(line):
    lines = ledger("finished").decode().split("\n")
    fields = json.loads(lines[line])
    signature = bytes.fromhex(fields["signature"])
    scalar = int.from_bytes(signature[32:], "little") + ORDER
    fields["signature"] = (signature[:32] + scalar.to_bytes(32, "little")).hex()
    lines[line] = canonical_json(fields)
    assert "signature" in refusal("\n".join(lines).encode())


# What a site could sign to break who reads it.


def with_kind(kind):
    lines = ledger("finished").decode().split("\n")
    lines[2] = canonical_json({**json.loads(lines[2]), "kind": kind})
    return "\n".join(lines).encode()


@pytest.mark.parametrize("kind", [None, 3, "", "genesis", "Kind.PLAN", [], ["PLAN"], {}], ids=str)
def test_a_kind_may_be_anything_and_is_refused(kind):
    assert refusal(with_kind(kind)).startswith("entry 3: ")


@pytest.mark.parametrize("name", ["two\nlines", "\x1b[2Jall is well", "\x00"])
def test_a_refusal_is_one_printable_line(name):
    """Who reads it may be at a terminal."""
    pen = MAKE["begun"]()
    pen.reserve(1, **{name: 1})
    assert refusal(exported(pen)).isprintable()


@pytest.mark.parametrize("depth", [10, 400, 900, 980, 2000, 30000])
def test_a_deeply_nested_value_is_refused(depth):
    nested = "[" * depth + "]" * depth
    for old in ('"version":1', '"round":1', '"epsilon_pld":'):
        content = ledger("finished").decode().replace(old, f'"{old.split(chr(34))[1]}":{nested}', 1)
        refusal(content.encode())


UNPRICEABLE = {
    "more steps than memory": (Event(1.0, 0.01, 2**53 - 1), {}),
    "more steps than numbers": (Event(10.0, 1.0, 2**53 - 1), {"rounds": 2**53 - 1}),
    "hardly any noise": (Event(0.001, 1.0, 10**6), {}),
    "a rate below any": (Event(1.0, 1e-320, 10), {}),
}


@pytest.mark.parametrize("name", UNPRICEABLE)
def test_a_plan_that_no_accountant_can_price_is_refused(name):
    event, changes = UNPRICEABLE[name]
    pen = Pen()
    pen.plan(event=event_body(event), **changes)
    assert refusal(exported(pen)).startswith("entry 2 (PLAN): ")


ENDLESS = {
    "many almost free steps": ({}, Event(1e6, 1e-9, 2**53 - 1)),
    "many dear steps": ({}, Event(1.0, 0.5, 10**6)),
    "little noise": ({}, Event(0.05, 0.5, 10**4)),
    "a high order": ({"filter_order": 2**53 - 1}, Event(2.0, 0.5, 5)),
}
JUDGE = """
import resource
import sys
resource.setrlimit(resource.RLIMIT_AS, (2**33, 2**33))
from common.errors import VerificationError
from common.privacy.verification import verify
try:
    verify(sys.stdin.buffer.read())
except VerificationError:
    pass
"""


@pytest.mark.slow
@pytest.mark.parametrize("name", ENDLESS)
def test_no_file_takes_a_minute_or_eight_gigabytes_to_read(name):
    genesis, event = ENDLESS[name]
    pen = Pen(**genesis)
    pen.plan(event=event_body(event), admission="filter" if genesis else "plan")
    run([sys.executable, "-c", JUDGE], input=exported(pen), timeout=60)


def test_the_officer_is_not_the_site():
    """Else the site raises its own cap."""
    refusal(exported(Pen(officer_key=chain.public_hex(SITE))))


def test_an_output_of_a_single_event_was_seen():
    """Nothing says when it leaves; what is planned after it may have been chosen by it."""
    pen = Pen()
    pen.misc(Event(30.0, 1.0, 1))
    pen.plan()
    assert refusal(exported(pen)).startswith("entry 3 (PLAN): ")


# Alone.

ALONE = """
import sys
from pathlib import Path
from common.privacy.verification import verify
assert verify(Path(sys.argv[1]).read_bytes()).epsilon_pld > 0
heavy = {"torch", "opacus", "transformers", "flwr", "pandas", "hydra"} & set(sys.modules)
assert not heavy, heavy
assert not [name for name in sys.modules if name.split(".")[0] in ("client", "server")]
"""


def test_a_ledger_is_verified_without_torch():
    run([sys.executable, "-c", ALONE, str(ASSETS / "ledgers" / "eventful.jsonl")])

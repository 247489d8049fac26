"""Makes `tests/assets/ledgers`: three good ledgers, and one with each fault, and only that.

Run it to write them anew, byte for byte: keys, nonces, times and claims are fixed here. Entries
are signed properly whatever they say: the books' own rules hold for nothing in this file.
"""

import hashlib
import json
import math
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from common.canonical import canonical_json
from common.privacy import chain
from common.privacy.accounting import Event, epsilon_pld, epsilon_rdp
from common.privacy.chain import EMPTY, Entry, Head, Kind, event_body

FOLDER = Path(__file__).parent / "ledgers"
DELTA, CAP, ORDER = 1e-4, 3.0, 8
ROUND = Event(2.2, 0.25, 5)
"""What a round costs: eight of them fit under the cap, nine do not."""
AMPLE = {"epsilon_pld": 100.0, "epsilon_rdp": 100.0}
"""No under-count of anything here."""


def seeded_key(name):
    """The key that belongs to a name, for ever."""
    return Ed25519PrivateKey.from_private_bytes(hashlib.sha256(name.encode()).digest())


def digest(text):
    """Some SHA-256 that stands for a file."""
    return hashlib.sha256(text.encode()).hexdigest()


SITE, OFFICER, OTHER = seeded_key("site"), seeded_key("officer"), seeded_key("other")
COORDINATOR, NEXT = seeded_key("coordinator"), seeded_key("next")


class Pen:
    """Writes any entry after any other, signed as a site would."""

    def __init__(self, **genesis):
        """Begins with GENESIS, changed as told."""
        self.entries, self.key, self.name = [], SITE, "first"
        self.write(
            Kind.GENESIS,
            **{
                "version": chain.VERSION,
                "site": "clinic",
                "dataset": "letters",
                "dataset_root": digest("letters"),
                "unit": "record",
                "relation": "add_or_remove_one",
                "cap": CAP,
                "delta": DELTA,
                "filter_order": ORDER,
                "site_key": chain.public_hex(SITE),
                "officer_key": chain.public_hex(OFFICER),
            }
            | genesis,
        )

    @property
    def head(self):
        return Head(self.entries[-1].seq, self.entries[-1].hash) if self.entries else EMPTY

    def write(self, kind, *, signer=None, **body):
        """One more entry; returns its number."""
        seq = self.head.seq + 1
        fields = {
            "seq": seq,
            "kind": kind,
            "time": f"2026-01-02T03:{seq // 60 % 60:02}:{seq % 60:02}Z",
            "nonce": digest(f"{self.name} {seq}")[:32],
            "prev": self.head.hash,
            "body": body,
        }
        unsigned = Entry(**fields, signature="")
        self.entries.append(Entry(**fields, signature=signed(unsigned.hash, signer or self.key)))
        return seq

    def plan(self, run="a", **changes):
        """A run of two rounds and a spare one, changed as told."""
        body = {
            "run": run,
            "plan": digest(run),
            "model": "tiny",
            "unit": self.entries[0].body["unit"] if self.entries else "record",
            "event": event_body(ROUND),
            "rounds": 2,
            "spare_rounds": 1,
            "admission": "plan",
        }
        return self.write(Kind.PLAN, **body | changes)

    def reserve(self, number, run="a", **changes):
        body = {"run": run, "round": number, "attempt": 1, "event": event_body(ROUND)}
        return self.write(Kind.RESERVE, **body | changes)

    def prepare(self, reservation, **changes):
        body = {
            "reservation": reservation,
            "update": digest(f"update {reservation}"),
            "steps": ROUND.steps,
        }
        return self.write(Kind.PREPARE, **body | changes)

    def audit(self, **changes):
        """A result that falsifies nothing, changed as told."""
        body = {
            "report": digest("report"),
            "design": "a design",
            "m": 1000,
            "confidence": 0.95,
            "lower_bound": 0.31,
            "claimed_epsilon": 3.0,
            "ceiling": 6.5,
            "verdict": "NOT FALSIFIED",
        }
        return self.write(Kind.AUDIT, **body | changes)

    def release(self, reservation):
        return self.write(Kind.RELEASE, reservation=reservation)

    def lose(self, reservation):
        return self.write(Kind.LOST, reservation=reservation, reason="crash")

    def answer(self, number, run="a", **changes):
        """A whole round: three entries."""
        reservation = self.reserve(number, run, **changes)
        self.prepare(reservation)
        self.release(reservation)

    def misc(self, event, **changes):
        body = {
            "purpose": "count",
            "unit": self.entries[0].body["unit"],
            "event": event_body(event),
            "admission": "plan",
        }
        return self.write(Kind.MISC_EVENT, **body | changes)

    def cap(self, cap, *, key=OFFICER, after=None, signed_cap=None):
        signature = chain.sign_cap(key, cap=signed_cap or cap, after=after or self.head)
        return self.write(Kind.CAP_CHANGE, cap=cap, officer_signature=signature)

    def rotate(self, key=NEXT, *, prover=None, old=SITE):
        proof = chain.prove_rotation(prover or key, chain.public_hex(old), after=self.head)
        seq = self.write(Kind.KEY_ROTATE, site_key=chain.public_hex(key), proof=proof)
        self.key = key
        return seq

    def receipt(self, head, *, key=COORDINATOR, signed_head=None):
        return self.write(
            Kind.RECEIPT,
            seq=head.seq,
            hash=head.hash,
            coordinator_key=chain.public_hex(COORDINATOR),
            signature=chain.sign_head(key, signed_head or head),
        )

    def export(self, claims=AMPLE, *, signer=None):
        return chain.export(self.entries, claims, signer or self.key)


def signed(entry_hash, key):
    return key.sign(chain._ENTRY + bytes.fromhex(entry_hash)).hex()


def claims_of(pen):
    """What a pen's entries cost, rounded up: platforms may differ in the last digits."""
    kinds = (Kind.RESERVE, Kind.MISC_EVENT)
    events = [chain.event_of(e.body["event"]) for e in pen.entries if e.kind in kinds]
    prices = {
        "epsilon_pld": epsilon_pld(events, DELTA),
        "epsilon_rdp": epsilon_rdp(events, DELTA),
    }
    return {name: math.ceil(price * 1e4) / 1e4 for name, price in prices.items()}


# The good ones.


def finished():
    """One run, planned, answered and closed."""
    pen = Pen()
    pen.plan()
    pen.answer(1)
    pen.answer(2)
    pen.write(Kind.CLOSE, run="a")
    return pen


def eventful():
    """An entry of every kind: two runs side by side, a lost round, more cap, another key."""
    pen = Pen()
    pen.plan("a")
    pen.answer(1)
    pen.receipt(pen.head)
    pen.lose(pen.reserve(2))
    pen.cap(6.0)
    pen.plan("b", admission="filter", spare_rounds=0)
    first = pen.reserve(1, "b")
    again = pen.reserve(2, attempt=2)
    pen.rotate()
    pen.prepare(first)
    pen.prepare(again)
    pen.write(Kind.DATASET, dataset_root=digest("more letters"))
    pen.release(again)
    pen.release(first)
    pen.write(Kind.CLOSE, run="b")
    pen.misc(Event(30.0, 1.0, 1), admission="filter")
    pen.audit()
    pen.cap(4.0)
    pen.write(Kind.CLOSE, run="a")
    return pen


def of_persons():
    """A run by person, in a ledger whose unit is the person."""
    pen = Pen(unit="person")
    pen.plan()
    pen.answer(1)
    pen.answer(2)
    return pen


# The broken ones: what the rules refuse.


def begun(**genesis):
    """GENESIS, and in entry 2 the plan of run a."""
    pen = Pen(**genesis)
    pen.plan()
    return pen


def half():
    """Entries 1 to 5: a plan of two rounds, and the first of them."""
    pen = begun()
    pen.answer(1)
    return pen


def forged(pen, seq, **changes):
    """Other content in one entry and all hashes made new; the signatures stay as they were."""
    entries, head = pen.entries, EMPTY
    for at, entry in enumerate(entries):
        other = changes if entry.seq == seq else {}
        entries[at] = Entry(**{**vars_of(entry), "prev": head.hash, **other})
        head = Head(entries[at].seq, entries[at].hash)
    return pen


def vars_of(entry):
    names = ("seq", "kind", "time", "nonce", "prev", "body", "signature")
    return {name: getattr(entry, name) for name in names}


def after_genesis(kind, **body):
    pen = Pen()
    pen.write(kind, **body)
    return pen


def made(start, *steps):
    """A pen after some of its own methods, each with its arguments."""
    pen = start()
    for name, *arguments in steps:
        keywords = arguments.pop() if arguments and isinstance(arguments[-1], dict) else {}
        getattr(pen, name)(*arguments, **keywords)
    return pen


def priced(**changes):
    """The event of a round, changed: what an under-count would write."""
    return {"event": event_body(ROUND) | changes}


def retries():
    """Three lost attempts of a plan that has one spare round."""
    pen = begun()
    for attempt in (1, 2, 3):
        pen.lose(pen.reserve(1, attempt=attempt))
    return pen


def elsewhere():
    """The officer's signature under a cap, kept and used two entries later."""
    pen = half()
    old = pen.entries[3]
    pen.cap(6.0, after=Head(old.seq, old.hash))
    return pen


def lowered():
    pen = half()
    pen.cap(1.0)
    pen.answer(2)
    return pen


def receipt_of(head):
    pen = half()
    pen.receipt(head)
    return pen


def closed():
    pen = half()
    pen.write(Kind.CLOSE, run="a")
    return pen


def lost():
    pen = begun()
    pen.lose(pen.reserve(1))
    return pen


def another_sites():
    """A chain like `half`, by the same key, of another site."""
    pen = begun(site="hospital")
    pen.answer(1)
    return pen


def resigned(pen, seq, key):
    """One entry with another key's signature."""
    entry = pen.entries[seq - 1]
    pen.entries[seq - 1] = Entry(**{**vars_of(entry), "signature": signed(entry.hash, key)})
    return pen


def retired_key():
    pen = half()
    pen.rotate()
    pen.key = SITE
    pen.reserve(2)
    return pen


def spliced():
    pen, other = half(), another_sites()
    pen.entries[3:] = other.entries[3:]
    return pen


def without_unit():
    """A plan as it was before units were in it."""
    body = {name: value for name, value in begun().entries[1].body.items() if name != "unit"}
    return after_genesis(Kind.PLAN, **body)


def without_genesis():
    pen = Pen()
    pen.entries.clear()
    pen.plan()
    return pen


RULES = {
    # Entries that do not belong where they stand.
    "edited": lambda: forged(
        half(), 3, body={"run": "a", "round": 2, "attempt": 1, "event": event_body(ROUND)}
    ),
    "edited-time": lambda: forged(half(), 4, time="2026-01-02T03:00:05Z"),
    "signed-by-another": lambda: resigned(half(), 4, OTHER),
    "signed-by-retired-key": retired_key,
    "spliced": spliced,
    "second-genesis": lambda: made(
        half, ("write", Kind.GENESIS, dict(Pen(cap=50.0).entries[0].body))
    ),
    "no-genesis": without_genesis,
    # Rounds.
    "release-without-reserve": lambda: made(half, ("release", 6)),
    "release-of-another-entry": lambda: made(half, ("release", 2)),
    "release-without-prepare": lambda: made(begun, ("reserve", 1), ("release", 3)),
    "released-twice": lambda: made(half, ("release", 3)),
    "release-of-lost": lambda: made(lost, ("release", 3)),
    "prepared-twice": lambda: made(begun, ("reserve", 1), ("prepare", 3), ("prepare", 3)),
    "prepared-after-release": lambda: made(half, ("prepare", 3)),
    "prepared-after-lost": lambda: made(lost, ("prepare", 3)),
    "lost-after-release": lambda: made(half, ("lose", 3)),
    "under-count-noise": lambda: made(
        begun, ("answer", 1, priced(noise_multiplier=2.2000000000000006))
    ),
    "under-count-rate": lambda: made(begun, ("answer", 1, priced(sample_rate=0.2))),
    "under-count-steps": lambda: made(begun, ("answer", 1, priced(steps=4))),
    "reserve-without-plan": lambda: made(Pen, ("answer", 1)),
    "reserve-of-another-run": lambda: made(begun, ("answer", 1, "b")),
    "reserve-after-close": lambda: made(closed, ("answer", 2)),
    "answered-twice": lambda: made(half, ("answer", 1, {"attempt": 2})),
    "same-round-side-by-side": lambda: made(begun, ("reserve", 1), ("reserve", 1, {"attempt": 2})),
    "no-spare-left": retries,
    "round-not-planned": lambda: made(half, ("answer", 2), ("answer", 3)),
    "round-zero": lambda: made(half, ("answer", 0)),
    "attempt-left-out": lambda: made(lost, ("answer", 1, {"attempt": 3})),
    "attempt-again-the-first": lambda: made(lost, ("answer", 1)),
    "measured-steps": lambda: made(begun, ("reserve", 1), ("prepare", 3, {"steps": 6})),
    # Budgets.
    "plan-over-cap": lambda: made(Pen, ("plan", {"rounds": 8})),
    "plans-over-cap-together": lambda: made(
        begun, ("plan", "b", {"rounds": 3}), ("plan", "c", {"spare_rounds": 0})
    ),
    "plan-over-cap-by-its-spares": lambda: made(Pen, ("plan", {"spare_rounds": 7})),
    "plan-forgets-closed-rounds": lambda: made(
        lambda: made(begun, ("write", Kind.CLOSE, {"run": "a"})), ("plan", "b", {"rounds": 5})
    ),
    "plan-admission-after-release": lambda: made(half, ("plan", "b")),
    "plan-admission-after-filter": lambda: made(
        Pen, ("plan", {"admission": "filter"}), ("plan", "b")
    ),
    "filter-over-cap": lambda: made(half, ("plan", "b", {"admission": "filter", "rounds": 4})),
    "misc-over-cap": lambda: made(half, ("misc", Event(0.8, 1.0, 1), {"admission": "filter"})),
    "misc-plan-after-release": lambda: made(half, ("misc", Event(30.0, 1.0, 1))),
    "record-plan-in-person-ledger": lambda: made(
        lambda: Pen(unit="person"), ("plan", {"unit": "record"})
    ),
    "person-plan-in-record-ledger": lambda: made(Pen, ("plan", {"unit": "person"})),
    "record-misc-in-person-ledger": lambda: made(
        lambda: Pen(unit="person"), ("misc", Event(30.0, 1.0, 1), {"unit": "record"})
    ),
    "plan-of-unknown-unit": lambda: made(Pen, ("plan", {"unit": "user"})),
    "plan-without-unit": without_unit,
    "no-noise": lambda: made(Pen, ("plan", priced(noise_multiplier=1e-4))),
    "run-planned-twice": lambda: made(begun, ("plan",)),
    "closed-twice": lambda: made(closed, ("write", Kind.CLOSE, {"run": "a"})),
    "close-without-plan": lambda: made(half, ("write", Kind.CLOSE, {"run": "b"})),
    "reserve-under-lowered-cap": lowered,
    "cap-signed-by-site": lambda: made(half, ("cap", 6.0, {"key": SITE})),
    "cap-signed-for-another-place": elsewhere,
    "cap-signed-for-another-value": lambda: made(half, ("cap", 6.0, {"signed_cap": 5.0})),
    "delta-of-one": lambda: Pen(delta=1.0),
    "filter-order-one": lambda: Pen(filter_order=1),
    # Keys and receipts.
    "rotation-not-proved": lambda: made(half, ("rotate", {"prover": SITE})),
    "rotation-proved-for-another-key": lambda: made(half, ("rotate", {"old": OTHER})),
    "receipt-for-no-head": lambda: receipt_of(Head(4, digest("no head"))),
    "receipt-for-a-later-head": lambda: receipt_of(Head(6, digest("no head"))),
    "audit-denies-its-figures": lambda: made(half, ("audit", {"lower_bound": 3.1})),
    "audit-verifies": lambda: made(half, ("audit", {"verdict": "VERIFIED"})),
    "receipt-not-signed": lambda: made(half, ("receipt", EMPTY, {"key": OTHER})),
    # Entries that are none.
    "unknown-version": lambda: Pen(version=2),
    "unknown-unit": lambda: Pen(unit="user"),
    "unknown-field": lambda: made(half, ("reserve", 2, {"free": True})),
    "missing-field": lambda: after_genesis(
        Kind.MISC_EVENT, purpose="x", unit="record", admission="plan"
    ),
    "negative-noise": lambda: made(Pen, ("plan", priced(noise_multiplier=-2.2))),
    "fraction-of-a-step": lambda: made(Pen, ("plan", priced(steps=4.5))),
    "true-for-one": lambda: made(begun, ("reserve", 1, {"attempt": True})),
    "rate-above-one": lambda: made(Pen, ("plan", priced(sample_rate=1.5))),
}
"""Each a pen whose last entries break one rule."""


# The broken ones: what no pen writes.


def lines_of(pen):
    return pen.export().split("\n")


def cut(text, drop):
    """Without some of its lines."""
    return "\n".join(line for at, line in enumerate(text.split("\n"), 1) if at not in drop)


def swapped():
    lines = lines_of(half())
    lines[3], lines[4] = lines[4], lines[3]
    return "\n".join(lines)


def relabelled(number, **changes):
    """One line with other fields, signed again."""
    lines, entry = lines_of(half()), half().entries[number - 1]
    content = {**json.loads(lines[number - 1]), **changes}
    bare = {name: content[name] for name in content if name not in ("prev", "signature")}
    new_hash = chain.linked(entry.prev, digest(canonical_json(bare)))
    content["signature"] = signed(new_hash, SITE)
    lines[number - 1] = canonical_json(content)
    return "\n".join(lines)


def rewritten(number, change):
    """One line as another text of what it says."""
    lines = lines_of(half())
    lines[number - 1] = change(lines[number - 1])
    return "\n".join(lines)


def tail(**changes):
    """Other fields in the tail, signed again unless that is what changes."""
    lines = lines_of(half())
    fields = json.loads(lines[-2])
    fields.update(changes)
    if "signature" not in changes:
        bare = {name: fields[name] for name in fields if name != "signature"}
        fields["signature"] = SITE.sign(chain._TAIL + canonical_json(bare).encode()).hex()
    lines[-2] = canonical_json(fields)
    return "\n".join(lines)


def under_claim(name):
    pen = finished()
    claims = claims_of(pen)
    return pen.export({**claims, name: round(claims[name] - 2e-4, 4)})


def flipped(line):
    """With another first digit in its signature."""
    head, mark, rest = line.partition('"signature":"')
    return head + mark + format(int(rest[0], 16) ^ 1, "x") + rest[1:]


def rotated_tail():
    pen = half()
    pen.rotate()
    return pen.export(signer=SITE)


FILES = {
    "gap": lambda: cut(half().export(), {3}),
    "gap-at-the-start": lambda: cut(half().export(), {1}),
    "reordered": swapped,
    "line-twice": lambda: rewritten(3, lambda line: f"{line}\n{line}"),
    "bad-signature": lambda: rewritten(4, flipped),
    "no-tail": lambda: cut(half().export(), {6}),
    "end-of-line-missing": lambda: half().export().rstrip("\n"),
    "end-cut-off-and-old-tail-kept": lambda: cut(finished().export(), {8, 9}),
    "tail-only": lambda: cut(half().export(), {1, 2, 3, 4, 5}),
    "empty": lambda: "",
    "tail-of-an-older-copy": lambda: "\n".join(lines_of(finished())[:9] + lines_of(half())[-2:]),
    "tail-edited": lambda: rewritten(6, lambda line: line.replace("100.0", "101.0", 1)),
    "tail-signed-by-another": lambda: half().export(signer=OTHER),
    "tail-signed-by-retired-key": rotated_tail,
    "tail-bad-signature": lambda: rewritten(6, flipped),
    "tail-without-head": lambda: tail(tail="5"),
    "claim-missing": lambda: tail(claims={"epsilon_pld": 100.0}),
    "claim-in-words": lambda: tail(claims={**AMPLE, "epsilon_pld": "100"}),
    "claim-too-small-pld": lambda: under_claim("epsilon_pld"),
    "claim-too-small-rdp": lambda: under_claim("epsilon_rdp"),
    "unknown-kind": lambda: relabelled(5, kind="REFUND"),
    "unknown-entry-field": lambda: relabelled(5, refund=1),
    "time-in-words": lambda: relabelled(5, time="noon"),
    "short-nonce": lambda: relabelled(5, nonce="00"),
    "spaces": lambda: rewritten(2, lambda line: json.dumps(json.loads(line), sort_keys=True)),
    "field-twice": lambda: rewritten(5, lambda line: line.replace('{"body"', '{"body":{},"body"')),
    "keys-not-sorted": lambda: rewritten(
        5, lambda line: json.dumps(dict(reversed(json.loads(line).items())), separators=(",", ":"))
    ),
    "hex-in-capitals": lambda: rewritten(
        5, lambda line: line.replace(json.loads(line)["prev"], json.loads(line)["prev"].upper())
    ),
    "windows-lines": lambda: half().export().replace("\n", "\r\n"),
    "blank-line": lambda: rewritten(3, lambda line: f"{line}\n"),
    "not-a-number": lambda: rewritten(2, lambda line: line.replace("0.25", "NaN")),
    "not-an-object": lambda: rewritten(4, lambda line: f"[{line}]"),
    "byte-order-mark": lambda: "\ufeff" + half().export(),
    "long-line": lambda: relabelled(5, time="0" * chain.MAX_LINE),
}
"""Each a text in which one thing is wrong."""

GOOD = {"finished": finished, "eventful": eventful, "of-persons": of_persons}


def contents():
    """Every file by its name."""
    good = {name: (pen := make()).export(claims_of(pen)) for name, make in GOOD.items()}
    rules = {name: make().export() for name, make in RULES.items()}
    texts = {**good, **rules, **{name: make() for name, make in FILES.items()}}
    texts = {name: text.encode() for name, text in texts.items()}
    texts["not-text"] = texts["finished"].replace(b"clinic", b"cl\xffnic", 1)
    return {f"{name}.jsonl": content for name, content in texts.items()}


if __name__ == "__main__":
    for name, content in contents().items():
        (FOLDER / name).write_bytes(content)

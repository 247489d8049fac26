"""The officer's report: what was spent of whose cap, on one page, from the ledgers themselves.

Every figure is computed anew from entries that were checked one by one. What a run says of itself
stands beside it as a claim, and is held against them.
"""

import json
import math
import platform
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from common.canonical import canonical_json
from common.errors import VerificationError
from common.privacy.accounting import (
    LIVE_INTERVAL,
    epsilon_of_group,
    epsilon_pld,
    number,
    shown,
)
from common.privacy.books import Books, Plan
from common.privacy.chain import NOTHING, Entry, Head, Kind
from common.privacy.mechanism import is_counting
from common.privacy.stored import Chain
from common.privacy.verification import TOLERANCE
from server import officer_words as words
from server.spent_plot import Point

SCHEMA = "coterie officer report 1"
"""Which edition of docs/officer-report.schema.json a report follows."""
MOST_POINTS = 48
"""Of a curve: of longer histories so many are priced, the last one among them."""
GROUP = 2
"""Records of one person that are priced as an example."""
LIBRARIES = ("coterie", "dp-accounting", "cryptography")
"""What these figures were computed with."""
FINGERPRINT = 16
"""Hex digits of a key or digest that people compare."""


@dataclass(frozen=True)
class Check:
    """One figure three ways. Texts, as people read them."""

    what: str
    policy: str
    """What is allowed, or was committed beforehand."""
    claimed: str
    """What the run's report, or the signed end of an export, says."""
    measured: str
    """What the entries come to."""
    agrees: bool


@dataclass(frozen=True)
class PlanFacts:
    """A run as the ledger knows it."""

    run: str
    counts: bool
    """Whether what it releases is a count of the site's records, and no update."""
    admission: str
    noise_multiplier: float
    sample_rate: float
    steps_per_round: int
    rounds: int
    spare_rounds: int
    charged: int
    released: int
    lost: int
    steps_counted: int


@dataclass(frozen=True)
class WitnessFacts:
    """What a witness said of a ledger."""

    address: str
    ledger: str
    """The id under which it is enrolled there."""
    head: str
    key: str
    entries_after: int
    """Entries of this ledger that the witness has not seen yet."""


@dataclass(frozen=True)
class Verification:
    """What was checked, and against what."""

    source: str
    signed_end: bool
    """Whether it was an exported file, whose end is signed."""
    entries: int
    head: str
    site_key: str
    """The first one, by which the ledger was enrolled."""
    current_key: str
    officer_key: str
    key_pinned: bool
    officer_pinned: bool
    head_pinned: bool
    countersigned: tuple[dict[str, str], ...]
    """The latest head that each coordinator or witness has signed, by this ledger's receipts."""
    witness: WitnessFacts | None = None


@dataclass(frozen=True)
class SiteFacts:
    """One ledger."""

    site: str
    dataset: str
    unit: str
    delta: float
    cap: float
    epsilon: Mapping[str, float | str]
    """As `coterie ledger verify` has it: proved, pld, rdp."""
    epsilon_two_records: float | str
    """For two records of one person; 0 where the unit is the person."""
    committed: float | str
    """Epsilon if every open plan is used up."""
    admission: str
    rounds: Mapping[str, int]
    history: tuple[Point, ...]
    plans: tuple[PlanFacts, ...]
    releases: tuple[dict[str, Any], ...]
    """Single releases: purpose and price."""
    checks: tuple[Check, ...]
    audits: tuple[Mapping[str, Any], ...]
    verification: Verification


@dataclass(frozen=True)
class RunClaims:
    """What a run's own report says, as far as it is held against the ledgers."""

    facts: Mapping[str, Any] = field(default_factory=dict)
    sites: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """By name: epsilon, cap, rounds, steps, ledger_head."""
    min_noise_multiplier: float = 0.0
    """Floor of the sites' policy; 0: none."""
    uncharged: tuple[tuple[str, str], ...] = ()
    not_covered: tuple[str, ...] = ()


def officer_report(
    chains: Sequence[Chain],
    claims: RunClaims | None = None,
    witnessed: Mapping[str, WitnessFacts] | None = None,
) -> dict[str, Any]:
    """The report as plain values; docs/officer-report.schema.json says what each is.

    Args: chains: at least one; witnessed: by the chain's source.
    Raises: VerificationError where a ledger does not hold what the run says it had.
    """
    told, seen = claims or RunClaims(), witnessed or {}
    own = (words.UNCHARGED_UNKNOWN,) if claims is None else told.uncharged
    sites = [_site(each, told, seen.get(each.source)) for each in chains]
    content = {
        "schema": SCHEMA,
        "made": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        **({"run": dict(told.facts)} if claims else {}),
        "summary": _summary(sites),
        "protected": _protected(sites),
        "sites": [_plain(each) for each in sites],
        "left_the_sites": {
            "charged": _charged(sites),
            "uncharged": _pairs((*words.UNCHARGED, *own), "what", "why"),
        },
        "watched": {
            "checks": [
                {"name": name, "what": what, "measurements": list(measured)}
                for name, what, measured in words.WATCHED
            ],
            "rule": words.WATCHED_RULE,
            "lost_rounds": sum(each.rounds["lost"] for each in sites),
            "alarmed_rounds": sum(each.rounds["alarmed"] for each in sites),
        },
        "not_covered": [*_not_covered(sites), *told.not_covered],
        "glossary": _pairs(words.GLOSSARY, "word", "meaning"),
        "versions": {
            "python": platform.python_version(),
            **{name: metadata.version(name) for name in LIBRARIES},
        },
    }
    plain: dict[str, Any] = json.loads(canonical_json(content))  # as whoever reads the file
    return plain


def _plain(site: SiteFacts) -> dict[str, Any]:
    content = asdict(site)
    if site.verification.witness is None:
        del content["verification"]["witness"]
    return content


def _pairs(rows: Sequence[tuple[str, str]], left: str, right: str) -> list[dict[str, str]]:
    return [{left: one, right: other} for one, other in rows]


def _summary(sites: Sequence[SiteFacts]) -> dict[str, Any]:
    worst = max(sites, key=_share)
    audits = [audit for site in sites for audit in site.audits]
    return {
        "sites": len(sites),
        "worst_site": worst.site,
        "epsilon": worst.epsilon["proved"],
        "cap": worst.cap,
        "within_caps": all(_share(site) <= 1 for site in sites),
        "claims_agree": all(check.agrees for site in sites for check in site.checks),
        "audits": len(audits),
        "falsified": sum(audit.get("verdict") == "FALSIFIED" for audit in audits),
        "pinned": all(
            site.verification.key_pinned
            and site.verification.officer_pinned
            and site.verification.head_pinned
            for site in sites
        ),
    }


def _share(site: SiteFacts) -> float:
    spent = site.epsilon["proved"]
    return math.inf if isinstance(spent, str) else spent / site.cap


def _protected(sites: Sequence[SiteFacts]) -> dict[str, Any]:
    units = sorted({site.unit for site in sites})
    return {
        "units": units,
        "relation": "add_or_remove_one",
        "against": list(words.AGAINST),
        "not_against": list(words.NOT_AGAINST),
    }


def _not_covered(sites: Sequence[SiteFacts]) -> Iterator[str]:
    if any(site.unit == "record" for site in sites):
        yield words.NOT_COVERED_RECORD
    yield from words.NOT_COVERED


def _site(read: Chain, told: RunClaims, witness: WitnessFacts | None) -> SiteFacts:
    books, genesis = read.books, read.books.genesis
    states = Counter(each.state for each in books.reservations.values())
    plans = tuple(_plan(books, plan, _steps_counted(read.entries)) for plan in books.plans.values())
    return SiteFacts(
        site=read.site,
        dataset=str(genesis["dataset"]),
        unit=books.unit,
        delta=books.delta,
        cap=books.cap,
        epsilon={
            "proved": number(books.spent()),
            "pld": number(read.verified.epsilon_pld),
            "rdp": number(read.verified.epsilon_rdp),
        },
        epsilon_two_records=_two_records(books),
        committed=number(books.committed()),
        admission=books.admission(),
        rounds={
            "charged": len(books.reservations),
            "released": states["released"],
            "lost": states["lost"],
            "alarmed": books.alarms(),
            "left": sum(books.remaining_rounds(run) for run in books.plans),
        },
        history=tuple(_history(read)),
        plans=plans,
        releases=tuple(
            {"purpose": entry.body["purpose"], **entry.body["event"]}
            for entry in read.entries
            if entry.kind is Kind.MISC_EVENT
        ),
        checks=tuple(_checks(read, plans, told)),
        audits=tuple(
            {"entry": entry.seq, "time": entry.time, **entry.body}
            for entry in read.entries
            if entry.kind is Kind.AUDIT
        ),
        verification=_verification(read, witness),
    )


def _two_records(books: Books) -> float | str:
    if books.unit != "record":
        return 0.0
    return number(epsilon_of_group(books.charges(), GROUP, books.delta))


def _steps_counted(entries: Sequence[Entry]) -> Mapping[int, int]:
    """By reservation: the steps that were taken, as they were counted."""
    prepared = (entry.body for entry in entries if entry.kind is Kind.PREPARE)
    return {body["reservation"]: body["steps"] for body in prepared}


def _plan(books: Books, plan: Plan, steps: Mapping[int, int]) -> PlanFacts:
    own = {seq: each for seq, each in books.reservations.items() if each.run == plan.run}
    states = Counter(each.state for each in own.values())
    return PlanFacts(
        run=plan.run,
        counts=is_counting(plan.run),
        admission=plan.admission,
        noise_multiplier=plan.event.noise_multiplier,
        sample_rate=plan.event.sample_rate,
        steps_per_round=plan.event.steps,
        rounds=plan.rounds,
        spare_rounds=plan.spare_rounds,
        charged=plan.reserved,
        released=states["released"],
        lost=states["lost"],
        steps_counted=sum(steps.get(seq, 0) for seq in own),
    )


def _history(read: Chain) -> Iterator[Point]:
    """The ledger after each entry that charged, or changed the cap, from its beginning.

    Prices on the way are by the coarse grid, which is above, and never above the last one.
    """
    marks = [entry.seq for entry in read.entries if entry.kind in _MARKS]
    kept = {*marks[:: max(1, math.ceil(len(marks) / MOST_POINTS))], *marks[-1:]}
    kept |= {entry.seq for entry in read.entries if entry.kind in {Kind.GENESIS, Kind.CAP_CHANGE}}
    books, final = Books(), read.books.spent()
    for entry in read.entries:
        books.apply(entry)
        if entry.seq in kept:
            run = str(entry.body.get("run", entry.body.get("purpose", "")))
            yield Point(entry.seq, entry.time, run, min(final, _spent_then(books)), books.cap)


_MARKS = {Kind.GENESIS, Kind.RESERVE, Kind.MISC_EVENT, Kind.CAP_CHANGE}


def _spent_then(books: Books) -> float:
    if books.filtered:
        return books.spent()
    return min(books.spent_rdp(), epsilon_pld(books.charges(), books.delta, LIVE_INTERVAL))


def _checks(read: Chain, plans: Sequence[PlanFacts], told: RunClaims) -> Iterator[Check]:
    books, claim = read.books, _claim(read, told)
    yield _epsilon_check(read)
    if claim is not None:
        yield from _run_checks(read, claim, plans, str(told.facts["run_id"]))
    for plan in plans:
        yield _steps_check(plan)
        yield _noise_check(plan, told.min_noise_multiplier)
    yield Check(
        "delta, the chance of failing",
        f"{books.delta:g}, by the ledger's first entry",
        f"{told.facts['delta']:g}, by the run" if told.facts else "-",
        f"{books.delta:g}: every figure here",
        not told.facts or told.facts["delta"] >= books.delta,
    )


def _claim(read: Chain, told: RunClaims) -> Mapping[str, Any] | None:
    """What the run says of this ledger: a coordinator may call the site by another name."""
    ours = (each for each in told.sites.values() if read.books.contains(_head(each)))
    return next(ours, told.sites.get(read.site))


def _head(claim: Mapping[str, Any]) -> Head:
    return Head.parse(claim["ledger_head"] or f"1:{NOTHING}")


def _epsilon_check(read: Chain) -> Check:
    books, claims = read.books, read.claims
    claimed = f"{shown(claims['epsilon_pld'])}, by the export" if claims else "-"
    return Check(
        "epsilon of the whole ledger",
        f"at most {books.cap:g}",
        claimed,
        _both(shown(books.spent()), shown(read.verified.epsilon_pld)),
        books.spent() <= books.cap
        and (claims is None or claims["epsilon_pld"] >= read.verified.epsilon_pld - TOLERANCE),
    )


def _both(proved: str, pld: str) -> str:
    return proved if proved == pld else f"{proved} ({pld} had all been fixed in advance)"


def _run_checks(
    read: Chain, claim: Mapping[str, Any], plans: Sequence[PlanFacts], run: str
) -> Iterator[Check]:
    """Raises: VerificationError if the ledger never had the head that the run reports."""
    head = _head(claim)
    if not read.books.contains(head):
        raise VerificationError(
            f"{read.source}: does not contain the head {head} that the run reports; it is an older "
            "copy, or another ledger"
        )
    then = _spent_at(read, head)
    yield Check(
        "epsilon when the run ended",
        f"at most {claim['cap']:g}",
        f"{shown(claim['epsilon'])}, by the run",
        shown(then),
        then - TOLERANCE <= _float(claim["epsilon"]) <= claim["cap"] + TOLERANCE,
    )
    own = [plan for plan in plans if plan.run == run]
    charged = sum(plan.charged for plan in own)
    yield Check(
        "rounds of the run",
        f"at most {sum(plan.rounds + plan.spare_rounds for plan in own)} were committed",
        f"{claim['rounds'] + claim['repeated']}, by the run",
        f"{charged} paid for, {sum(plan.released for plan in own)} released",
        claim["rounds"] + claim["repeated"] >= charged,
    )


def _float(value: float | str) -> float:
    return math.inf if value == "inf" else float(value)


def _spent_at(read: Chain, head: Head) -> float:
    books = Books()
    for entry in read.entries[: head.seq]:
        books.apply(entry)
    return books.spent()


def _steps_check(plan: PlanFacts) -> Check:
    done = plan.released
    return Check(
        f"steps of {_named(plan)}",
        f"{plan.steps_per_round} in each of at most {plan.rounds + plan.spare_rounds} rounds",
        f"{plan.charged * plan.steps_per_round} paid for",
        f"{plan.steps_counted} counted in the {done} rounds released",
        plan.steps_counted <= plan.charged * plan.steps_per_round,
    )


def _noise_check(plan: PlanFacts, floor: float) -> Check:
    return Check(
        f"noise of {_named(plan)}",
        f"at least {floor:g}, by the sites' policy" if floor else "no minimum beside the cap",
        f"{plan.noise_multiplier:g} at rate {plan.sample_rate:g}, by its plan",
        "measured in each step at the site; what differed was not released",
        plan.noise_multiplier >= floor,
    )


def _named(plan: PlanFacts) -> str:
    return f"the count of run {plan.run[:8]}" if plan.counts else f"run {plan.run[:8]}"


def _verification(read: Chain, witness: WitnessFacts | None) -> Verification:
    books, verified = read.books, read.verified
    return Verification(
        source=Path(read.source).name,
        signed_end=read.claims is not None,
        entries=books.head.seq,
        head=str(books.head),
        site_key=str(books.genesis["site_key"]),
        current_key=books.site_key,
        officer_key=str(books.genesis["officer_key"]),
        key_pinned=verified.key_pinned,
        officer_pinned=verified.officer_pinned,
        head_pinned=verified.head_pinned or witness is not None,
        countersigned=tuple(
            {"key": key, "head": str(head)} for key, head in books.receipts.items()
        ),
        witness=witness,
    )


def _charged(sites: Sequence[SiteFacts]) -> list[dict[str, Any]]:
    """What was released and charged, in words, each with how often at how many sites."""
    rows: dict[tuple[str, str], list[int]] = {}
    for site in sites:
        for plan in site.plans:
            what = "a noisy count of right answers" if plan.counts else "an update of the model"
            rows.setdefault((what, f"run {plan.run.split()[0][:8]}"), []).append(plan.released)
        for release in site.releases:
            rows.setdefault((f"a single release: {release['purpose']}", "-"), []).append(1)
    return [
        {"what": what, "where": where, "sites": len(times), "times": sum(times)}
        for (what, where), times in rows.items()
    ]

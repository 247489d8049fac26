"""`coterie ledger`: a site's books, as the people who answer for them need them."""

import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from client.ledger import Ledger, Store, Terms, check_terms
from common.cli import Invocation, emit_json, run_typer
from common.durable import write_atomic
from common.errors import ConfigError
from common.keys import generate_key, read_private_key
from common.privacy import chain
from common.privacy.accounting import number, shown
from common.privacy.books import Books
from common.privacy.chain import Head, Kind
from common.privacy.lower_bounds import FALSIFIED
from common.privacy.verification import Verified
from common.privacy.verification import verify as verify_export
from common.privacy.witness import Confirmation, as_fields, confirmed, opened

BAR = 16
"""Characters of a budget bar."""

LedgerArgument = Annotated[
    str, typer.Argument(help="FILE[#SITE]; the site may be left out if there is one.")
]


def ledger(invocation: Invocation) -> None:
    """A site's privacy books: make, show, export and verify them, change their cap and key."""

    def init(  # noqa: PLR0917 - options, which are given by name
        ledger: Annotated[Path, typer.Argument(help="File to make; its key is made beside it.")],
        cap: Annotated[float, typer.Option(help="Epsilon that may never be exceeded.")],
        delta: Annotated[float, typer.Option(help="Delta of every epsilon of this ledger.")],
        dataset: Annotated[str, typer.Option(help="Name of the dataset.")],
        site: Annotated[list[str], typer.Option(help="Site to open a ledger for; repeatable.")],
        officer_key: Annotated[
            str, typer.Option(help="The officer's public key, 64 hex digits, or a new key file.")
        ],
        unit: Annotated[
            str, typer.Option(help="What the cap protects: record, or person.")
        ] = "record",
        site_key: Annotated[
            Path | None, typer.Option(help="A key to begin with, as a kit's ledger.key.")
        ] = None,
    ) -> None:
        """Makes a ledger for each site of a dataset.

        OFFICER-KEY is a public key; where it names a file that does not exist, a key is made
        there: give it to the officer and keep no copy at the site. A ledger takes runs of its
        own unit only. With SITE-KEY the ledger begins with a copy of that key, which others know
        the public half of already.

        Example: coterie ledger init books.db --cap 8 --delta 1e-5 --dataset notes
        --site ward-1 --officer-key officer.key
        """
        check_terms(cap, delta, unit)
        if ledger.exists():
            raise ConfigError(f"{ledger}: exists already; a ledger is never overwritten")
        public = _officer(officer_key)
        with Store.create(ledger, site_key) as store, store.together():
            for name in site:
                store.open(name, Terms(dataset, cap, delta, public, unit))
        _answer(invocation, {"ledger": str(ledger), "site_key": chain.public_hex(store.key)})

    def show(ledger: LedgerArgument) -> None:
        """Shows what was spent, of what cap, and what is left.

        Example: coterie ledger show books.db#ward-1
        """
        with _opened(ledger) as (store, names):
            states = {name: _state(store.ledger(name).books) for name in names}
        if invocation.json:
            emit_json({"sites": [{"site": name, **state} for name, state in states.items()]})
        else:
            _show(states, Console(markup=False))

    def export(
        ledger: LedgerArgument,
        output: Annotated[Path, typer.Option(help="File to write.")],
    ) -> None:
        """Writes a ledger as a file that anybody can verify.

        Example: coterie ledger export books.db#ward-1 --output ward-1.ledger
        """
        with _one(ledger) as one:
            write_atomic(output, one.export())
            head = one.head
        _answer(invocation, {"file": str(output), "head": str(head)})

    def verify(  # noqa: PLR0917 - options, which are given by name
        file: Annotated[Path, typer.Argument(help="An exported ledger.")],
        key: Annotated[str, typer.Option(help="The site's public key, as it was enrolled.")] = "",
        officer: Annotated[str, typer.Option(help="The officer's public key.")] = "",
        head: Annotated[str, typer.Option(help="SEQ:HASH that the ledger must contain.")] = "",
        prv: Annotated[bool, typer.Option(help="Also price it with Opacus (slow).")] = False,
        witness: Annotated[str, typer.Option(help="HOST:PORT of a witness to ask.")] = "",
        witness_pass: Annotated[
            Path | None, typer.Option("--pass", help="Folder that `coterie witness admit` made.")
        ] = None,
        witness_id: Annotated[
            str, typer.Option(help="What it is enrolled as there; DATASET/SITE if left out.")
        ] = "",
    ) -> None:
        """Judges an exported ledger from the file alone; exit code 5 names the entry at fault.

        Example: coterie ledger verify ward-1.ledger --key 3b6a... --head 32:05e8...

        Example: coterie ledger verify ward-1.ledger --witness witness:9443 --pass passes/officer
        """
        content = sys.stdin.buffer.read() if str(file) == "-" else file.read_bytes()
        verdict = verify_export(
            content,
            key=key or None,
            officer=officer or None,
            head=Head.parse(head) if head else None,
            prv=prv,
        )
        found = _asked(verdict.books, witness, witness_pass, witness_id)
        _tell_verdict(invocation, verdict, file, found, witness)

    def cap(
        ledger: LedgerArgument,
        cap: Annotated[float, typer.Option(help="The new cap.")],
        officer_key: Annotated[Path, typer.Option(help="The officer's private key file.")],
    ) -> None:
        """Changes the cap; only the officer's key can.

        Example: coterie ledger cap books.db#ward-1 --cap 10 --officer-key officer.key
        """
        with _one(ledger) as one:
            check_terms(cap, one.books.delta)
            signature = chain.sign_cap(read_private_key(officer_key), cap=cap, after=one.head)
            one.append(Kind.CAP_CHANGE, {"cap": cap, "officer_signature": signature})
            head = one.head
        _answer(invocation, {"site": one.site, "cap": cap, "head": str(head)})

    def rotate(
        ledger: Annotated[Path, typer.Argument(help="FILE; all its sites get the new key.")],
    ) -> None:
        """Gives FILE a new site key, for all its sites.

        For when the old one may be known, or is old. Stop whatever has the ledger open first. What
        was exported stays good, and the first key stays the one to verify with. Keep FILE.secret,
        which is written now, with the ledger: commitments to records rest on it.

        Example: coterie ledger rotate books.db
        """
        if not ledger.exists() and "#" in ledger.name:
            raise ConfigError(f"{ledger}: one key is that of all sites; give the file alone")
        with Store(ledger) as store:
            store.rotate()
            heads = {site: str(store.ledger(site).head) for site in store.sites()}
        _answer_rotated(invocation, str(ledger), chain.public_hex(store.key), heads)

    run_typer([init, show, export, verify, cap, rotate], invocation)


def _officer(given: str) -> str:
    """The public key given, or that of a key made now in the file given."""
    if re.fullmatch("[0-9a-f]{64}", given):
        return given
    path = Path(given)
    return chain.public_hex(read_private_key(path) if path.exists() else generate_key(path))


@contextmanager
def _opened(argument: str) -> Iterator[tuple[Store, list[str]]]:
    """The store, and the sites asked for: all of them where none is named."""
    path, _, site = argument.partition("#")
    with Store(Path(path)) as store:
        yield store, [site] if site else store.sites()


@contextmanager
def _one(argument: str) -> Iterator[Ledger]:
    """The ledger asked for. Raises: ConfigError if it might be one of several."""
    with _opened(argument) as (store, names):
        if len(names) != 1:
            raise ConfigError(f"{argument}: holds {len(names)} sites; name one as FILE#SITE")
        yield store.ledger(names[0])


def _state(books: Books) -> dict[str, Any]:
    return {
        "dataset": books.genesis["dataset"],
        "unit": books.unit,
        "epsilon": {
            "proved": number(books.spent()),
            "pld": number(books.spent_pld()),
            "rdp": number(books.spent_rdp()),
        },
        "cap": books.cap,
        "delta": books.delta,
        "admission": books.admission(),
        "rounds": len(books.reservations),
        "lost": books.lost_rounds(),
        "plans": [
            {"run": plan.run, "rounds_left": books.remaining_rounds(plan.run)}
            for plan in books.plans.values()
        ],
        "audits": [dict(audit) for audit in books.audits],
        "head": str(books.head),
        "site_key": books.site_key,
    }


def _show(states: dict[str, dict[str, Any]], console: Console) -> None:
    table = Table(title="Privacy spent", title_justify="left")
    for column in ("site", "unit", "of its cap", "epsilon", "rounds", "lost", "left", "head"):
        table.add_column(column, no_wrap=column != "site")
    for name, state in states.items():
        spent, cap = state["epsilon"]["proved"], state["cap"]
        left = sum(plan["rounds_left"] for plan in state["plans"])
        table.add_row(
            name,
            state["unit"],
            _bar(spent / cap),
            f"{shown(spent)} of {cap:g}",
            str(state["rounds"]),
            str(state["lost"]),
            str(left),
            state["head"][:10],
        )
    console.print(table)
    for name, state in states.items():
        if state["audits"]:
            console.print(f"{name}: {told(state['audits'])}", highlight=False)
    console.print(
        "epsilon: how much better than by guessing anybody can tell whether one record (or one "
        "person, by unit) was used, over everything ever released;\nleft: rounds that are "
        "committed and not yet charged; lost: rounds that were charged and released nothing.",
        highlight=False,
    )


def _bar(share: float) -> str:
    filled = min(BAR, round(share * BAR))
    return "█" * filled + "░" * (BAR - filled)


def told(audits: Sequence[Mapping[str, Any]]) -> str:
    """What the audits of a ledger say, in a line: its last, and whether any falsified."""
    last, falsified = audits[-1], sum(each["verdict"] == FALSIFIED for each in audits)
    return (
        f"audits: {len(audits)}, of which {falsified} {FALSIFIED}; the last, {last['design']}: at "
        f"least epsilon {last['lower_bound']:.3f} of {shown(last['claimed_epsilon'])} claimed "
        f"({last['confidence']:.0%}; at best it could have shown {last['ceiling']:.2f}): "
        f"{last['verdict']}"
    )


def _verdict_object(verdict: Verified) -> dict[str, Any]:
    prv = verdict.epsilon_prv
    return {
        "ok": True,
        "site": verdict.books.genesis["site"],
        "dataset": verdict.books.genesis["dataset"],
        "unit": verdict.books.unit,
        "officer_key": verdict.books.genesis["officer_key"],
        "entries": verdict.books.head.seq,
        "admission": verdict.books.admission(),
        "epsilon": {
            "proved": number(verdict.books.spent()),
            "pld": number(verdict.epsilon_pld),
            "rdp": number(verdict.epsilon_rdp),
            **({} if prv is None else {"prv": number(prv)}),
        },
        "cap": verdict.books.cap,
        "delta": verdict.books.delta,
        "audits": [dict(audit) for audit in verdict.books.audits],
        "head": str(verdict.books.head),
        "key_pinned": verdict.key_pinned,
        "officer_pinned": verdict.officer_pinned,
        "head_pinned": verdict.head_pinned,
    }


def _show_verdict(verdict: Verified, file: Path, console: Console) -> None:
    books = verdict.books
    console.print(
        f"{file}: nothing wrong in {books.head.seq} entries of {books.genesis['site']}, dataset "
        f"{books.genesis['dataset']}; unit {books.unit}; epsilon {shown(books.spent())} (PLD "
        f"{shown(verdict.epsilon_pld)}, RDP {shown(verdict.epsilon_rdp)}) of cap {books.cap:g} at "
        f"delta {books.delta:g}; head {books.head}; officer {books.genesis['officer_key']}",
        highlight=False,
        soft_wrap=True,
    )
    if books.audits:
        console.print(told(books.audits), highlight=False, soft_wrap=True)
    if not verdict.key_pinned:
        console.print("key not pinned: the file says itself whose it is; give --key")
    if not verdict.officer_pinned:
        console.print("officer not pinned: whose cap it is, the site says; give --officer")
    if not verdict.head_pinned:
        console.print("head not pinned: a cut-off end would not show; give --head")


def _asked(books: Books, witness: str, folder: Path | None, name: str) -> Confirmation | None:
    """What the witness says, if there is one. Raises: VerificationError where it knows better."""
    if not witness:
        return None
    with opened(witness, folder) as line:
        return confirmed(line, books, name)


def _tell_verdict(
    invocation: Invocation,
    verdict: Verified,
    file: Path,
    found: Confirmation | None,
    witness: str,
) -> None:
    if found is not None:
        verdict = replace(verdict, head_pinned=True)
    if invocation.json:
        beside = {} if found is None else {"witness": as_fields(found, witness)}
        emit_json({**_verdict_object(verdict), **beside})
        return
    _show_verdict(verdict, file, Console(markup=False))
    if found is not None:
        print(_witness_sentence(found, witness))


def _witness_sentence(found: Confirmation, address: str) -> str:
    head, after = found.receipt.head, found.entries_after
    later = f"; the last {after} entries it was not told of yet" if after else ""
    return f"witness {address}: holds {found.ledger} at {head}, which is in this ledger{later}"


def _answer_rotated(
    invocation: Invocation, ledger: str, site_key: str, heads: dict[str, str]
) -> None:
    if invocation.json:
        emit_json({"ledger": ledger, "site_key": site_key, "heads": heads})
        return
    _answer(invocation, {"ledger": ledger, "site_key": site_key})
    for site, head in heads.items():
        print(f"{site}: head {head}")


def _answer(invocation: Invocation, content: dict[str, Any]) -> None:
    if invocation.json:
        emit_json(content)
    else:
        print(", ".join(f"{name} {value}" for name, value in content.items()))

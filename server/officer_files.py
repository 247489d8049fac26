"""`coterie report --for officer`: from a run, or ledgers alone, to a page, JSON, a signature."""

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from common.canonical import canonical_json
from common.cli import Invocation, emit_json
from common.config import Config, EngineName, from_yaml
from common.durable import write_atomic
from common.errors import ConfigError, CoterieError, VerificationError
from common.keys import read_private_key
from common.privacy import chain
from common.privacy.accounting import shown
from common.privacy.chain import Head
from common.privacy.stored import Chain, Pins, read_chains
from common.privacy.witness import Confirmation
from server import officer_words as words
from server.officer import RunClaims, WitnessFacts, officer_report
from server.officer_page import page
from server.report import OfficerCall, read_report

NAME = "officer-report"
PAGE, CONTENT, SIGNATURE = f"{NAME}.html", f"{NAME}.json", f"{NAME}.sig"
_PURPOSE = b"coterie officer report\n"
"""What the signature is for: it can never stand for one under a cap or a ledger."""
MAX_SIGNATURE_BYTES = 1 << 16


@dataclass(frozen=True)
class Sources:
    """What a report is made from."""

    ledgers: tuple[str, ...]
    run: Path | None = None
    pins: Pins = field(default_factory=Pins)


def answer(invocation: Invocation, asked: OfficerCall) -> None:
    """Makes the report that was asked for, or checks its signature; and says so."""
    if asked.check is not None:
        _tell(invocation, check_signature(asked.check, asked.key or None), _checked_sentence)
        return
    pins = Pins(asked.key or None, asked.officer or None, _head(asked.head))
    sources = sources_of(asked.given, pins)
    key = None if asked.sign is None else read_private_key(asked.sign)
    chains = chains_of(sources)
    witnessed = _witnessed(asked, chains)
    content = made_report(sources, chains, witnessed)
    folder = (
        asked.output
        or sources.run
        or Path(sources.ledgers[0].rpartition("#")[0] or sources.ledgers[0]).parent
    )
    written = write_report(folder, content, key)
    if invocation.json:
        emit_json(content)
    else:
        _show(content, written)


def _head(text: str) -> Head | None:
    return Head.parse(text) if text else None


def _witnessed(asked: OfficerCall, chains: Sequence[Chain]) -> dict[str, WitnessFacts]:
    """What the witness says of each ledger. Raises: VerificationError where it knows better."""
    if not asked.witness:
        return {}
    from common.privacy.witness import confirmed, opened  # noqa: PLC0415 - gRPC, for this alone

    with opened(asked.witness, asked.witness_pass) as line:
        return {each.source: _facts(confirmed(line, each.books), asked.witness) for each in chains}


def _facts(found: Confirmation, address: str) -> WitnessFacts:
    return WitnessFacts(
        address, found.ledger, str(found.receipt.head), found.receipt.key, found.entries_after
    )


def _show(content: Mapping[str, Any], written: Sequence[Path]) -> None:
    for site in content["sites"]:
        epsilon = shown(site["epsilon"]["proved"])
        rounds = site["rounds"]["charged"]
        print(f"{site['site']}: epsilon {epsilon} of cap {site['cap']:g}, {rounds} rounds charged")
    if not content["summary"]["claims_agree"]:
        print("what was claimed does not agree with the books: see the page")
    print(f"wrote {', '.join(map(str, written))}")


def _checked_sentence(found: Mapping[str, Any]) -> str:
    whose = (
        "the key given" if found["key_pinned"] else f"{found['key']} (key not pinned: give --key)"
    )
    return f"{' and '.join(found['files'])}: as signed {found['signed']} by {whose}"


def _tell(
    invocation: Invocation, found: dict[str, Any], sentence: Callable[[Mapping[str, Any]], str]
) -> None:
    if invocation.json:
        emit_json(found)
    else:
        print(sentence(found))


def sources_of(given: Sequence[str], pins: Pins) -> Sources:
    """The run folder and ledgers among the arguments. Raises: ConfigError if there are none."""
    runs = [name for name in given if Path(name).is_dir()]
    ledgers = tuple(name for name in given if name not in runs)
    if len(runs) > 1:
        raise ConfigError(f"{runs[1]}: a report is of one run; give ledgers beside it, or none")
    run = Path(runs[0]) if runs else None
    if run is not None and not ledgers:
        ledgers = (_ledger_of(run),)
    if not ledgers:
        raise ConfigError("RUN|LEDGER: give the folder of a run, an exported ledger, or FILE#SITE")
    return Sources(ledgers, run, pins)


def _ledger_of(run: Path) -> str:
    """The ledgers of a simulation: its own, or those it was told to use."""
    content, _ = read_report(run)
    if content["privacy"].get("mode") == "none":
        raise ConfigError(f"{run}: protected nothing (privacy=none), and so charged no ledger")
    own = run / "ledgers" / "sites.db"
    config = _config(run)
    lasting = Path(config.ledger).expanduser() if config.ledger else own
    if not lasting.is_file():
        raise ConfigError(
            f"{run}: {lasting} is not there; give the sites' exported ledgers beside it: "
            f"coterie report --for officer {run} SITE.ledger ..."
        )
    return str(lasting)


def _config(run: Path) -> Config:
    try:
        return from_yaml((run / "config.yaml").read_text(encoding="utf-8"))
    except (OSError, ValueError, CoterieError) as error:
        raise VerificationError(f"{run}: its config.yaml is not one of ours") from error


def chains_of(sources: Sources) -> list[Chain]:
    """The ledgers, each found sound. Raises: VerificationError naming file and entry."""
    chains = [each for name in sources.ledgers for each in read_chains(name, sources.pins)]
    if not chains:
        raise ConfigError(f"{sources.ledgers[0]}: holds no site's ledger")
    return chains


def made_report(
    sources: Sources, chains: Sequence[Chain], witnessed: Mapping[str, WitnessFacts]
) -> dict[str, Any]:
    """The report's content. Raises: VerificationError where run and ledgers contradict."""
    claims = None if sources.run is None else claims_of(sources.run)
    return officer_report(chains, claims, witnessed)


def claims_of(run: Path) -> RunClaims:
    """What a finished run says of itself. Raises: VerificationError if it is none."""
    content, _ = read_report(run)
    config = _config(run)
    privacy = content["privacy"]
    simulated = config.engine.name is not EngineName.superlink
    facts = {
        **{name: content[name] for name in ("run_id", "task", "model", "tuning", "rounds")},
        "engine": content["engine"],
        "simulated": simulated,
        "delta": privacy["delta"],
        "private": privacy["private"],
        "private_reason": privacy["private_reason"],
        "config_hash": content["config_hash"],
        "versions": content["versions"],
    }
    try:
        sites = {site["name"]: site for site in content["sites"]}
    except (KeyError, TypeError) as error:
        raise VerificationError(f"{run}: its report.json is not one of ours") from error
    return RunClaims(
        facts,
        sites,
        config.node.min_noise_multiplier if simulated else 0.0,
        tuple(_uncharged(content)),
        (words.NOT_COVERED_SIMULATION,) if simulated else (),
    )


def _uncharged(content: Mapping[str, Any]) -> Iterable[tuple[str, str]]:
    if content["privacy"].get("records") == "counted":
        yield words.UNCHARGED_RECORDS
    if "evaluation_left_out" in content:
        yield words.UNCHARGED_LEFT_OUT


def write_report(
    folder: Path, content: dict[str, Any], key: Ed25519PrivateKey | None
) -> list[Path]:
    """Writes page and JSON, and the signature under both if there is a key; whole each.

    Returns: the files. A signature that stood there is of another report, and goes first.
    """
    text = json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    files = {PAGE: page(content).encode(), CONTENT: text.encode()}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / SIGNATURE).unlink(missing_ok=True)
    for name, data in files.items():
        write_atomic(folder / name, data)
    written = [folder / PAGE, folder / CONTENT]
    if key is not None:
        write_atomic(folder / SIGNATURE, f"{canonical_json(_signed(files, key))}\n")
        written.append(folder / SIGNATURE)
    return written


def _signed(files: Mapping[str, bytes], key: Ed25519PrivateKey) -> dict[str, Any]:
    statement = {
        "files": {name: hashlib.sha256(data).hexdigest() for name, data in files.items()},
        "signed": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
    }
    signature = key.sign(_PURPOSE + canonical_json(statement).encode()).hex()
    return {"statement": statement, "key": chain.public_hex(key), "signature": signature}


def check_signature(path: Path, key: str | None) -> dict[str, Any]:
    """What a signature file says, once it holds and the files beside it are those it is of.

    Raises: VerificationError naming what does not hold.
    """
    statement, signer, signature = _read_signature(path)
    message = _PURPOSE + canonical_json(statement).encode()
    if not chain.is_signed(signer, signature, message):
        raise VerificationError(f"{path}: its signature is not that of the key it names")
    if key is not None and key != signer:
        raise VerificationError(f"{path}: is signed by another key than the one given")
    for name, digest in statement["files"].items():
        beside = path.with_name(name)
        if not beside.is_file():
            raise VerificationError(f"{beside}: is not there, and is signed in {path.name}")
        if hashlib.sha256(beside.read_bytes()).hexdigest() != digest:
            raise VerificationError(f"{beside}: is not the file that was signed")
    return {
        "ok": True,
        "files": sorted(statement["files"]),
        "signed": statement["signed"],
        "key": signer,
        "key_pinned": key is not None,
    }


def _read_signature(path: Path) -> tuple[dict[str, Any], str, str]:
    try:
        if path.stat().st_size > MAX_SIGNATURE_BYTES:
            raise VerificationError(f"{path}: longer than any signature")
        content = json.loads(path.read_bytes())
        statement, signer, signature = (content[x] for x in ("statement", "key", "signature"))
        files, signed = statement["files"], statement["signed"]
        named = set(files) == {PAGE, CONTENT} and all(isinstance(x, str) for x in files.values())
    except FileNotFoundError as error:
        raise ConfigError(f"{path}: no such signature; --sign makes one") from error
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise VerificationError(f"{path}: is no signature of a report") from error
    texts = all(isinstance(each, str) for each in (signer, signature, signed))
    if not named or not texts or set(statement) != {"files", "signed"}:
        raise VerificationError(f"{path}: is no signature of a report")
    return statement, signer, signature

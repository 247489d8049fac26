"""`coterie doctor node`: looks at all that `coterie node` will need, with the node's own settings.

It reads what the node reads and writes nothing: the ledger is opened read-only, and the node's line
to the SuperLink is held for a moment only, and not at all while the node itself holds it. What it
says names no record and no number of them.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import load_pem_private_key

from client.ledger import read_chain
from client.node import checked, from_kit, told
from client.policy import check_policy
from client.settings import NODE, NodeSettings
from client.site_keys import SiteKeys
from common.certificates import PUBLIC_SUFFIX, Credentials, read_node_key
from common.cli import Invocation
from common.code import code_digest
from common.composition import run_job, run_with
from common.config import Config, NoiseSource, PrivacyMode, check_delta
from common.data import check_files
from common.doctor import Check, DoubtError, OpenError, Visit, conclude, examine
from common.errors import ConfigError, CoterieError, PrivacyRefusedError, VerificationError
from common.keys import check_secret
from common.peer import Peer, check_authority, check_end, read_certificate
from common.premises import check_gpu, check_model, check_room, check_versions
from common.privacy import chain
from common.privacy.accounting import shown, solve_noise_multiplier
from common.privacy.books import Books
from common.privacy.chain import Entry, Head
from common.privacy.mechanism import count_event, mechanism_of, run_events
from common.privacy.verification import verify
from common.seal import Seal

ENGINE = "engine="
RESTORE = "find the latest copy of the ledger, and do not train on this one (docs/deploy.md)"
NARROW = "ask the coordinator for a run within it, or change the policy with your privacy officer"


def checkup(invocation: Invocation, visit: Visit) -> None:
    """Looks at one node."""
    planned = None if visit.run is None else _composed(visit.run)

    def job(settings: NodeSettings) -> None:
        seal = checked(settings, invocation)
        findings = examine(Checkup(settings, visit, planned, seal).checks(), offline=visit.offline)
        conclude(f"node {settings.name}", findings, invocation, visit)

    with from_kit(invocation) as whole:  # of an altered kit nothing is believed, or looked at
        run_with(NODE, job, whole)


def _composed(overrides: Sequence[str]) -> Config:
    """The coming run, as its coordinator composes it. Raises: ConfigError."""
    named = any(each.startswith(ENGINE) for each in overrides)
    words = (*overrides, *(() if named else (f"{ENGINE}superlink",)))
    composed: list[Config] = []
    run_job(composed.append, Invocation("doctor node --", words, json=False))
    return composed[0]


class Checkup:
    """What there is to look at, of one node."""

    def __init__(
        self, settings: NodeSettings, visit: Visit, planned: Config | None, seal: Seal | None
    ) -> None:
        self.settings, self.visit, self.planned, self.seal = settings, visit, planned, seal
        self.authority = Path(settings.authority).expanduser()
        self.own = (
            Credentials(Path(settings.certificate), Path(settings.certificate_key))
            if settings.certificate
            else None
        )
        self.peer = Peer("superlink", settings.superlink, self.authority, self.own)

    def checks(self) -> Iterator[Check]:
        """In the order in which a node needs them."""
        settings = self.settings
        yield Check("versions", check_versions, "install this program anew, with constraints.txt")
        yield Check("authority", lambda: check_authority(self.authority), "get ca.crt anew")
        if self.seal is not None:
            yield Check("kit", self.kit, "get the kit anew from whoever provisions")
        if self.own is not None:
            yield Check("own certificate", self.own_certificate, "get the kit renewed")
        yield Check("node key", self.node_key, "make one: ssh-keygen -t ecdsa -b 384 -N '' -f FILE")
        yield from self.peer.checks()
        yield Check("registered", self.registered, "have the coordinator register it", calls=True)
        folder = (settings.books[0] if settings.ledger else Path(settings.key)).parent
        yield Check("disk", lambda: check_room(folder, "ledger and inbox"), "make room")
        if self.visit.gpu or settings.device.startswith("cuda"):
            yield Check("GPU", check_gpu, "install the driver, and a torch for CUDA")
        yield Check("model", self.model, "save the model in a folder, as safetensors")
        yield Check("records", self.records, "correct data.* in the node's settings")
        yield Check("ledger key", self.ledger_key, "put it back from its copy")
        yield Check("ledger", self.ledger, RESTORE)
        yield Check("policy", self.policy, NARROW)
        yield Check("coming run", self.coming_run, NARROW)

    def kit(self) -> str:
        """What its seal says; that it is whole was checked before a word of it was believed."""
        assert self.seal is not None
        if not self.seal.pinned:
            raise DoubtError(
                f"{told(self.seal, self.settings.kit)}; ask for the provisioner's public key by "
                "another way than the kit came, and give it as sealed_by"
            )
        return told(self.seal, self.settings.kit)

    def own_certificate(self) -> str:
        """Whether what this node shows at a door is of today, and its own."""
        assert self.own is not None
        check_secret(self.own.key.expanduser())
        found = read_certificate(self.own.certificate.expanduser(), "this node, from its kit")
        key = load_pem_private_key(self.own.key.expanduser().read_bytes(), None)
        if key.public_key() != found.public_key():
            raise ConfigError(
                f"certificate={self.own.certificate}: is not that of {self.own.key}; put both back "
                "from the kit"
            )
        ends = found.not_valid_after_utc
        check_end(ends, f"certificate={self.own.certificate}: it", "have the kit renewed")
        return f"until {ends:%Y-%m-%d}"

    def node_key(self) -> str:
        """Whether it is a key, and its owner's alone."""
        path = Path(self.settings.key).expanduser()
        read_node_key(path)
        public = path.with_name(f"{path.name}{PUBLIC_SUFFIX}")
        return f"private; the coordinator registers {public.name}"

    def registered(self) -> str:
        """Whether the SuperLink lets this key in: as a node does, and out again at once."""
        from client.fleet import Fleet  # noqa: PLC0415 - Flower takes a second to import
        from client.inbox import Inbox  # noqa: PLC0415 - the same
        from client.service import fingerprint  # noqa: PLC0415 - torch comes with it

        try:
            key = read_node_key(Path(self.settings.key).expanduser())
        except ConfigError as error:
            raise OpenError("there is no key to ask for") from error
        self.peer.check_well()
        inbox = None
        if self.settings.inbox_path.is_dir():
            try:
                inbox = Inbox(self.settings.inbox_path)
            except ConfigError:
                return "this site's node is running, and was let in: see its log"
        try:
            fleet = Fleet(self.settings.superlink, self.authority, key, own=self.own)
            try:
                fleet.join(inbox.identity(fingerprint(self.settings, key)) if inbox else None)
            finally:
                fleet.leave()
        finally:
            if inbox is not None:
                inbox.close()
        return f"yes, as node {fleet.node_id}"

    def model(self) -> str:
        """Whether the models that are known beforehand can be opened here."""
        names = [*self.settings.node.models]
        if self.settings.reader:
            names.append(self.settings.reader)
        if self.planned is not None:
            names.append(self.planned.model.name)
        if not names:
            raise OpenError("which one, only the coordinator knows: give its run after --")
        return "; ".join(check_model(name) for name in dict.fromkeys(names))

    def records(self) -> str:
        """Whether they can be read, all of them, as the settings say."""
        check_files(self.settings.data)
        from client.service import read_records  # noqa: PLC0415 - torch comes with it

        records = read_records(self.settings)
        if not len(records):
            raise ConfigError(
                f"data.path={self.settings.data.path}: holds no record with a text and a label; "
                "correct data.path, data.text_column or data.labels"
            )
        books = self._books_or_none()
        if books and books.unit == PrivacyMode.person.name and records.persons is None:
            raise ConfigError(
                f"data.person_column='': the unit of {self.settings.ledger} is person; name the "
                "column of person ids"
            )
        return "can be read, each with its text and label"

    def ledger_key(self) -> str:
        """Whether the books can be signed, and by nobody else."""
        path, _ = self._books_file()
        keys = SiteKeys(path)
        public = chain.public_hex(keys.current())
        keys.kept_secret()  # where there is one, it must be private, too
        return f"private; public half {public[:16]}..."

    def ledger(self) -> str:
        """Whether the books are whole, this key's, and go on from the head that was given."""
        self._books_file()
        books, entries, key = replayed(self._chain), self._chain, self._key_or_none()
        if key is not None and books.site_key != chain.public_hex(key):
            raise VerificationError(
                f"{self.settings.ledger}: is signed by another key than the one beside it; put the "
                "key back that belongs to it"
            )
        head = Head.parse(self.visit.head) if self.visit.head else None
        if head is not None and not books.contains(head):
            raise VerificationError(
                f"{self.settings.ledger}: never had the head {head.seq}:{head.hash[:12]}..., it is "
                f"older, or another one; {RESTORE}"
            )
        if key is not None:  # what an officer would be handed is judged as an officer would
            claims = {"epsilon_pld": books.spent_pld(), "epsilon_rdp": books.spent_rdp()}
            verify(chain.export(entries, claims, key).encode(), head=head)
        spent, left = shown(books.spent()), "" if head else "; no --head given: age not checked"
        said = f"{books.head.seq} entries; epsilon {spent} of cap {books.cap:g}{left}"
        if books.spent() >= books.cap:
            raise PrivacyRefusedError(
                f"{self.settings.ledger}: all of its cap {books.cap:g} is spent; only its officer "
                "can raise it (coterie ledger cap)"
            )
        return said

    def policy(self) -> str:
        """Whether what is installed may train here, and protects what is private."""
        policy = self.settings.node
        if policy.code and code_digest() not in policy.code:
            raise PrivacyRefusedError(
                f"node.code: this program, {code_digest()}, is not one that was reviewed; have it "
                "reviewed, and add that digest"
            )
        if self.settings.allow_unprotected:
            raise DoubtError(
                "allow_unprotected=true: NOT PRIVATE, this node also answers runs that protect "
                "nothing; take it out, unless the records are not private"
            )
        if policy.max_epsilon is None and policy.min_noise_multiplier == 0:
            raise DoubtError("it limits no run, the ledger's cap alone does; see node=careful")
        return "limits a run; see node.* in the settings"

    def coming_run(self) -> str:
        """Whether the coming run would be refused here, as far as the site alone can tell."""
        if self.planned is None:
            raise OpenError("none was given: put its settings after --")
        config = self.planned
        if [*config.data.labels] != [*self.settings.data.labels]:
            raise ConfigError(
                "data.labels: differ between the run and this node; agree on names and order"
            )
        none = config.privacy.mode is PrivacyMode.none
        if none or config.privacy.noise is NoiseSource.seeded:
            if self.settings.allow_unprotected:
                raise DoubtError("NOT PRIVATE: it protects nothing; have it submitted with privacy")
            raise PrivacyRefusedError(
                "it would protect nothing, and is refused here; have it submitted with privacy"
            )
        if config.federation.participation < 1 or config.federation.availability:
            raise OpenError("sites sit rounds out: only the coordinator's plan knows which")
        config = _with_sigma(config)
        check_policy(self.settings.node, config)
        books = self._books_or_none()
        if books is not None:
            _check_books(books, config, self.settings.ledger)
        epsilon = f"epsilon {config.privacy.epsilon:g} at delta {config.privacy.delta:g}"
        return f"{epsilon}, sigma {config.privacy.noise_multiplier:g}: within policy and cap"

    def _books_file(self) -> tuple[Path, str]:
        """Raises: OpenError where there are to be none; ConfigError where there is no file."""
        if not self.settings.ledger:
            raise OpenError("this node keeps none: allow_unprotected=true")
        path, site = self.settings.books
        if not path.is_file():
            raise ConfigError(
                f"ledger={path}: no such file; put it back from its backup, or make it with your "
                "officer: coterie ledger init"
            )
        return path, site

    def _books_or_none(self) -> Books | None:
        """The books, where they are whole; what is wrong with them is said elsewhere."""
        try:
            self._books_file()
            return replayed(self._chain)
        except (CoterieError, OpenError, OSError):
            return None

    def _key_or_none(self) -> Ed25519PrivateKey | None:
        """The ledger's key, where it is well; what is wrong with it is said elsewhere."""
        try:
            return SiteKeys(self.settings.books[0]).current()
        except CoterieError:
            return None

    @cached_property
    def _chain(self) -> list[Entry]:
        return read_chain(*self.settings.books)


def replayed(entries: Sequence[Entry]) -> Books:
    """The books after these entries. Raises: VerificationError naming the one at fault."""
    books = Books()
    for entry in entries:
        try:
            books.apply(entry)
        except PrivacyRefusedError as error:  # one that was not allowed when it was written
            raise VerificationError(f"entry {entry.seq}: {error}") from error
    return books


def _with_sigma(config: Config) -> Config:
    """With the noise that the coordinator's plan will solve for a site that is always asked."""
    privacy = config.privacy
    epsilon = max(privacy.site_epsilons or [privacy.epsilon])
    sigma = privacy.noise_multiplier
    if sigma is None:
        count = count_event(config)
        beside = () if count is None else (count,)
        sigma = solve_noise_multiplier(
            epsilon, privacy.delta, privacy.sample_rate, config.charged_steps, beside=beside
        )
    return replace(config, privacy=replace(privacy, epsilon=epsilon, noise_multiplier=sigma))


def _check_books(books: Books, config: Config, ledger: str) -> None:
    """What an instruction of this run is held against. Raises: ConfigError, PrivacyRefusedError."""
    mechanism = mechanism_of(config)
    check_delta(
        config.privacy.delta, math.ceil(mechanism.divisor / mechanism.sample_rate), "a site"
    )
    if config.privacy.unit != books.unit:
        raise PrivacyRefusedError(
            f"privacy={config.privacy.unit}: the unit of {ledger} is {books.unit}; have the run "
            "submitted for that unit"
        )
    if config.privacy.delta < books.delta:
        raise PrivacyRefusedError(
            f"privacy.delta={config.privacy.delta:g}: is below that of {ledger}, {books.delta:g}, "
            "which can prove nothing there; have the run submitted with a larger one"
        )
    if not books.admits(run_events(config), books.admission()):
        raise PrivacyRefusedError(
            f"the run would exceed the cap of {ledger}, {books.cap:g}, of which "
            f"{shown(books.spent())} is spent; ask for a smaller epsilon, or the officer for a "
            "higher cap"
        )

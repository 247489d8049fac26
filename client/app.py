"""The ClientApp: steps 3 to 7 of a round, at one site.

Steps 1, 2 and 8 to 12 are the coordinator's; see `server/rounds.py`.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial

import numpy as np
import torch
from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from client.egress import egress
from client.ledger import Ledger
from client.meters import AlarmError
from client.policy import check_policy
from client.refusals import BooksBehindError, BudgetExhaustedError, RoundLostError
from client.site import Site
from client.train import Trainer, randomness_of
from common import messages
from common.coding import decoded, encoded
from common.config import (
    Coding,
    Config,
    NoiseSource,
    PrivacyMode,
    check_delta,
    config_hash,
    without_terms,
)
from common.device import CPU
from common.errors import PrivacyRefusedError, VerificationError
from common.messages import Count, Instruction, SiteBooks, Update
from common.parameters import Vector
from common.privacy.accounting import Event, coalesce, within
from common.privacy.books import Books, NoSpareRoundError
from common.privacy.mechanism import (
    count_event,
    count_std,
    counting,
    is_counting,
    mechanism_of,
    noisy_count,
    round_event,
    run_events,
)

OpenSite = Callable[[Context], Site]
MakeTrainer = Callable[[Config, torch.device], Trainer]
"""A trainer of a configuration, on a device."""


def client_app(
    open_site: OpenSite,
    *,
    allow_unprotected: bool = False,
    trainers: dict[str, Trainer] | None = None,
    make: MakeTrainer = Trainer,
    device: torch.device = CPU,
) -> ClientApp:
    """The ClientApp that answers training instructions for the sites `open_site` knows.

    Guarantee: whatever arrives, the reply is an `Update` or one of the fixed refusals of
    `common.messages`; see `client.egress`.
    Args: allow_unprotected: True in simulations only, for seeded noise and for none at all;
    trainers: the warm ones, shared with whoever else answers in this process; device: theirs; make:
    what trains.
    """
    app = ClientApp()
    warm: dict[str, Trainer] = {} if trainers is None else trainers

    def opened(message: Message, context: Context) -> tuple[Site, Trainer, Instruction]:
        instruction = messages.read_instruction(message)
        site = open_site(context)
        check_terms(site, instruction, allow_unprotected=allow_unprotected)
        return site, warm_trainer(warm, instruction.config, device, make), instruction

    @app.train(mods=[egress])
    def train(message: Message, context: Context) -> Message:
        update = _answer(*opened(message, context))
        return Message(messages.pack_update(update), reply_to=message)

    @app.evaluate(mods=[egress])
    def evaluate(message: Message, context: Context) -> Message:
        count = _count(*opened(message, context))
        return Message(messages.pack_count(count), reply_to=message)

    return app


def _answer(site: Site, trainer: Trainer, instruction: Instruction) -> Update:
    # 3. The terms are checked and the model is rehearsed; the rest must fit that model.
    check_fit(trainer, instruction)
    charge = round_event(instruction.config)
    if instruction.config.privacy.mode is PrivacyMode.none:
        vector, _ = trainer.train(site, instruction.vector, round_number=instruction.round)
        if instruction.config.federation.coding is Coding.float32:
            return update_of(instruction, charge, vector)  # as it is: no books want its bytes
        return _update(instruction, charge, _coded(vector, site, instruction))
    ledger = ledger_of(site)
    # Prepared before, and perhaps lost on its way: the same bytes once more, and no other.
    reservation = ledger.answered(instruction.run_id, instruction.round)
    if reservation is None:
        # 4. Reserve: charged and on disk before data are touched, and never given back.
        reservation = reserve(ledger, instruction, instruction.run_id, instruction.round, charge)
        with _lost_on_failure(ledger, reservation):
            # 5. The private steps.
            vector, measured = trainer.train(
                site, instruction.vector, round_number=instruction.round
            )
            assert measured is not None
            # 6. Prepare: these bytes, and no others, may leave.
            coded = _coded(vector, site, instruction)
            ledger.prepare(reservation, coded, steps=measured.round_steps)
    # 7. Release: the parameters after the noise, and what they cost.
    released = ledger.release(reservation)
    ledger.books.spent()  # priced, and remembered, while nobody waits for the file
    return _update(instruction, charge, released, books_of(ledger, instruction))


def _count(site: Site, trainer: Trainer, instruction: Instruction) -> Count:
    """The same steps for what a site may say of its own records: how many the model gets right."""
    config, charge = instruction.config, count_event(instruction.config)
    if charge is None:
        raise VerificationError("instruction: its plan counts nothing")
    check_fit(trainer, instruction)
    ledger, run = ledger_of(site), counting(instruction.run_id)
    reservation = ledger.answered(run, 1)
    if reservation is None:
        reservation = reserve(ledger, instruction, run, 1, charge)
        with _lost_on_failure(ledger, reservation):
            correct = trainer.count_correct(site, instruction.vector)
            coins = randomness_of(config, site.name, "count")
            noised = noisy_count(correct, count_std(config), coins)
            ledger.prepare(reservation, np.float64(noised).tobytes(), steps=1)
    released = np.frombuffer(ledger.release(reservation), dtype=np.float64)
    ledger.books.spent()  # priced while nobody waits for the file, as a round is
    return Count(instruction.run_id, float(released[0]), books_of(ledger, instruction))


@contextmanager
def _lost_on_failure(ledger: Ledger, reservation: int) -> Iterator[None]:
    """Raises: RoundLostError, whatever went wrong inside."""
    try:
        yield
    except BaseException as error:
        # A disk that is full takes no entry that says so either; the charge is there, and enough.
        with suppress(OSError):
            ledger.lose(reservation, reason_of(error))
        if not isinstance(error, Exception):  # somebody stops this process
            raise
        raise RoundLostError(f"a round was charged, and is lost: {error}") from error


def reason_of(error: BaseException | None) -> str:
    """Why a round is lost, as its ledger says it: of an alarm, that it was one, and not which."""
    return "alarm" if isinstance(error, AlarmError) else "failure"


def _coded(vector: Vector, site: Site, instruction: Instruction) -> bytes:
    config = instruction.config
    coins = randomness_of(config, site.name, f"coding {instruction.round}")
    return encoded(vector, instruction.vector, config.federation.coding, coins)


def _update(
    instruction: Instruction, charge: Event, data: bytes, books: SiteBooks | None = None
) -> Update:
    """The update whose coded parameters these are."""
    coding = instruction.config.federation.coding
    update = update_of(instruction, charge, decoded(data, instruction.vector, coding), books)
    return update if coding is Coding.float32 else replace(update, coded=data)


def update_of(
    instruction: Instruction, charge: Event, vector: Vector, books: SiteBooks | None = None
) -> Update:
    """What a site releases in one round."""
    ids = instruction.run_id, instruction.round, instruction.layout_digest
    return Update(*ids, charge, vector, books)


def books_of(ledger: Ledger, instruction: Instruction) -> SiteBooks:
    """What the reply says of the ledger, with the way from the head the coordinator knows."""
    with ledger.at_once():  # others may append, and all of this is of one moment
        books, receipt = ledger.books, instruction.receipt
        links = b"" if receipt is None else ledger.links(receipt.head, books.head)
        return SiteBooks(books.head, books.cap, books.spent(), coalesce(books.charges()), links)


def check_terms(site: Site, instruction: Instruction, *, allow_unprotected: bool) -> None:
    """What can be refused without loading a model. It depends on the instruction, on declared
    constants and on past charges, never on records.
    """
    check_plan(site, instruction, allow_unprotected=allow_unprotected)
    if instruction.config.privacy.mode is not PrivacyMode.none:
        check_price(site, instruction)


def check_plan(site: Site, instruction: Instruction, *, allow_unprotected: bool) -> None:
    """What depends on the instruction, the site's classes and its policy alone."""
    config = instruction.config
    if is_counting(instruction.run_id):
        raise VerificationError("instruction: its run has the name of a count")
    if not 1 <= instruction.round <= config.federation.rounds:
        raise VerificationError(f"instruction: round {instruction.round} is not in the plan")
    if tuple(config.data.labels) != site.classes:
        raise VerificationError("instruction: its classes are not those of this site")
    none = config.privacy.mode is PrivacyMode.none
    if (none or config.privacy.noise is NoiseSource.seeded) and not allow_unprotected:
        raise VerificationError("instruction: it would protect nothing, and is refused here")
    check_policy(site.policy, config)


def check_price(site: Site, instruction: Instruction) -> None:
    """What depends on the site's ledger, too."""
    config, mechanism = instruction.config, mechanism_of(instruction.config)
    records = math.ceil(mechanism.divisor / mechanism.sample_rate)
    check_delta(config.privacy.delta, records, site.name)
    whole = run_events(config)
    if not within(whole, epsilon=config.privacy.epsilon, delta=config.privacy.delta):
        raise BudgetExhaustedError(f"the run would exceed epsilon {config.privacy.epsilon:g}")
    books = ledger_of(site).books
    if instruction.receipt is not None and not books.contains(instruction.receipt.head):
        raise BooksBehindError(
            f"{site.name}: its ledger never had the head {instruction.receipt.head} that the "
            "coordinator signed; it was put back to an older copy, or is another one: find the "
            "latest copy, and do not train on this one"
        )
    if config.privacy.unit != books.unit:  # a record's price says nothing about a person's
        raise VerificationError(f"instruction: its unit is not the ledger's, {books.unit}")
    if config.privacy.mode is PrivacyMode.person and site.records.persons is None:
        raise VerificationError("instruction: the records of this site name no persons")
    if config.privacy.delta < books.delta:  # the ledger can prove nothing at a smaller one
        raise VerificationError(f"instruction: its delta is below the ledger's, {books.delta:g}")
    if not _is_committed(books, instruction) and not books.admits(whole, books.admission()):
        raise BudgetExhaustedError(f"the run would exceed the site's cap, {books.cap:g}")


def _is_committed(books: Books, instruction: Instruction) -> bool:
    """Whether its run has begun. Raises: VerificationError if that was with other settings."""
    plan = books.plans.get(instruction.run_id)
    if plan is not None and plan.config != config_hash(instruction.config):
        raise VerificationError("instruction: its configuration is not the one its run began with")
    return plan is not None


def check_fit(trainer: Trainer, instruction: Instruction) -> None:
    """Whether the parameters are those of the model. Raises: VerificationError."""
    if instruction.layout_digest != trainer.layout.digest:
        raise VerificationError("instruction: its layout is not that of the model named in it")
    trainer.check(instruction.vector)


def reserve(
    ledger: Ledger, instruction: Instruction, run: str, round_number: int, charge: Event
) -> int:
    """Commits the run when its first instruction comes, and charges one round of `run`."""
    try:
        with ledger.at_once():
            if instruction.receipt is not None:
                ledger.acknowledge(instruction.receipt)
            if not _is_committed(ledger.books, instruction):  # now that nobody else can begin it
                _commit(ledger, instruction)
            return ledger.reserve(run, round_number, charge)
    except NoSpareRoundError:
        raise
    except PrivacyRefusedError as error:
        raise BudgetExhaustedError(str(error)) from error


def _commit(ledger: Ledger, instruction: Instruction) -> None:
    """All that the run may ever charge, before any of it: then PLD may price it as one."""
    config = instruction.config
    commit = partial(
        ledger.commit,
        plan=config_hash(config),
        model=config.model.name,
        unit=config.privacy.unit,
    )
    commit(
        instruction.run_id,
        round_event(config),
        rounds=config.asked_rounds,
        spare_rounds=config.privacy.spare_rounds,
    )
    count = count_event(config)
    if count is not None:
        commit(counting(instruction.run_id), count, rounds=1, spare_rounds=0)


def ledger_of(site: Site) -> Ledger:
    """The books of a site. Raises: VerificationError if it has none."""
    if site.ledger is None:
        raise VerificationError("instruction: this site keeps no ledger, and can charge nothing")
    return site.ledger


def warm_trainer(
    trainers: dict[str, Trainer],
    config: Config,
    device: torch.device = CPU,
    make: MakeTrainer = Trainer,
) -> Trainer:
    """One trainer per configuration and process: the model is loaded once, and sites that differ
    in their terms alone take turns on it.
    """
    known = next((each for each in trainers.values() if each.config is config), None)
    if known is not None:
        return known
    key = config_hash(without_terms(config))
    if key not in trainers:
        trainer = make(config, device)
        trainer.rehearse()
        trainers.clear()
        trainers[key] = trainer
    return trainers[key].under(config)

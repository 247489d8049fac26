"""A cohort: sites of one process that are answered together, as each would be alone.

What `client.app` does for one message happens here for several at once, where what is trained is
small: the same checks, refusals, charges and egress for each, with one computation and one flush
of the books for all. Simulations only: sites that share a process keep nothing from each other.

Steps 3 to 7 are those of `client.app`.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from client.app import (
    MakeTrainer,
    OpenSite,
    books_of,
    check_fit,
    check_plan,
    check_price,
    client_app,
    ledger_of,
    reason_of,
    reserve,
    update_of,
    warm_trainer,
)
from client.egress import egress
from client.ledger import Ledger
from client.refusals import RoundLostError
from client.site import Site
from client.train import Trained, Trainer
from common import messages
from common.config import PrivacyMode
from common.device import CPU
from common.envelopes import Envelopes
from common.messages import Instruction, Update
from common.privacy.mechanism import round_event

TOGETHER = ("train", "train.default")
"""Kinds of message that are answered together; a count is rare."""


@dataclass
class _Case:
    """One message on its way to a reply. An error ends its way, and no other's."""

    message: Message
    context: Context
    instruction: Instruction | None = None
    site: Site | None = None
    reservation: int | None = None
    """Its charge in the books; None before, and where nothing is charged."""
    trained: Trained | None = None
    outcome: Update | Exception | None = None
    lost_for: str = ""
    """Why its round is lost, as the books say it."""

    @property
    def asked(self) -> Instruction:
        """What was read."""
        assert self.instruction is not None
        return self.instruction

    @property
    def ledger(self) -> Ledger:
        """Of its site."""
        assert self.site is not None
        return ledger_of(self.site)


class Cohort:
    """Answers training instructions for several sites at once.

    Guarantee: what one message gets, and what its site's ledger then holds, is what the ClientApp
    of `client.app.client_app` gives it, to rounding; a site that is refused, fails, or had prepared
    its answer before, is treated by itself, and the rest go on together. Each is charged, on disk,
    before any of their data are touched; a crash in between leaves them all lost, and charged.
    Whether sites are computed together follows from the configuration and the model alone, and a
    site's vector does not depend on who else is asked, or on how many at a time.
    """

    def __init__(
        self,
        open_site: OpenSite,
        *,
        most: int,
        allow_unprotected: bool = False,
        device: torch.device = CPU,
        make: MakeTrainer = Trainer,
    ) -> None:
        """Args: most: messages that are answered at once, of `client.agreement.sites_together`;
        device: where models are; make: what trains.
        """
        self._make, self._most, self._allow = make, most, allow_unprotected
        self._opening = open_site
        self._device = device
        self._trainers: dict[str, Trainer] = {}
        self._unforeseen: dict[Ledger, None] = {}
        """Of sites that were asked, and may be asked again."""
        self.app = client_app(
            self._open_site,
            allow_unprotected=allow_unprotected,
            trainers=self._trainers,
            device=device,
            make=make,
        )
        """Answers what is asked of one site alone."""

    def size(self, message: Message) -> int:
        """How many messages may be answered together, this one and others of its instruction."""
        return self._most if message.metadata.message_type in TOGETHER else 1

    def __call__(self, asked: Sequence[Message], contexts: Sequence[Context]) -> list[Message]:
        """Replies, in order. Of a site that is asked twice, the second waits for the first."""
        replies: dict[int, Message] = {}
        waiting = dict(enumerate(zip(asked, contexts, strict=True)))
        while waiting:
            cases = {at: _Case(*waiting.pop(at)) for at in self._next(waiting)}
            replies |= zip(cases, self._answered([*cases.values()]), strict=True)
        return [replies[at] for at in range(len(asked))]

    def rest(self) -> bool:
        """For whoever has nothing to answer: prices what the next answer of one site will say.

        Returns: whether there is more to price.
        """
        if self._unforeseen:
            ledger, _ = self._unforeseen.popitem()
            ledger.books.foresee()
        return bool(self._unforeseen)

    def _open_site(self, context: Context) -> Site:
        site = self._opening(context)
        if site.ledger is not None:
            self._unforeseen[site.ledger] = None
        return site

    def _next(self, waiting: dict[int, tuple[Message, Context]]) -> list[int]:
        """Places of the first message and of those, for other nodes, that go with it."""
        chosen: dict[int, int] = {}
        most = 1
        for at, (message, context) in waiting.items():
            size = self.size(message)
            most = most if chosen else size
            if context.node_id not in chosen and len(chosen) < min(most, size):
                chosen[context.node_id] = at
        return [*chosen.values()]

    def _answered(self, cases: list[_Case]) -> list[Message]:
        """A reply to each, through the door that every reply goes through."""
        if self.size(cases[0].message) > 1:
            self._read(cases)
            for alike in _by_instruction(_going(cases)):
                self._train(alike)
        envelopes = Envelopes()
        return [_reply(case, self.app, envelopes) for case in cases]

    def _read(self, cases: list[_Case]) -> None:
        """What each is asked, and whether its site does that."""
        known: list[tuple[Message, Instruction]] = []
        passed: _Case | None = None
        for case in cases:
            with _ends(case):
                case.instruction = _read(case.message, known)
                case.site = self._open_site(case.context)
                if passed is None or not _have_one_plan(case, passed):
                    check_plan(case.site, case.asked, allow_unprotected=self._allow)
                    passed = case
                if case.asked.config.privacy.mode is not PrivacyMode.none:
                    check_price(case.site, case.asked)

    def _train(self, cases: list[_Case]) -> None:
        """Takes cases of one instruction through the round, or leaves them to the ClientApp."""
        asked = cases[0].asked
        try:
            trainer = warm_trainer(self._trainers, asked.config, self._device, self._make)
            if trainer.together == 1:
                self._most = 1
                return
            # 3. The terms are checked and the model is rehearsed; the rest must fit that model.
            check_fit(trainer, asked)
            if asked.config.privacy.mode is PrivacyMode.none:
                _compute(cases, trainer)
                _finish(cases)
            else:
                _answer_together(cases, trainer)
        except Exception as error:
            _end(cases, error)


def _answer_together(cases: list[_Case], trainer: Trainer) -> None:
    # Prepared before, and perhaps lost on its way: the same bytes once more, and no other.
    for case in cases:
        with _ends(case):
            case.reservation = case.ledger.answered(case.asked.run_id, case.asked.round)
    new = [case for case in _going(cases) if case.reservation is None]
    # 4. Reserve, all of them: charged and on disk before data are touched, and never given back.
    new = _in_one_transaction(new, _reserve)
    with _lost_on_failure(new) as unprepared:
        # 5. The private steps.
        _compute(new, trainer)
        # 6. Prepare: these bytes, and no others, may leave.
        for case in _in_one_transaction(_going(new), _prepare):
            unprepared.remove(case)
    # 7. Release: the parameters after the noise, and what they cost, which is priced while nobody
    # waits for the file.
    for case in _going(cases):
        with _ends(case):
            case.ledger.books.spent()
    _in_one_transaction(_going(cases), _release)


def _compute(cases: list[_Case], trainer: Trainer) -> None:
    """The local steps of all; a site at which something fails has its error and no result."""
    if not cases:
        return
    asked, sites = cases[0].asked, [case.site for case in cases if case.site is not None]
    found = trainer.train_together(sites, asked.vector, round_number=asked.round)
    for case, each in zip(cases, found, strict=True):
        if isinstance(each, Exception):
            case.outcome = each
        else:
            case.trained = each


def _finish(cases: list[_Case]) -> None:
    """The update of each site of a run without any guarantee."""
    charge = round_event(cases[0].asked.config)  # of one instruction, and so the same for all
    for case in _going(cases):
        assert case.trained is not None
        case.outcome = update_of(case.asked, charge, case.trained[0])


def _reserve(case: _Case) -> None:
    asked = case.asked
    charge = round_event(asked.config)
    case.reservation = reserve(case.ledger, asked, asked.run_id, asked.round, charge)


def _prepare(case: _Case) -> None:
    assert case.trained is not None
    assert case.reservation is not None
    vector, measured = case.trained
    assert measured is not None
    case.ledger.prepare(case.reservation, vector.tobytes(), steps=measured.round_steps)


def _release(case: _Case) -> None:
    assert case.reservation is not None
    released = np.frombuffer(case.ledger.release(case.reservation), dtype=np.float32)
    charge, books = round_event(case.asked.config), books_of(case.ledger, case.asked)
    case.outcome = update_of(case.asked, charge, released, books)


def _in_one_transaction(cases: list[_Case], act: Callable[[_Case], None]) -> list[_Case]:
    """`act` for each, with one flush of a file; one that is refused leaves nothing in its chain.

    Returns: those for which it is on disk.
    """
    for store in dict.fromkeys(case.ledger.store for case in cases):
        own = [case for case in cases if case.ledger.store is store]
        try:
            with store.together():
                for case in own:
                    with _ends(case), store.apart(case.ledger):
                        act(case)
        except Exception as error:  # nothing of it is on disk
            _end(own, error)
    return [case for case in cases if not isinstance(case.outcome, Exception)]


@contextmanager
def _lost_on_failure(charged: list[_Case]) -> Iterator[list[_Case]]:
    """Whoever is still in the list when this ends is lost, whatever went wrong inside."""
    unprepared = list(charged)
    try:
        yield unprepared
    except BaseException as error:
        if not isinstance(error, Exception):  # somebody stops this process
            _in_one_transaction(unprepared, _lose)
            raise
        _end(unprepared, error)
    lost = [(case, _lost(case.outcome)) for case in unprepared]
    for case, why in lost:
        case.outcome, case.lost_for = None, reason_of(why.__cause__)
    _in_one_transaction(unprepared, _lose)
    for case, why in lost:
        case.outcome = case.outcome or why


def _lost(cause: Update | Exception | None) -> RoundLostError:
    assert isinstance(cause, Exception), "what is not prepared has failed"
    error = RoundLostError(f"a round was charged, and is lost: {cause}")
    error.__cause__ = cause
    return error


def _lose(case: _Case) -> None:
    assert case.reservation is not None
    case.ledger.lose(case.reservation, case.lost_for or "failure")


@contextmanager
def _ends(case: _Case) -> Iterator[None]:
    """An error inside is what the case comes to."""
    try:
        yield
    except Exception as error:
        case.outcome = error


def _end(cases: Iterable[_Case], error: Exception) -> None:
    """Each that had no error before comes to this one."""
    for case in cases:
        if not isinstance(case.outcome, Exception):
            case.outcome = error


def _going(cases: Iterable[_Case]) -> list[_Case]:
    return [case for case in cases if case.outcome is None]


def _read(message: Message, known: list[tuple[Message, Instruction]]) -> Instruction:
    """What a message asks; what several ask is parsed once, and remembered in `known`."""
    for other, instruction in known:
        alike = messages.read_alike(message, other, instruction)
        if alike is not None:
            return alike
    known.append((message, messages.read_instruction(message)))
    return known[-1][1]


def _have_one_plan(case: _Case, passed: _Case) -> bool:
    """Whether what let the plan of one pass lets that of the other pass, too."""
    mine, theirs = case.asked, passed.asked
    assert case.site is not None
    assert passed.site is not None
    return (
        mine.config is theirs.config
        and (mine.run_id, mine.round) == (theirs.run_id, theirs.round)
        and (case.site.classes, case.site.policy) == (passed.site.classes, passed.site.policy)
    )


def _by_instruction(cases: Iterable[_Case]) -> list[list[_Case]]:
    """Those that are asked the same, their receipts apart."""
    alike: dict[tuple[int, int, str, int, str], list[_Case]] = {}
    for case in cases:
        asked = case.asked
        key = (id(asked.config), id(asked.vector), asked.run_id, asked.round, asked.layout_digest)
        alike.setdefault(key, []).append(case)
    return [*alike.values()]


def _reply(case: _Case, app: ClientApp, envelopes: Envelopes) -> Message:
    """What leaves; of a case that nobody has looked at, what the ClientApp answers."""
    outcome = case.outcome
    if outcome is None:
        return app(case.message, case.context)

    def answer(message: Message, _: Context) -> Message:
        if isinstance(outcome, Exception):
            raise outcome
        return envelopes.reply(messages.pack_update(outcome), message)

    return egress(case.message, case.context, answer)

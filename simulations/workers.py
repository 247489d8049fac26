"""Workers: the processes of a simulation that answer its messages, and who answers which.

A site has a home, the worker that has prepared its records; homes are dealt longest first, so
that all end together. A worker without work takes from the one with the most left, shortest first,
and pays for preparing those records again. Who answers changes no answer: seeds are by run, round
and site, and what sums the replies does not depend on when they come.
"""

import logging
import os
import signal
import time
from collections import deque
from collections.abc import Callable, Collection, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from multiprocessing.connection import Connection, wait
from typing import Any

from flwr.app import Array, Error, Message, RecordDict

from common import messages
from common.config import EngineConfig
from common.device import gpus_of
from simulations.answer import Answer, Together, alone, are_alike, is_late, partition_of
from simulations.link import Link, Parcel, Shares
from simulations.nursery import nursery
from simulations.worker import Born, Done, Job, Settings

log = logging.getLogger(__name__)

AHEAD = 2
"""Jobs that a worker has at a time: the one it works on, and one that waits there. So no more than
so many of its replies wait to be read."""
MOST_DEATHS = 2
"""Workers that a message may cost; after one more it is answered as a failure of its site."""
END_S = 2.0
"""How long the end of a killed worker is waited for."""

Lost = Callable[[Message], bool]
"""Told what a worker that died had to answer: whether an attempt that was charged is lost."""


def workers_of(engine: EngineConfig, sites: int) -> int:
    """How many processes answer: `engine.workers`, never more than there are sites.

    0 is one for each GPU, or without any the cores divided by the threads; as threads are all cores
    by default, so is one process.
    """
    cores, gpus = len(os.sched_getaffinity(0)), gpus_of(engine.device)
    return max(1, min(engine.workers or gpus or cores // (engine.threads or cores), sites))


def threads_of(engine: EngineConfig, workers: int) -> int:
    """Torch threads of each of so many processes: as told, else their share of the cores."""
    return engine.threads or max(1, len(os.sched_getaffinity(0)) // workers)


def homes(work: Sequence[float], workers: int) -> list[int]:
    """Which worker each site is at home with: longest first, each to whom has least.

    Guarantee: the same for the same arguments; no worker has more than the mean and the longest.

    >>> homes([1, 5, 3, 3], 2)
    [0, 0, 1, 1]
    """
    loads, at = [0.0] * workers, [0] * len(work)
    for site in sorted(range(len(work)), key=lambda site: -work[site]):
        at[site] = min(range(workers), key=loads.__getitem__)
        loads[at[site]] += work[site]
    return at


@dataclass(eq=False)
class Task:
    """A message that is to be answered."""

    message: Message
    work: float
    deaths: int = 0
    """Workers that died over it."""

    @property
    def partition(self) -> int:
        """Whom it is for."""
        return partition_of(self.message)


@dataclass(eq=False)
class Worker:
    """One process, and what it has to do."""

    link: Link
    place: int
    """Among the workers; who takes the place of another has the same."""
    pid: int = 0
    """Once it has said so."""
    queue: deque[Task] = field(default_factory=deque)
    """Longest first; not sent yet."""
    jobs: deque[list[Task]] = field(default_factory=deque)
    """Sent, and not answered."""

    def kill(self) -> None:
        """Ends it whatever it is doing, if it has said who it is."""
        if self.pid:
            with suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGKILL)


class Workers:
    """Some processes that answer messages.

    Guarantee: a message is answered by a reply of the ClientApp, or, where its worker died, by the
    code of a local failure: if the site was charged for the attempt, or after `MOST_DEATHS`. Other
    messages of that worker are answered by its replacement. What is late is not answered, and a
    worker at work on it is replaced.
    """

    def __init__(
        self,
        answer_of: Callable[[], Answer],
        *,
        workers: int,
        threads: int,
        work: Sequence[float],
        lost: Lost,
        together: Together = alone,
    ) -> None:
        """Args: answer_of: makes, in a worker, what answers; work: expected of each site, in any
        unit. Raises: FederationError if no process can be started.
        """
        self._work, self._together, self._lost = work, together, lost
        self._homes = homes(work, workers)
        self._parcel = Parcel.of(answer_of)
        self._settings = Settings(threads, logging.getLogger().getEffectiveLevel(), len(work))
        self._states: dict[int, RecordDict] = {}
        self._shares = Shares()
        self._replies: dict[str, Message] = {}
        self._workers: list[Worker] = []
        self._workers += [self._started(place) for place in range(workers)]

    @property
    def pids(self) -> list[int]:
        """Of the workers that have said who they are."""
        return [worker.pid for worker in self._workers if worker.pid]

    def push(self, outgoing: Iterable[Message]) -> None:
        """Takes messages, and has them answered from now on."""
        self._leave_late()
        if not any(worker.queue or worker.jobs for worker in self._workers):
            self._shares.clear()
        tasks = [Task(message, self._work[partition_of(message)]) for message in outgoing]
        self._shares.add([array for task in tasks for array in _arrays(task.message)])
        for task in sorted(tasks, key=lambda task: -task.work):
            self._workers[self._homes[task.partition]].queue.append(task)
        self._feed()

    def pull(self, wanted: Collection[str], timeout_s: float) -> list[Message]:
        """Replies to these messages; waits for the first of them, so long at most."""
        deadline = time.monotonic() + timeout_s
        while True:
            if found := [identity for identity in self._replies if identity in wanted]:
                return [self._replies.pop(identity) for identity in found]
            left = deadline - time.monotonic()
            if left <= 0 or not self._listen(left):
                return []

    def close(self) -> None:
        """Kills the workers. What was at work is as after a crash: charged, and lost."""
        for worker in self._workers:
            worker.kill()
        for worker in self._workers:
            self._end(worker)
        self._workers.clear()
        self._replies.clear()
        self._shares.clear()
        self._parcel.segment.close()

    def _started(self, place: int) -> Worker:
        worker = Worker(Link(nursery().worker()), place)
        with suppress(OSError):  # that it is gone already is found when it is listened to
            worker.link.send(replace(self._settings, place=place))
            worker.link.send_parcel(self._parcel)
        return worker

    def _feed(self) -> None:
        """Gives every worker as much as it may have."""
        for worker in [*self._workers]:
            while len(worker.jobs) < AHEAD and (job := self._next_job(worker)):
                worker.jobs.append(job)
                states = [self._states.get(task.partition, RecordDict()) for task in job]
                sent = Job([task.message for task in job], states, self._shares.numbers())
                with suppress(OSError):  # the same
                    worker.link.send(sent, self._shares)

    def _next_job(self, worker: Worker) -> list[Task]:
        """From its own queue; with nothing at all to do, from another's."""
        if worker.queue:
            return self._cut(worker.queue, worker.queue.popleft, 0)
        if worker.jobs:
            return []
        longest = max(self._workers, key=lambda other: sum(task.work for task in other.queue))
        return self._cut(longest.queue, longest.queue.pop, -1) if longest.queue else []

    def _cut(self, queue: deque[Task], take: Callable[[], Task], end: int) -> list[Task]:
        """A task from an end of a queue, and as many next to it as may be answered with it."""
        job = [take()]
        most = self._together(job[0].message)
        while len(job) < most and queue and are_alike(queue[end].message, job[0].message):
            job.append(take())
        return job

    def _listen(self, timeout_s: float) -> bool:
        """Takes in what workers have said; waits for it. Returns: whether any had."""
        by_connection = {worker.link.connection: worker for worker in self._workers}
        ready = wait([*by_connection], timeout_s)
        for connection in ready:
            assert isinstance(connection, Connection)
            worker = by_connection[connection]
            try:
                self._take(worker, worker.link.receive())
            except (EOFError, OSError):
                log.warning("a worker of the simulation died; another one takes its place")
                self._replace(worker)
        self._feed()
        return bool(ready)

    def _take(self, worker: Worker, said: Any) -> None:
        if isinstance(said, Born):
            worker.pid = said.pid
        elif isinstance(said, logging.LogRecord):
            logging.getLogger(said.name).handle(said)
        else:
            assert isinstance(said, Done)
            for task, state in zip(worker.jobs.popleft(), said.states, strict=True):
                if state or task.partition in self._states:
                    self._states[task.partition] = state
            self._replies |= {reply.metadata.reply_to_message_id: reply for reply in said.replies}

    def _end(self, worker: Worker) -> None:
        """Kills a worker, takes in what it had said by then, and waits until it is gone."""
        with suppress(EOFError, OSError):
            worker.kill()
            while worker.link.connection.poll(END_S if worker.pid else 0):
                self._take(worker, worker.link.receive())
                worker.kill()
        worker.link.close()

    def _replace(self, worker: Worker) -> None:
        """Puts a new worker in the place of one, and into its queue what that one left undone."""
        self._end(worker)
        new = self._started(worker.place)
        new.queue = worker.queue
        self._workers[self._workers.index(worker)] = new
        for place, job in reversed([*enumerate(worker.jobs)]):
            for task in reversed(job):
                task.deaths += place == 0  # it died over its first; the others had not begun
                self._again(task, new)

    def _again(self, task: Task, worker: Worker) -> None:
        charged = self._lost(task.message)
        if is_late(task.message):
            return
        if charged or task.deaths > MOST_DEATHS:
            code = messages.LOCAL_FAILURE
            failure = Message(Error(code, messages.REFUSALS[code]), reply_to=task.message)
            self._replies[task.message.metadata.message_id] = failure
        else:
            worker.queue.appendleft(task)

    def _leave_late(self) -> None:
        """What nobody waits for any more is forgotten, and who is at work on it replaced."""
        for worker in [*self._workers]:
            if any(is_late(task.message) for job in worker.jobs for task in job):
                log.warning("a worker of the simulation was too slow for a round, and is replaced")
                self._replace(worker)
        for worker in self._workers:
            worker.queue = deque(task for task in worker.queue if not is_late(task.message))
        self._replies = {k: reply for k, reply in self._replies.items() if not is_late(reply)}


def _arrays(message: Message) -> list[Array]:
    records = message.content.array_records.values()
    return [array for record in records for array in record.values()]

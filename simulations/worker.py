"""A worker: one process that is any of the simulation's sites, with one warm model.

It is forked by the nursery, which imports this module; see `simulations.nursery`.
"""

import logging
import logging.handlers
import os
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import torch
from flwr.app import Message, RecordDict

import client.app  # noqa: F401 - what every worker needs is imported once, in the nursery
from common.allocation import Trimming, keep_freed_memory
from common.device import prefer_gpu
from simulations.answer import Answer, Resting, answered, context_of, identify, partition_of
from simulations.link import Link

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Settings:
    """What a worker is told before anything else."""

    threads: int
    """Of torch."""
    level: int
    """From which on log records are passed on."""
    partitions: int
    """Number of sites."""
    place: int = 0
    """Among the workers."""


@dataclass(frozen=True)
class Born:
    """The first word of a worker."""

    pid: int


@dataclass(frozen=True)
class Job:
    """Messages to be answered together."""

    messages: list[Message]
    states: list[RecordDict]
    """What each site's context held after its last message."""
    shared: tuple[int, ...]
    """Numbers of the shared arrays that may still be asked for."""


@dataclass(frozen=True)
class Done:
    """The answers to the oldest job that was not answered yet."""

    replies: list[Message]
    states: list[RecordDict]


def serve(handle: int) -> None:
    """Answers jobs that come over a connection, until it is closed."""
    link = Link(Connection(handle))
    try:
        _serve(link)
    except (EOFError, OSError):  # whoever asked is gone, and waits for nothing
        os._exit(0)


def _serve(link: Link) -> None:
    link.send(Born(os.getpid()))
    settings: Settings = link.receive()
    _log_over(link, settings.level)
    torch.set_num_threads(settings.threads)
    prefer_gpu(settings.place)
    keep_freed_memory()
    identify()
    answer: Answer = link.receive_parcel()()
    trimming = Trimming()
    while True:
        if not link.connection.poll():  # the round is over, as far as it is this one's
            _rest(answer, link.connection)
            trimming.after_round()
        job: Job = link.receive()
        link.keep_only(job.shared)
        link.send(_done(answer, job, settings.partitions))


def _rest(answer: Any, connection: Connection) -> None:
    """While nothing is asked, what comes next is made ready: the others are still at work, or the
    coordinator is, and all workers would do it at the same time at the beginning of the next round.
    """
    more = isinstance(answer, Resting)
    while more and not connection.poll():
        try:
            more = answer.rest()
        except Exception:  # what was not made ready is made when it is needed, and fails there
            log.exception("a worker of the simulation could not make its next answers ready")
            more = False


def _done(answer: Answer, job: Job, partitions: int) -> Done:
    contexts = [
        context_of(partition_of(message), partitions, state)
        for message, state in zip(job.messages, job.states, strict=True)
    ]
    replies = answered(answer, job.messages, contexts)
    return Done(replies, [context.state for context in contexts])


class _Records:
    """A queue, as logging wants one, whose other end is the simulation."""

    def __init__(self, link: Link) -> None:
        self._link = link

    def put_nowait(self, record: logging.LogRecord) -> None:
        """Sends a record, whose traceback is text by now."""
        self._link.send(record)


def _log_over(link: Link, level: int) -> None:
    """Records go to the simulation's own handlers: whole, and in its order."""
    root = logging.getLogger()
    root.handlers = [logging.handlers.QueueHandler(_Records(link))]  # type: ignore[arg-type] # its put_nowait alone is used
    root.setLevel(level)

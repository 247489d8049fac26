"""A witness on loopback, with passes for those who ask, and chains to tell it of."""

import runpy
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from common.privacy.chain import Kind
from common.privacy.witness import Pass, WitnessLine, steps_after
from server.witness import Folder, Witness, admit_to, make_witness, started

ASSETS = Path(__file__).parents[1] / "assets"
MAKE = runpy.run_path(str(ASSETS / "make_ledgers.py"))
Pen, SITE, NEXT, OTHER = (MAKE[name] for name in ("Pen", "SITE", "NEXT", "OTHER"))
ADDRESS = "127.0.0.1:0"


class Party:
    """One witness: its folder, its passes, and a server while somebody asks."""

    def __init__(self, folder):
        self.folder = Folder(folder / "witness")
        self.key = make_witness(self.folder.path, ["127.0.0.1"], 30)
        self.passes = folder / "passes"
        self.book = self.folder.book()
        self.address = ""

    def admit(self, name):
        given = self.passes / name
        if not given.exists():
            admit_to(self.folder, name, given, 30)
        return given

    @contextmanager
    def serving(self, listen=ADDRESS):
        server, self.address = started(self.folder, Witness(self.book, self.folder.key()), listen)
        try:
            yield self.address
        finally:
            server.stop(None).wait()

    @contextmanager
    def line(self, name="ward-1"):
        line = WitnessLine(self.address, Pass(self.admit(name)))
        try:
            yield line
        finally:
            line.close()


def chain_of(entries=0, *, site="ward-1", **genesis):
    """A ledger of so many entries beyond its first one."""
    pen = Pen(site=site, **genesis)
    grow(pen, entries)
    return pen


def grow(pen, entries, word="more"):
    for _ in range(entries):
        pen.write(Kind.DATASET, dataset_root=MAKE["digest"](f"{word} {pen.head.seq}"))
    return pen


def copy_of(pen, upto):
    """An older copy: the same ledger, up to an entry."""
    other = Pen()
    other.entries, other.key, other.name = pen.entries[:upto], pen.key, pen.name
    return other


def steps(pen, after, name):
    """What brings a witness from a head to the pen's end."""
    return list(steps_after(name, after, pen.entries[after.seq :]))


def step(pen, after, name):
    (only,) = steps(pen, after, name)
    return only


def at_once(calls):
    with ThreadPoolExecutor(len(calls)) as pool:
        return [each.result() for each in [pool.submit(call) for call in calls]]

"""Processes: what a program and everything it starts take, daemons included.

Linux only: it reads /proc.
"""

import os
from pathlib import Path

STOPPED = "T"
_TICK_S = 1 / os.sysconf("SC_CLK_TCK")


def family(root: int) -> list[int]:
    """A process and all that live of its descendants."""
    children: dict[int, list[int]] = {}
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit() and (fields := _stat(int(folder.name))):
            children.setdefault(int(fields[1]), []).append(int(folder.name))
    found, waiting = [], [root]
    while waiting:
        found.append(waiting.pop())
        waiting += children.get(found[-1], [])
    return found


def cpu_s(root: int) -> float:
    """CPU seconds of a family so far, with those of its ended members that it has waited for."""
    ticks = sum(sum(map(int, fields[11:15])) for pid in family(root) if (fields := _stat(pid)))
    return ticks * _TICK_S


def own_cpu_s(pid: int) -> float:
    """CPU seconds of one process so far, without those of any other; 0 if it has ended."""
    return sum(map(int, _stat(pid)[11:13])) * _TICK_S


def resident_mb(root: int) -> float:
    """Memory of a family now; what several map counts once (proportional set size)."""
    return sum(_pss_kb(pid) for pid in family(root)) / 1024


def resident_of(pid: int) -> float:
    """Resident memory of one process, in MB."""
    return _field_kb(pid, "status", "VmRSS:") / 1024


def anonymous_of(pid: int) -> float:
    """Resident memory of one process that no file is behind, in MB: what it allocated itself."""
    return _field_kb(pid, "status", "RssAnon:") / 1024


def handles_of(pid: int) -> int:
    """How many file handles a process has open; 0 if it has ended."""
    try:
        return len(os.listdir(f"/proc/{pid}/fd"))
    except OSError:
        return 0


def command_of(pid: int) -> str:
    """The program that a process runs, without its folder; of a script, the script."""
    try:
        words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    except OSError:
        return ""
    names = [Path(word.decode(errors="replace")).name for word in words[:2] if word]
    return names[-1] if names and names[0].startswith("python") else "".join(names[:1])


def state_of(pid: int) -> str:
    """One letter, as in /proc: `STOPPED` by a signal, and others; empty of an ended process."""
    return "".join(_stat(pid)[:1])


def peak_mb(root: int) -> float:
    """The peak of each member, added up: shared memory counts once for each who maps it."""
    return sum(_field_kb(pid, "status", "VmHWM:") for pid in family(root)) / 1024


def _stat(pid: int) -> list[str]:
    """Fields of /proc/PID/stat from the third on: state, parent, ...; none of an ended process."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return []


def _pss_kb(pid: int) -> int:
    return _field_kb(pid, "smaps_rollup", "Pss:")


def _field_kb(pid: int, file: str, name: str) -> int:
    try:
        lines = Path(f"/proc/{pid}/{file}").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith(name)), 0)

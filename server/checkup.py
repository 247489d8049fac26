"""`coterie doctor coordinator`: looks at all that `coterie submit` will need, with its settings."""

import ipaddress
import sys
from collections.abc import Iterator
from dataclasses import replace
from functools import cached_property
from pathlib import Path

from common.cli import Invocation
from common.composition import run_job
from common.config import Config, Resume
from common.doctor import Check, DoubtError, Visit, conclude, examine
from common.errors import ConfigError, FederationError
from common.keys import KEY_SUFFIX, read_private_key
from common.peer import Peer, check_authority
from common.premises import check_gpu, check_model, check_room, check_versions
from common.privacy.accounting import shown
from common.privacy.mechanism import is_private
from server.control import Address, Link
from server.occupation import is_occupied

ENGINE = "engine="
ONLINE = "online"


def checkup(invocation: Invocation, visit: Visit) -> None:
    """Looks at what a run is submitted with, and to."""
    if visit.head or visit.run is not None:
        raise ConfigError("--head, --: are of a node; settings of the run stand as for submit")

    def job(config: Config) -> None:
        findings = examine(Checkup(config, visit).checks(), offline=visit.offline)
        conclude("coordinator", findings, invocation, visit)

    named = any(each.startswith(ENGINE) for each in invocation.arguments)
    own = () if named else (f"{ENGINE}superlink",)
    run_job(job, replace(invocation, arguments=(*invocation.arguments, *own)))


class Checkup:
    """What there is to look at, of one coordinator."""

    def __init__(self, config: Config, visit: Visit) -> None:
        self.config, self.visit = config, visit
        self.authority = Path(config.superlink.ca).expanduser()
        self.peer = Peer("superlink.address", config.superlink.address, self.authority)

    def checks(self) -> Iterator[Check]:
        """In the order in which a run needs them."""
        yield Check("versions", self.versions, "install this program anew, with constraints.txt")
        yield Check("authority", self.authority_, "give superlink.ca=ca.crt")
        yield Check("door", self.door, "keep the control API on loopback")
        yield from self.peer.checks()
        yield Check("sites", self.sites, "have the sites start their nodes", calls=True)
        yield Check("disk", lambda: check_room(self._runs, "runs"), "make room")
        yield Check("run folder", self.run_folder, "choose another run_dir")
        if self.visit.gpu:
            yield Check("GPU", check_gpu, "install the driver, and a torch for CUDA")
        yield Check("model", lambda: check_model(self.config.model.name), "save it in a folder")
        yield Check("public records", self.records, "correct data.test_path")
        yield Check("heads", self.heads, "put the book of heads and its key back")
        yield Check("plan", self.plan, "change privacy.* or federation.*; see coterie plan")

    def versions(self) -> str:
        """Also whether Flower's own command is there, by which runs are submitted."""
        program = Path(sys.executable).with_name("flwr")
        if not program.is_file():
            raise ConfigError(
                f"{program}: Flower's command is not there; install flwr into the environment of "
                "this program"
            )
        return check_versions()

    def authority_(self) -> str:
        """Whether the file is the certificate of an authority."""
        if not self.config.superlink.ca:
            raise ConfigError("superlink.ca='': no file; give the authority's certificate, ca.crt")
        return check_authority(self.authority)

    def door(self) -> str:
        """Whether the control API is asked where nobody else should reach it."""
        host, _ = self.peer.host_and_port
        if host != "localhost" and not _is_loopback(host):
            raise DoubtError(
                f"superlink.address={self.config.superlink.address}: is not this machine; whoever "
                "reaches the control API runs code there: keep it on loopback behind a proxy "
                "(docs/coordinator.md)"
            )
        return "the control API is asked on loopback"

    def sites(self) -> str:
        """Whether as many nodes are registered, and there, as the run needs."""
        address = Address.checked(self.config.superlink.address, self.config.superlink.ca)
        self.peer.check_well()
        states = [*Link(address).nodes().values()]
        planned = self.config.federation.training_sites
        if len(states) < planned:
            raise FederationError(
                f"{len(states)} nodes are registered, and federation.sites={planned}; register "
                "the others: flwr supernode register KEY.pub --name SITE"
            )
        there = states.count(ONLINE)
        if there < planned:
            raise DoubtError(
                f"{there} of {planned} nodes are there; a run waits for the others up to "
                f"federation.round_timeout_s={self.config.federation.round_timeout_s:g}"
            )
        return f"{there} nodes are there, {planned} are planned"

    def run_folder(self) -> str:
        """Whether a run can begin, or go on, in it."""
        if not self.config.run_dir:
            return "a new one, runs/DATE/TIME"
        path = Path(self.config.run_dir).expanduser()
        if is_occupied(path):
            raise ConfigError(f"run_dir={path}: a run goes on in it; see coterie status {path}")
        if path.exists() and (not path.is_dir() or any(path.iterdir())):
            if self.config.resume is Resume.auto:
                return "holds a run, which would go on"
            raise ConfigError(
                f"run_dir={path}: is not an empty folder; choose another, or give resume=auto"
            )
        return f"{path}: is free"

    def records(self) -> str:
        """Whether the public records can be read, all of them."""
        from server.bundled import public_records  # noqa: PLC0415 - torch comes with it

        public_records(self.config)
        return "can be read, each with its text and label"

    def heads(self) -> str:
        """Whether the heads of earlier runs can be held against the sites' ledgers."""
        if not self.config.heads:
            raise DoubtError(
                "heads='': this run's own; a ledger that went back to before it is not found: give "
                "heads=FILE, the same for all runs"
            )
        path = Path(self.config.heads).expanduser()
        key = Path(f"{path}{KEY_SUFFIX}")
        if not path.exists() and not key.exists():
            return f"{path}: will be made"
        read_private_key(key)
        if not path.exists():
            raise ConfigError(f"heads={path}: no such file; put it back, its key is there")
        from server.heads import HeadBook  # noqa: PLC0415 - beside its only use

        return f"{path}: knows {len(HeadBook(path).receipts())} sites"

    def plan(self) -> str:
        """Whether it can be priced, and what it comes to."""
        from server.plan import make_plan  # noqa: PLC0415 - torch comes with it

        made = make_plan(self.config)
        if not is_private(made.config):
            raise DoubtError("NOT PRIVATE: sites refuse it, unless they say otherwise themselves")
        return f"epsilon {shown(made.epsilon)} at delta {self.config.privacy.delta:g}, at most"

    @cached_property
    def _runs(self) -> Path:
        return Path(self.config.run_dir or "runs").expanduser().resolve()


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False

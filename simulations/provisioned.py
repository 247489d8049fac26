"""A deployment from its kits alone: `federation.yaml`, `coterie provision`, and what the kits hold.

Everything runs by the command that stands in a kit's unit, on other paths; nodes reach the
SuperLink through the door alone. Needs nginx.
"""

import json
import os
import shlex
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

import yaml

from common.certificates import Authority
from server.control import Address, Link
from server.kits import PATHS
from simulations.deployment import (
    COTERIE,
    DELTA,
    HOST,
    READY_S,
    Deployment,
    Running,
    SiteFiles,
    free_port,
    until,
)

NGINX_PLACES = ("/usr/sbin", "/usr/local/sbin", "/sbin")


def find_nginx() -> str | None:
    """Where nginx is, if it is installed; it often is in no user's PATH."""
    path = os.pathsep.join((os.environ.get("PATH", ""), *NGINX_PLACES))
    return shutil.which("nginx", path=path)


class Provisioned(Deployment):
    """A coordinator with its door, and sites, each with nothing but its kit and its own settings.

    Guarantee: as `Deployment`'s.
    """

    def __init__(
        self,
        folder: Path,
        names: Sequence[str],
        *,
        cap: float = 8.0,
        delta: float = DELTA,
        stock: bool = False,
    ) -> None:
        """Provisions the federation in `folder`; starts nothing yet. Args: stock: whether stock
        SuperNodes may come.
        """
        self.cap, self.delta, self.stock, self.door_port = cap, delta, stock, free_port()
        self.door: Running | None = None
        super().__init__(folder, names)

    @property
    def office(self) -> Path:
        """The folder of whoever provisions: no other has it."""
        return self.folder / "federation"

    @property
    def coordinator_kit(self) -> Path:
        """Where the coordinator has its kit."""
        return self.folder / "coordinator" / "kit"

    @property
    def state(self) -> Path:
        """Where SuperLink and door keep what they write."""
        return self.folder / "coordinator" / "state"

    @property
    def link(self) -> Link:
        """What runs are submitted through: loopback, behind the door."""
        return Link(Address(self.address, self.coordinator_kit / "ca.crt"))

    @property
    def entrance(self) -> str:
        """Where nodes come in, in words."""
        return f"Its door, nginx at {self.door_address}: certificates only, fleet routes only."

    @property
    def door_address(self) -> str:
        """HOST:PORT that nodes call."""
        return f"{HOST}:{self.door_port}"

    def kit(self, name: str) -> Path:
        """Where a site has its kit."""
        return self.folder / name / "kit"

    def _provision(self) -> None:
        described = {
            "name": "trial",
            "coordinator": {
                "hosts": [HOST, "localhost"],
                "listen": HOST,
                "port": self.door_port,
                "control_port": self.port,
            },
            "ledger": {"dataset": "trial", "cap": self.cap, "delta": self.delta},
            "sites": [site.name for site in self.sites],
            "stock_supernodes": self.stock,
        }
        file = self.folder / "federation.yaml"
        file.write_text(yaml.safe_dump(described), encoding="utf-8")
        answer = self.coterie("provision", str(file), "--to", str(self.office))
        self.sealed_by = str(answer["sealed_by"])
        self.hand_out()
        self.authority = Authority(self.coordinator_kit / "ca.crt", Path())
        (self.state / "door").mkdir(parents=True, exist_ok=True)
        self._superlink_command = self.unit(
            self.coordinator_kit / "coterie-superlink.service", self.state
        )
        self.environment["FLWR_HOME"] = str(self.state / "flower")

    def hand_out(self) -> None:
        """Carries each kit to whoever it is for, over an earlier one."""
        for kit in sorted((self.office / "kits").iterdir()):
            place = self.folder / kit.name / "kit"
            place.mkdir(mode=0o700, parents=True, exist_ok=True)
            for file in kit.iterdir():
                shutil.copy(file, place)  # with its mode

    def unit(self, file: Path, state: Path) -> tuple[str, ...]:
        """The command of a kit's unit, where this deployment has what it names."""
        lines = file.read_text(encoding="utf-8").splitlines()
        (line,) = [each for each in lines if each.startswith("ExecStart=")]
        places = {
            f"{PATHS['bin']}/coterie": shlex.join(COTERIE),
            f"{PATHS['bin']}/": f"{self.bin}/",
            "/usr/sbin/nginx": str(find_nginx()),
            str(PATHS["kit"]): str(file.parent),
            str(PATHS["state"]): str(state),
            # The units are for ports that nobody else has.
            f":{PATHS['health_port']}": f":{free_port()}",
        }
        command = line.removeprefix("ExecStart=")
        for place, ours in places.items():
            command = command.replace(place, ours)
        return tuple(shlex.split(command))

    def start_superlink(self) -> None:
        """And its door; then lets the sites of the kit in."""
        super().start_superlink()
        if self.door is None:
            command = self.unit(self.coordinator_kit / "coterie-door.service", self.state)
            self.door = self.start_nginx(command, self.state / "door", self.folder / "door.log")
        self.admit()

    def start_nginx(self, command: Sequence[str], prefix: Path, log: Path) -> Running:
        """Returns once it listens. Args: command: without what concerns the user it runs as."""
        prefix.mkdir(parents=True, exist_ok=True)
        # Where this is root, as in a container, nginx would give its folders to another user.
        own = ("-g", "user root;") if os.geteuid() == 0 else ()
        started = Running((*command, *own), log, self.environment)
        for _ in until(READY_S, "nginx does not start"):
            started.check_alive()
            if (prefix / "nginx.pid").exists():
                break
        return started

    def admit(self) -> Mapping[str, object]:
        """Brings the lists of the coordinator's kit to the SuperLink and the door."""
        return self.coterie(
            *("provision", "admit", str(self.coordinator_kit)),
            *("--state", str(self.state), "--key", self.sealed_by),
        )

    def enrol(self, site: SiteFiles, *, cap: float, delta: float, dataset: str) -> str:
        """Books that begin with the kit's key; its public half."""
        key = self.kit(site.name) / "ledger.key"
        answer = self.coterie(
            *("ledger", "init", str(site.ledger), "--cap", str(cap), "--delta", str(delta)),
            *("--dataset", dataset, "--site", site.name, "--site-key", str(key)),
            *("--officer-key", self.officer),
        )
        return str(answer["site_key"])

    def ledger_keys(self) -> dict[str, str]:
        """Public keys of the sites' books, as the coordinator's kit has them."""
        nodes = json.loads((self.coordinator_kit / "nodes.json").read_text(encoding="utf-8"))
        return {name: str(each["ledger_key"]) for name, each in nodes.items()}

    def start_node(
        self, site: SiteFiles, *settings: str, command: Sequence[str] = (*COTERIE, "node")
    ) -> None:
        """By its kit, the settings of its own, and nothing else."""
        own = (
            *(f"kit={self.kit(site.name)}", f"sealed_by={self.sealed_by}"),
            *(f"ledger={site.ledger}", "data=csv", f"data.path={site.records}", "threads=1"),
        )
        site.log.unlink(missing_ok=True)
        whole = (*command, *own, *settings)
        self.nodes[site.name] = Running(whole, site.log, self.environment)

    def stop(self) -> None:
        """Ends everything, the door last."""
        super().stop()
        if self.door is not None:
            self.door.stop()

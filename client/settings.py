"""What a node is told by its own operator, and by nobody else.

A file of its own beside that of a run: nothing of what a coordinator sends is merged into it, and
nothing of it is sent.
"""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING, DictConfig

from common.composition import Schema
from common.config import (
    DEVICES,
    MAX_THREADS,
    Config,
    DataConfig,
    EngineConfig,
    EngineName,
    EvaluationConfig,
    FaultsConfig,
    FederationConfig,
    ModelConfig,
    NodeConfig,
    NoiseSource,
    Partition,
    PrivacyConfig,
    PrivacyMode,
    TaskConfig,
    TuningConfig,
    TuningMethod,
    check,
    field_names,
    frozen,
    is_device,
    opened,
)
from common.errors import ConfigError
from common.exposition import ADDRESS_RULE, is_listen_address
from common.log_lines import LogForm
from common.strategies import StrategyConfig

MIN_POLL_S, MAX_POLL_S = 0.01, 60.0
MAX_PORT = 65_535
_ADDRESS = re.compile(r"(?:\[[0-9a-fA-F:.]+\]|[^:/\s\[\]]+):([0-9]{1,5})")


@dataclass(frozen=True)
class NodeSettings:
    """One node. Hydra fills it from `conf/node.yaml`, the operator's own file and the command
    line.
    """

    name: str = MISSING
    """What the site is called in its ledger and log. The coordinator has its own name for it,
    under which it registered the node's key."""
    superlink: str = MISSING
    """HOST:PORT of the coordinator's SuperLink. Always over TLS."""
    authority: str = MISSING
    """Certificate of the authority, in PEM, that signed the coordinator's; no other is believed."""
    certificate: str = ""
    """The node's own certificate, in PEM, where a door stands before the SuperLink; with it goes
    `certificate_key`, the private key of it, which its owner alone may read."""
    certificate_key: str = ""
    kit: str = ""
    """Folder of the site's kit, as `coterie provision` made it: the settings in it come first, and
    nothing starts if anything in it was altered. Given on the command line."""
    sealed_by: str = ""
    """Public key of who provisioned the federation, if it is known by another way than the kit."""
    key: str = MISSING
    """The node's private key, which its owner alone may read; its public half is registered."""
    ledger: str = ""
    """The books of these records: a file that `coterie ledger init` made, or FILE#SITE where it
    holds others too; SITE is `name` if left out. May be empty with `allow_unprotected` only."""
    witness: str = ""
    """HOST:PORT of a privacy officer's witness, which is told after each round how far the ledger
    got; empty: none is. Without an answer the node goes on."""
    witness_pass: str = ""
    """Folder that `coterie witness admit` made for this node."""
    witness_id: str = ""
    """What the officer enrolled the ledger as. Empty: DATASET/SITE, by its first entry."""
    inbox: str = ""
    """Folder for the instruction that is being answered. Empty: beside the ledger."""
    task: TaskConfig = MISSING
    data: DataConfig = MISSING
    """All of its records are private, and trained on."""
    reader: str = ""
    """Model whose processor reads files, by its `model.name`: needed for sounds and images."""
    node: NodeConfig = MISSING
    """The site's policy."""
    threads: int = 0
    """Torch threads; 0: the cores that the process may use."""
    device: str = "auto"
    """Where its model is trained: `cpu`, `cuda` (the first GPU), `cuda:N`; `auto`: the first GPU if
    there is one. Which GPUs there are CUDA_VISIBLE_DEVICES may say, too."""
    poll_s: float = 0.2
    """Seconds between two questions for an instruction, at least; who waits long asks less often:
    see `client.looks`."""
    patience_s: float = 0.0
    """Seconds without an answer from the coordinator after which the node gives up; 0: never."""
    metrics: str = ""
    """Where Prometheus may read how this node does, under /metrics: PORT of loopback, or HOST:PORT.
    In the clear, to whoever reaches it. Empty: nowhere."""
    health: str = ""
    """Where probes may ask by `grpc.health.v1` whether it is well: as `metrics`. Service "" is the
    process, `node` whether the coordinator answers. Empty: nowhere."""
    log: LogForm = LogForm.text
    """A line of the log: `text`, or a `json` object."""
    allow_unprotected: bool = False
    """Answers instructions that protect nothing, with seeded noise or none: for demonstrations, on
    records that are not private."""

    @property
    def books(self) -> tuple[Path, str]:
        """The ledger's file, and the site in it."""
        path, _, site = self.ledger.partition("#")
        return Path(path).expanduser(), site or self.name

    @property
    def inbox_path(self) -> Path:
        """Where an instruction lies until it is answered."""
        beside = f"{self.books[0] if self.ledger else self.key}.{self.name}.inbox"
        return Path(self.inbox or beside).expanduser()


def _register() -> None:
    schema = opened(NodeSettings(task=TaskConfig(), data=DataConfig(), node=NodeConfig()))
    ConfigStore.instance().store(name="node_schema", node=schema)


def _names() -> Iterator[str]:
    return field_names(NodeSettings)


def read_settings(composed: DictConfig) -> NodeSettings:
    """The settings of a node. Raises: ConfigError naming every missing value or broken rule."""
    settings = frozen(composed, _names())
    assert isinstance(settings, NodeSettings)
    faults = [*_broken(settings)]
    try:
        check(_run_on(settings))
    except ConfigError as error:
        faults.append(str(error))
    if faults:
        raise ConfigError("; ".join(faults))
    return settings


NODE = Schema("node", _register, read_settings, _names)
"""Of `coterie node`."""


def _broken(settings: NodeSettings) -> Iterator[str]:
    for name, (rule, holds) in _RULES.items():
        value = getattr(settings, name)
        if not holds(value):
            yield f"{name}={value if value != '' else repr(value)}: must be {rule}"
    if bool(settings.certificate) != bool(settings.certificate_key):
        yield (
            f"certificate={settings.certificate!r}, certificate_key={settings.certificate_key!r}: "
            "must be given together, or both left out where no door asks for one"
        )
    if not settings.ledger and not settings.allow_unprotected:
        yield "ledger='': must name this site's books; make them with `coterie ledger init`"
    if settings.witness and not settings.ledger:
        yield f"witness={settings.witness}: needs a ledger, which it can be told of"
    if bool(settings.witness) != bool(settings.witness_pass):
        yield "witness, witness_pass: must be given both, or neither"
    data = settings.data
    if data.holdout_fraction or data.validation_fraction or data.test_path or data.test_split:
        yield (
            "data.holdout_fraction, data.validation_fraction, data.test_path, data.test_split: "
            "must be left out; a node has private records only"
        )


def _run_on(settings: NodeSettings) -> Config:
    """A run that has this node's part of a configuration, so that the same rules apply to it."""
    return Config(
        task=settings.task,
        model=ModelConfig(name=settings.reader or "any", feature_scale=1.0),
        data=settings.data,
        tuning=TuningConfig(
            method=TuningMethod.head, targets=[], head_learning_rate=1.0, adapter_learning_rate=1.0
        ),
        privacy=PrivacyConfig(
            mode=PrivacyMode.record,
            epsilon=1.0,
            delta=1e-5,
            clip_norm=1.0,
            sample_rate=0.5,
            noise=NoiseSource.entropy,
        ),
        federation=FederationConfig(sites=1, rounds=1, local_steps=1, partition=Partition.iid),
        strategy=StrategyConfig(),
        engine=EngineConfig(name=EngineName.local),
        evaluation=EvaluationConfig(),
        node=settings.node,
        faults=FaultsConfig(),
    )


def _is_address(value: str) -> bool:
    found = _ADDRESS.fullmatch(value)
    return found is not None and 1 <= int(found[1]) <= MAX_PORT


_RULES: dict[str, tuple[str, Callable[..., bool]]] = {
    "name": ("a name without # and /", lambda value: bool(re.fullmatch(r"[^#/\s]+", value))),
    "superlink": ("HOST:PORT, without http:// or https://; TLS is always used", _is_address),
    "witness": ("HOST:PORT", lambda value: not value or _is_address(value)),
    "authority": ("the path of a certificate", bool),
    "key": ("the path of a private key", bool),
    "sealed_by": (
        "64 hex digits, or empty",
        lambda value: bool(re.fullmatch("(?:[0-9a-f]{64})?", value)),
    ),
    "threads": ("between 0 and 1024", lambda value: 0 <= value <= MAX_THREADS),
    "device": (DEVICES, is_device),
    "poll_s": ("between 0.01 and 60", lambda value: MIN_POLL_S <= value <= MAX_POLL_S),
    "metrics": (ADDRESS_RULE, is_listen_address),
    "health": (ADDRESS_RULE, is_listen_address),
    "patience_s": ("0 or more", lambda value: value >= 0),
}

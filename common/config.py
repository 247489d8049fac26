"""The configuration: schemas, cross-field rules, and its one canonical text.

Hydra composes `conf/` once, at the entry point; below it everything is one of these frozen
dataclasses. Fields that change the guarantee stand in `PrivacyConfig` and `FederationConfig`;
fields that change only speed stand in `EngineConfig`.
"""

import json
import math
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field, fields, is_dataclass, replace
from enum import Enum
from functools import cache, cached_property, reduce
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from common.canonical import canonical_json, digest
from common.dialect import Dialect, Separator, is_encoding
from common.errors import ConfigError
from common.strategies import StrategyConfig, faults

ROUNDING = 1e-9
"""So that 0.28 of 25 sites is 7, and not a little more."""
MAX_SPARES = 1000
"""Rounds a run may keep in reserve."""
MAX_THREADS = 1024
DEVICES = "auto, cpu, cuda or cuda:N"
"""What a device may be called."""
"""Torch threads: of many more the process dies without a word."""
MAX_WORKERS = 256
"""Processes of a simulation."""
MAX_SECONDS = 3600
"""Longest sound a task may keep."""
MAX_TOKENS, MAX_BATCH, MAX_RANK, MAX_ALPHA = 32_768, 65_536, 4096, 10**6
"""What a model is built and rehearsed with: above any use, and no memory is asked for in vain."""
MAX_SITES, MAX_ROUNDS, MAX_STEPS = 100_000, 10_000, 10**6
"""Sites; rounds, and steps in one; steps of a run: what a plan prices in seconds."""
MIN_SAMPLE_RATE = 1e-6
"""Smallest Poisson rate that a ledger takes."""
MAX_STEP_SIZE = 1e6
"""Of step sizes and clip bounds: beyond, the first step is no finite number."""

# Enums are read by member *name* (OmegaConf), so members are spelled as people type them.


CLASSES, NO_CLASSES = True, False


class TaskName(Enum):
    """What the model learns to do: a line makes `common/tasks/NAME.py` a task.

    It names the class in that file, and says whether its records carry one of `data.labels`, which
    must then be given.
    """

    text_classification = "TextClassification", CLASSES
    image_classification = "ImageClassification", CLASSES
    audio_classification = "AudioClassification", CLASSES
    causal_lm = "CausalLM", NO_CLASSES
    question_answering = "QuestionAnswering", NO_CLASSES
    seq2seq = "Seq2Seq", NO_CLASSES

    def __init__(self, class_name: str, has_classes: bool) -> None:
        self.class_name, self.has_classes = class_name, has_classes


class TuningMethod(Enum):
    """Which parameters are trained, and so released."""

    lora = "lora"
    head = "head"
    full = "full"
    bitfit = "bitfit"
    last_layers = "last_layers"


class HeadName(Enum):
    """What a task with classes puts on its encoder."""

    mean = "mean"
    native = "native"


class PrivacyMode(Enum):
    """The unit the guarantee protects: one record, one person with all records, or nothing."""

    record = "record"
    person = "person"
    none = "none"


class NoiseSource(Enum):
    """Where noise and Poisson coins come from; `seeded` is for tests and is never private."""

    entropy = "entropy"
    seeded = "seeded"


class DataSource(Enum):
    """Where records are read from."""

    bbc_news = "bbc_news"
    digits = "digits"
    csv = "csv"
    jsonl = "jsonl"
    parquet = "parquet"
    image_folder = "image_folder"
    audio_folder = "audio_folder"
    hub = "hub"
    toy = "toy"


FILES = frozenset({DataSource.csv, DataSource.jsonl, DataSource.parquet})
"""Sources that are a file of the user's own, at `data.path`."""
FOLDERS = frozenset({DataSource.image_folder, DataSource.audio_folder})
"""Sources that are a folder of the user's own, at `data.path`, with one for each label in it."""


class EmptyTexts(Enum):
    """What becomes of a row without a text."""

    skip = "skip"
    refuse = "refuse"


class Partition(Enum):
    """How a simulation deals records to sites."""

    iid = "iid"
    dirichlet = "dirichlet"
    pathological = "pathological"
    quantity = "quantity"
    natural = "natural"


class Weighting(Enum):
    """What an accepted update counts in the mean of a round."""

    equal = "equal"
    inverse_variance = "inverse_variance"


class Coding(Enum):
    """How an update travels; see `common.coding`."""

    float32 = "float32"
    float16 = "float16"
    int8 = "int8"


class EngineName(Enum):
    """What carries messages between the coordinator and the sites."""

    local = "local"
    ray = "ray"
    superlink = "superlink"


class TrackerName(Enum):
    """Where a run is followed beside its folder."""

    none = "none"
    tensorboard = "tensorboard"
    mlflow = "mlflow"


class Resume(Enum):
    """What becomes of a run that was interrupted."""

    off = "off"
    auto = "auto"


class Split(Enum):
    """Which public split the coordinator evaluates on."""

    holdout = "holdout"
    validation = "validation"


@dataclass(frozen=True)
class TaskConfig:
    """The task and how its input is cut."""

    name: TaskName = MISSING
    """One of the tasks in `common/tasks`."""
    max_tokens: int = 128
    """Tokens kept of a text; longer texts are truncated, shorter ones padded."""
    max_target_tokens: int = 64
    """Tokens kept of a record's target, and written at most, where the task has one (seq2seq)."""
    max_seconds: float = 1.0
    """Seconds kept of a sound; longer sounds are cut, shorter ones padded with zeros."""


@dataclass(frozen=True)
class ModelConfig:
    """The pretrained encoder."""

    name: str = MISSING
    """Hub name, local folder, an embedded model of the `demo` extra, or one of `made_models`."""
    feature_scale: float = MISSING
    """Length to which pooled features are normalised before the `mean` head."""
    head: HeadName = HeadName.mean
    """Of tasks with classes: `mean`, a linear layer on the normalised mean of the states; or
    `native`, what transformers itself puts on this encoder, which `pipeline(...)` opens."""


@dataclass(frozen=True)
class DataConfig:
    """Records, and which of them are public."""

    source: DataSource = MISSING
    """Reader to use."""
    path: str = MISSING
    """File of private records (csv, jsonl, parquet; the first two may be packed), a folder with
    one for each label in it (image_folder, audio_folder), or a data set by its name on the hub, its
    folder saved by `datasets`, or a folder of its parquet files (hub).
    """
    test_path: str = ""
    """Public hold-out records, as `path`; empty: a share of `path` is declared public."""
    subset: str = ""
    """Which configuration of a data set of the hub. Empty: its only one, or its default."""
    split: str = "train"
    """Which split of a data set (hub) holds the private records, and those of `test_path`."""
    test_split: str = ""
    """Which split of a data set (hub) is the public hold-out. Empty: none is."""
    revision: str = ""
    """Commit or tag of a data set of the hub, whose records then stay what they were. Empty: the
    newest.
    """
    text_column: str = "text"
    """Column that holds the text."""
    columns: list[str] = field(default_factory=list)
    """Columns of a task with several texts, in its order: question, context, answers, see
    `common.answers`; or source, target. Empty: `text_column` alone."""
    media_column: str = ""
    """Column of a data set (hub) that holds an image or a sound. Empty: the only such one."""
    label_column: str = "label"
    """Column that holds the class name."""
    person_column: str = ""
    """Column that names the person a record is of (csv), by an id that is compared as it stands,
    surrounding blanks apart. Empty: no persons are known.
    """
    labels: list[str] = MISSING
    """Class names, in order. From the config and never from private data. May be left out where
    the task knows no classes.
    """
    empty: EmptyTexts = EmptyTexts.skip
    """What becomes of a row that has nothing, or only blanks, in a column of texts, or answers that
    do not stand in their context: `skip` leaves it out whatever else stands in it, and a
    simulation, or a node's own log, says how many there were; `refuse` stops there and names the
    row. No answer at all says that there is none: such a row is kept."""
    encoding: str = ""
    """How a csv file spells its characters, by Python's name: latin-2, cp1251. Empty: UTF-16 where
    its first bytes say so, else UTF-8, where each byte that is not is read as Windows-1252."""
    separator: Separator = Separator.comma
    """What stands between two columns of a csv file: `comma`, `semicolon`, `tab` or `pipe`."""
    site_column: str = ""
    """Column that says whose a record is, for `federation.partition=natural`. Empty: none does."""
    group_column: str = ""
    """Column that names a group of each public record: a report gives the metrics of each group.
    What stands there in private rows is dropped unseen; of `data.test_path`'s file alone it is
    read, where there is one. Empty: no groups."""
    holdout_fraction: float = 0.2
    """Share of the records set aside as public hold-out, in [0, 1)."""
    validation_fraction: float = 0.1
    """Share of the records set aside as public validation split, in [0, 1)."""
    toy_records: int = 200
    """How many of the task's own made examples `data=toy` deals."""
    split_seed: int = 0
    """Which split; fixed apart from `seed`, so that no run trains on another run's hold-out."""
    declared_records: int | None = None
    """Training records of all sites together, public by declaration. None: a simulation counts."""
    records_counted: bool = False
    """Set by a simulation that counted: then the number is not one by declaration."""

    @property
    def dialect(self) -> Dialect:
        """How a csv file is spelled."""
        return Dialect(self.encoding, self.separator)


@dataclass(frozen=True)
class TuningConfig:
    """What is trained, and how fast."""

    method: TuningMethod = MISSING
    """`lora` (adapters), `head` (alone, on frozen features), `full` (all), `bitfit` (biases) or
    `last_layers` (the top `k` blocks); the head is trained in each."""
    k: int = 1
    """How many of the top blocks `last_layers` trains."""
    rank: int = 8
    """Rank r of the LoRA matrices."""
    alpha: int = 16
    """LoRA scaling: the adapter's output is multiplied by alpha / rank."""
    freeze_a: bool = False
    """FFA-LoRA: of each pair of LoRA matrices, A stays as `seed` drew it, the same at every site
    and public, and B alone is trained and travels. Source: Sun et al. (2024), arXiv:2403.12313."""
    last_layers: int = 1
    """How many of the top blocks get adapters; 0: all, and of an encoder-decoder both sides'."""
    targets: list[str] = MISSING
    """Names of the linear modules, inside a block, that get adapters. Empty: those that are
    usual for this type of model, as peft names them, else its query and value projections.
    """
    head_learning_rate: float = MISSING
    """Step size of the classification head, in units of parameter per clipped gradient."""
    head_noise: float = 0.0
    """Standard deviation of the noise that a weight of a `mean` head should gather over the run, in
    units of parameter: where many records leave less, its step size is raised, at most fourfold.
    0: never."""
    raised: bool = False
    """Set by the plan that has raised it, from declared constants alone."""
    adapter_learning_rate: float = 0.0
    """Step size of what is trained below the head: adapters, biases or blocks."""


@dataclass(frozen=True)
class PrivacyConfig:
    """The guarantee. Every field here changes it."""

    mode: PrivacyMode = MISSING
    """What is added or removed: one `record`, or one `person` with all of their records; `none`:
    no guarantee.
    """
    epsilon: float = MISSING
    """Bound of the whole run, over all rounds, per site. Dimensionless."""
    site_epsilons: list[float] = field(default_factory=list)
    """Bounds of the first, second, ... site, where they differ, and from the start again where
    there are more sites; `epsilon` is then their largest. Empty: `epsilon` is every site's."""
    delta: float = MISSING
    """Probability the bound may fail; below one over the records of a site."""
    clip_norm: float = MISSING
    """L2 bound C of one record's gradient, over all trainable parameters."""
    sample_rate: float = MISSING
    """Poisson rate q: each record, or each person with all their records, enters each step with
    this probability, independently.
    """
    noise: NoiseSource = MISSING
    """`entropy` (private) or `seeded` (reproducible, NOT PRIVATE)."""
    noise_multiplier: float | None = None
    """Sigma, in units of what one record (C) or one person (k C) can do to a sum. None: solved
    from epsilon, delta, q and the number of steps, for each site from its own.
    """
    max_records_per_person: int | None = None
    """k: a site uses at most so many records of a person, in `person` mode only."""
    spare_rounds: int = 0
    """Rounds a site may be charged beyond the run's, to repeat those that were lost to a crash.
    Epsilon covers them, used or not."""
    count_noise: float | None = None
    """Sigma of the noise on the number of training records that the final model classifies
    correctly, released once by each site, in units of what one record (1) or person (k) can do to
    it. Epsilon covers it. None: nothing is counted."""

    @property
    def unit(self) -> str:
        """What neighbours differ in, as reports and ledgers call it: `person`, else `record`."""
        return PrivacyMode.person.name if self.mode is PrivacyMode.person else "record"


@dataclass(frozen=True)
class FederationConfig:
    """Who takes part and for how long."""

    sites: int = MISSING
    """Number of sites."""
    rounds: int = MISSING
    """Rounds of the run."""
    local_steps: int = MISSING
    """Private steps a site takes per round, whatever its number of records."""
    partition: Partition = MISSING
    """How a simulation deals records to sites: `iid`; `dirichlet` and `pathological`, skewed by
    label; `quantity`, the n-th site n times as many as the first; `natural`, by
    `data.site_column`."""
    dirichlet_alpha: float = 0.5
    """Concentration of the Dirichlet label skew; smaller is more skewed."""
    classes_per_site: int = 2
    """Classes a site has records of, under `partition=pathological`."""
    leave_out: str = ""
    """A site, as `site-3`, that does not train: the report measures the final model on its records,
    WITHOUT any protection of these, which a simulation alone can do. Empty: all sites train."""
    participation: float = 1.0
    """Share of the sites that a round asks, in (0, 1], rounded up: a public schedule, drawn from
    `seed`, in which all sites take turns. A site is charged for its own rounds only."""
    availability: str = ""
    """CSV file, public, of when sites are there: columns site and round, or site, from and to
    (rounds, both included). A round asks nobody else of the sites that it names; a site that it
    does not name is always there. Empty: all are."""
    availability_digest: str = ""
    """Set by the plan: SHA-256 of that file, so that the schedule stays that of the run."""
    asked_rounds: int | None = None
    """Set by the plan in what it tells a site: in how many of the rounds that site is asked. None:
    in all of them."""
    weighting: Weighting = Weighting.equal
    """What an update counts in the mean: `equal`; or `inverse_variance`, in proportion to one over
    the variance of the noise that its site adds, which is public, unlike a number of records. Then
    the mean has the least noise, and sites of small epsilon have little say."""
    coding: Coding = Coding.float32
    """How updates travel: `float32`, as they are; `float16` or `int8`, half and a quarter of the
    bytes, the way from the global parameters rounded at random, after the noise."""
    quorum: float = 1.0
    """Share of the sites asked whose valid update a round needs, in (0, 1]."""
    enough: float = 1.0
    """Share of the sites asked whose valid updates close a round, in (0, 1], `quorum` at least:
    below 1 a round asks more sites than it waits for. Those that are later are charged all the
    same, and their updates are not used. 1: a round waits for all, up to its deadline."""
    round_timeout_s: float = 3600.0
    """Seconds after which a round closes with the replies it has."""

    @property
    def site_names(self) -> tuple[str, ...]:
        """What a simulation calls the sites that it deals records to."""
        return tuple(f"site-{number}" for number in range(1, self.sites + 1))

    @property
    def training_sites(self) -> int:
        """Sites that train: all but the one that is left out."""
        return self.sites - bool(self.leave_out)

    @property
    def quorum_sites(self) -> int:
        """Valid updates that a round needs, where all sites are there."""
        return share_of(self._asked_sites, self.quorum)

    @property
    def enough_sites(self) -> int:
        """Valid updates that close a round, where all sites are there."""
        return share_of(self._asked_sites, self.enough)

    @property
    def _asked_sites(self) -> int:
        return share_of(self.training_sites, self.participation)


@dataclass(frozen=True)
class EngineConfig:
    """Speed only: nothing here changes what is computed beyond rounding."""

    name: EngineName = MISSING
    """`local`: all sites on this machine. `ray`: through Flower's own simulation, here or, where
    the environment variable RAY_ADDRESS names one, on a cluster; needs the extra `ray`.
    `superlink`: sites on machines of their own, by `coterie submit`; their records, and their
    policy, are in their own configuration."""
    workers: int = 0
    """Processes that take turns with the sites of a simulation, each with a model of its own; never
    more than sites train. 1: this process alone, and no other is started. 0: one for each GPU, or,
    without any, the cores that it may use, divided by `threads`; as those are by default all of
    them, so too this process alone."""
    threads: int = 0
    """Torch threads of each process; 0: the cores that it may use, divided among the workers."""
    device: str = "auto"
    """Where models are trained: `cpu`, `cuda`, `cuda:N`; `auto`: a GPU if there is one. Of several
    GPUs each worker takes another. A node has its own setting, and the coordinator evaluates on its
    processor. Seeded runs are the same to the bit on processors only."""
    physical_batch: int = 16
    """Records per forward pass; a drawn batch is cut into pieces of this size."""
    cache_mb: int = 2048
    """Memory, in MiB, that a process may use for training records prepared once, and as much again
    for public ones. More than fit, by their declared number, are prepared anew at each use."""
    together: int = 0
    """Sites of one process that train in one computation, at most, where what is trained is small;
    0: as many as are quicker so; 1: each by itself."""


@dataclass(frozen=True)
class FaultsConfig:
    """What goes wrong on purpose, in simulations only.

    A rate is the share of pairs of a round and a site that the fault hits. Whether it hits follows
    from `seed`, the fault, the round and the site's name and from nothing else; where several hit,
    the first in this order happens.
    """

    seed: int = 0
    """Of the faults, apart from the run's own."""
    sites: list[str] = field(default_factory=list)
    """Sites that faults may befall, as `[site-2]`. Empty: all."""
    crash: float = 0.0
    """The site dies after it charged the round and before its update is prepared: the round is
    lost, and stays charged."""
    crash_prepared: float = 0.0
    """The site dies after its update is prepared: asked again, it sends the same bytes."""
    dropout: float = 0.0
    """The site is gone for the round: the instruction never reaches it."""
    straggler: float = 0.0
    """The site takes `slowdown` times as long."""
    not_finite: float = 0.0
    """A value of the update is no number."""
    wrong_length: float = 0.0
    """The update lacks its last value."""
    wrong_layout: float = 0.0
    """The update is of other parameters, by its own word."""
    oversized: float = 0.0
    """The update is larger than a parameter may be."""
    other_round: float = 0.0
    """The update is that of the round before, by its own word."""
    other_site: float = 0.0
    """The reply is that of the next site asked in the round."""
    extreme: float = 0.0
    """Each value of the update is as large as is accepted, its sign reversed."""
    flipped: float = 0.0
    """The update goes as far, the other way: a Byzantine site, which nothing tells from others."""
    scaled: float = 0.0
    """The update goes `scale` times as far."""
    scale: float = 10.0
    """Factor of `scaled`; below zero also the other way."""
    slowdown: float = 10.0
    """Factor of `straggler`, at least 1."""
    speeds: list[float] = field(default_factory=list)
    """How fast the first, second, ... site is, 1 being usual, and from the start again where there
    are more sites. Empty: all are usual."""
    round_s: float = 60.0
    """Seconds of the simulated clock that a site of usual speed takes for a round."""
    deadline_s: float | None = None
    """Seconds of the simulated clock after which a round is closed: who is later was charged, and
    is not heard. Nobody waits for them in fact. None: `federation.round_timeout_s`."""

    @property
    def rates(self) -> dict[str, float]:
        """The rate of each fault, in the order in which they go first."""
        return {name: getattr(self, name) for name in FAULTS}

    @property
    def active(self) -> bool:
        """Whether anything differs from a run in which nothing goes wrong."""
        return any(self.rates.values()) or bool(self.speeds)

    @property
    def altering(self) -> list[str]:
        """Those at work that write an update anew."""
        return [name for name in ALTERING if getattr(self, name)]


FAULTS = (
    *("crash", "crash_prepared", "dropout", "straggler"),
    *("not_finite", "wrong_length", "wrong_layout", "oversized", "other_round", "other_site"),
    *("extreme", "flipped", "scaled"),
)
"""Names of the rates, in the order in which faults go first."""
ALTERING = tuple(name for name in FAULTS[4:] if name != "other_site")
"""Of these, the ones that change what an update says."""


@dataclass(frozen=True)
class EvaluationConfig:
    """What the coordinator measures, on public data."""

    split: Split = Split.holdout
    """`validation` for choosing hyperparameters, `holdout` for reporting."""
    every: int = 1
    """Rounds from one measurement to the next; 0: after the last round only, which is always
    measured. The final model is the last round's, whatever was measured before."""


@dataclass(frozen=True)
class NodeConfig:
    """A site's policy: it holds instructions against its own; a coordinator's is not read."""

    min_noise_multiplier: float = 0.0
    """Floor of sigma, of a count's too."""
    max_epsilon: float | None = None
    """Cap of one run, at the run's delta; the ledger's cap is of all runs. None: no limit."""
    max_clip_norm: float | None = None
    """Cap of the clip bound. None: no limit."""
    max_rounds: int | None = None
    """Rounds of one run. None: no limit."""
    max_steps: int | None = None
    """Private steps of one run. None: no limit."""
    models: list[str] = field(default_factory=list)
    """Models that may be trained, by `model.name`. Empty: any."""
    tasks: list[TaskName] = field(default_factory=list)
    """Tasks that may be trained. Empty: any."""
    tunings: list[TuningMethod] = field(default_factory=list)
    """Ways of tuning that may be used. Empty: any."""
    code: list[str] = field(default_factory=list)
    """Digests of this site's own program, as `coterie preflight` prints, that may train here: an
    update of the program then waits for a review. Empty: any."""
    units: list[PrivacyMode] = field(default_factory=list)
    """Units a run may protect. Empty: any."""


@dataclass(frozen=True)
class SuperlinkConfig:
    """Where a run is submitted to: for `coterie submit` alone, and told to nobody."""

    address: str = "127.0.0.1:8000"
    """HOST:PORT of the SuperLink, as it is reached from here; its control API should be reachable
    from this machine only."""
    ca: str = ""
    """File with the certificate of the authority that signed the SuperLink's, in PEM."""
    detach: bool = False
    """True: return once the run is started, and leave `coterie status` to follow it."""


@dataclass(frozen=True)
class TrackingConfig:
    """A tracker that is told, by the coordinator, what stands in a run's own files: told to no
    site, and nothing that a run computes.
    """

    name: TrackerName = TrackerName.none
    """`tensorboard`, `mlflow`, or `none`. The first two need the extra `tracking`."""
    uri: str = ""
    """Of mlflow: its server, or a folder; of tensorboard: a folder. Empty: in the run's folder. A
    password goes into the environment (MLFLOW_TRACKING_USERNAME, MLFLOW_TRACKING_PASSWORD)."""
    experiment: str = "coterie"
    """Name of the experiment that runs stand under (mlflow)."""


@dataclass(frozen=True)
class Config:
    """One run. Hydra groups fill it; see `conf/`."""

    task: TaskConfig = MISSING
    model: ModelConfig = MISSING
    data: DataConfig = MISSING
    tuning: TuningConfig = MISSING
    privacy: PrivacyConfig = MISSING
    federation: FederationConfig = MISSING
    strategy: StrategyConfig = MISSING
    engine: EngineConfig = MISSING
    evaluation: EvaluationConfig = MISSING
    node: NodeConfig = MISSING
    faults: FaultsConfig = MISSING
    superlink: SuperlinkConfig = field(default_factory=SuperlinkConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    seed: int = 0
    """Seed of public things only: partition, initialisation, cohort. Never of noise or coins."""
    run_dir: str = ""
    """Folder the run writes; empty: `runs/DATE/TIME`."""
    resume: Resume = Resume.off
    """`auto`: a run that was interrupted in `run_dir` goes on after its last whole round, and one
    that never began begins; `off`: a folder that holds anything is refused."""
    ledger: str = ""
    """Persistent books, a file made by `coterie ledger init`; empty: new ones in the run folder."""
    heads: str = ""
    """The coordinator's book of its sites' ledger heads, kept from run to run; empty: beside
    `ledger`, or in the run folder."""

    @cached_property
    def digest(self) -> str:
        """See `config_hash`."""
        values = _plain(asdict(self))
        for name in FREE:
            group, _, last = name.rpartition(".")
            (_at(values, group) if group else values).pop(last)
        return digest(values)

    @property
    def is_deployed(self) -> bool:
        """Whether sites are on machines of their own."""
        return self.engine.name is EngineName.superlink

    @property
    def books_last(self) -> bool:
        """Whether the sites' ledgers may hold other runs as well."""
        return bool(self.ledger) or self.is_deployed

    @property
    def asked_rounds(self) -> int:
        """Rounds in which a site is asked: all, where the config is not one site's own."""
        asked = self.federation.asked_rounds
        return self.federation.rounds if asked is None else asked

    @property
    def total_steps(self) -> int:
        """Private steps of the whole run at one site."""
        return self.asked_rounds * self.federation.local_steps

    @property
    def charged_rounds(self) -> int:
        """Rounds that a site may be charged: those in which it is asked, and its spares."""
        return self.asked_rounds + self.privacy.spare_rounds

    @property
    def charged_steps(self) -> int:
        """Private steps the guarantee is solved for."""
        return self.charged_rounds * self.federation.local_steps


def share_of(sites: int, share: float) -> int:
    """So many of these sites, rounded up; at least one.

    >>> share_of(25, 0.28), share_of(5, 0.5), share_of(5, 0.01)
    (7, 3, 1)
    """
    return max(1, math.ceil(share * sites - ROUNDING))


def register_schemas() -> None:
    """Makes the schema known to Hydra as `config_schema`, the first default of every job."""
    ConfigStore.instance().store(name="config_schema", node=_open_schema())


@cache
def _open_schema() -> DictConfig:
    """The schema of a run, as `opened` gives it; whoever merges into it merges into a copy."""
    return opened(
        Config(
            TaskConfig(),
            ModelConfig(),
            DataConfig(),
            TuningConfig(),
            PrivacyConfig(),
            FederationConfig(),
            StrategyConfig(),
            EngineConfig(),
            EvaluationConfig(),
            NodeConfig(),
            FaultsConfig(),
            SuperlinkConfig(),
            TrackingConfig(),
        )
    )


def opened(settings: object) -> DictConfig:
    """A schema as a node YAML can be merged into: a frozen dataclass gives a read-only one."""
    schema: DictConfig = OmegaConf.structured(settings)
    nodes = [schema]
    while nodes:
        node = nodes.pop()
        OmegaConf.set_readonly(node, None)
        nodes += [
            child
            for key in node
            if not OmegaConf.is_missing(node, key) and isinstance(child := node[key], DictConfig)
        ]
    return schema


def from_composed(composed: DictConfig) -> Config:
    """Turns what Hydra composed into the frozen `Config`, or says all that is wrong with it.

    Raises: ConfigError naming every missing value or broken rule.
    """
    _leave_out_path(composed)
    config = frozen(composed, field_names())
    assert isinstance(config, Config)
    check(config)
    return config


def frozen(composed: DictConfig, names: Iterable[str]) -> object:
    """The dataclasses of what was composed. Args: names: of the settings that its schema knows.

    Raises: ConfigError naming every other setting, or every missing value.
    """
    unknown = sorted(set(_leaf_names(composed)) - set(names))
    if unknown:  # Hydra's +NAME=VALUE forces keys in that no schema knows
        raise ConfigError(f"{', '.join(unknown)}: no such setting")
    _leave_out_labels(composed)
    missing = sorted(OmegaConf.missing_keys(composed))
    if missing:
        raise ConfigError(f"no value for {', '.join(missing)}: give each as NAME=VALUE")
    try:
        return OmegaConf.to_object(composed)
    except OmegaConfBaseException as error:
        raise ConfigError(_one_line(error)) from error


def _leave_out_labels(composed: DictConfig) -> None:
    """No labels are an empty list, where the task knows no classes."""
    task, data = composed.task, composed.data
    if OmegaConf.is_missing(task, "name") or task.name.has_classes:
        return
    if OmegaConf.is_missing(data, "labels"):
        data.labels = []


def _leave_out_path(composed: DictConfig) -> None:
    """Private records have no path here, where they are at sites of their own."""
    engine, data = composed.engine, composed.data
    deployed = not OmegaConf.is_missing(engine, "name") and engine.name is EngineName.superlink
    if deployed and OmegaConf.is_missing(data, "path"):
        data.path = ""


def to_canonical(config: Config) -> str:
    """The canonical JSON of a config: what is hashed and what travels to the sites."""
    return canonical_json(_plain(asdict(config)))


def to_yaml(config: Config) -> str:
    """The config as people read it: what a run folder keeps as `config.yaml`."""
    return OmegaConf.to_yaml(OmegaConf.create(_plain(asdict(config))))


def from_yaml(text: str) -> Config:
    """Parses what `to_yaml` wrote. Raises: ConfigError, as `from_canonical`."""
    try:
        values = OmegaConf.to_container(OmegaConf.create(text), resolve=False)
    except (ValueError, YAMLError, OmegaConfBaseException) as error:
        raise ConfigError(f"malformed configuration: {_one_line(error)}") from error
    return from_canonical(json.dumps(values))


def from_canonical(text: str) -> Config:
    """Parses a config that came over the network.

    Guarantee: unknown keys, wrong types and broken rules are refused. Raises: ConfigError.
    """
    try:
        values = json.loads(text)
        if not isinstance(values, dict):
            raise ConfigError("malformed configuration: must be a JSON object")
        _refuse_interpolation(values)
        config = from_composed(OmegaConf.merge(_open_schema(), values))  # type: ignore[arg-type]
        to_canonical(config).encode()  # text that has no bytes, as a lone surrogate, fails here
    except (ValueError, RecursionError, OmegaConfBaseException) as error:
        raise ConfigError(f"malformed configuration: {_one_line(error)}") from error
    return config


def _refuse_interpolation(value: Any) -> None:
    """OmegaConf would resolve `${oc.env:NAME}`, and so read the receiver's environment."""
    if isinstance(value, dict):
        for key, item in value.items():
            _refuse_interpolation(key)
            _refuse_interpolation(item)
    elif isinstance(value, list):
        for item in value:
            _refuse_interpolation(item)
    elif isinstance(value, str) and "${" in value:
        raise ConfigError("malformed configuration: holds an interpolation")


def config_hash(config: Config) -> str:
    """SHA-256 that two runs share if they were asked for the same thing, wherever they write."""
    return config.digest


def without_terms(config: Config) -> Config:
    """The same for all sites of a run, whatever each of them may cost: what a model is built by."""
    privacy = replace(config.privacy, epsilon=1.0, noise_multiplier=None, site_epsilons=[])
    return replace(
        config, privacy=privacy, federation=replace(config.federation, asked_rounds=None)
    )


def as_told(config: Config) -> Config:
    """What a site of its own machine is told: of where the coordinator keeps its files nothing but
    `data.test_path`, which the rules for data ask for.
    """
    if not config.is_deployed:
        return config
    return replace(
        config,
        run_dir="",
        ledger="",
        heads="",
        resume=Resume.off,
        superlink=SuperlinkConfig(),
        tracking=TrackingConfig(),
    )


def differences(config: Config, other: Config) -> list[str]:
    """Names of the settings in which what two runs compute differs."""
    ours, theirs = _plain(asdict(config)), _plain(asdict(other))
    differ = [name for name in field_names() if _at(ours, name) != _at(theirs, name)]
    return [
        name
        for name in differ
        if not {name, name.split(".")[0]} & {*FREE} and not isinstance(_at(ours, name), dict)
    ]


def is_device(name: str) -> bool:
    """Whether a device may be called so; not whether it is there: see `common.device`."""
    return re.fullmatch(r"auto|cpu|cuda(:[0-9]{1,3})?", name) is not None


def setting(config: Config, name: str) -> Any:
    """The value of a setting by its dotted name, as people write it."""
    return _at(_plain(asdict(config)), name)


FREE = ("run_dir", "ledger", "heads", "resume", "superlink", "tracking", "engine.workers")
"""Settings that do not change what a run computes."""


def field_names(schema: type = Config, prefix: str = "") -> Iterator[str]:
    """Every dotted name that may stand left of `=` on a command line."""
    for each in fields(schema):
        name = f"{prefix}{each.name}"
        yield name
        if isinstance(each.type, type) and is_dataclass(each.type):
            yield from field_names(each.type, f"{name}.")


def _leaf_names(node: DictConfig, prefix: str = "") -> Iterator[str]:
    for key in node:
        name = f"{prefix}{key!s}"
        child = None if OmegaConf.is_missing(node, key) else node[key]
        if isinstance(child, DictConfig):
            yield from _leaf_names(child, f"{name}.")
        else:
            yield name


def check(config: Config) -> None:
    """Applies every rule a type cannot express, and reports all faults together.

    Raises: ConfigError with one clause per fault: name, value, rule.
    """
    faults = list(_broken(config))
    if faults:
        raise ConfigError("; ".join(faults))


def check_delta(delta: float, records: int, owner: str) -> None:
    """Refuses a delta at which publishing one whole record would still be called private.

    Args: records: N, the number of records the guarantee speaks about; owner: whose they are.
    Of persons there are no more than records: below 1/N delta is below one over either number.
    Raises: ConfigError if delta >= 1/N.
    """
    if records > 0 and delta * records >= 1:
        raise ConfigError(
            f"privacy.delta={delta:g}: must be below 1/N = {1 / records:.2g} "
            f"for the {records} records of {owner}; choose a smaller delta"
        )


def _broken(config: Config) -> Iterator[str]:
    """One clause per broken rule."""
    rules = dict(_RULES)
    if config.tuning.method is not TuningMethod.head:
        rules["tuning.adapter_learning_rate"] = _STEP_SIZE
    if config.tuning.method is TuningMethod.lora:
        rules |= _LORA_RULES
    if config.tuning.method is TuningMethod.last_layers:
        rules["tuning.k"] = _COUNT
    if not config.task.name.has_classes:
        rules["data.labels"] = ("different class names, in order, or none", _distinct_or_none)
    if config.data.source in _PATHS and not config.is_deployed:
        rules["data.path"] = (_PATHS[config.data.source], bool)
    for name, (rule, holds) in rules.items():
        value: Any = reduce(getattr, name.split("."), config)
        if not holds(value):
            yield f"{name}={value if value != '' else repr(value)}: must be {rule}"
    public = round(config.data.holdout_fraction + config.data.validation_fraction, 12)
    if public >= 1:
        yield f"data.holdout_fraction + data.validation_fraction={public}: must be below 1"
    if config.tuning.freeze_a and config.tuning.method is not TuningMethod.lora:
        yield (
            f"tuning.freeze_a=True: must be left out with tuning={config.tuning.method.name}; "
            "only tuning=lora has a matrix A"
        )
    if config.model.head is HeadName.native and not config.task.name.has_classes:
        yield (
            f"model.head=native: must be left out with task={config.task.name.name}, which always "
            "has the head that transformers gives it"
        )
    if config.charged_steps > MAX_STEPS:
        yield (
            f"federation.rounds={config.federation.rounds}: must keep the steps of a site, "
            f"{config.charged_steps:,} with federation.local_steps and spare rounds, at most "
            f"{MAX_STEPS:,}"
        )
    yield from _broken_of_persons(config)
    yield from _broken_of_contents(config)
    yield from _broken_of_columns(config)
    yield from _broken_of_groups(config)
    yield from _broken_of_left_out(config.federation)
    yield from _broken_of_participation(config)
    yield from _broken_of_faults(config)
    yield from _broken_of_strategy(config)
    yield from _broken_of_sources(config)
    yield from _broken_of_deployed(config)
    sites, declared = config.federation.sites, config.data.declared_records
    if declared is not None and 1 <= declared < sites:
        yield f"federation.sites={sites}: must be at most {declared}, the training records"


def _broken_of_persons(config: Config) -> Iterator[str]:
    """What stands and falls with `privacy=person`."""
    data, most = config.data, config.privacy.max_records_per_person
    person = config.privacy.mode is PrivacyMode.person
    if person and (most is None or most < 1):
        yield f"privacy.max_records_per_person={most}: must be at least 1 with privacy=person"
    if not person and most is not None:
        yield (
            f"privacy.max_records_per_person={most}: must be left out with "
            f"privacy={config.privacy.mode.name}; only privacy=person bounds persons"
        )
    if data.source in _NO_PERSONS and (person or data.person_column):
        setting = "privacy=person" if person else f"data.person_column={data.person_column}"
        yield (
            f"{setting}: data={data.source.name} names no persons; "
            "give data=csv with data.person_column"
        )
    elif person and not data.person_column:
        yield (
            "data.person_column='': must name the column of person ids with privacy=person; "
            "give it, or choose privacy=record"
        )
    elif data.person_column and data.person_column in (data.text_column, data.label_column):
        yield f"data.person_column={data.person_column}: must be a column of its own"


_TEXTS = {
    TaskName.text_classification: ("text",),
    TaskName.causal_lm: ("text",),
    TaskName.question_answering: ("question", "context", "answer"),
    TaskName.seq2seq: ("source", "target"),
}
"""What the texts of a record are, of tasks that have no other."""


def _broken_of_columns(config: Config) -> Iterator[str]:
    """Columns that are not the texts of the task's records, where columns hold them."""
    columns, task = config.data.columns, config.task.name
    texts, given = _TEXTS.get(task, ()), f"data.columns=[{','.join(config.data.columns)}]"
    if config.data.source not in (*FILES, DataSource.hub):
        return
    if task.has_classes and not config.data.label_column.strip():
        yield f"data.label_column='': must name a column with task={task.name}: that of the labels"
    if len(texts) == 1 and not config.data.text_column.strip():
        yield f"data.text_column='': must name a column with task={task.name}: that of the texts"
    if len({*columns}) < len(columns):
        yield f"{given}: must be different columns"
    if len(texts) == 1 and columns:
        yield (
            f"{given}: must be left out with task={task.name}, whose records are one text; "
            "data.text_column names its column"
        )
    if len(texts) > 1 and len(columns) != len(texts):
        yield (
            f"{given}: must name {len(texts)} columns with task={task.name}: of "
            f"{', '.join(texts)}, in this order"
        )


def _broken_of_contents(config: Config) -> Iterator[str]:
    """Data that hold what the task does not read, as far as the source alone tells."""
    source, task = config.data.source, config.task.name
    if (only := _ONLY.get(source)) and task is not only:
        kind = "sounds" if only is TaskName.audio_classification else "images"
        yield f"task={task.name}: data={source.name} holds {kind}; choose task={only.name}"
    if source in _OF_TEXTS and task in _NO_TEXTS:
        yield f"task={task.name}: data={source.name} holds texts; choose other data or another task"


def _broken_of_sources(config: Config) -> Iterator[str]:
    """Settings that the source of the records has no use for, or cannot follow."""
    data = config.data
    if data.source in FOLDERS and any(map(_is_no_folder, data.labels)):
        yield f"data.labels={data.labels}: must be names of folders, with no / and no dot in front"
    if data.source is not DataSource.csv and data.dialect != Dialect():
        yield f"data.encoding, data.separator: must be left out with data={data.source.name}"
    if data.source is not DataSource.hub:
        given = {n: getattr(data, n) for n in ("subset", "test_split", "revision", "media_column")}
        for name in (name for name, value in given.items() if value):
            yield f"data.{name}={given[name]}: must be left out with data={data.source.name}"
    elif not data.split:
        yield "data.split='': must name a split"
    elif data.test_split and data.test_path:
        yield f"data.test_split={data.test_split}: must be left out where data.test_path is given"
    elif data.test_split == data.split:
        yield f"data.test_split={data.test_split}: must differ from data.split"


def _broken_of_deployed(config: Config) -> Iterator[str]:
    """What only a simulation can do, or know; and what is private, and so at a site."""
    if not config.is_deployed:
        return
    data = config.data
    own = data.source in FILES | FOLDERS
    if own and data.path:
        yield (
            f"data.path={data.path}: must be left out with engine=superlink; private records "
            "stand in each site's own configuration"
        )
    if own and not data.test_path:
        yield (
            "data.test_path='': must be the public hold-out with engine=superlink; the "
            "coordinator sees no other records"
        )
    if data.source is DataSource.hub and not (data.test_path or data.test_split):
        yield "data.test_path='': must be given with engine=superlink, or data.test_split"
    if config.evaluation.split is not Split.holdout and (data.test_path or data.test_split):
        yield (
            f"evaluation.split={config.evaluation.split.name}: must be holdout with "
            "engine=superlink, as no other split is public"
        )
    if data.declared_records is None:
        yield (
            "data.declared_records=None: must be given with engine=superlink: the number of "
            "records that all sites together declare; nothing is counted there"
        )
    if config.ledger:
        yield f"ledger={config.ledger}: must be left out with engine=superlink; sites keep theirs"
    if config.federation.leave_out:
        yield (
            f"federation.leave_out={config.federation.leave_out}: must be empty with "
            "engine=superlink; only a simulation sees the records of a site"
        )
    if config.faults.active:
        yield "faults: must be none with engine=superlink; only a simulation makes them up"


def _is_no_folder(label: str) -> bool:
    return not label or label.startswith(".") or "/" in label


def _broken_of_groups(config: Config) -> Iterator[str]:
    """What metrics by group need: public records that name one."""
    data, setting = config.data, f"data.group_column={config.data.group_column}"
    if not data.group_column:
        return
    if data.source not in FILES:
        known = ", ".join(sorted(source.name for source in FILES))
        yield f"{setting}: data={data.source.name} names no groups; give one of data={known}"
    if data.group_column == data.person_column:
        yield f"{setting}: must not be the column of persons; a report would print their ids"
    if data.test_path and config.evaluation.split is not Split.holdout:
        yield (
            f"{setting}: is read from data.test_path, the hold-out; "
            f"evaluation.split={config.evaluation.split.name} names no groups"
        )


def _broken_of_left_out(federation: FederationConfig) -> Iterator[str]:
    """A site can be left out if it is one, and others stay."""
    left_out, sites = federation.leave_out, federation.sites
    if left_out and sites == 1:
        yield f"federation.leave_out={left_out}: must be empty with one site; nobody would train"
    elif left_out and not _is_site(left_out, sites):
        yield f"federation.leave_out={left_out}: must be one of site-1 to site-{sites}, or empty"


def _broken_of_participation(config: Config) -> Iterator[str]:
    """What cannot be scheduled."""
    federation = config.federation
    asked, digest_ = federation.asked_rounds, federation.availability_digest
    if 0 < federation.enough < federation.quorum <= 1:
        yield (
            f"federation.enough={federation.enough:g}: must be at least federation.quorum="
            f"{federation.quorum:g}, without which a round fails; lower federation.quorum"
        )
    if asked is not None and not 1 <= asked <= federation.rounds:
        yield f"federation.asked_rounds={asked}: must be between 1 and federation.rounds, or null"
    if digest_ and not federation.availability:
        yield (
            f"federation.availability_digest={digest_}: must be left out without "
            "federation.availability; the plan sets it"
        )
    if len(config.privacy.site_epsilons) > federation.sites:
        yield (
            f"privacy.site_epsilons={config.privacy.site_epsilons}: must be no more than the "
            f"{federation.sites} sites"
        )


def _broken_of_faults(config: Config) -> Iterator[str]:
    """Faults of sites that are none; more speeds than sites."""
    faults, sites = config.faults, config.federation.sites
    if unknown := [name for name in faults.sites if not _is_site(name, sites)]:
        yield f"faults.sites={unknown}: must be some of site-1 to site-{sites}, or empty"
    coding = config.federation.coding
    if coding is not Coding.float32 and faults.altering:
        yield (
            f"federation.coding={coding.name}: must be float32 with faults.{faults.altering[0]}, "
            "which alters an update that is not coded"
        )
    if len(faults.speeds) > sites:
        yield f"faults.speeds={faults.speeds}: must be no more than the {sites} sites"


def _broken_of_strategy(config: Config) -> Iterator[str]:
    """Held against a federation that can be one: what is wrong with that is said already."""
    federation = config.federation
    possible = (
        federation.training_sites >= 1
        and 0 < federation.quorum <= 1
        and 0 < federation.participation <= 1
    )
    if federation.weighting is not Weighting.equal and not config.strategy.is_mean:
        yield (
            f"federation.weighting={federation.weighting.name}: must be equal with "
            f"strategy={config.strategy.name.name}, which takes no mean"
        )
    yield from faults(config.strategy, federation.quorum_sites if possible else None)


def _is_site(name: str, sites: int) -> bool:
    """Without a list of the names: their number may be a stranger's choice."""
    digits = name.removeprefix("site-")
    short = digits.isascii() and digits.isdigit() and len(digits) <= len(str(sites))
    return short and 1 <= int(digits) <= sites and name == f"site-{int(digits)}"


def _distinct_names(labels: list[str]) -> bool:
    named = all(isinstance(label, str) and label.strip() for label in labels)
    return named and len(labels) > 1 and len(set(labels)) == len(labels)


def _distinct_or_none(labels: list[str]) -> bool:
    return not labels or _distinct_names(labels)


def _positive(value: float) -> bool:
    return math.isfinite(value) and value > 0


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


_NO_PERSONS = (DataSource.bbc_news, DataSource.digits, *FOLDERS)
"""Sources that say of no record whose it is."""
_NO_TEXTS = (TaskName.image_classification, TaskName.audio_classification)
"""Tasks whose records are no texts."""
_OF_TEXTS = (DataSource.bbc_news, *FILES)
"""Sources that hold texts."""
_ONLY = {
    DataSource.digits: TaskName.image_classification,
    DataSource.image_folder: TaskName.image_classification,
    DataSource.audio_folder: TaskName.audio_classification,
}
"""The one task that reads what these sources hold."""
_PATHS = {
    **{source: f"the path of a {source.name} file" for source in FILES},
    **dict.fromkeys(FOLDERS, "the path of a folder that has one for each label"),
    DataSource.hub: "the name of a data set on the hub, or the path of a local one",
}
"""What `data.path` must be."""

_Rule = tuple[str, Callable[[Any], bool]]
"""What a value must be, in words and as a test."""


def _up_to(most: int) -> _Rule:
    return f"between 1 and {most:,}", lambda value: bool(1 <= value <= most)


_POSITIVE: _Rule = ("a finite number above 0", _positive)
_COUNT: _Rule = ("at least 1", lambda value: bool(value >= 1))
_STEP_SIZE: _Rule = (
    f"above 0 and at most {MAX_STEP_SIZE:g}",
    lambda value: bool(0 < value <= MAX_STEP_SIZE),
)
_LIMIT: _Rule = ("above 0, or null for no limit", lambda value: value is None or _positive(value))
_OPEN_SHARE: _Rule = ("above 0 and at most 1", lambda value: bool(0 < value <= 1))
_PUBLIC_SHARE: _Rule = ("at least 0 and below 1", lambda value: bool(0 <= value < 1))

_SEED: _Rule = ("at least 0 and below 2**32", lambda value: bool(0 <= value < 2**32))
_SHARE: _Rule = ("between 0 and 1", lambda value: bool(0 <= value <= 1))
_ALL_POSITIVE: _Rule = (
    "finite numbers above 0",
    lambda values: all(_is_number(value) and _positive(value) for value in values),
)

_RULES: dict[str, _Rule] = {
    "seed": _SEED,
    "task.max_tokens": _up_to(MAX_TOKENS),
    "task.max_target_tokens": _up_to(MAX_TOKENS),
    "task.max_seconds": ("above 0 and at most 3600", lambda value: bool(0 < value <= MAX_SECONDS)),
    "model.feature_scale": _POSITIVE,
    "privacy.epsilon": _POSITIVE,
    "privacy.site_epsilons": _ALL_POSITIVE,
    "privacy.delta": ("between 0 and 1, both excluded", lambda value: bool(0 < value < 1)),
    "privacy.clip_norm": _STEP_SIZE,
    "privacy.sample_rate": (
        f"at least {MIN_SAMPLE_RATE:g} and at most 1",
        lambda value: bool(MIN_SAMPLE_RATE <= value <= 1),
    ),
    "node.min_noise_multiplier": ("a finite number, 0 or more", lambda v: 0 <= v < math.inf),
    "node.max_epsilon": _LIMIT,
    "node.max_clip_norm": _LIMIT,
    "node.max_rounds": _LIMIT,
    "node.max_steps": _LIMIT,
    "privacy.spare_rounds": ("between 0 and 1000", lambda value: bool(0 <= value <= MAX_SPARES)),
    "privacy.count_noise": ("a finite number above 0, or null", _LIMIT[1]),
    "privacy.noise_multiplier": (
        "a finite number above 0, or null to solve it",
        lambda value: value is None or _positive(value),
    ),
    "federation.sites": _up_to(MAX_SITES),
    "federation.rounds": _up_to(MAX_ROUNDS),
    "federation.local_steps": _up_to(MAX_ROUNDS),
    "federation.dirichlet_alpha": _POSITIVE,
    "federation.classes_per_site": _COUNT,
    "federation.quorum": _OPEN_SHARE,
    "federation.enough": _OPEN_SHARE,
    "federation.participation": _OPEN_SHARE,
    "federation.round_timeout_s": _POSITIVE,
    "tracking.uri": (
        "without a name and password; give MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD "
        "in the environment",
        lambda value: "@" not in value,
    ),
    "tracking.experiment": ("a name", lambda value: bool(value.strip())),
    "evaluation.every": ("0 or more", lambda value: bool(value >= 0)),
    "engine.threads": ("between 0 and 1024", lambda value: bool(0 <= value <= MAX_THREADS)),
    "engine.device": (DEVICES, is_device),
    "engine.workers": ("between 0 and 256", lambda value: bool(0 <= value <= MAX_WORKERS)),
    "engine.physical_batch": _up_to(MAX_BATCH),
    "engine.cache_mb": ("0 or more", lambda value: bool(value >= 0)),
    "engine.together": ("0 or more", lambda value: bool(value >= 0)),
    "tuning.head_learning_rate": _STEP_SIZE,
    "tuning.head_noise": ("a finite number, 0 or more", lambda value: 0 <= value < math.inf),
    "data.labels": ("two or more different class names, in order", _distinct_names),
    "data.toy_records": _COUNT,
    "data.encoding": ("an encoding that Python knows, or empty", is_encoding),
    "data.holdout_fraction": _PUBLIC_SHARE,
    "data.validation_fraction": _PUBLIC_SHARE,
    "data.declared_records": (
        "at least 1, or null to count",
        lambda value: value is None or value >= 1,
    ),
    **{f"faults.{name}": _SHARE for name in FAULTS},
    "faults.seed": _SEED,
    "faults.scale": ("a finite number", math.isfinite),
    "faults.slowdown": ("a finite number, 1 or more", lambda value: 1 <= value < math.inf),
    "faults.speeds": _ALL_POSITIVE,
    "faults.round_s": _POSITIVE,
    "faults.deadline_s": _LIMIT,
}
_LORA_RULES: dict[str, _Rule] = {
    "tuning.rank": _up_to(MAX_RANK),
    "tuning.alpha": _up_to(MAX_ALPHA),
    "tuning.last_layers": ("0 for all blocks, or more", lambda value: bool(value >= 0)),
}


def _at(values: dict[str, Any], name: str) -> Any:
    return reduce(lambda inner, part: inner[part], name.split("."), values)


def _plain(value: Any) -> Any:
    """Enums by member name, as OmegaConf reads them back."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return value.name if isinstance(value, Enum) else value


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split("\n    ")[0].split())

"""What every test shares: a quiet offline environment, a tiny real model, tiny real data."""

import os

from common.processor import steady_products

os.environ.update(
    HF_HUB_OFFLINE="1",
    FLWR_TELEMETRY_ENABLED="0",
    FLWR_DISABLE_UPDATE_CHECK="1",
    TOKENIZERS_PARALLELISM="false",
    **steady_products(),  # before torch is imported, as `coterie` does it
)

import csv
import json
import random
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_dir
from hypothesis import settings

from benchmarks import tiny
from common import cli
from common.composition import CONF
from common.config import Config, from_composed, register_schemas

MEMORY, ROOM = Path("/dev/shm"), 8 * 2**30
"""A folder in memory, and how much must be free for the suite's files to be there."""


def _has_room() -> bool:
    """Whether there is so much memory, and the folder may have it: in a container it may not."""
    try:
        (free,) = re.findall(r"^MemAvailable: *(\d+) kB$", Path("/proc/meminfo").read_text(), re.M)
        return min(int(free) * 1024, shutil.disk_usage(MEMORY).free) > ROOM
    except (OSError, ValueError):
        return False


if _has_room():
    # Ledgers and checkpoints wait for the disk at every entry, which tests do not: what is to last
    # a loss of power is told by the calls that were made (test_durable), and a process that is
    # killed leaves the same files here.
    os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", str(MEMORY))

if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)  # tests run beside each other: threads would wait for each other

settings.register_profile("coterie", derandomize=True, deadline=None)
settings.load_profile("coterie")

RECORDS = 120


LONGEST = ("test_main_job.py", "test_readme.py", "test_audit.py")
"""Files that begin first where files are dealt to two processes, so that none is left over."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files first; the others stay in their order."""
    place = {name: number for number, name in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(item.path.name, len(place)))


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A two-block BERT with random weights and a whole-word tokenizer, as a local folder."""
    folder = tmp_path_factory.mktemp("tiny") / "model"
    tiny.save_model(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_csv(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """120 different one-line texts of two classes that can be told apart."""
    path = tmp_path_factory.mktemp("tiny-data") / "records.csv"
    tiny.write(path, tiny.rows(RECORDS))
    return path


@pytest.fixture(scope="session")
def tiny_overrides(tiny_model: Path, tiny_csv: Path) -> list[str]:
    """Overrides that make any job run on the tiny model and data, in about a second."""
    return [
        "data=csv",
        f"data.path={tiny_csv}",
        "data.labels=[sport,money]",
        f"model.name={tiny_model}",
        "task.max_tokens=12",
        "privacy.delta=1e-3",
        "privacy.epsilon=8",
        "federation.sites=2",
        "federation.rounds=2",
        "federation.local_steps=2",
        "engine.threads=1",
        "engine.workers=1",
    ]


@pytest.fixture(scope="session")
def tiny_persons_csv(tmp_path_factory: pytest.TempPathFactory, tiny_csv: Path) -> Path:
    """The same records, of 37 persons who have one to six of them."""
    path = tmp_path_factory.mktemp("tiny-persons") / "records.csv"
    draw = random.Random(1)
    with tiny_csv.open(newline="") as source, path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow([*next(reader := csv.reader(source)), "person"])
        persons = [f"p{n:02d}" for n in range(38) for _ in range(draw.randint(1, 6))][:RECORDS]
        draw.shuffle(persons)
        writer.writerows([*row, person] for row, person in zip(reader, persons, strict=True))
    return path


@pytest.fixture(scope="session")
def person_overrides(tiny_overrides: list[str], tiny_persons_csv: Path) -> list[str]:
    """The tiny job by person, with at most three records of each."""
    return [
        *(o for o in tiny_overrides if not o.startswith("data.path=")),
        f"data.path={tiny_persons_csv}",
        "data.person_column=person",
        "privacy=person",
        "privacy.max_records_per_person=3",
    ]


@pytest.fixture(scope="session")
def person_config(compose_config: Callable[..., Config], person_overrides: list[str]) -> Config:
    """The resolved config of a tiny run by person."""
    return compose_config(
        *person_overrides, "privacy.noise_multiplier=2", "data.declared_records=84"
    )


@pytest.fixture(scope="session")
def compose_config() -> Callable[..., Config]:
    """Composes `conf/simulate.yaml` with overrides, as the command line would."""

    def composed(*overrides: str) -> Config:
        register_schemas()
        with initialize_config_dir(str(CONF), version_base="1.3"):
            return from_composed(compose("simulate", list(overrides)))

    return composed


@pytest.fixture(scope="session")
def tiny_config(compose_config: Callable[..., Config], tiny_overrides: list[str]) -> Config:
    """The resolved config of a tiny private run: sigma and number of records are filled in."""
    return compose_config(*tiny_overrides, "privacy.noise_multiplier=2", "data.declared_records=84")


@dataclass(frozen=True)
class Answer:
    """What one call of the command line left behind."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """The one JSON object on stdout."""
        return json.loads(self.out)


@pytest.fixture
def coterie(capsys: pytest.CaptureFixture[str]) -> Callable[..., Answer]:
    """Calls `coterie` in this process."""

    def call(*arguments: object) -> Answer:
        capsys.readouterr()
        code = cli.main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return Answer(code, captured.out, captured.err)

    return call

"""Trackers: what stands in `metrics.jsonl`, shown where people already look.

A tracker is told what the run's own files hold, after they hold it, and nothing else: metrics of
public records, epsilon, bytes, seconds, counts of replies, settings. A run does not depend on one:
what goes wrong with it is said once, and the run goes on without.
"""

import logging
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from common.config import Config, TrackerName, TrackingConfig, field_names, setting
from common.durable import write_atomic
from common.errors import ConfigError
from server.record import RoundLine

PACKAGES = {TrackerName.tensorboard: "tensorboard", TrackerName.mlflow: "mlflow"}
KEPT = "tracking.json"
"""File of the run folder that holds the name which mlflow gave the run."""
MAX_VALUE = 500
"""Characters of a setting that mlflow takes."""
_NOT_TOLD = {
    *("run_dir", "ledger", "heads", "resume", "superlink", "tracking", "node", "faults"),
    *("data.path", "data.test_path", "federation.availability", "data.declared_records"),
}
"""Settings of where files are, or of other commands, and what a simulation may have counted."""

log = logging.getLogger(__name__)


class Tracker(Protocol):
    """Where a run is followed."""

    def follow(self, line: RoundLine) -> None:
        """A round is over."""

    def end(self, *, well: bool) -> None:
        """The run is over, or was stopped."""


def check_tracker(tracking: TrackingConfig) -> None:
    """Raises: ConfigError if the tracker is not installed."""
    package = PACKAGES.get(tracking.name)
    if package is not None and find_spec(package) is None:
        raise ConfigError(
            f"tracking={tracking.name.name}: {package} is not installed; pip install "
            "'coterie[tracking]', or leave tracking out"
        )


@contextmanager
def tracked(config: Config, run_dir: Path, *, after: int) -> Iterator[Tracker]:
    """Follows a run for as long as the block runs. Args: after: the last round that is over."""
    tracker = _Careful(lambda: _tracker(config, run_dir, after), config.tracking)
    try:
        yield tracker
    except BaseException:
        tracker.end(well=False)
        raise
    tracker.end(well=True)


def numbers(line: RoundLine) -> dict[str, float]:
    """What a round is told as, by name; all finite."""
    asked = dict.fromkeys(line.asked)
    found = {
        **{f"evaluation/{name}": value for name, value in line.metrics.items()},
        "privacy/epsilon": float(line.epsilon),
        "replies/accepted": float(len(asked) - len(line.refused.keys() & asked.keys())),
        "replies/refused": float(len(line.refused)),
        "bytes/down": float(line.bytes_down),
        "bytes/up": float(line.bytes_up),
        "seconds/sites": line.sites_s,
        "seconds/run": line.elapsed_s,
    }
    return {name: value for name, value in found.items() if math.isfinite(value)}


class _Careful:
    """A tracker that a run does not depend on."""

    def __init__(self, opened: Callable[[], Tracker], tracking: TrackingConfig) -> None:
        self._name = tracking.name.name
        self._tracker: Tracker | None = None
        self._try(lambda: setattr(self, "_tracker", opened()))

    def follow(self, line: RoundLine) -> None:
        tracker = self._tracker
        if tracker is not None:
            self._try(lambda: tracker.follow(line))

    def end(self, *, well: bool) -> None:
        tracker = self._tracker
        if tracker is not None:
            self._try(lambda: tracker.end(well=well))

    def _try(self, work: Callable[[], None]) -> None:
        try:
            work()
        except Exception as error:  # whatever a library and a server far away may come to
            self._tracker = None
            log.warning(
                "tracking=%s: %s; the run goes on without it", self._name, type(error).__name__
            )


def _tracker(config: Config, run_dir: Path, after: int) -> Tracker:
    if config.tracking.name is TrackerName.tensorboard:
        return _Tensorboard(config, run_dir, after)
    if config.tracking.name is TrackerName.mlflow:
        return _Mlflow(config, run_dir)
    return _Nobody()


class _Nobody:
    def follow(self, line: RoundLine) -> None:
        """Nothing to do."""

    def end(self, *, well: bool) -> None:
        """Nothing to do."""


class _Tensorboard:
    """Event files, written by torch's own writer."""

    def __init__(self, config: Config, run_dir: Path, after: int) -> None:
        from torch.utils.tensorboard import SummaryWriter  # noqa: PLC0415 - of an extra, and slow

        uri = config.tracking.uri
        folder = Path(uri).expanduser() / run_dir.name if uri else run_dir / "tensorboard"
        # What an interrupted run had told beyond its last whole round is not shown.
        self._writer: Any = SummaryWriter(str(folder), purge_step=after + 1 if after else None)

    def follow(self, line: RoundLine) -> None:
        for name, value in numbers(line).items():
            self._writer.add_scalar(name, value, line.round)
        self._writer.flush()

    def end(self, *, well: bool) -> None:
        del well
        self._writer.close()


@dataclass
class _Mlflow:
    """A run of an MLflow server, or in files; by its client, which has no state of the process."""

    config: Config
    run_dir: Path

    def __post_init__(self) -> None:
        tracking = self.config.tracking
        uri = tracking.uri or str(self.run_dir / "mlruns")
        if "://" not in uri:
            uri = Path(uri).expanduser().resolve().as_uri()
            # Files are no longer developed by mlflow, and still kept: a server is the better home.
            os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
        from mlflow import MlflowClient  # noqa: PLC0415 - of an extra, and slow

        self._client: Any = MlflowClient(tracking_uri=uri)
        self._run = self._kept() or self._begun(tracking.experiment)

    def _kept(self) -> str:
        """The run that an earlier process began here."""
        path = self.run_dir / KEPT
        return path.read_text(encoding="utf-8").strip() if path.exists() else ""

    def _begun(self, experiment: str) -> str:
        found = self._client.get_experiment_by_name(experiment)
        number = found.experiment_id if found else self._client.create_experiment(experiment)
        run = self._client.create_run(number, run_name=self.run_dir.name).info.run_id
        write_atomic(self.run_dir / KEPT, f"{run}\n")
        for name, value in _settings(self.config).items():
            self._client.log_param(run, name, value)
        return str(run)

    def follow(self, line: RoundLine) -> None:
        from mlflow.entities import Metric  # noqa: PLC0415

        now = int(time.time() * 1000)
        told = [Metric(name, value, now, line.round) for name, value in numbers(line).items()]
        self._client.log_batch(self._run, metrics=told)
        self._client.set_tag(self._run, "private", str(line.private).lower())

    def end(self, *, well: bool) -> None:
        self._client.set_terminated(self._run, "FINISHED" if well else "FAILED")


def _settings(config: Config) -> Mapping[str, str]:
    """What the run is asked for, setting by setting."""
    names = [name for name in field_names() if not {name, name.split(".")[0]} & _NOT_TOLD]
    values = {name: setting(config, name) for name in names}
    return {
        name: str(value)[:MAX_VALUE]
        for name, value in values.items()
        if not isinstance(value, dict)
    }

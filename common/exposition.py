"""What a long-lived process tells those who watch it: Prometheus metrics, and `grpc.health.v1`.

Both are off unless an address is configured, on loopback unless that names a host, in the clear and
read-only: whoever can reach the address sees all of it, and can change nothing. Their libraries are
imported only where they are used.
"""

import re
import sys
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from common.errors import ConfigError

LOOPBACK = "127.0.0.1"
MAX_PORT = 65_535
EXTRA = "pip install 'coterie[metrics]'"
ADDRESS_RULE = "PORT, which is of loopback, or HOST:PORT; or empty, for none"
_ADDRESS = re.compile(r"(?:(\[[0-9a-fA-F:.]+\]|[^:/\s\[\]]+):)?([0-9]{1,5})")


@dataclass(frozen=True)
class Sample:
    """One number, and what it is of."""

    labels: tuple[str, ...]
    value: float


@dataclass(frozen=True)
class Family:
    """One metric, as `# HELP` and `# TYPE` announce it. Names of counters have no `_total`."""

    name: str
    help: str
    labels: tuple[str, ...]
    samples: tuple[Sample, ...]
    counts: bool = False
    """Whether it only ever grows."""


Families = Callable[[], Iterable[Family]]
"""What there is to tell at this moment; called for each scrape, in a thread of its own."""


def is_listen_address(value: str) -> bool:
    """Whether a setting follows `ADDRESS_RULE`.

    >>> [is_listen_address(each) for each in ("", "9464", "0.0.0.0:9464", "9464:", "0", "x y:1")]
    [True, True, True, False, False, False]
    """
    found = _ADDRESS.fullmatch(value)
    return not value or (found is not None and 1 <= int(found[2]) <= MAX_PORT)


def listen_address(value: str) -> tuple[str, int]:
    """Host and port of a setting that names one.

    >>> listen_address("9464"), listen_address("[::1]:9464")
    (('127.0.0.1', 9464), ('[::1]', 9464))
    """
    found = _ADDRESS.fullmatch(value)
    assert found is not None, "settings were checked"
    return found[1] or LOOPBACK, int(found[2])


@contextmanager
def metrics_at(setting: str, address: str, families: Families) -> Iterator[None]:
    """Answers scrapes at `address` for as long as the block runs; at none if it is empty.

    Raises: ConfigError, naming `setting`, if prometheus-client is not installed, or somebody else
    has the address.
    """
    if not address:
        yield
        return
    try:
        from prometheus_client import CollectorRegistry, ProcessCollector  # noqa: PLC0415 - an extra
        from prometheus_client import start_http_server as started  # noqa: PLC0415 - an extra
    except ImportError as error:
        raise ConfigError(f"{setting}={address}: needs prometheus-client; {EXTRA}") from error
    registry = CollectorRegistry()
    ProcessCollector(registry=registry)
    registry.register(_Collector(families))
    host, port = listen_address(address)
    try:
        server, thread = started(port, addr=host.strip("[]"), registry=registry)
    except OSError as error:
        raise _taken(setting, address, error) from error
    try:
        yield
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Collector:
    """Families as prometheus-client takes them."""

    def __init__(self, families: Families) -> None:
        self._families = families

    def collect(self) -> Iterator[Any]:
        from prometheus_client.core import (  # noqa: PLC0415
            CounterMetricFamily,
            GaugeMetricFamily,
        )

        for family in self._families():
            kind = CounterMetricFamily if family.counts else GaugeMetricFamily
            made = kind(family.name, family.help, labels=family.labels)
            for sample in family.samples:
                made.add_metric(sample.labels, sample.value)
            yield made


class Health:
    """Which services of a process are well, as `grpc.health.v1` tells it; "" is the process."""

    def __init__(self, servicer: Any = None) -> None:
        self._servicer = servicer
        self.tell("", well=True)

    def tell(self, service: str, *, well: bool) -> None:
        """From now on. Nothing happens where nobody listens."""
        if self._servicer is not None:
            from grpc_health.v1.health_pb2 import HealthCheckResponse  # noqa: PLC0415

            kinds = HealthCheckResponse.ServingStatus
            self._servicer.set(service, kinds.SERVING if well else kinds.NOT_SERVING)


@contextmanager
def health_at(setting: str, address: str) -> Iterator[Health]:
    """Answers `grpc.health.v1` at `address` for as long as the block runs; at none if it is empty.

    Raises: ConfigError, naming `setting`, if somebody else has the address.
    """
    if not address:
        yield Health()
        return
    import grpc  # noqa: PLC0415
    from grpc_health.v1 import health, health_pb2_grpc  # noqa: PLC0415

    host, port = listen_address(address)
    # Without the option two processes could share a port, and each hear half of the questions.
    server = grpc.server(ThreadPoolExecutor(2), options=[("grpc.so_reuseport", 0)])
    servicer = health.HealthServicer()
    health_pb2_grpc.add_HealthServicer_to_server(servicer, server)
    try:
        server.add_insecure_port(f"{host}:{port}")
    except RuntimeError as error:
        raise _taken(setting, address, error) from error
    server.start()
    try:
        yield Health(servicer)
    finally:
        servicer.enter_graceful_shutdown()
        server.stop(1.0).wait()


def _taken(setting: str, address: str, error: Exception) -> ConfigError:
    reason = getattr(error, "strerror", None) or "the address is taken, or not of this machine"
    return ConfigError(f"{setting}={address}: cannot be listened on ({reason}); choose another")


def gpu_memory() -> Iterator[Family]:
    """Of each GPU that this process uses; none where it uses none. Makes no context of its own."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_available() or not torch.cuda.is_initialized():
        return
    samples = []
    for device in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(device)
        for kind, value in (
            ("own", torch.cuda.memory_reserved(device)),
            ("free", free),
            ("total", total),
        ):
            samples.append(Sample((str(device), kind), float(value)))
    yield Family(
        "coterie_gpu_memory_bytes",
        "Memory of a GPU: reserved by this process, free, and in all.",
        ("device", "kind"),
        tuple(samples),
    )

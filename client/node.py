"""`coterie node`: the long-lived process beside a site's records."""

import logging
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path

from client.settings import NODE, NodeSettings
from common.cli import Invocation, emit_json
from common.code import check_flower
from common.composition import run_with
from common.errors import ConfigError
from common.log_lines import begin_log
from common.seal import Seal, check_seal

KIT, KIT_SETTINGS, GROUP = "kit", "node.yaml", "sealed"
"""The setting that names a kit; its file of settings; the group as which Hydra knows that."""
SOON_DAYS = 30
"""How long before a certificate ends a node says so in capitals."""

log = logging.getLogger(__name__)
log.setLevel(logging.INFO)


def node(invocation: Invocation) -> None:
    """Answer a coordinator's instructions beside a site's own records, by its own policy."""

    def job(settings: NodeSettings) -> None:
        check_flower(metadata.version("flwr"))
        seal = checked(settings, invocation)
        begin_log(settings.log)  # before libraries that would begin one of their own
        if seal is not None:
            log.info("%s: %s", settings.name, told(seal, settings.kit))
        # torch and the model come with it: whoever mistyped a setting does not wait for them.
        from client.service import run_node  # noqa: PLC0415

        answer = run_node(settings)
        if invocation.json:
            emit_json(answer)

    with from_kit(invocation) as whole:
        run_with(NODE, job, whole)


def told(seal: Seal, kit: str) -> str:
    """What is to be known of a kit at the start, in a line.

    A certificate that has ended ends no node: the door says so, and a renewed kit mends it.
    """
    pinned = "as sealed_by says" if seal.pinned else "a key that sealed_by does not name"
    text = f"kit {kit} of {seal.federation}: whole, and sealed by {seal.key[:16]}..., {pinned}"
    if seal.ends is None:
        return text
    left = (seal.ends - datetime.now(UTC)).days
    soon = "; HAVE IT RENEWED" if left < SOON_DAYS else ""
    return f"{text}; its first certificate ends on {seal.ends:%Y-%m-%d}{soon}"


@contextmanager
def from_kit(invocation: Invocation) -> Iterator[Invocation]:
    """With the settings of the kit that is named, before all others.

    Hydra composes from folders of groups: it is shown one that holds the kit's file, for as long
    as it composes and the node runs.
    """
    kit = _given(invocation, KIT)
    if kit is None:
        yield invocation
        return
    check_seal(Path(kit))  # nothing of an altered kit is believed, not even its settings
    settings = Path(kit).expanduser().resolve() / KIT_SETTINGS
    if not settings.is_file():
        raise ConfigError(f"kit={kit}: is no kit of a site, as it has no {KIT_SETTINGS}")
    folder = Path(tempfile.mkdtemp(prefix="coterie-kit-"))
    try:
        (folder / GROUP).mkdir()
        shutil.copy(settings, folder / GROUP / KIT_SETTINGS)
        added = (f"hydra.searchpath=[{folder}]", f"+{GROUP}={settings.stem}")
        own = tuple(_absolute_kit(each) for each in invocation.arguments)
        yield replace(invocation, arguments=(*added, *own))
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _absolute_kit(argument: str) -> str:
    """The kit by a path that holds wherever it is read."""
    name, equals, value = argument.partition("=")
    if name != KIT or not equals:
        return argument
    path = str(Path(value.strip("'\"")).expanduser().resolve())
    return f"{KIT}='{path}'"


def _given(invocation: Invocation, name: str) -> str | None:
    """The last value that the command line gives a setting; None where it gives none."""
    found = [each.partition("=")[2] for each in invocation.arguments if each.startswith(f"{name}=")]
    return found[-1].strip("'\"") or None if found else None


def checked(settings: NodeSettings, invocation: Invocation) -> Seal | None:
    """The seal of this node's kit, if it has one. Raises: as `check_seal`."""
    if not settings.kit:
        if settings.sealed_by:
            raise ConfigError(f"sealed_by={settings.sealed_by}: needs kit=FOLDER beside it")
        return None
    if _given(invocation, KIT) is None:
        raise ConfigError(f"kit={settings.kit}: must be given on the command line, as kit=FOLDER")
    return check_seal(Path(settings.kit), key=settings.sealed_by)

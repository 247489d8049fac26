"""`coterie audit`: what can be tested of the promise, and how far."""

from common.cli import Invocation
from common.composition import run_job
from common.config import Config
from common.errors import ConfigError

USAGE = """\
coterie audit mechanism [NAME=VALUE ...] [canaries=N] [ledger=FILE[#SITE]] [--json]
    This installation's own private step (engine, clipping, noise, model of the settings) on made
    records, every one of them drawn: a lower bound of epsilon beside the one that is claimed.
    Spends no budget and reads no records. Example:

        coterie audit mechanism privacy.epsilon=1 tuning=head
"""


def audit(invocation: Invocation) -> None:
    """Try to falsify what is claimed: of the private step, of a run, of a released model."""
    from client.audit import CANARIES, tell_mechanism

    action, *rest = invocation.arguments or ("--help",)
    rest, canaries = taken(tuple(rest), "canaries", CANARIES)
    asked = Invocation(f"audit {action}", rest, invocation.json)

    def job(config: Config) -> None:
        tell_mechanism(config, canaries=canaries, json=invocation.json)

    run_job(job, asked)


def taken(arguments: tuple[str, ...], name: str, otherwise: int) -> tuple[tuple[str, ...], int]:
    """The arguments without `NAME=N`, and its number: a setting of an audit, and of no run."""
    given = [a for a in arguments if a.startswith(f"{name}=")]
    if not given:
        return arguments, otherwise
    value = given[-1].partition("=")[2]
    if not value.isascii() or not value.isdigit():
        raise ConfigError(f"{name}={value}: must be a whole number")
    return tuple(a for a in arguments if a not in given), int(value)

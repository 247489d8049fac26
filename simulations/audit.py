"""`coterie audit`: what can be tested of the promise, and how far."""

from pathlib import Path
from typing import Annotated

import typer

from common.cli import Invocation, emit_json, run_typer
from common.composition import run_job
from common.config import Config
from common.errors import ConfigError

USAGE = """\
coterie audit mechanism [NAME=VALUE ...] [canaries=N] [ledger=FILE[#SITE]] [--json]
    The private step of this installation, with the settings' engine, clipping, noise and model, on
    made records that are all drawn. No budget, no data, under a minute.
    Example: coterie audit mechanism privacy.epsilon=1 tuning=head

coterie audit run [NAME=VALUE ...] [canaries=N] [run_dir=PATH] [--json]
    A simulated run with canaries beside each site's records. It is charged like any other run, and
    its model is for the audit only.
    Example: coterie audit run tuning=head federation.sites=2 run_dir=runs/audit

coterie audit mia RUN [--ledger FILE[#SITE]] [--json]
    Membership inference on the model of a finished simulation: a demonstration.
    Example: coterie audit mia runs/demo

Each prints a lower bound of epsilon, at 95% confidence, beside the epsilon that is claimed, and
the ceiling: the best bound that the test could have reached. The verdict is FALSIFIED (exit code 5)
or NOT FALSIFIED. An audit never verifies. `canaries=N` is how many are counted; a fifth more choose
where to cut. Results are signed into ledgers as AUDIT entries where one is named, and those of a
run into its own. What the words mean: docs/audits.md. All settings: coterie simulate --cfg job.
"""


def audit(invocation: Invocation) -> None:
    """Try to falsify what is claimed: of the private step, of a run, of a released model."""
    action, *rest = invocation.arguments or ("--help",)
    if action in ("-h", "--help") or {"-h", "--help"} & {*rest}:
        print(USAGE, end="")
        return
    if action not in _ACTIONS:
        raise ConfigError(
            f"{action}: no such audit; give one of {', '.join(_ACTIONS)}. See: coterie audit --help"
        )
    _ACTIONS[action](Invocation(f"audit {action}", tuple(rest), invocation.json))


def _mechanism(invocation: Invocation) -> None:
    from client.audit import CANARIES, tell_mechanism  # noqa: PLC0415 - torch: help is quick

    rest, canaries = counted(invocation.arguments, CANARIES)
    rest, ledger = taken(rest, "ledger")  # here it may name a site, which Hydra would not read

    def job(config: Config) -> None:
        tell_mechanism(config, canaries=canaries, ledger=ledger, json=invocation.json)

    run_job(job, Invocation(invocation.command, rest, invocation.json))


def _run(invocation: Invocation) -> None:
    from simulations.run_audit import CANARIES, tell_run  # noqa: PLC0415 - as above

    rest, canaries = counted(invocation.arguments, CANARIES)

    def job(config: Config) -> None:
        tell_run(config, canaries=canaries, invocation=invocation)

    run_job(job, Invocation(invocation.command, rest, invocation.json))


def _mia(invocation: Invocation) -> None:
    def mia(
        run: Annotated[Path, typer.Argument(help="Folder of a finished simulation.")],
        ledger: Annotated[str, typer.Option(help="FILE[#SITE] to sign the results into.")] = "",
    ) -> None:
        """Attacks the model of a run. Example: coterie audit mia runs/demo."""
        from simulations.mia import tell_mia  # noqa: PLC0415 - as above

        content = tell_mia(run, ledger=ledger, json=invocation.json)
        if content is not None:
            emit_json(content)

    run_typer(mia, invocation)


def counted(arguments: tuple[str, ...], otherwise: int) -> tuple[tuple[str, ...], int]:
    """The arguments without `canaries=N`, and N. Raises: ConfigError."""
    rest, given = taken(arguments, "canaries")
    if given and not (given.isascii() and given.isdigit()):
        raise ConfigError(f"canaries={given}: must be a whole number")
    return rest, int(given) if given else otherwise


def taken(arguments: tuple[str, ...], name: str) -> tuple[tuple[str, ...], str]:
    """The arguments without `NAME=VALUE`, a setting of an audit and of no run, and its last value.

    >>> taken(("canaries=5", "tuning=head"), "canaries")
    (('tuning=head',), '5')
    """
    given = [argument for argument in arguments if argument.startswith(f"{name}=")]
    rest = tuple(argument for argument in arguments if argument not in given)
    return rest, given[-1].partition("=")[2] if given else ""


_ACTIONS = {"mechanism": _mechanism, "run": _run, "mia": _mia}

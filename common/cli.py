"""`coterie`: the one console script. It knows no command; it finds them.

Commands are entry points of the group `coterie.commands`; a module is imported only when its
command is called, so `coterie --help` stays quick and no import runs against the arrows.
A command is a function `(Invocation) -> None`; the first line of its docstring is its help.
"""

import ast
import gc
import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata, util
from pathlib import Path
from types import MappingProxyType
from typing import Any, NoReturn

from common.errors import ConfigError, CoterieError
from common.processor import steady_products

GROUP = "coterie.commands"
INTERRUPTED = 130

PART_MIB = 12
"""MiB of each part that a vector travels in, for Flower's 5: a part costs the SuperLink some 12 ms
of processor whatever it holds. A door has to let it in, see `server.federation.Door`."""

# Read by libraries at import: nothing calls out, nothing is installed at run time, and products are
# rounded alike wherever their rows stand.
ENVIRONMENT = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "DO_NOT_TRACK": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "FLWR_PRIVATE_MAX_ARRAY_CHUNK_SIZE": str(PART_MIB << 20),
    **steady_products(),
}


@dataclass(frozen=True)
class Invocation:
    """One call of one command: its arguments, and whether a machine reads the answer."""

    command: str
    arguments: tuple[str, ...]
    json: bool


def main(argv: list[str] | None = None) -> int:
    """Runs one command and returns its exit code; see `common/errors.py` for the codes."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    commands = {point.name: point for point in metadata.entry_points(group=GROUP)}
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_help(commands))
        return 0
    if arguments[0] == "--version":
        print(f"coterie {metadata.version('coterie')}")
        return 0
    name, rest = arguments[0], arguments[1:]
    code = _dispatch(_invocation(name, rest), commands)
    if code == INTERRUPTED and argv is None:
        _leave(code)
    return code


def _leave(code: int) -> NoReturn:
    """Ends the process at once: to take torch's modules apart can take it seconds, and whoever
    pressed Ctrl-C waits. Everything on disk is whole by now.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _dispatch(invocation: Invocation, commands: dict[str, metadata.EntryPoint]) -> int:
    """Runs the command; an error of ours, or the file system's, becomes one line and a code."""
    try:
        if invocation.command not in commands:
            known = ", ".join(sorted(commands))
            raise ConfigError(f"no such command; the commands are {known}")
        os.environ.update({**ENVIRONMENT, **os.environ})
        with importing():
            command = commands[invocation.command].load()
        command(invocation)
    except CoterieError as error:
        return _complain(
            invocation, error.exit_code, type(error).__name__, str(error), error.details
        )
    except KeyboardInterrupt as stop:
        return _complain(invocation, INTERRUPTED, "Interrupted", str(stop) or "interrupted")
    except BrokenPipeError:  # the reader of our output has gone, as in `coterie ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        reason = f"{error.filename or 'a file'}: {error.strerror or error}"
        return _complain(invocation, ConfigError.exit_code, "OSError", reason)
    return 0


@contextmanager
def importing() -> Iterator[None]:
    """What is imported inside stays: no collection looks at it, inside or later.

    That is a sixth of the time torch and all take to be imported, and more of every full
    collection afterwards.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


def emit_json(answer: dict[str, Any]) -> None:
    """Prints the one JSON object of a `--json` call on stdout."""
    print(json.dumps(answer, ensure_ascii=False, allow_nan=False))


def run_typer(
    function: Callable[..., None] | Sequence[Callable[..., None]], invocation: Invocation
) -> None:
    """Runs `function` with arguments parsed by typer; a usage fault becomes a ConfigError.

    Of several functions, the first argument names the one to run.
    """
    import click  # noqa: PLC0415 - only commands that parse pay for the import
    import typer  # noqa: PLC0415

    app = typer.Typer(add_completion=False, rich_markup_mode="rich")
    for each in (function,) if callable(function) else function:
        app.command()(each)
    try:
        code = typer.main.get_command(app).main(
            args=list(invocation.arguments),
            prog_name=f"coterie {invocation.command}",
            standalone_mode=False,
        )
        if code == INTERRUPTED:  # typer returns it instead of raising
            raise KeyboardInterrupt
    except click.ClickException as error:
        raise ConfigError(
            f"{error.format_message()} See: coterie {invocation.command} --help"
        ) from error


def _invocation(name: str, rest: list[str]) -> Invocation:
    """Takes `--json` off before anyone else parses; Hydra would refuse it. `--` ends options."""
    end = rest.index("--") if "--" in rest else len(rest)
    options = [argument for argument in rest[:end] if argument != "--json"]
    return Invocation(name, (*options, *rest[end:]), json=len(options) < end)


def _complain(
    invocation: Invocation,
    code: int,
    kind: str,
    message: str,
    details: Mapping[str, Any] = MappingProxyType({}),
) -> int:
    print(f"coterie {invocation.command}: {message}", file=sys.stderr)
    if invocation.json:
        emit_json({**details, "error": {"code": code, "kind": kind, "message": message}})
    return code


def _help(commands: dict[str, metadata.EntryPoint]) -> str:
    width = max(map(len, commands), default=0)
    lines = [f"  {name:<{width}}  {_summary(commands[name])}" for name in sorted(commands)]
    return "\n".join(
        [
            "Usage: coterie COMMAND [ARGUMENT ...] [--json]",
            "",
            "Sites that may not share data fine-tune one Transformer together.",
            "",
            "Commands:",
            *lines,
            "",
            "Example: coterie simulate privacy.epsilon=1 federation.sites=3",
            "Help of one command: coterie COMMAND --help",
        ]
    )


def _summary(point: metadata.EntryPoint) -> str:
    """First docstring line of a command's function, read without importing its module."""
    spec = util.find_spec(point.module)
    if spec is None or spec.origin is None:
        return "(not installed)"
    for node in ast.parse(Path(spec.origin).read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef) and node.name == point.attr:
            return (ast.get_docstring(node) or "").split("\n")[0]
    return ""

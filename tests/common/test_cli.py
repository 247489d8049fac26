import json
import re
import subprocess
import sys
import types
from importlib import metadata
from pathlib import Path

import pytest

import common
from common import cli
from common.errors import (
    ConfigError,
    CoterieError,
    FederationError,
    PrivacyRefusedError,
    VerificationError,
)

CHECKOUT = Path(__file__).resolve().parent.parent.parent
ENTRY_POINTS = {point.name: point for point in metadata.entry_points(group=cli.GROUP)}


def test_the_package_under_test_is_this_checkout():
    """Another installed copy, or the folder tests/common, would make every test here idle."""
    assert Path(common.__file__) == CHECKOUT / "common" / "__init__.py"


def test_help_lists_every_command_with_a_summary_and_imports_none_of_them():
    """Checked in another process, since this one has imported everything already."""
    program = (
        "import json, sys\n"
        "from common import cli\n"
        "code = cli.main(['--help'])\n"
        "print(json.dumps([code, sorted(sys.modules)]))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=CHECKOUT, capture_output=True, text=True, check=True
    )
    *lines, last = done.stdout.splitlines()
    code, modules = json.loads(last)
    assert code == 0
    assert "common.cli" in modules
    assert not {"torch", "hydra", "flwr", "transformers"} & set(modules)
    assert not {point.module for point in ENTRY_POINTS.values()} & set(modules)
    listed = dict(
        re.match(r"  ([\w-]+) +(.*)$", line).groups() for line in lines if line[:2] == "  "
    )
    assert set(listed) == set(ENTRY_POINTS)
    assert len(listed) >= 5
    for name, summary in listed.items():
        assert len(summary.split()) >= 4, name


LIGHT = {
    *("account", "ledger", "logs", "monitor", "node", "provision", "report", "status", "stop"),
    "witness",
}
"""Commands that answer from files, or from elsewhere, and are asked often."""


def test_whoever_only_looks_does_not_wait_for_a_model():
    """torch and transformers take five seconds to be imported, and the accountants one."""
    program = (
        "import json, sys\n"
        "from importlib import metadata\n"
        "points = metadata.entry_points(group='coterie.commands')\n"
        "found = [point.load() for point in points if point.name in sys.argv[1:]]\n"
        "print(json.dumps([len(found), sorted(sys.modules)]))\n"
    )
    command = [sys.executable, "-c", program, *LIGHT]
    done = subprocess.run(command, cwd=CHECKOUT, capture_output=True, text=True, check=True)
    count, modules = json.loads(done.stdout)
    assert count == len(LIGHT)
    assert not {"torch", "transformers", "flwr", "dp_accounting", "pandas"} & set(modules)


@pytest.mark.parametrize("arguments", [[], ["-h"], ["--help"]])
def test_no_command_or_help_exits_0(coterie, arguments):
    answer = coterie(*arguments)
    assert answer.code == 0
    assert answer.out.startswith("Usage: coterie COMMAND")


def test_version_is_the_installed_one(coterie):
    answer = coterie("--version")
    assert (answer.code, answer.out) == (0, f"coterie {metadata.version('coterie')}\n")


def test_unknown_command_exits_2_and_names_the_known_ones(coterie):
    answer = coterie("simulat")
    assert answer.code == 2
    assert answer.out == ""
    assert answer.err.count("\n") == 1
    for name in ENTRY_POINTS:
        assert name in answer.err


REFUSED = [
    ("nonsense",),
    ("plan", "privacy.epsilon=-1"),
    ("simulate", "privacy.epsilom=1"),
    ("account", "/nowhere.json", "--delta", "1e-5"),
    ("account",),
]


@pytest.mark.parametrize("arguments", REFUSED, ids=" ".join)
def test_a_refusal_with_json_is_exactly_one_object(coterie, arguments):
    answer = coterie(*arguments, "--json")
    assert answer.code == 2
    assert set(answer.json) == {"error"}
    assert set(answer.json["error"]) == {"code", "kind", "message"}
    assert answer.json["error"]["code"] == 2
    assert answer.json["error"]["kind"] == "ConfigError"
    assert answer.json["error"]["message"] in answer.err
    assert answer.out.count("\n") == 1


@pytest.mark.parametrize("arguments", REFUSED, ids=" ".join)
def test_a_refusal_without_json_is_one_line_on_stderr_only(coterie, arguments):
    answer = coterie(*arguments)
    assert (answer.code, answer.out) == (2, "")
    assert answer.err.startswith(f"coterie {arguments[0]}: ")
    assert answer.err.count("\n") == 1


@pytest.fixture
def command(monkeypatch):
    """Makes a function the command `stand-in`."""

    def install(function):
        module = types.ModuleType("stand_in_command")
        module.run = function
        monkeypatch.setitem(sys.modules, module.__name__, module)
        point = metadata.EntryPoint("stand-in", "stand_in_command:run", cli.GROUP)
        monkeypatch.setattr(cli.metadata, "entry_points", lambda **_: [point])

    return install


@pytest.mark.parametrize(
    "error",
    [CoterieError, ConfigError, PrivacyRefusedError, FederationError, VerificationError],
)
def test_each_error_becomes_its_exit_code_and_kind(coterie, command, error):
    def refuse(_invocation):
        raise error("why, and what to do")

    command(refuse)
    answer = coterie("stand-in", "--json")
    assert answer.code == error.exit_code
    assert answer.json == {
        "error": {
            "code": error.exit_code,
            "kind": error.__name__,
            "message": "why, and what to do",
        }
    }


def test_an_interrupt_exits_130(coterie, command):
    def interrupted(_invocation):
        raise KeyboardInterrupt

    command(interrupted)
    answer = coterie("stand-in", "--json")
    assert answer.code == 130
    assert answer.json["error"]["kind"] == "Interrupted"


def test_a_mistake_of_ours_is_not_dressed_up_as_the_users(coterie, command):
    def broken(_invocation):
        raise ZeroDivisionError

    command(broken)
    with pytest.raises(ZeroDivisionError):
        coterie("stand-in")


@pytest.mark.parametrize(
    ("given", "arguments", "json_wanted"),
    [
        (["a", "b"], ("a", "b"), False),
        (["a", "--json", "b"], ("a", "b"), True),
        (["--json"], (), True),
        (["a", "--", "--json"], ("a", "--", "--json"), False),
        (["--json", "--", "--json"], ("--", "--json"), True),
    ],
)
def test_json_is_taken_off_wherever_it_stands_before_two_dashes(
    coterie, command, given, arguments, json_wanted
):
    seen = []
    command(seen.append)
    assert coterie("stand-in", *given).code == 0
    assert seen == [cli.Invocation("stand-in", arguments, json_wanted)]


def test_emitted_json_has_no_nan():
    with pytest.raises(ValueError, match="Out of range"):
        cli.emit_json({"epsilon": float("nan")})

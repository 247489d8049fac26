"""Every error a person can meet, in one tree; each class has one exit code.

CoterieError                  1
├── ConfigError               2  a value the user can change
├── PrivacyRefusedError       3  budget or policy says no
├── FederationError           4  quorum, deadline, malformed replies
└── VerificationError         5  an artefact is not what it claims to be
"""

from typing import Any


class CoterieError(Exception):
    """Root of the tree: its text is one line for a person, with the remedy."""

    exit_code = 1

    def __init__(self, *args: object) -> None:
        super().__init__(*args)
        self.details: dict[str, Any] = {}
        """What a machine that asked for `--json` gets beside the error."""


class ConfigError(CoterieError):
    """A configuration value is unknown, ill-typed or breaks a rule."""

    exit_code = 2


class PrivacyRefusedError(CoterieError):
    """The privacy rules forbid what was asked; nothing was released."""

    exit_code = 3


class FederationError(CoterieError):
    """Too few valid replies, too late."""

    exit_code = 4


class VerificationError(CoterieError):
    """A file or message is malformed, altered or of another run."""

    exit_code = 5


def first_line(error: Exception) -> str:
    r"""What a library says in its first line, and in the next where that one only announces it.

    >>> first_line(ValueError("Field 'layers':\n    expected int\nSee the manual"))
    "Field 'layers': expected int"
    """
    lines = [line.strip() for line in str(error).strip().splitlines()] or [""]
    return " ".join(lines[: 2 if lines[0].endswith(":") else 1])

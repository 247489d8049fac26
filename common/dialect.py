"""How a CSV file spells its records: which bytes are which characters, and what parts the columns.

Nothing here depends on what a file holds, beyond the mark that it may begin with: a rule that
looked at the texts would let one record change how others are read.
"""

import codecs
from dataclasses import dataclass
from enum import Enum

ERRORS = "coterie.windows-1252"
"""Name of what decodes bytes that are not UTF-8, byte by byte."""
UTF_16_MARKS = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
"""First bytes that declare an encoding, as those of Excel's "Unicode text" do."""


class Separator(Enum):
    """What stands between two columns."""

    comma = ","
    semicolon = ";"
    tab = "\t"
    pipe = "|"


@dataclass(frozen=True)
class Dialect:
    """What a config says of its CSV files."""

    encoding: str = ""
    """Empty: UTF-8, where bytes that are not are taken for Windows-1252, each by itself."""
    separator: Separator = Separator.comma

    def spelling(self, head: bytes) -> tuple[str, str]:
        """Encoding, and what becomes of bytes that are not of it, of a file that begins so."""
        encoding = self.encoding or ("utf-16" if head[:2] in UTF_16_MARKS else "utf-8")
        return encoding, ERRORS if encoding == "utf-8" and not self.encoding else "strict"


def is_encoding(name: str) -> bool:
    """Whether texts can be read in an encoding of that name; an empty name asks for none."""
    try:
        return not name or "a".encode(name) != b""
    except (LookupError, UnicodeError, ValueError):
        return False


def separator_of(header: str, column: str) -> Separator | None:
    """What parts the columns of a first line that was read as one column, if it has `column`.

    >>> separator_of("subject;body;label", "body")
    <Separator.semicolon: ';'>
    """
    for separator in Separator:
        names = [name.strip().strip('"') for name in header.split(separator.value)]
        if len(names) > 1 and column in names:
            return separator
    return None


def _windows_1252(error: UnicodeError) -> tuple[str, int]:
    """The characters of bytes that are not UTF-8, and where decoding goes on.

    Five bytes stand for nothing in it; they become the control characters of their number.
    """
    if not isinstance(error, UnicodeDecodeError):
        raise error
    wrong = error.object[error.start : error.end]
    return "".join(_character(byte) for byte in wrong), error.end


def _character(byte: int) -> str:
    try:
        return bytes([byte]).decode("cp1252")
    except UnicodeDecodeError:
        return chr(byte)


codecs.register_error(ERRORS, _windows_1252)

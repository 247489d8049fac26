"""What the mathematics of this machine's processor must be told before it is loaded."""

from pathlib import Path

CPUINFO = Path("/proc/cpuinfo")
AMD = "AuthenticAMD"
REPRODUCIBLE = "AUTO,STRICT"
"""MKL's conditional numerical reproducibility, on whatever instructions there are."""


def steady_products(cpuinfo: Path = CPUINFO) -> dict[str, str]:
    """Environment with which MKL rounds a row of a product in the same way wherever it stands.

    On AMD's processors it does not by itself, where matrices are small: then a record's clipped
    gradient would depend, in its last bit, on its place in a batch, and `client.preflight` refuse
    the quick engine. There this costs nothing that was measured. On Intel's it is not needed.
    """
    try:
        is_amd = AMD in cpuinfo.read_text("utf-8")
    except (OSError, UnicodeDecodeError):  # no Linux, or nobody knows
        return {}
    return {"MKL_CBWR": REPRODUCIBLE} if is_amd else {}

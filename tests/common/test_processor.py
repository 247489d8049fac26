"""A row of a product is rounded alike wherever it stands, on every processor that was met."""

import os
import subprocess
import sys

import pytest

from common.processor import steady_products

ROWS = """
import torch
torch.manual_seed(0)
for records in (8, 16, 32):
    for width in (6, 8, 32, 384):
        layer, batch = torch.nn.Linear(width, width), torch.randn(records, 5, width)
        forwards, backwards = layer(batch), layer(batch.flip(0)).flip(0)
        assert torch.equal(forwards, backwards), (records, width)
"""


@pytest.mark.parametrize("threads", ["1", "2"])
def test_a_row_is_rounded_alike_wherever_it_stands(threads):
    environment = {**os.environ, **steady_products(), "OMP_NUM_THREADS": threads}
    done = subprocess.run(
        [sys.executable, "-c", ROWS], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("vendor", "told"),
    [("AuthenticAMD", {"MKL_CBWR": "AUTO,STRICT"}), ("GenuineIntel", {}), ("", {})],
)
def test_only_who_needs_it_is_told(tmp_path, vendor, told):
    path = tmp_path / "cpuinfo"
    if vendor:
        path.write_text(f"processor : 0\nvendor_id : {vendor}\n")
    assert steady_products(path) == told

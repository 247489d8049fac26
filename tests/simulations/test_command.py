"""What `coterie simulate` imports before it does anything: seconds that a first reply waits for."""

import json
import subprocess
import sys

from simulations.command import are_asked

LATER = {
    "datasets": "a hub's data, and deals that are not iid",
    "flwr_datasets": "deals that are not iid",
    "matplotlib": "the report",
    "nltk": "ROUGE",
    "opacus": "the cross-check of a price, and models that need its hooks",
    "pandas": "CSV",
    "peft": "adapters",
    "sklearn": "the digits",
    "torchmetrics": "metrics, after training",
}
"""What is imported where it is needed, and for what."""
IMPORTS = """
import gc, json, sys
import common.cli
with common.cli.importing():
    import simulations.run
print(json.dumps([sorted(sys.modules), gc.get_freeze_count(), gc.isenabled()]))
"""


def test_what_the_first_reply_may_not_need_is_imported_later():
    answer = subprocess.run([sys.executable, "-c", IMPORTS], check=True, stdout=subprocess.PIPE)
    modules, frozen, collects = json.loads(answer.stdout)
    assert "torch" in modules
    assert set(LATER) & set(modules) == set()
    assert frozen > 100_000  # no collection looks at them again
    assert collects


def test_workers_are_asked_for_by_number():
    assert are_asked(("engine.workers=2",))
    assert not are_asked(("engine.workers=2", "engine.workers=1"))
    assert not are_asked(("engine.workers=2", "engine=ray"))
    assert not are_asked(("engine.threads=2",))

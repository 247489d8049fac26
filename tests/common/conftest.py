"""What tests of what travels have in common."""

import pytest
from flwr.supercore.task_identity import TaskIdentity


@pytest.fixture
def coordinator(monkeypatch):
    """`Message()` reads the sender from here; a Flower process sets it at start."""
    monkeypatch.setattr(TaskIdentity, "_run_id", 1)
    monkeypatch.setattr(TaskIdentity, "_node_id", 1)
    monkeypatch.setattr(TaskIdentity, "_task_id", 1)

"""What a node's operator may watch, and what a line of its log is."""

import io
import json
import logging

import grpc
import pytest
import torch
from grpc_health.v1.health_pb2 import HealthCheckRequest
from grpc_health.v1.health_pb2_grpc import HealthStub

from client.vitals import CONNECTED, Vitals
from common import messages
from common.exposition import gpu_memory, health_at
from common.log_lines import JsonLine
from tests.integration.superlink import free_port
from tests.server.test_monitor import scraped


def test_a_scrape_tells_what_was_answered_and_refused():
    vitals = Vitals("ward-1")
    vitals.online(connected=True)
    vitals.moved(received=1000, sent=10)
    vitals.took(None, 2.5)
    vitals.took(messages.LOCAL_FAILURE, 0.5)
    found = scraped(vitals.families)
    assert found["coterie_node_answers_total", "answered"] == 1
    assert found["coterie_node_answers_total", messages.REFUSALS[messages.LOCAL_FAILURE]] == 1
    assert found["coterie_node_connected",] == 1
    assert found["coterie_node_received_bytes_total",] == 1000
    assert found["coterie_node_sent_bytes_total",] == 10
    assert found["coterie_node_answer_seconds",] == 0.5
    assert ("coterie_node_epsilon_spent",) not in found  # before the ledger was priced


def test_a_scrape_tells_what_the_ledger_has_left():
    vitals = Vitals("ward-1")
    vitals._spent = (3.0, 8.0)
    found = scraped(vitals.families)
    assert found["coterie_node_epsilon_spent",] == 3
    assert found["coterie_node_epsilon_remaining",] == 5


def test_a_probe_hears_whether_the_node_is_connected():
    port = free_port()
    with health_at("health", str(port)) as health:
        vitals = Vitals("ward-1", health)
        with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:

            def status(service):
                return HealthStub(channel).Check(HealthCheckRequest(service=service)).status

            assert (status(""), status(CONNECTED)) == (1, 2)
            vitals.online(connected=True)
            assert (status(""), status(CONNECTED)) == (1, 1)
            with pytest.raises(grpc.RpcError):
                status("another")


def test_a_line_of_the_log_is_one_json_object_and_holds_no_traceback():
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(JsonLine())
    log = logging.Logger("trial")
    log.addHandler(handler)
    log.info("a\nb %d", 3, extra={"facts": {"round": 3}})
    try:
        int("what stands in a record")
    except ValueError:
        log.exception("it broke")
    first, second = map(json.loads, stream.getvalue().splitlines())
    assert (first["message"], first["round"], first["level"]) == ("a b 3", 3, "info")
    assert second["exception"] == "ValueError"
    assert "record" not in stream.getvalue()


def test_memory_of_a_gpu_is_told_where_this_process_uses_one(monkeypatch):
    """No machine of ours has one: that what torch says is told, not that it says so."""
    assert not list(gpu_memory())
    for name, value in (
        ("is_available", lambda: True),
        ("is_initialized", lambda: True),
        ("device_count", lambda: 1),
        ("mem_get_info", lambda _: (6, 8)),
        ("memory_reserved", lambda _: 1),
    ):
        monkeypatch.setattr(torch.cuda, name, value)
    found = scraped(gpu_memory)
    kinds = {key[2]: value for key, value in found.items() if key[0] == "coterie_gpu_memory_bytes"}
    assert kinds == {"own": 1, "free": 6, "total": 8}

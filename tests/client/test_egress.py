"""The door of a site: what is not on the list stays, whoever put it into the reply."""

import logging

import numpy as np
import pytest
from flwr.app import (
    Array,
    ArrayRecord,
    ConfigRecord,
    Context,
    Error,
    Message,
    Metadata,
    MetricRecord,
    RecordDict,
)
from flwr.clientapp import ClientApp
from flwr.supercore.task_identity import TaskIdentity

from client.egress import ALLOWED, egress
from client.refusals import CODES
from common import messages
from common.errors import ConfigError, CoterieError

SECRET = "patient 4711"


@pytest.fixture(autouse=True)
def _identity():
    TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, 2, 1


def vector(*names):
    return ArrayRecord({name: Array(np.zeros(3, np.float32)) for name in names})


def answered(content, kind="train"):
    """What leaves when a handler replies with `content`: records, an error, or an exception."""
    app = ClientApp()
    handles = {"train": app.train, "evaluate": app.evaluate, "query": app.query}[kind]

    @handles(mods=[egress])
    def handler(message, context):
        if isinstance(content, Exception):
            raise content
        return Message(content, reply_to=message)

    metadata = Metadata(1, "m-1", 1, 2, "", "1", 1.8e9, 3600.0, kind)
    asked = Message(content=RecordDict(), metadata=metadata)
    return app(asked, Context(1, 2, {}, RecordDict(), {}))


LEAKS = {
    "metric record": {"metrics": MetricRecord({"loss": 0.25})},
    "one more fact": {"facts": ConfigRecord({"round": 1, "records": 4711})},
    "one more array": {"vector": vector("vector", "gradient")},
    "one more record": {"debug": ConfigRecord({"text": SECRET})},
    "a metric under a listed name": {"facts": MetricRecord({"round": 1.0})},
}


@pytest.mark.parametrize("leak", LEAKS)
def test_what_is_not_listed_is_dropped_and_logged(leak, caplog):
    good = {"vector": vector("vector"), "facts": ConfigRecord({"round": 1})}
    with caplog.at_level(logging.WARNING, logger="client.egress"):
        content = answered(RecordDict({**good, **LEAKS[leak]})).content
    assert {*content} <= {"vector", "facts"}
    assert {*content["vector"]} == {"vector"}
    assert {*content.get("facts", {})} <= {"round"}
    assert "and dropped" in caplog.text
    assert SECRET not in caplog.text


def test_a_reply_of_listed_names_leaves_as_it_is(caplog):
    good = RecordDict({"vector": vector("vector"), "facts": ConfigRecord({"round": 1, "cap": 2.0})})
    content = answered(good).content
    assert dict(content["facts"]) == {"round": 1, "cap": 2.0}
    assert content["vector"]["vector"].data == good["vector"]["vector"].data
    assert caplog.text == ""


def test_nothing_is_listed_for_a_kind_of_message_nobody_answers():
    content = answered(RecordDict({"facts": ConfigRecord({"round": 1})}), "query").content
    assert not {*content}
    assert "query" not in ALLOWED


@pytest.mark.parametrize("code", [1, 200, 600, 699])
def test_an_error_of_unknown_code_becomes_a_local_failure(code):
    error = answered(Error(code, SECRET)).error
    assert (error.code, error.reason) == (603, "local failure")


def test_a_known_code_leaves_with_its_fixed_text_only():
    assert answered(Error(602, SECRET)).error.reason == "budget exhausted"


@pytest.mark.parametrize("kind", [*CODES, ConfigError, CoterieError, ValueError, OSError])
def test_an_exception_leaves_as_a_code_whatever_it_says(kind):
    error = answered(kind(SECRET)).error
    assert error.code in messages.REFUSALS
    assert error.reason == messages.REFUSALS[error.code]
    assert error.code == CODES.get(kind, 601 if issubclass(kind, CoterieError) else 603)

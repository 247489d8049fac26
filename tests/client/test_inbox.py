"""The instruction that is being answered: there after any crash, and one node's at a time."""

import errno
import os
from pathlib import Path

import pytest

from client.fleet import Parcel
from client.inbox import INSTRUCTION, Inbox
from common.errors import ConfigError, VerificationError

PART = b"part"


def parcel():
    import hashlib

    name = hashlib.sha256(PART).hexdigest()
    return Parcel(b"envelope", name, {name: PART})


@pytest.fixture
def inbox(tmp_path):
    made = Inbox(tmp_path / "inbox")
    yield made
    made.close()


def test_what_was_put_is_there_for_the_next_process_until_it_is_cleared(inbox):
    assert inbox.waiting() is None
    inbox.put(parcel())
    inbox.close()
    again = Inbox(inbox.folder)
    assert again.waiting() == parcel()
    again.clear()
    assert again.waiting() is None
    inbox._lock = again._lock  # closed at the end


def test_a_second_node_of_the_same_site_is_refused(inbox):
    with pytest.raises(ConfigError, match="another node has it"):
        Inbox(inbox.folder)


@pytest.mark.parametrize("heard", [Inbox.heard, Inbox.clear, lambda one: one.put(parcel())])
def test_who_asked_and_did_not_live_to_hear_is_known_to_the_next_process(inbox, heard):
    assert not inbox.unsure
    inbox.asking()
    inbox.close()
    again = Inbox(inbox.folder)
    assert again.unsure
    heard(again)
    assert not again.unsure
    inbox._lock = again._lock  # closed at the end


def test_an_inbox_that_cannot_be_written_ends_no_idle_node(inbox, monkeypatch):
    """A disk that was mounted anew, for reading only."""
    inbox.asking()

    def refused(*_, **__):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(Path, "touch", refused)
    monkeypatch.setattr(Path, "unlink", refused)
    for _ in range(2):
        inbox.heard()
        assert not inbox.unsure  # or it would step away at every look
        inbox.asking()
        assert inbox.unsure


def test_an_altered_instruction_is_named_and_not_read(inbox):
    inbox.put(parcel())
    path = inbox.folder / INSTRUCTION
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(VerificationError, match="instruction"):
        inbox.waiting()


def test_the_node_id_is_of_one_key_at_one_address(inbox):
    assert inbox.identity("one") is None
    inbox.remember("one", 2**63 + 5)
    assert inbox.identity("one") == 2**63 + 5
    assert inbox.identity("other") is None


def test_others_cannot_read_what_a_coordinator_sent(inbox):
    assert inbox.folder.stat().st_mode & 0o077 == 0


def test_a_reply_that_was_being_sent_goes_on_in_its_own_session_and_no_other(inbox):
    inbox.put(parcel())
    assert inbox.session("reply") == ""
    inbox.sending("reply", "session-1")
    assert inbox.session("reply") == "session-1"
    assert inbox.session("another") == ""
    inbox.clear()
    assert inbox.session("reply") == ""
    inbox.sending("reply", "session-2")
    inbox.put(parcel())  # another instruction: what was sent before is of the past
    assert inbox.session("reply") == ""

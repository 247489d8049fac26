"""Lines of rounds: what of a file is whole, and what is not one."""

import pytest

from common.errors import VerificationError
from server.record import RoundLine, append_line, read_lines, whole_lines, write_lines


def line(number):
    return RoundLine(number, {"accuracy": 0.5}, 1.0, ("site-1",), {}, 10, 5, 2.0, True)


@pytest.fixture
def three(tmp_path):
    for number in (1, 2, 3):
        append_line(tmp_path, line(number))
    return tmp_path


def test_a_line_cut_anywhere_is_left_out_and_the_others_stay(three):
    path = three / "metrics.jsonl"
    whole = path.read_bytes()
    second = len(whole) * 2 // 3
    for length in range(second, len(whole)):
        path.write_bytes(whole[:length])
        assert whole_lines(three) == [line(1), line(2)]
    path.write_bytes(whole)
    assert whole_lines(three) == read_lines(three) == [line(1), line(2), line(3)]


def test_zeros_at_the_end_are_left_out(three):
    """What a file system may leave of a write that a crash overtook."""
    path = three / "metrics.jsonl"
    path.write_bytes(path.read_bytes() + b"\0" * 30)
    assert len(whole_lines(three)) == 3
    path.write_bytes(path.read_bytes() + b"\n")
    assert len(whole_lines(three)) == 3


def test_a_malformed_line_before_the_last_is_named(three):
    path = three / "metrics.jsonl"
    path.write_text(path.read_text().replace('"round": 2', '"round": '))
    with pytest.raises(VerificationError, match=r"metrics\.jsonl: line 2 is malformed"):
        whole_lines(three)


def test_lines_written_anew_are_the_same(three):
    before = (three / "metrics.jsonl").read_bytes()
    write_lines(three, whole_lines(three))
    assert (three / "metrics.jsonl").read_bytes() == before


def test_no_file_has_no_lines(tmp_path):
    assert whole_lines(tmp_path) == []


def test_lines_of_before_elapsed_seconds_were_kept_are_read(three):
    path = three / "metrics.jsonl"
    path.write_text(path.read_text().replace(', "elapsed_s": 0.0', ""))
    assert whole_lines(three) == [line(1), line(2), line(3)]

"""What may be said of the measurements at a site, from its ledger."""

import inspect
import json
import re
from pathlib import Path

from scipy import special

from client import meters, private_step
from common.privacy.verification import verify
from common.privacy.watched import CHECKS, FALSE_ALARMS, watched

LEDGERS = Path(__file__).parents[2] / "assets" / "ledgers"


def test_every_check_that_can_stop_a_step_is_told_and_no_other():
    source = inspect.getsource(meters) + inspect.getsource(private_step)
    named = re.findall(r'"((?:noise|sampler|step|clip|optimizer)-[a-z]+)(?::[^"]*)?"', source)
    assert {check.name for check in CHECKS} == {*named}


def test_the_odds_of_a_false_alarm_are_those_of_the_meters():
    """Nine judgements of a step at most, of two tails each: energy of the step, of all, of its
    pieces; neighbours, pieces and steps that repeat; rate, dispersion and overlap. And one bet,
    which is lost once at such odds over all steps together.
    """
    correlations = 3 * 2 * special.ndtr(-meters.DEVIATIONS)
    assert 6 * 2 * meters.ODDS + correlations + meters.ODDS <= FALSE_ALARMS


def test_a_ledger_says_how_many_rounds_passed_and_how_many_were_stopped():
    books = verify((LEDGERS / "eventful.jsonl").read_bytes()).books
    told = watched(books)
    assert (told["rounds_released"], told["alarms"]) == (3, 0)
    next(iter(books.reservations.values())).reason = "alarm"
    assert watched(books)["alarms"] == 1
    assert json.loads(json.dumps(told)) == told

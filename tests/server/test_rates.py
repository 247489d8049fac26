"""The step size of the head follows the declared noise, and nothing else."""

import math
from dataclasses import replace

import numpy as np
import pytest

from common.config import PrivacyMode
from common.errors import ConfigError
from server.plan import make_plan
from server.rates import MOST, gathered_noise, with_raised_rate

OWN = ["data=csv", "data.path=a.csv", "data.labels=[a,b]", "privacy.noise_multiplier=2.9222"]
MAILS = [*OWN, "federation.sites=10"]


@pytest.fixture
def mails(compose_config):
    """A config of ten sites that declare some records together."""

    def config(records, *more):
        return compose_config(*MAILS, f"data.declared_records={records}", *more)

    return config


def test_the_main_job_keeps_its_step_size(compose_config):
    """Its noise is more than is aimed at; the settings of its results must not move."""
    assert make_plan(compose_config()).config.tuning == compose_config().tuning
    head = compose_config("tuning=head")
    assert make_plan(head).config.tuning == head.tuning


def test_many_records_raise_it_until_the_noise_is_what_is_aimed_at(mails):
    raised = with_raised_rate(mails(4364))
    assert raised.tuning.raised
    assert raised.tuning.head_learning_rate == pytest.approx(4.75, abs=0.02)
    assert gathered_noise(raised) == pytest.approx(0.09, rel=1e-3)
    assert raised.tuning.adapter_learning_rate == mails(4364).tuning.adapter_learning_rate
    assert with_raised_rate(raised) == raised


def test_it_is_never_lowered_and_never_raised_without_end(mails):
    assert with_raised_rate(mails(100)) == mails(100)
    first = mails(10**7).tuning.head_learning_rate
    assert with_raised_rate(mails(10**7)).tuning.head_learning_rate == MOST * first


def test_the_gathered_noise_is_that_of_the_simulated_steps(mails):
    """Independent of the formula: the noise of every site at every step, averaged and added up."""
    config = mails(2000, "federation.sites=4")
    draw, steps, rate = np.random.default_rng(0), config.total_steps, 2.5
    divisor = 0.5 * 2000 / 4
    noise = draw.normal(0, 2.9222, (4000, steps, 4)) / divisor
    assert gathered_noise(config) == pytest.approx((rate * noise.mean(2)).sum(1).std(), rel=0.05)


def test_a_site_that_is_left_out_adds_no_noise_and_sends_no_records(mails):
    all_train, nine_train = mails(4000), mails(4000, "federation.leave_out=site-2")
    assert gathered_noise(nine_train) == pytest.approx(
        gathered_noise(all_train) * math.sqrt(10 / 9)
    )


@pytest.mark.parametrize(
    "changes",
    [
        ["tuning.head_noise=0"],
        ["model.head=native"],
        ["tuning=full"],
        ["task=causal_lm", "data.labels=[]"],
        ["data.declared_records=null"],
        ["privacy.noise_multiplier=null"],
    ],
)
def test_it_stays_where_the_rule_was_not_tried_or_something_is_not_known(mails, changes):
    config = mails(10**5, *changes)
    assert with_raised_rate(config) == config


def test_the_baseline_takes_the_steps_of_the_private_run(mails):
    solved = ["privacy.noise_multiplier=null"]
    private = make_plan(mails(4364, *solved)).config
    baseline = make_plan(mails(4364, "privacy=none", *solved)).config
    assert baseline.privacy.mode is PrivacyMode.none
    assert baseline.privacy.noise_multiplier is None
    assert baseline.tuning == private.tuning
    assert private.tuning.raised


def test_noise_for_persons_counts_all_of_their_records(mails):
    records = mails(10**5)
    privacy = replace(records.privacy, mode=PrivacyMode.person, max_records_per_person=3)
    persons = replace(records, privacy=privacy)
    assert gathered_noise(persons) == pytest.approx(3 * gathered_noise(records))


@pytest.mark.parametrize("value", ["-1", "inf", "nan"])
def test_an_impossible_noise_is_refused(compose_config, value):
    with pytest.raises(ConfigError, match=r"tuning\.head_noise=.*must be a finite number, 0 or"):
        compose_config(f"tuning.head_noise={value}")


def test_means_of_the_first_updates_alone_gather_more_noise(mails):
    """Half of the updates in each mean: a root of two as much."""
    some = ("federation.sites=4", "federation.quorum=0.5", "federation.enough=0.5")
    ratio = gathered_noise(mails(4000, *some)) / gathered_noise(mails(4000, some[0]))
    assert ratio == pytest.approx(math.sqrt(2))

"""FedProx: a pull towards the global parameters, of released values only."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from client.private_step import ParameterGroup, sgd
from client.site import Site
from client.train import Trainer
from common import parameters
from common.config import NoiseSource
from common.privacy.mechanism import round_event, run_events
from common.records import Records
from common.tasks import build_model
from server.plan import make_plan

RATE, MU = 0.5, 0.8


def stepped(gradients, *, mu=None):
    """Parameters of two groups after steps along given gradients, from ones."""
    groups = [
        ParameterGroup((nn.Parameter(torch.ones(3)),), RATE),
        ParameterGroup((nn.Parameter(torch.ones(2)),), 2 * RATE),
    ]
    optimizer = sgd(groups, proximal_mu=mu)
    for gradient in gradients:
        for group in groups:
            group.parameters[0].grad = torch.full_like(group.parameters[0], gradient)
        optimizer.step()
    return [group.parameters[0].detach()[0].item() for group in groups]


def test_a_step_is_the_minimum_of_its_model_and_the_penalty():
    for rate, value in zip((RATE, 2 * RATE), stepped([3.0], mu=MU), strict=True):
        around = torch.linspace(value - 1e-2, value + 1e-2, 201, dtype=torch.float64)
        moved = 1.0 - rate * 3.0
        loss = (around - moved) ** 2 / (2 * rate) + MU / 2 * (around - 1.0) ** 2
        assert around[loss.argmin()].item() == pytest.approx(value, abs=1e-4)


def test_every_step_is_pulled_towards_the_beginning_of_the_round():
    value, weight = 1.0, 1 / (1 + RATE * MU)
    for gradient in (3.0, -1.0, 2.0):
        value = 1.0 + (value - RATE * gradient - 1.0) * weight
    assert stepped([3.0, -1.0, 2.0], mu=MU)[0] == pytest.approx(value, abs=1e-6)


def test_the_strongest_pull_stays_and_never_overshoots():
    assert stepped([3.0] * 9, mu=1e9) == pytest.approx([1.0, 1.0], abs=1e-6)
    assert stepped([3.0] * 9, mu=1e-9) == pytest.approx(stepped([3.0] * 9), rel=1e-6)


@pytest.fixture(scope="module")
def sent(tiny_config, compose_config):
    """The updates of a site that takes the same seeded steps, under fedavg and under fedprox."""
    privacy = replace(tiny_config.privacy, noise=NoiseSource.seeded)
    config = replace(tiny_config, privacy=privacy)
    texts = tuple(f"the goal match {n}" for n in range(20))
    site = Site("site-1", Records(texts, np.arange(20) % 2), ("sport", "money"), None)
    start = parameters.flatten(build_model(config))

    def of(mu, steps):
        name = "fedavg" if mu is None else "fedprox"
        strategy = replace(compose_config(f"strategy={name}").strategy, proximal_mu=mu)
        federation = replace(config.federation, local_steps=steps)
        trainer = Trainer(replace(config, strategy=strategy, federation=federation))
        return trainer.train(site, start, round_number=1)[0] - start

    return of


def test_one_noised_step_is_shrunk_by_what_is_public(sent):
    """The step without the pull is what DP-SGD releases; the rest is a function of it."""
    plain, pulled = sent(None, 1), sent(MU, 1)
    ratios = pulled[np.abs(plain) > 1e-3] / plain[np.abs(plain) > 1e-3]
    assert len(np.unique(ratios.round(4))) == 2  # one for each step size
    assert ((ratios > 0) & (ratios < 1)).all()


def test_a_stronger_pull_leaves_a_site_closer(sent):
    lengths = [np.linalg.norm(sent(mu, 3)) for mu in (None, 0.3, 3.0, 1e7)]
    assert lengths == sorted(lengths, reverse=True)
    assert lengths[-1] < 1e-4 < lengths[0]


def test_the_pull_costs_nothing(tiny_config, compose_config):
    """It is not in the event, nor in what a plan charges: it never looks at a record."""
    pulled = replace(tiny_config, strategy=compose_config("strategy=fedprox").strategy)
    assert round_event(pulled) == round_event(tiny_config)
    assert run_events(pulled) == run_events(tiny_config)
    assert make_plan(pulled).epsilon == make_plan(tiny_config).epsilon

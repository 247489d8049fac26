"""The training that every arm does: one epoch of one batch of 32 records, by SGD, at each site."""

from functools import cache
from itertools import pairwise

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

RECORDS, FEATURES, CLASSES = 32, 64, 10
HIDDEN = {2410: (32,), 75130: (512, 80)}
"""Hidden layers, by the number of parameters."""
RATE = 0.1


def model_of(values: int) -> nn.Sequential:
    """The same weights at every call."""
    widths = (FEATURES, *HIDDEN[values], CLASSES)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        layers: list[nn.Module] = []
        for before, after in pairwise(widths):
            layers += [nn.Linear(before, after), nn.ReLU()]
    model = nn.Sequential(*layers[:-1])
    assert sum(parameter.numel() for parameter in model.parameters()) == values
    return model


@cache
def records_of(site: int) -> tuple[Tensor, Tensor]:
    """(32, 64) features and (32,) labels of a site."""
    made = np.random.default_rng((7, site))
    features = made.standard_normal((RECORDS, FEATURES), dtype=np.float32)
    return torch.from_numpy(features), torch.from_numpy(made.integers(0, CLASSES, RECORDS))


@cache
def trained_model(values: int) -> tuple[nn.Sequential, torch.optim.SGD]:
    """One model, and its optimiser, per process: SGD without momentum keeps nothing of a site."""
    torch.set_num_threads(1)
    model = model_of(values)
    return model, torch.optim.SGD(model.parameters(), lr=RATE)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, site: int) -> None:
    """One epoch at a site."""
    features, labels = records_of(site)
    optimizer.zero_grad()
    functional.cross_entropy(model(features), labels).backward()
    optimizer.step()


def as_one(model: nn.Module) -> NDArray[np.float32]:
    """All parameters as one vector, of which each is a view from now on."""
    whole = torch.from_numpy(flat(model))
    parts = whole.split([parameter.numel() for parameter in model.parameters()])
    for parameter, part in zip(model.parameters(), parts, strict=True):
        parameter.data = part.view_as(parameter)
    return whole.numpy()


def flat(model: nn.Module) -> NDArray[np.float32]:
    """All parameters, in the model's order."""
    with torch.no_grad():
        return torch.cat([parameter.flatten() for parameter in model.parameters()]).numpy()

"""Rate, steps and step size of the head alone, on cached features: what narrowed the search.

    python benchmarks/narrowing.py

Simulates the federation's sum (five sites' noise, one step a round) on pooled features of the
training and validation splits, in random folds of 217 records. The hold-out is never looked at.
"""

import argparse
import statistics

import numpy as np
import torch
from hydra import compose, initialize_config_dir
from torch.nn import functional

from common.composition import CONF
from common.config import from_composed, register_schemas
from common.data import load_splits
from common.model import POOLED, build_classifier, load_tokenizer
from common.privacy.accounting import solve_noise_multiplier
from common.tasks import TASKS

SETTINGS = [  # sample rate, steps, learning rate, momentum
    (0.25, 40, 2.0, 0.0),
    (0.25, 30, 2.5, 0.0),
    (0.25, 40, 0.2, 0.9),
    (0.5, 10, 5.0, 0.0),
    (0.5, 15, 2.5, 0.0),
    (0.5, 15, 5.0, 0.0),
    (0.5, 15, 10.0, 0.0),
    (0.5, 15, 0.5, 0.9),
    (0.5, 20, 3.5, 0.0),
    (0.75, 15, 5.0, 0.0),
    (1.0, 5, 10.0, 0.0),
    (1.0, 15, 5.0, 0.0),
    (1.0, 30, 2.5, 0.0),
]


def main() -> None:
    """Prints one row per setting, private and not."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folds", type=int, default=24)
    options = parser.parse_args()
    features, labels = _features()
    print("| q | steps | lr | momentum | sigma | epsilon 3 (se) | no privacy |")
    print("|---|---|---|---|---|---|---|")
    for q, steps, rate, momentum in SETTINGS:
        sigma = solve_noise_multiplier(3.0, 1e-4, q, steps)
        private, plain = (
            [
                _fold(
                    features,
                    labels,
                    q=q,
                    steps=steps,
                    rate=rate,
                    momentum=momentum,
                    sigma=noise,
                    seed=seed,
                )
                for seed in range(options.folds)
            ]
            for noise in (sigma, 0.0)
        )
        error = statistics.stdev(private) / len(private) ** 0.5
        print(
            f"| {q:g} | {steps} | {rate:g} | {momentum:g} | {sigma:.3f} "
            f"| {statistics.mean(private):.4f} ({error:.4f}) | {statistics.mean(plain):.4f} |",
            flush=True,
        )


def _features() -> tuple[torch.Tensor, torch.Tensor]:
    register_schemas()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        config = from_composed(compose("simulate", ["tuning=head"]))
    splits = load_splits(config.data)
    texts = [*splits.train.texts, *splits.validation.texts]
    encoded = TASKS[config.task.name].encode(
        load_tokenizer(config.model), texts, max_tokens=config.task.max_tokens
    )
    pooled = build_classifier(config).prepare(encoded)[POOLED]
    labels = np.concatenate([splits.train.labels, splits.validation.labels])
    return torch.cat([pooled, torch.ones(len(pooled), 1)], 1), torch.from_numpy(labels)


def _fold(
    features: torch.Tensor,
    labels: torch.Tensor,
    *,
    q: float,
    steps: int,
    rate: float,
    momentum: float,
    sigma: float,
    seed: int,
) -> float:
    """Validation accuracy of one fold; sigma 0 means neither noise nor clipping."""
    draw = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(labels), generator=draw)
    held, kept = order[:217], order[217:]
    one_hot = functional.one_hot(labels).float()
    weights = torch.zeros(one_hot.shape[1], features.shape[1])
    velocity = torch.zeros_like(weights)
    for _ in range(steps):
        chosen = kept[torch.rand(len(kept), generator=draw) < q]
        errors = (features[chosen] @ weights.T).softmax(1) - one_hot[chosen]
        if sigma:
            norms = errors.norm(dim=1) * features[chosen].norm(dim=1)
            errors *= (1 / norms).clamp(max=1)[:, None]
        total = errors.T @ features[chosen]
        total += torch.randn(weights.shape, generator=draw) * sigma * 5**0.5
        velocity = momentum * velocity + total / (q * len(kept))
        weights -= rate * velocity
    predicted = (features[held] @ weights.T).argmax(1)
    return float((predicted == labels[held]).float().mean())


if __name__ == "__main__":
    main()

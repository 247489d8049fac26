"""Steps, step sizes and clip bound on the public validation split, one site's worth of code.

    python benchmarks/narrowing.py FILE [--seeds 0 1 2] [--only REGEX]

Cuts what a federation adds: one process holds all training records behind the frozen prefix, and
the noise of five sites is one draw at sqrt(5) times the standard deviation. Same engine, same
mechanism, same records as the main job at one step a round. Scores the validation split only;
the hold-out is never looked at. Appends one line per run to FILE; a row that is there is not run
again.
"""

import argparse
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from hydra import compose, initialize_config_dir
from numpy.typing import NDArray
from torch import Tensor

from client.clipping.engines import SingleBackward
from client.private_step import ParameterGroup, plain_steps, private_steps, sgd
from common.composition import CONF
from common.config import Config, from_composed, register_schemas
from common.data import load_splits
from common.model import Classifier
from common.prefix import Inputs
from common.pretrained import load_tokenizer
from common.privacy.accounting import solve_noise_multiplier
from common.privacy.mechanism import Mechanism
from common.privacy.noise import Randomness
from common.records import Records
from common.tasks import TASKS, build_model


@dataclass(frozen=True)
class Setting:
    """One row: what is tried, private or not."""

    steps: int
    head: float
    adapters: float
    """Learning rates."""
    q: float = 0.5
    clip: float = 1.0
    alpha: int = 16
    private: bool = True


SETTINGS = [
    Setting(15, 5, 0.2),
    Setting(15, 5, 0.02),
    Setting(15, 5, 0.8),
    Setting(15, 5, 0.1, alpha=32),
    Setting(15, 5, 0.2, alpha=32),
    Setting(15, 10, 0.4, clip=0.5),
    Setting(15, 5, 0.2, private=False),
    Setting(20, 2.5, 0.1),
    Setting(20, 2.5, 0.4),
    Setting(20, 2.5, 0.8),
    Setting(20, 2.5, 0.1, private=False),
    Setting(20, 2.5, 0.4, private=False),
    Setting(20, 2.5, 0.8, private=False),
]


def main() -> None:
    """Runs what is missing."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("file", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--only", default="", help="regular expression: settings to run")
    options = parser.parse_args()
    torch.set_num_threads(1)
    done = options.file.read_text() if options.file.exists() else ""
    for seed in options.seeds:
        for setting in SETTINGS:
            name = f"{setting}, seed {seed}"
            if name not in done and re.search(options.only, name):
                accuracy, loss = run(setting, seed)
                with options.file.open("a") as lines:
                    lines.write(f"{name}: accuracy {accuracy:.4f}, cross entropy {loss:.4f}\n")


def run(setting: Setting, seed: int) -> tuple[float, float]:
    """Validation accuracy and cross entropy after the last step."""
    config = _config(setting, seed)
    model, splits = build_model(config), load_splits(config.data)
    train, labels = _prepared(config, model, splits.train)
    held, held_labels = _prepared(config, model, splits.validation)
    task = TASKS[config.task.name]

    def loss_of(at: NDArray[np.int64]) -> Tensor:
        return task.loss_vector(model(**{n: t[at] for n, t in train.items()}), labels[at])

    optimizer = sgd(
        [
            ParameterGroup(tuple(model.classifier.parameters()), setting.head),
            ParameterGroup(
                tuple(p for p in model.encoder.parameters() if p.requires_grad), setting.adapters
            ),
        ]
    )
    sigma = solve_noise_multiplier(
        config.privacy.epsilon, config.privacy.delta, setting.q, setting.steps
    )
    whole = {
        "mechanism": Mechanism(
            sigma * config.federation.sites**0.5, setting.clip, setting.q, len(labels)
        ),
        "randomness": Randomness.from_entropy(),
        "records": len(labels),
        "steps": setting.steps,
        "physical_batch": config.engine.physical_batch,
    }
    if setting.private:
        private_steps(SingleBackward(model), optimizer, loss_of, **whole)
    else:
        plain_steps(optimizer, loss_of, **whole)
    with torch.no_grad():
        logits = torch.cat(
            [
                model(**{n: t[i : i + 32] for n, t in held.items()})
                for i in range(0, len(held_labels), 32)
            ]
        )
    accuracy = (logits.argmax(1) == held_labels).float().mean()
    return float(accuracy), float(task.loss_vector(logits, held_labels).mean())


def _config(setting: Setting, seed: int) -> Config:
    register_schemas()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return from_composed(compose("simulate", [f"seed={seed}", f"tuning.alpha={setting.alpha}"]))


def _prepared(config: Config, model: Classifier, records: Records) -> tuple[Inputs, Tensor]:
    encoded = TASKS[config.task.name].encode(
        load_tokenizer(config.model), list(records.contents), max_tokens=config.task.max_tokens
    )
    return model.prepare(encoded, batch=16), torch.tensor(np.array(records.labels))


if __name__ == "__main__":
    main()

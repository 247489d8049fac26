"""pfl-research: FederatedAveraging on a SimulatedBackend, in one process, as in its tutorials."""

import time

import numpy as np
import torch
from pfl.aggregate.simulate import SimulatedBackend
from pfl.algorithm.base import NNAlgorithmParams
from pfl.algorithm.federated_averaging import FederatedAveraging
from pfl.callback.base import TrainingProcessCallback
from pfl.data.dataset import Dataset
from pfl.data.federated_dataset import FederatedDataset
from pfl.data.sampling import get_user_sampler
from pfl.hyperparam import NNTrainHyperParams
from pfl.metrics import Metrics
from pfl.model.pytorch import PyTorchModel
from torch import nn
from torch.nn import functional

from benchmarks.arms.mlp import RATE, RECORDS, flat, model_of, records_of
from benchmarks.arms.pace import Pace

ALWAYS = 10**9


class Module(nn.Module):
    """A model with the two methods that pfl asks for."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def loss(self, features: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """The mean over a batch."""
        return functional.cross_entropy(self.inner(features), labels)

    def metrics(self, features: torch.Tensor, labels: torch.Tensor) -> dict[str, float]:
        """None is measured."""
        return {}


class Averaging(FederatedAveraging):
    """Tells when the first user has been trained, and evaluates at no user."""

    def __init__(self, pace: Pace) -> None:
        super().__init__()
        self._pace, self._current_central_iteration = pace, 1

    def train_one_user(self, *arguments, **named):  # noqa: ANN002, ANN003, ANN201 - as it is there
        """As it is there."""
        answer = super().train_one_user(*arguments, **named)
        self._pace.answered()
        return answer


class Turns(TrainingProcessCallback):
    """Waits for its turn after each round."""

    def __init__(self, pace: Pace) -> None:
        self._pace, self._turns, self._left, self._rounds = pace, pace.turns(), 0, 0
        self._started = 0.0

    def begin(self) -> bool:
        """Waits for the next turn. Returns: whether there is one."""
        self._left = self._rounds = next(self._turns, 0)
        self._started = time.perf_counter()
        return bool(self._left)

    def after_central_iteration(self, aggregate_metrics, model, *, central_iteration):  # noqa: ANN001, ANN201
        """Between rounds."""
        self._left -= 1
        if self._left:
            return False, Metrics()
        spent_s = time.perf_counter() - self._started
        self._pace.end_turn(spent_s / self._rounds, lambda: flat(model.pytorch_model.inner))
        return not self.begin(), Metrics()


def main() -> None:
    """Takes its turns."""
    pace, case = Pace.of_command_line()
    torch.set_num_threads(1)
    module, users = Module(model_of(case.values)), [*range(case.sites)]
    model = PyTorchModel(module, torch.optim.SGD, torch.optim.SGD(module.parameters(), lr=1.0))
    known = {user: Dataset([*records_of(user)], user_id=user) for user in users}
    sampler = get_user_sampler("minimize_reuse", users)
    dataset = FederatedDataset(known.__getitem__, sampler)
    turns = Turns(pace)
    if turns.begin():
        np.random.seed(0)
        Averaging(pace).run(
            backend=SimulatedBackend(training_data=dataset, val_data=dataset),
            model=model,
            algorithm_params=NNAlgorithmParams(
                central_num_iterations=ALWAYS,
                evaluation_frequency=ALWAYS,
                train_cohort_size=case.sites,
                val_cohort_size=None,
            ),
            model_train_params=NNTrainHyperParams(
                local_num_epochs=1, local_learning_rate=RATE, local_batch_size=RECORDS
            ),
            callbacks=[turns],
        )


if __name__ == "__main__":
    main()

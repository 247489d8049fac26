"""What FLARE runs: a controller in its server, and an executor at each client."""

from pathlib import Path

import numpy as np
import torch
from nvflare.apis.executor import Executor
from nvflare.apis.fl_constant import ReturnCode
from nvflare.apis.shareable import make_reply
from nvflare.app_common.abstract.fl_model import FLModel
from nvflare.app_common.utils.fl_model_utils import FLModelUtils
from nvflare.app_common.workflows.base_fedavg import BaseFedAvg

from benchmarks.arms.mlp import flat, model_of, train, trained_model
from benchmarks.arms.pace import Pace


class Averaging(BaseFedAvg):
    """FLARE's average of what its clients send, round by round as asked for."""

    def __init__(self, folder: str, sites: int, values: int) -> None:
        self.folder, self.sites, self.values = folder, sites, values
        super().__init__(persistor_id="")

    def run(self) -> None:
        """The workflow."""
        pace, model = Pace(Path(self.folder)), model_of(self.values)
        known = {name: p.detach().numpy() for name, p in model.named_parameters()}
        self.current_round = 0

        def one_round():  # noqa: ANN202 - what shows a vector
            nonlocal known
            self.current_round += 1
            sent = FLModel(params=known, current_round=self.current_round)
            results = self.send_model_and_wait(data=sent, min_responses=self.sites)
            assert len(results) == self.sites
            pace.answered()
            known = self.aggregate(results).params
            return lambda: np.concatenate([value.ravel() for value in known.values()])

        pace.run(one_round)


class Trainer(Executor):
    """One client: the same training as everywhere."""

    def __init__(self, values: int) -> None:
        super().__init__()
        self.values = values

    def execute(self, task_name, shareable, fl_ctx, abort_signal):  # noqa: ANN001, ANN201
        """One task."""
        if task_name != "train":
            return make_reply(ReturnCode.TASK_UNKNOWN)
        model, optimizer = trained_model(self.values)
        given = FLModelUtils.from_shareable(shareable)
        site = int(fl_ctx.get_identity_name().rpartition("-")[2]) - 1
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.copy_(torch.from_numpy(np.array(given.params[name])))
        train(model, optimizer, site)
        params = {name: p.detach().numpy() for name, p in model.named_parameters()}
        assert len(flat(model)) == self.values
        return FLModelUtils.to_shareable(FLModel(params=params))

"""The bare loop: one model, set back in place for each site, and one running sum. The limit."""

import torch

from benchmarks.arms.mlp import flat, train, trained_model
from benchmarks.arms.pace import Pace


def main() -> None:
    """Takes its turns."""
    pace, case = Pace.of_command_line()
    model, optimizer = trained_model(case.values)
    parameters = [*model.parameters()]
    known = [parameter.detach().clone() for parameter in parameters]
    total = [torch.zeros_like(each) for each in known]

    @torch.no_grad()
    def start() -> None:
        for parameter, value in zip(parameters, known, strict=True):
            parameter.copy_(value)

    def one_round():  # noqa: ANN202 - a vector
        for each in total:
            each.zero_()
        for site in range(case.sites):
            start()
            train(model, optimizer, site)
            with torch.no_grad():
                for each, parameter in zip(total, parameters, strict=True):
                    each.add_(parameter)
            pace.answered()
        for value, each in zip(known, total, strict=True):
            value.copy_(each / case.sites)
        start()
        return lambda: flat(model)

    pace.run(one_round)


if __name__ == "__main__":
    main()

"""FedProx's pull: a site's parameters stay near the global ones that its round began with.

The pull comes after the noise and looks at two public things, the parameters as the noised step
left them and those the round began with: post-processing, which costs no epsilon.
"""

from typing import Any

import torch
from torch import Tensor


class ProximalSGD(torch.optim.SGD):
    """Gradient descent on the loss plus mu / 2 |w - g|^2, g being where the parameters are now.

    Each step takes w' = w - lr * gradient, and then the w that minimises |w - w'|^2 / (2 lr) +
    mu / 2 |w - g|^2: g + (w' - g) / (1 + lr * mu). That is the penalty's implicit step: other than
    lr * mu * (w - g) subtracted, it never overshoots, however large lr * mu.
    Source: Li et al. (2020), arXiv:1812.06127, eq. 2; Parikh & Boyd (2014), Proximal Algorithms.
    """

    def __init__(self, groups: list[dict[str, Any]], *, mu: float) -> None:
        """Args: groups: as of `torch.optim.SGD`, each with its `lr`; mu: weight of the penalty."""
        super().__init__(groups, lr=0.0)
        self._mu = mu
        self._anchors: dict[Tensor, Tensor] = {
            p: p.detach().clone() for group in self.param_groups for p in group["params"]
        }

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override] # no closure is taken
        """One step, then the pull."""
        super().step(closure)
        for group in self.param_groups:
            pull = group["lr"] * self._mu
            for parameter in group["params"]:
                parameter.lerp_(self._anchors[parameter], pull / (1.0 + pull))

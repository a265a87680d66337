"""Learning little about much: how much there is of each row and column of matrices that are trained already.

A sixtieth of the parameters, which gradients of few crops tell more about than about the
weights themselves (measured: docs/machine-view.md).
"""

from __future__ import annotations

from torch import Tensor, nn

from ugicm.codec.networks import Weights, weights_of


class Scales(nn.Module):
    """How much there is of each row and column of a module's matrices, each filter and each bias.

    A weight (out, in) is multiplied by 1 + pace (row + column), every other parameter by 1 + pace row, from
    zero.
    """

    def __init__(self, module: nn.Module, pace: float = 1.0) -> None:
        """Of `module`; `pace` multiplies what an optimiser's steps change."""
        super().__init__()
        self.pace = pace
        named = {_key(name): value for name, value in weights_of(module).items()}
        self.rows = nn.ParameterDict({key: value.new_zeros(len(value)) for key, value in named.items()})
        self.columns = nn.ParameterDict(
            {key: value.new_zeros(value.shape[1]) for key, value in named.items() if value.ndim == 2}
        )

    def forward(self, weights: Weights) -> Weights:
        return {name: value * self._times(_key(name), value.ndim) for name, value in weights.items()}

    def _times(self, key: str, dimensions: int) -> Tensor:
        more = self.rows[key].view(-1, *[1] * (dimensions - 1))
        if key in self.columns:
            more = more + self.columns[key]
        return 1 + self.pace * more


def _key(name: str) -> str:
    """A parameter's name where names have no dots."""
    return name.replace(".", "/")

"""Head metrics as counts, which are summed over batches and ranks before ratios are computed."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

TOP = 5


@dataclass(frozen=True)
class HeadCounts:
    """Sums per head: loss [K] float64, positions it counted [K] int64, positions ranked [K] int64, hits [K, TOP] int64
    (hits[:, j]: the token is among the top j + 1), targets outside the draft vocabulary [K] int64.
    """

    loss: Tensor
    counted: Tensor
    ranked: Tensor
    hits: Tensor
    outside: Tensor

    @classmethod
    def zeros(cls, heads: int) -> HeadCounts:
        whole = torch.zeros(heads, dtype=torch.int64)
        hits = torch.zeros(heads, TOP, dtype=torch.int64)
        return cls(torch.zeros(heads, dtype=torch.float64), whole, whole, hits, whole)

    def __add__(self, other: HeadCounts) -> HeadCounts:
        return HeadCounts(self.loss + other.loss, self.counted + other.counted, self.ranked + other.ranked,
                          self.hits + other.hits, self.outside + other.outside)

    def to_tensor(self) -> Tensor:
        """[K, 4 + TOP] float64: one tensor to sum over ranks (counts stay exact below 2**53)."""
        columns = [self.loss, self.counted, self.ranked, self.outside]
        return torch.cat([torch.stack([c.double() for c in columns], 1), self.hits.double()], 1)

    @classmethod
    def from_tensor(cls, values: Tensor) -> HeadCounts:
        whole = values.round().to(torch.int64)
        return cls(values[:, 0], whole[:, 1], whole[:, 2], whole[:, 4:], whole[:, 3])

    def ratios(self) -> dict[str, float]:
        """`head<i>_loss` (mean over counted positions), `head<i>_top<k>` (share of ranked ones), `head<i>_outside`."""
        figures: dict[str, float] = {}
        for head in range(self.loss.shape[0]):
            ranked = max(int(self.ranked[head]), 1)
            figures[f"head{head}_loss"] = float(self.loss[head]) / max(int(self.counted[head]), 1)
            figures[f"head{head}_outside"] = int(self.outside[head]) / ranked
            for top in range(TOP):
                figures[f"head{head}_top{top + 1}"] = int(self.hits[head, top]) / ranked
        return figures

"""What a learning curve says of one drafter: its points, the fit, what it foretells, and its back-test."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from pipelines.curve.points import Trained
from pipelines.curve.power_law import CannotFit, Foretold, PowerLaw, fit_power_law, foretell


@dataclass(frozen=True)
class Measured:
    """The trainings of one share. `values`: tokens per step of each seed; `tokens_per_step`, `seconds`: their means."""

    share: float
    rows: int
    steps: int
    values: tuple[float, ...]
    response_tokens: int
    seconds: float

    @property
    def tokens_per_step(self) -> float:
        return statistics.fmean(self.values)


@dataclass(frozen=True)
class BackTest:
    """The largest share as the curve through all smaller ones foretells it, and as it was measured."""

    foretold: Foretold
    measured: float

    @property
    def held(self) -> bool:
        """Whether the measured value lies in the interval."""
        return self.foretold.low <= self.measured <= self.foretold.high


@dataclass(frozen=True)
class Curve:
    """One drafter's curve. `law`: or why there is none; `ahead`: for each of `curve.ahead`; `backtest`: or why there is none."""

    points: tuple[Measured, ...]
    law: PowerLaw | CannotFit
    ahead: tuple[Foretold, ...]
    backtest: BackTest | CannotFit

    def figures(self) -> dict[str, Any]:
        """As the report's JSON has it."""
        points = [asdict(point) | {"tokens_per_step": round(point.tokens_per_step, 4)} for point in self.points]
        test = asdict(self.backtest) | ({"held": self.backtest.held} if isinstance(self.backtest, BackTest) else {})
        law = asdict(self.law) | ({"rises": self.law.rises} if isinstance(self.law, PowerLaw) else {})
        return {"points": points, "law": law, "ahead": [asdict(one) for one in self.ahead], "backtest": test}


def curves_of(trained: Sequence[Trained], limits: Mapping[str, float], ahead: Sequence[float]) -> dict[str, Curve]:
    """Drafter -> its curve. `limits`: drafter -> most tokens per step that it can reach; `ahead`: multiples of the most rows."""
    return {name: curve_of([one for one in trained if one.point.drafter == name], limit, ahead) for name, limit in limits.items()}


def curve_of(trained: Sequence[Trained], limit: float, ahead: Sequence[float]) -> Curve:
    """The curve of one drafter's trainings."""
    points = tuple(_measured([one for one in trained if one.point.share == share])
                   for share in sorted({one.point.share for one in trained}))
    law, told = _fit(points, limit, [times * points[-1].rows for times in ahead])
    lower, test = _fit(points[:-1], limit, [points[-1].rows])
    backtest = BackTest(test[0], points[-1].tokens_per_step) if isinstance(lower, PowerLaw) else CannotFit(
        f"without the largest share {lower.why}")
    return Curve(points, law, tuple(told), backtest)


def _fit(points: Sequence[Measured], limit: float, ahead: Sequence[float]) -> tuple[PowerLaw | CannotFit, list[Foretold]]:
    rows = [float(point.rows) for point in points for _ in point.values]
    law = fit_power_law(rows, [value for point in points for value in point.values], limit)
    seeds = min((len(point.values) for point in points), default=1)
    return law, foretell(law, rows, ahead, limit, seeds) if isinstance(law, PowerLaw) else []


def _measured(trained: Sequence[Trained]) -> Measured:
    first = trained[0]
    return Measured(first.point.share, first.point.rows, first.point.steps, tuple(one.tokens_per_step for one in trained),
                    first.response_tokens, round(statistics.fmean(one.seconds for one in trained), 1))

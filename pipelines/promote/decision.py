"""The decision of `promote`: which contender of a bench becomes champion, or that the champion stays, and why."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from hydra_core.errors import InputError
from pipelines.bench.plan import NO_CONFIGURATION, PLAIN, is_foreign
from pipelines.config import PromoteSection
from pipelines.promote.gates import GAIN, LOSSLESS, OVER_CHAMPION, Judgement, judge, judgement

FORCED = "promote.force=true"
NO_CHAMPION = "there is no champion yet"


@dataclass(frozen=True)
class Standing:
    """The present champion, as a bench knows it. `name`: what it decodes with; `method`: the contender that it was timed as;
    `why_not`: why the bench does not compare with it, None where it does."""

    model: str
    version: int
    name: str
    method: str | None = None
    why_not: str | None = None


@dataclass(frozen=True)
class Decision:
    """`winner`: the contender that becomes champion, or the name of the champion that stays; `contenders`: all that were judged,
    the fastest first, plain decoding among them; `proof`: the weight format in which losslessness is shown."""

    winner: str
    stays: bool
    why: str
    contenders: tuple[Judgement, ...]
    champion: Standing | None
    proof: str

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)

    def losers(self) -> list[Judgement]:
        """The contenders that were judged and did not win."""
        first = self.champion.method if self.stays and self.champion else None if self.stays else self.winner
        return [one for one in self.contenders if one.gates and one.contender != first]


def decide(methods: Mapping[str, Any], settings: PromoteSection, *, proof: str = "fp32", champion: Standing | None = None,
           sizes: Mapping[str, int | None] | None = None) -> Decision:
    """The fastest contender that passes every gate; without one plain decoding, or the champion that there is.

    `methods`: contender -> figures of a bench's report; `proof`: the format in which losslessness is shown: fp32, or the base's
    own where the bench judged in that; `sizes`: bytes of each contender's heads.

    A champion stays unless a contender is faster by the margin, both timed in this bench. It gives way, to plain decoding too,
    where this bench shows it slower than plain decoding or not lossless. `promote.force` asks for no comparison with it.
    Raises InputError for a bench that has not timed plain decoding.
    """
    _check_plain(methods)
    fault = _fault(methods, champion, proof)
    unasked = NO_CHAMPION if champion is None else FORCED if settings.force else fault
    if champion is None or champion.why_not:  # what an earlier champion was compared with says nothing about this one
        methods = {name: {**figures, "vs_champion": None} for name, figures in methods.items()}
    judged = {name: judge(name, figures, settings, proof, (sizes or {}).get(name),
                          "is the champion" if champion and name == champion.method else unasked)
              for name, figures in methods.items() if name not in (PLAIN, *NO_CONFIGURATION) and not is_foreign(name)}
    rows = tuple(sorted((*judged.values(), judgement(PLAIN, methods[PLAIN])), key=lambda one: -(one.speed_vs_plain or 0.0)))
    sure = {name: one for name, one in judged.items() if one.speed_vs_plain and one.holds(GAIN, OVER_CHAMPION)}
    note = _note(judged, sure)
    able = [name for name, one in sure.items() if one.holds()
            and (unasked is not None or champion is None or name != champion.method)]
    best = max(able, key=lambda name: judged[name].speed_vs_plain or 0.0, default=None)
    if champion is not None and unasked is None and (best is None or champion.why_not):
        return Decision(champion.name, True, _why_it_stays(champion, sure) + note, rows, champion, proof)
    gone = f"; {champion.model} gives way: {fault}" if champion and fault and not settings.force else ""
    if best is None:
        return Decision(PLAIN, False, f"no lossless contender is faster than {settings.min_gain:g}x plain decoding{note}{gone}",
                        rows, champion, proof)
    if champion is not None and best == champion.method:
        return Decision(champion.name, True, f"{best} is the champion, {champion.model}, and remains the fastest{note}", rows,
                        champion, proof)
    found = judged[best]
    against = f", {found.gate(OVER_CHAMPION).measured} the champion" if champion and unasked is None else gone
    return Decision(best, False, f"{found.speed_vs_plain:.2f}x plain decoding, the fastest of {len(sure)} lossless contenders"
                                 f"{against}{note}", rows, champion, proof)


def _check_plain(methods: Mapping[str, Any]) -> None:
    if PLAIN not in methods:
        raise InputError("promote: the bench has no plain decoding to compare with: run `bench` again")
    if not methods[PLAIN]["speed_vs_plain"]:
        raise InputError("promote: the bench timed no single request (bench.single=false), and the champion is chosen by their "
                         "speed: run `hydra-heads bench` without that setting")


def _fault(methods: Mapping[str, Any], champion: Standing | None, proof: str) -> str | None:
    """Why the champion may not stay, shown by this bench; None where it may."""
    if champion is None or champion.why_not or champion.method in (None, PLAIN):
        return None
    found = judge(champion.method, methods[champion.method], PromoteSection(), proof, None, "is the champion")
    if found.gate(LOSSLESS).verdict == "failed":
        return "it is not lossless in this bench"
    if found.spread is not None and found.spread[1] < 1.0:
        return f"it is slower than plain decoding in this bench: {found.spread[0]:.2f}x - {found.spread[1]:.2f}x"
    return None


def _why_it_stays(champion: Standing, sure: Mapping[str, Judgement]) -> str:
    stays = f"the champion stays, {champion.model} ({champion.name})"
    if champion.why_not:
        return f"{stays}: {champion.why_not}"
    rivals = {name: one for name, one in sure.items() if name != champion.method}
    best = max(rivals, key=lambda name: rivals[name].speed_vs_plain or 0.0, default=None)
    if best is None:
        return f"{stays}: no other contender passes the gates"
    found = rivals[best].gate(OVER_CHAMPION)
    reason = rivals[best].why_not() or "is slower than the champion"
    return f"{stays}: {best}, the fastest other contender, {reason}" + (f" ({found.measured})" if not found.reason else "")


def _note(judged: Mapping[str, Judgement], sure: Collection[str]) -> str:
    """Who was not considered, and why."""
    refused = sorted(name for name, one in judged.items() if not one.gate(LOSSLESS).holds)
    noise = {name: why for name, one in sorted(judged.items())
             if name not in refused and name not in sure and (why := one.why_not(GAIN, OVER_CHAMPION))}
    return ((f"; not considered, since not shown to be lossless: {', '.join(refused)}" if refused else "")
            + (f"; not considered: {', '.join(f'{name} ({why})' for name, why in noise.items())}" if noise else ""))

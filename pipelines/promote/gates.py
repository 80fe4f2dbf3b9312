"""The gates of `promote`: what a contender of a bench has to show before it may become champion.

Each gate is a small function of the figures that `bench` reports (`pipelines/bench/report.py`). Intervals are 95 % intervals over
resampled questions of one run (bootstrap), paired: every contender answered every question.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from pipelines.config import PromoteSection

FEW = 6
"""Questions below which an interval over questions says little: each of them, of two or more, has to be answered faster. A
category of fewer is not judged."""
UNEXPLAINED = 1.1
"""How much faster a contender may be than the steps that it saved explain: by so much may timing on a shared machine be off."""
LOSSLESS, ACCEPTANCE, MARGIN, QUESTIONS, EXPLAINED = "lossless", "acceptance", "margin over plain", "questions", "explained"
CATEGORY, SIZE, GAIN, OVER_CHAMPION = "category", "size", "gain", "margin over champion"
Figures = Mapping[str, Any]
"""A contender's figures in a bench's report."""


@dataclass(frozen=True)
class Gate:
    """The answer of one gate. `asked`, `measured`: as a person reads them; `reason`: one line, empty where there is nothing to
    say; `needed`: what was not measured does not pass."""

    name: str
    asked: str
    measured: str
    verdict: Literal["passed", "failed", "not measured"]
    reason: str = ""
    needed: bool = False

    @property
    def holds(self) -> bool:
        """Whether a contender may pass."""
        return self.verdict == "passed" or (self.verdict == "not measured" and not self.needed)


@dataclass(frozen=True)
class Judgement:
    """A contender before the gates. `speed_vs_champion`, `champion_spread`: None where the champion was not timed."""

    contender: str
    tokens_per_step: float | None
    speed_vs_plain: float | None
    spread: tuple[float, float] | None
    speed_vs_champion: float | None
    champion_spread: tuple[float, float] | None
    gates: tuple[Gate, ...] = ()

    def holds(self, *but: str) -> bool:
        """Whether every gate holds, but those named so."""
        return all(gate.holds for gate in self.gates if gate.name not in but)

    def gate(self, name: str) -> Gate:
        """The gate of that name."""
        return next(gate for gate in self.gates if gate.name == name)

    def why_not(self, *but: str) -> str:
        """The reason of the first gate that does not hold, of those that are not named."""
        return next((gate.reason for gate in self.gates if not gate.holds and gate.name not in but), "")


def judge(name: str, figures: Figures, settings: PromoteSection, proof: str, size: int | None, unasked: str | None) -> Judgement:
    """`figures` of contender `name` before every gate.

    `proof`: the weight format in which losslessness is shown; `size`: bytes of its heads, None if unknown; `unasked`: why no
    margin over the champion is asked of it, None where one is.
    """
    return judgement(name, figures, (
        lossless(figures, proof), acceptance(figures, settings.min_tokens_per_step), margin(figures, settings.margin),
        questions(figures, settings.min_questions), explained(figures), category(figures, settings.category_floor),
        size_of(size, settings.max_heads_mb), gain(figures, settings.min_gain),
        over_champion(figures, settings.margin, unasked)))


def judgement(name: str, figures: Figures, gates: tuple[Gate, ...] = ()) -> Judgement:
    """A record of `figures`, with the answers of `gates`."""
    against = figures.get("vs_champion") or {}
    return Judgement(name, figures["tokens_per_step"], figures["speed_vs_plain"], _pair(figures.get("spread")),
                     against.get("speed"), _pair(against.get("spread")), gates)


def lossless(figures: Figures, proof: str) -> Gate:
    """No answer differs by more than a near-tie: from the naive loop in the format `proof` and every other that was checked, and
    from plain decoding among timed answers. One whose answers in `proof` were not checked does not pass."""
    naive = figures.get("naive") or {}
    proven = figures["fp32"] if proof == "fp32" else naive.get(proof)
    checked = [verdicts for verdicts in (figures["fp32"], figures.get("differing"), *naive.values()) if verdicts]
    different = sum(verdicts["different"] for verdicts in checked)
    asked = f"every answer is the naive loop's in {proof}, or a near-tie"
    if different:
        return Gate(LOSSLESS, asked, f"{different} different", "failed", "answers differ by more than a near-tie", needed=True)
    if not proven:
        return Gate(LOSSLESS, asked, "-", "not measured", f"was not checked in {proof}", needed=True)
    ties = proven.get("near_tie", proven.get("near-tie", 0))
    answers = proven.get("answers", proven["identical"] + ties)
    shown = f"{proven['identical']}{f' + {ties} near-ties' if ties else ''} of {answers}"
    return Gate(LOSSLESS, asked, shown, "passed", needed=True)


def acceptance(figures: Figures, floor: float) -> Gate:
    """More than `floor` tokens a step, and more than one: a contender that never drafts is plain decoding."""
    found, asked = figures["tokens_per_step"] or 0.0, f"more than {floor:g} tokens per step"
    shown = f"{found:.2f}" if found else "-"
    if found <= 1.0:
        return Gate(ACCEPTANCE, asked, shown, "failed", "drafts nothing that is accepted")
    return Gate(ACCEPTANCE, asked, shown, *_answer(found > floor, f"{found:.2f} tokens per step, {floor:g} are to be exceeded"))


def margin(figures: Figures, least: float) -> Gate:
    """The whole interval of the speed against plain lies above 1 + `least`. One question has no interval."""
    spread, asked = _pair(figures.get("spread")), f"95 % interval above {1 + least:g}x"
    if spread is None:
        return Gate(MARGIN, asked, "-", "not measured", "has no interval")
    few = "be no faster" if not least else f"not be {1 + least:g}x as fast"
    return Gate(MARGIN, asked, _interval(spread), *_answer(
        spread[0] > 1.0 + least, f"may {few}: {spread[0]:.2f}x - {spread[1]:.2f}x plain"))


def gain(figures: Figures, least: float) -> Gate:
    """The speed against plain is more than `least`."""
    speed = figures["speed_vs_plain"]
    shown = f"{speed:.2f}x" if speed else "-"
    return Gate(GAIN, f"more than {least:g}x plain", shown, *_answer(
        bool(speed) and speed > least, f"{speed:.2f}x is not more than {least:g}x plain" if speed else "was not timed"))


def questions(figures: Figures, least: int) -> Gate:
    """At least `least` questions; of fewer than `FEW` each was answered faster, since the highest of several noisy figures is
    above 1 where none is faster. Benches of earlier versions did not count them."""
    few, faster = figures.get("questions"), figures.get("questions_faster")
    asked = f"{least} or more; of fewer than {FEW} each is faster"
    if few is None or faster is None:
        return Gate(QUESTIONS, asked, "-", "not measured", "its questions were not counted")
    told = f"measured on {few} question{'s' * (few != 1)}, faster on {faster}"
    enough = few >= least and (few >= FEW or faster == few)
    return Gate(QUESTIONS, asked, f"{few}, faster on {faster}", *_answer(
        enough, told + (f"; {least} are asked" if FEW <= few < least else "")))


def explained(figures: Figures) -> Gate:
    """The gain is explained by tokens per step and step time: no step is shorter than plain's, so a contender that is faster than
    the steps that it saved explain was lucky, or plain was not."""
    speed, most = figures["speed_vs_plain"], figures.get("speed_at_plain_steps")
    asked = f"at most {UNEXPLAINED:g} times what the saved steps explain"
    if not speed or not most:
        return Gate(EXPLAINED, asked, "-", "not measured", "is not known")
    return Gate(EXPLAINED, asked, f"{speed:.2f}x of {most:.2f}x", *_answer(
        speed <= UNEXPLAINED * most, f"{speed:.2f}x, of which saved steps explain {most:.2f}x"))


def category(figures: Figures, floor: float) -> Gate:
    """In no category of `FEW` questions or more the whole interval of the speed lies below `floor`."""
    found = {name: (values["speed_vs_plain"], _pair(values["spread"])) for name, values in figures.get("categories", {}).items()
             if values.get("questions", 0) >= FEW and values.get("spread") and values.get("speed_vs_plain")}
    asked = f"no category's 95 % interval below {floor:g}x" if floor else "-"
    if not found:
        return Gate(CATEGORY, asked, "-", "not measured", f"no category has {FEW} questions")
    texts = {name: f"{name} {speed:.2f}x ({_interval(spread)})" for name, (speed, spread) in found.items() if spread}
    slow = [name for name, (_, spread) in found.items() if spread and spread[1] < floor]
    lowest, than = min(found, key=lambda name: float(found[name][0])), "plain" if floor == 1 else f"{floor:g}x plain"
    return Gate(CATEGORY, asked, texts[lowest], *_answer(
        not slow, f"is slower than {than} in {', '.join(texts[name] for name in slow)}"))


def size_of(size: int | None, most: float | None) -> Gate:
    """The heads have at most `most` megabytes (None: any size)."""
    asked = "any size" if most is None else f"at most {most:g} MB"
    if size is None:
        return Gate(SIZE, asked, "-", "not measured", "its heads are gone", needed=most is not None)
    return Gate(SIZE, asked, f"{size / 1e6:.1f} MB", *_answer(
        most is None or size <= most * 1e6, f"its heads have {size / 1e6:.1f} MB, {most or 0:g} are allowed"))


def over_champion(figures: Figures, least: float, unasked: str | None) -> Gate:
    """The whole interval of the speed against the champion lies above 1 + `least`, and of fewer than `FEW` questions each was
    answered faster. `unasked`: why that is not asked, None where it is."""
    found, asked = figures.get("vs_champion"), f"95 % interval above {1 + least:g}x the champion"
    shown = _against(found) if found else "-"
    if unasked is not None:
        return Gate(OVER_CHAMPION, "-", shown, "not measured", unasked)
    if not found:
        return Gate(OVER_CHAMPION, asked, shown, "not measured", "was not timed beside the champion", needed=True)
    spread, few, faster = _pair(found["spread"]), found["questions"], found["questions_faster"]
    if spread is None or (few < FEW and faster < few):
        return Gate(OVER_CHAMPION, asked, shown, "failed", f"was faster than the champion on {faster} of {few} questions")
    return Gate(OVER_CHAMPION, asked, shown, *_answer(
        spread[0] > 1.0 + least, f"may be no faster than the champion: {spread[0]:.2f}x - {spread[1]:.2f}x"))


def _answer(passes: bool, reason: str) -> tuple[Literal["passed", "failed"], str]:
    return ("passed", "") if passes else ("failed", reason)


def _against(found: Mapping[str, Any]) -> str:
    spread = _pair(found["spread"])
    return (f"{found['speed']:.2f}x" if found["speed"] else "-") + (f" ({_interval(spread)})" if spread else "")


def _interval(spread: tuple[float, float]) -> str:
    return f"{spread[0]:.2f} - {spread[1]:.2f}"


def _pair(spread: Sequence[float] | None) -> tuple[float, float] | None:
    return (float(spread[0]), float(spread[1])) if spread else None

"""The page of a decision: every gate of every contender, for a terminal, as Markdown and as one HTML file."""

from __future__ import annotations

import json
from collections.abc import Mapping
from html import escape
from pathlib import Path
from typing import Any

from pipelines.promote.decision import Decision
from pipelines.promote.gates import Gate, Judgement
from pipelines.runtime.files import write_text
from pipelines.runtime.tables import Table

JSON, MARKDOWN, HTML = "decision.json", "decision.md", "decision.html"
MARKS = {"passed": "passed", "failed": "FAILED", "not measured": "-"}
STYLE = ("body{font:15px/1.5 system-ui,sans-serif;margin:2rem auto;max-width:90rem;padding:0 1rem}"
         "table{border-collapse:collapse;margin:1rem 0}td,th{border:1px solid #bbb;padding:.3rem .6rem;text-align:left;"
         "vertical-align:top}th{background:#eee}")


def write_page(folder: Path, decision: Decision, about: Mapping[str, str]) -> list[Path]:
    """Write the decision as JSON, Markdown and HTML into `folder`; returns the files. `about`: what it rests on, by name."""
    text = markdown(decision, about)
    for name, content in ((JSON, json.dumps({"about": dict(about)} | decision.to_json(), indent=2)), (MARKDOWN, text),
                          (HTML, html(title(decision), text))):
        write_text(folder / name, content)
    return [folder / name for name in (JSON, MARKDOWN, HTML)]


def title(decision: Decision) -> str:
    """Who is champion now."""
    if decision.stays and decision.champion is not None:
        return f"The champion stays: {decision.champion.model} ({decision.winner})"
    return f"{decision.winner} becomes champion"


def headline(decision: Decision) -> str:
    """The decision and its reason in one line."""
    return decision.why if decision.stays else f"{title(decision)}: {decision.why}"


def gate_table(decision: Decision) -> Table:
    """A row for each contender: its figures, and of each gate whether it passed and what was measured."""
    names = list(dict.fromkeys(gate.name for one in decision.contenders for gate in one.gates))
    return Table(("contender", "tokens/step", "vs plain", *names), [
        (_name(one, decision), "-" if one.tokens_per_step is None else f"{one.tokens_per_step:.2f}",
         "-" if one.speed_vs_plain is None else f"{one.speed_vs_plain:.2f}x",
         *(_cell(one.gate(name)) if one.gates else "" for name in names)) for one in decision.contenders], title(decision))


def markdown(decision: Decision, about: Mapping[str, str]) -> str:
    """The whole page."""
    asked = {gate.name: gate.asked for one in decision.contenders for gate in one.gates if gate.asked != "-"}
    parts = [f"# {title(decision)}\n\n{_sentence(decision.why)}\n",
             Table(("what", "value"), [(name, value) for name, value in about.items()]).markdown(),
             f"## Gates\n\n{gate_table(decision).markdown()}"]
    if asked:
        parts.append(f"## What was asked\n\n{Table(('gate', 'asked'), list(asked.items())).markdown()}")
    if losers := decision.losers():
        lines = "\n".join(f"- {one.contender}: {_why_lost(one)}" for one in losers)
        parts.append(f"## Who did not win, and why\n\n{lines}\n")
    return "\n".join(parts)


def html(heading: str, text: str) -> str:
    """Markdown with tables as one HTML file without scripts."""
    from markdown_it import MarkdownIt

    body = MarkdownIt("commonmark", {"html": False}).enable("table").render(text)
    return (f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(heading)}</title>'
            f"<style>{STYLE}</style></head><body>\n{body}</body></html>\n")


def short_gates(one: Judgement) -> str:
    """The gates of one contender in one line, for a tag."""
    return ", ".join(f"{gate.name} {gate.verdict}" + (f" ({gate.measured})" if gate.measured != "-" else "")
                     for gate in one.gates)


def short_losers(decision: Decision) -> str:
    """The contenders that did not win in one line, for a tag."""
    return "; ".join(f"{one.contender}: {_why_lost(one)}" for one in decision.losers()) or "none"


def _why_lost(one: Judgement) -> str:
    speed = "not timed" if one.speed_vs_plain is None else f"{one.speed_vs_plain:.2f}x plain"
    return f"{speed}; {one.why_not() or 'passes, and is not the fastest'}"


def _name(one: Judgement, decision: Decision) -> str:
    champion = decision.champion.method if decision.champion and not decision.champion.why_not else None
    marks = [mark for mark, holds in (("wins", one.contender == decision.winner and not decision.stays),
                                      ("champion", one.contender == champion)) if holds]
    return one.contender + (f" ({', '.join(marks)})" if marks else "")


def _cell(gate: Gate) -> str:
    return MARKS[gate.verdict] + (f" {gate.measured}" if gate.measured != "-" else "")


def _sentence(text: str) -> str:
    return f"{text[:1].upper()}{text[1:]}."


def about_of(report: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, str]:
    """What a decision rests on: the base and format of a bench's report, and `values`; what is None is left out."""
    base = report["plan"]["base"]
    found = {"base": f"{base['model']} in {base['dtype']}", **values}
    return {name: str(value) for name, value in found.items() if value is not None}

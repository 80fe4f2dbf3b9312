"""What MLflow shows of a bench: a few figures by the names that all stages share, and each contender's on its heads' model.

All other figures are in the artifact report.json.
"""

from __future__ import annotations

from typing import Any

from hydra_core.storage import as_path
from pipelines.bench.concurrency_report import concurrency_metrics
from pipelines.bench.plan import COMBINED, BenchPlan, combined_heads, is_foreign, own_heads
from pipelines.bench.report import category_markdown, method_table, metrics_of
from pipelines.bench.results import bench_label
from pipelines.config import RunConfig
from pipelines.tracking import Run
from pipelines.tracking.models import model_of


def record_bench(run: Run, config: RunConfig, plan: BenchPlan, figures: dict[str, Any], load: dict[str, Any],
                 digest: str) -> None:
    """Log metrics and a description. `digest`: of the questions, which have the name of their file."""
    label = bench_label(config)
    run.log_dataset(label, digest, config.bench.prompts or "held-out prompts of this run", "bench", of_chain=True)
    _record_heads(run, config, plan, figures, (label, digest))
    run.log_metrics(metrics_of(figures) | concurrency_metrics(load))
    best = fastest(figures)
    shown = contender_figures(figures[best]) if best else {}
    run.log_metrics({name: value for name, value in shown.items() if value is not None})
    if best is None:
        run.describe(f"{config.name}: no contender was timed", "")
        return
    low, high = shown["speed_vs_plain_low"], shown["speed_vs_plain_high"]
    between = "" if low is None else f" ({low:.2f} - {high:.2f})"
    run.log_headline(shown, {"fastest": best})
    run.describe(f"{best}: {shown['speed_vs_plain']:.2f}x plain decoding{between}, {shown['tokens_per_step']:.2f} tokens per "
                 f"step on {figures[best]['questions']} questions of {label}",
                 method_table(figures, "", config.base.dtype).markdown() + category_markdown(figures), ("report.png",))


def fastest(figures: dict[str, Any]) -> str | None:
    """The contender of this project's engine that is fastest against plain decoding, or plain decoding itself; None where no
    single request was timed."""
    timed = {name: values["speed_vs_plain"] for name, values in figures.items()
             if values["speed_vs_plain"] and values["tokens_per_step"] and not is_foreign(name)}
    return max(timed, key=lambda name: timed[name], default=None)


def contender_figures(values: dict[str, Any]) -> dict[str, float | None]:
    """The figures of one contender that people compare, by the names that all stages share."""
    low, high = values["spread"] or (None, None)
    return {"tokens_per_step": values["tokens_per_step"], "speed_vs_plain": values["speed_vs_plain"], "speed_vs_plain_low": low,
            "speed_vs_plain_high": high}


def _record_heads(run: Run, config: RunConfig, plan: BenchPlan, figures: dict[str, Any], data: tuple[str, str]) -> None:
    """Log the figures of each drafter on the model of its heads, with the questions. Those of `combined`, which drafts with the
    last heads and copied text, have names of their own there."""
    last = combined_heads(plan.heads) if COMBINED in figures and own_heads(plan.heads) else None
    for name, folder in plan.heads.items():
        found = contender_figures(figures[name]) if name in figures else {}
        if folder == last:
            found |= {f"{COMBINED}.{key}": value for key, value in contender_figures(figures[COMBINED]).items()}
        if found and (model := model_of(run, config, as_path(folder))) is not None:
            run.log_model_metrics(model.model_id, found, *data)

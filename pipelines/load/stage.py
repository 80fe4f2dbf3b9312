"""`load`: requests to the endpoint at constant rates, up to twice its capacity: latencies, refusals, and that nothing is lost.

    RUN/load/rates.jsonl, report.json, report.md, load.png
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from hydra_core.bundled import BUNDLED, EARLIER
from hydra_core.errors import InputError
from pipelines.batch.endpoint import ask_endpoint
from pipelines.batch.http_backend import api_key
from pipelines.config import RunConfig
from pipelines.load.client import FAILED, LOST, OK, REFUSED, Sent, Target, closed_loop, open_loop, run
from pipelines.load.report import draw, markdown, rate_table
from pipelines.load.soak import Soaked, chaos_folder, run_soak, soak_args
from pipelines.load.soak_chaos import Chaos
from pipelines.rows.parquet_parts import read_parts
from pipelines.rows.prompt_reader import PromptRow, read_prompt_rows
from pipelines.rows.schemas import PROMPTS, content_id
from pipelines.runtime.artifacts import (
    RunPaths,
    StageResult,
    fingerprint,
    finished,
    recorded_settings,
    require_manifest,
    stage_folder,
)
from pipelines.runtime.console import Progress, say
from pipelines.runtime.files import append_line, remove_file, write_text
from pipelines.runtime.ray_cluster import ensure_ray
from pipelines.serve.model_identity import ModelDigest, model_digest
from pipelines.serve.stage import find_args, resolve_args, serving_params, start_app
from pipelines.tracking import Tracker

STAGE = "load"
RECORDED = ("goodput", "first_token_p99_ms", "between_pieces_p99_ms", "refused", "lost")
"""Figures of each rate that are metrics in MLflow; all of them are in the report."""
SOAK_FIELDS = {"soak", "soak_minutes", "soak_seed", "soak_growth"}
"""Settings that no rate depends on."""


def run_load(config: RunConfig) -> StageResult:
    """Measure capacity, then every rate. Raises InputError for missing prompts, and when the endpoint does not answer."""
    prompts = _prompts(config)
    if config.load.soak:
        return _soak(config, prompts)
    folder = RunPaths.of(config).stage(STAGE)
    served = recorded_settings(config.serve, mode="json", exclude={"update"})
    served["model"] = EARLIER if served["model"] == BUNDLED else served["model"]
    settings = config.load.model_dump(mode="json", exclude=SOAK_FIELDS) | {"serve": served}
    serves = _serves(config)
    wanted = fingerprint(STAGE, settings, {"prompts": content_id(*prompts), "serves": str(serves)})
    if (done := finished(folder, wanted)) is not None:
        return done
    tracker = Tracker.open(config)
    with (stage_folder(config, STAGE, folder, wanted) as stage, _endpoint(config, serves) as (target, label),
          tracker.start(STAGE, fingerprint=wanted, params={"serves": label}) as tracked):
        remove_file(folder / "rates.jsonl")  # of a killed run: the capacity may have been another one then
        capacity = _capacity(config, target, prompts)
        rates = [_at(config, target, prompts, share, capacity, folder) for share in config.load.rates]
        figures = {"label": label, "capacity": capacity, "rates": rates}
        write_text(folder / "report.json", json.dumps(figures, indent=2))
        write_text(folder / "report.md", markdown(figures, config.load))
        draw(figures, folder / "load.png")
        rate_table(figures).show()
        tracked.log_metrics(capacity | {f"load.x{rate['share']:g}.{name}": rate[name] for rate in rates for name in RECORDED
                                        if rate[name] is not None})
        tracked.describe(f"{label}: {capacity['tokens_per_second']:.0f} tokens/s, "
                         f"{capacity['requests_per_second']:.2f} requests/s with a full batch",
                         rate_table(figures).markdown(), ("load.png",))
        files = [folder / name for name in ("report.json", "report.md", "load.png", "rates.jsonl")]
        for path in files:
            tracked.log_artifact(path)
        return stage.finish(StageResult(STAGE, tracked.run_id, {"report": str(folder / "report.md")}, figures), files)


def _soak(config: RunConfig, prompts: list[str]) -> StageResult:
    """Minutes of disturbances: of the endpoint given by address by its clients alone, of an application of its own in full."""
    section, slots = config.load, config.serve.max_batch_size
    seed = random.SystemRandom().randrange(2**31) if section.soak_seed is None else section.soak_seed
    if section.address:
        serves = _serves(config)
        with _endpoint(config, serves) as (target, label):
            return run_soak(config, Soaked(target, label, slots, 4 * slots, 1, serves.base.endswith(":fp32"), None), prompts,
                            seed)
    config = soak_args(config)
    args = resolve_args(config)
    with _endpoint(config, model_digest(args)) as (target, label):
        chaos = Chaos(args, chaos_folder(config), random.Random(seed))
        replicas = config.serve.replicas
        return run_soak(config, Soaked(target, label, slots * replicas, args.room * replicas, replicas,
                                       args.base["dtype"] == "fp32", chaos), prompts, seed)


def _prompts(config: RunConfig) -> list[str]:
    section = config.load
    if section.prompts:
        found = [row.prompt for row in read_prompt_rows(section.prompts, "prompt", section.limit)
                 if isinstance(row, PromptRow) and row.prompt]
    else:
        folder = RunPaths.of(config).stage("distill")
        require_manifest(folder, "distill")
        rows = read_parts(folder / "prompts", PROMPTS).to_pylist()
        found = [row["prompt"] for row in rows if row["split"] == "held_out" and row["prompt"]][:section.limit]
    if not found:
        raise InputError(f"load.prompts={section.prompts or 'held-out prompts of this run'}: has no prompt in words")
    return found


def _serves(config: RunConfig) -> ModelDigest:
    """The digest of the model that the endpoint decodes now."""
    section = config.load
    if section.address:
        return ask_endpoint(section.address, config.serve.app_name, api_key(section.key_variable)).digest
    return model_digest(find_args(config))


@contextmanager
def _endpoint(config: RunConfig, serves: ModelDigest) -> Iterator[tuple[Target, str]]:
    """The endpoint that the settings name, which decodes `serves`, or an application that ends with the block; and a label."""
    section = config.load
    headers = api_key(section.key_variable)

    def target(address: str) -> Target:
        return Target(address, config.serve.app_name, section.max_new_tokens, headers, section.patience)

    if section.address:
        yield target(section.address), str(serves)
        return
    args = resolve_args(config)
    with ensure_ray(config):
        app = start_app(config, args)
        try:
            yield target(app.url), f"{app.label}, {serving_params(args)['serves']['base']}"
        finally:
            app.stop()


def _capacity(config: RunConfig, target: Target, prompts: list[str]) -> dict[str, float]:
    """Requests and tokens per second with a full batch always in flight, after a warm-up that does not count."""
    section, slots = config.load, config.serve.max_batch_size * config.serve.replicas
    warm = run(closed_loop(target, prompts, slots, slots))
    sent = run(closed_loop(target, prompts, max(section.capacity_requests, slots), slots))
    if wrong := next((one for one in (*warm, *sent) if one.outcome != OK), None):
        raise InputError(f"load: {target.address} does not answer: {wrong.outcome} ({wrong.why})")
    seconds = max(one.at + one.seconds for one in sent)
    found = {"requests_per_second": len(sent) / seconds, "tokens_per_second": sum(one.tokens for one in sent) / seconds}
    say(STAGE, f"capacity: {found['requests_per_second']:.2f} requests/s, {found['tokens_per_second']:.0f} tokens/s")
    return {name: round(value, 3) for name, value in found.items()}


def _at(config: RunConfig, target: Target, prompts: list[str], share: float, capacity: dict[str, float],
        folder: Path) -> dict[str, Any]:
    """The figures of one rate; the outcome of every request is written to rates.jsonl."""
    section, rate = config.load, share * capacity["requests_per_second"]
    say(STAGE, f"{share:g} times capacity: {rate:.2f} requests/s for {section.seconds:g} s")
    with Progress(STAGE, "requests sent", total=max(1, round(rate * section.seconds))) as progress:
        sent = run(open_loop(target, prompts, rate, section.seconds, progress.advance))
    append_line(folder / "rates.jsonl", "\n".join(json.dumps({"share": share} | asdict(one)) for one in sent).encode())
    return {"share": share, "rate": round(rate, 3)} | summarise(sent, section.first_token_seconds)


def summarise(sent: list[Sent], first_token_seconds: float) -> dict[str, Any]:
    """Counts by outcome, percentiles in milliseconds, tokens per second of all answers and of those whose first token came in
    time (goodput), over the time from the first request to the last end."""
    answered = [one for one in sent if one.outcome == OK]
    seconds = max(one.at + one.seconds for one in sent)
    good = [one for one in answered if one.first is not None and one.first <= first_token_seconds]
    firsts = [one.first for one in answered if one.first is not None]
    gaps = [gap for one in answered for gap in one.gaps]
    counts = {name: sum(one.outcome == name for one in sent) for name in (OK, REFUSED, FAILED, LOST)}
    return {"sent": len(sent), **counts, "tokens_per_second": round(sum(one.tokens for one in answered) / seconds, 1),
            "goodput": round(sum(one.tokens for one in good) / seconds, 1), **_percentiles("first_token", firsts),
            **_percentiles("between_pieces", gaps), **_percentiles("whole", [one.seconds for one in answered])}


def _percentiles(name: str, seconds: list[float]) -> dict[str, float | None]:
    return {f"{name}_p{share}_ms": round(float(np.percentile(seconds, share)) * 1e3, 1) if seconds else None
            for share in (50, 99)}

"""What a stage would do, in words. `--plan` prints this and starts nothing."""

from __future__ import annotations

from pipelines.config import RunConfig
from pipelines.runtime.artifacts import RunPaths

BUDGET_MINUTES = {"distill": 10, "train": 9, "tree": 2, "bench": 9, "promote": 1, "serve": 1, "batch": 1}
"""Time each stage of the quickstart may take on two CPU cores."""
CHAIN = tuple(BUDGET_MINUTES)
SELF_MADE = 640
"""Prompts that the base writes where `prompts.count` is not set."""
HELD_OUT = 24
"""Questions of a bench of held-out prompts where `bench.limit` is not set."""


def describe(config: RunConfig, stage: str) -> list[str]:
    """Lines for a person, one for each step: inputs, sizes, outputs; for the quickstart each stage's time budget too."""
    if stage != "quickstart":
        return [f"{stage}: {line}" for line in _STEPS[stage](config)]
    lines = []
    for name in CHAIN:
        lines.append(f"{name}: at most {BUDGET_MINUTES[name]} min")
        lines += [f"  {line}" for line in _STEPS[name](config)]
    return [*lines, f"{sum(BUDGET_MINUTES.values())} minutes in all on two CPU cores, after installation"]


def _distill(config: RunConfig) -> list[str]:
    prompts, distill, folder = config.prompts, config.distill, RunPaths.of(config).stage("distill")
    count = prompts.count or (SELF_MADE if prompts.source == "self" else None)
    source = (f"the base writes itself, at most {prompts.max_tokens} tokens each" if prompts.source == "self"
              else f"from {prompts.path or 'the records of the endpoint'} ({prompts.source})")
    most = f"{count * len(distill.temperatures)} answers" if count else f"{len(distill.temperatures)} answers a prompt"
    temperatures = ", ".join(f"{value:g}" for value in distill.temperatures)
    width = 2 if distill.feature_dtype == "bf16" else 4
    workers = f"{distill.workers.count}{f' to {distill.max_workers}' if distill.max_workers else ''} worker(s)"
    return [f"{count or 'all'} prompts {source} -> {folder / 'prompts'}",
            f"{most} (temperatures {temperatures}), at most {distill.max_new_tokens} tokens each, "
            f"by {workers}{_engine(config)} -> {folder / 'responses'}",
            f"hidden states of {'all' if distill.features == 'all' else 'held-out'} rows, {width} bytes x the base's width for "
            f"each token -> {folder / 'features'}"]


def _engine(config: RunConfig) -> str:
    """What runs the base where answers are written, if it is not our own engine."""
    if config.engine == "own":
        return ""
    ranks = config.vllm.tensor_parallel_size
    return f" in vLLM{f' (tensor parallel over {ranks})' if ranks else ''}"


def _train(config: RunConfig) -> list[str]:
    train, folder = config.train, RunPaths.of(config).stage("train")
    if train.dry_run:
        return [f"{name}: untrained {heads.kind} heads -> {RunPaths.of(config).stage('train-dry') / name}"
                for name, heads in train.drafters.items() if train.only in (None, name)]
    least, most = train.workers.least, train.workers.most
    workers = f"{least}{f' to {most}' if most > least else ''} worker(s)"
    length = f"{train.max_steps} steps" if train.max_steps else f"{train.epochs:g} epochs"
    return [f"{name}: {heads.num_heads} {heads.kind} heads, draft vocabulary {heads.draft_vocab_size or 'in full'}, "
            f"{length} with {train.rows_per_step} rows a step, {workers}, ZeRO-{train.zero_stage} "
            f"-> {folder / name}"
            for name, heads in train.drafters.items() if train.only in (None, name)]


def _ablate(config: RunConfig) -> list[str]:
    ablate = config.ablate
    if ablate.space:
        return [f"a search over {', '.join(ablate.space)}: {ablate.trials} trials, one after the other, those that fall behind "
                f"stopped early; {ablate.best_seeds} trainings of the best one -> {RunPaths.of(config).stage('ablate')}"]
    trainings = sum(len(variant.seeds) for variant in config.ablate.variants.values())
    return [f"{len(config.ablate.variants)} variants, {trainings} trainings on the rows of this run's distill -> "
            f"{RunPaths.of(config).stage('ablate')}"]


def _curve(config: RunConfig) -> list[str]:
    curve, shares = config.curve, ", ".join(f"{share:g}" for share in sorted(config.curve.shares))
    drafters = curve.drafters or ((config.train.only,) if config.train.only else tuple(config.train.drafters))
    return [f"{', '.join(drafters)}: {len(drafters) * len(curve.shares) * len(curve.seeds)} trainings, one after the other, on "
            f"the shares {shares} of this run's training rows with {len(curve.seeds)} seed(s) each "
            f"-> {RunPaths.of(config).stage('curve')}"]


def _datacard(config: RunConfig) -> list[str]:
    return [f"the rows of this run's distill counted, at most {config.datacard.acceptance_rows} of the held-out ones drafted "
            f"with the heads that are trained -> {RunPaths.of(config).stage('datacard')}"]


def _tree(config: RunConfig) -> list[str]:
    tree, folder = config.tree, RunPaths.of(config).stage("tree")
    sizes = ", ".join(str(size) for size in tree.batch_sizes)
    return [f"step costs of {max(tree.node_counts)} nodes and fewer, batches of {sizes}, measured here",
            *(f"{name}: a tree for each batch size, from the ranks of at most {tree.max_rows} held-out rows "
              f"-> {folder / name}" for name in config.train.drafters if config.train.only in (None, name)),
            *([f"steps up to the base's longest context -> {folder / 'curves'}"] if tree.curves else [])]


def _bench(config: RunConfig) -> list[str]:
    bench, folder = config.bench, RunPaths.of(config).stage("bench")
    prompts = bench.prompts or "held-out prompts of this run"
    methods = ", ".join(bench.methods) or "transformers, ngram, every drafter found (bundled heads too) and combined"
    count = bench.limit or ("all" if bench.prompts else HELD_OUT)
    return [f"plain against {methods}: {count} of {prompts}, at most {bench.max_new_tokens} tokens each, {bench.rounds} round(s) "
            f"-> {folder / 'rows.jsonl'}",
            f"losslessness in fp32 against the naive loop on {bench.identity_prompts} prompts -> {folder / 'report.json'}",
            *(f"{level} requests in flight -> {folder / 'load.jsonl'}" for level in bench.concurrency)]


def _promote(config: RunConfig) -> list[str]:
    model = f"models:/{config.promote.model_name}@{config.promote.alias}"
    if config.promote.rollback:
        return [f"{model} goes back to the version that was champion before"]
    return [f"fastest configuration of this run's bench that passes the gates -> {RunPaths.of(config).stage('promote')}, {model}"]


def _serve(config: RunConfig) -> list[str]:
    model = config.serve.model or f"models:/{config.promote.model_name}@{config.promote.alias}"
    return [f"{model}, {config.serve.replicas} replica(s) of {config.serve.max_batch_size} sequences{_engine(config)} "
            f"-> http://{config.serve.host}:{config.serve.port}"]


def _generate(config: RunConfig) -> list[str]:
    model = config.generate.model or "the champion, or the bundled heads"
    return [f"{len(config.generate.prompts) or 'no'} prompt(s), at most {config.generate.max_new_tokens} tokens each, by {model}"]


def _batch(config: RunConfig) -> list[str]:
    batch = config.batch
    prompts = batch.source or "held-out prompts of this run"
    return [f"{batch.limit or 'all'} of {prompts}, at most {batch.max_new_tokens} tokens each{_batch_engine(config)} "
            f"-> {batch.target or RunPaths.of(config).stage('batch', batch.partition)} ({batch.format})"]


def _batch_engine(config: RunConfig) -> str:
    return f" by {config.batch.address}" if config.batch.address else _engine(config)


def _load(config: RunConfig) -> list[str]:
    load = config.load
    rates = ", ".join(f"{rate:g}" for rate in load.rates)
    target = load.address or "an application started for it"
    return [f"{target}: capacity, then {rates} times that for {load.seconds:g} s each -> "
            f"{RunPaths.of(config).stage('load')}"]


def _compare(config: RunConfig) -> list[str]:
    stage = f"`{config.compare.stage}`" if config.compare.stage else "the runs"
    return [f"{stage} of {', '.join(config.compare.runs) or 'no run yet: name two or more'}, and what led to them, read from "
            f"MLflow: tables, and a page under {config.compare.output or f'{config.storage}/comparisons'}"]


def _loop(config: RunConfig) -> list[str]:
    where = config.prompts.path if config.prompts.source == "served" else config.serve.record.folder
    return [f"distill: the hidden states of what the endpoint {config.serve.app_name} has recorded "
            f"{f'in {where}' if where else 'below the storage'} -> the run {config.name}-{config.loop.turn()}",
            f"with fewer than {config.loop.min_answers} answers it ends here",
            f"train: the champion's heads go on, on those rows and on those of {', '.join(config.train.also) or config.name}",
            "tree, and bench on the standing set and on held-out traffic",
            "promote: what passes its gates becomes the champion, which an endpoint that follows takes by itself"]


_STEPS = {"distill": _distill, "train": _train, "ablate": _ablate, "curve": _curve, "datacard": _datacard, "tree": _tree,
          "bench": _bench, "compare": _compare,
          "promote": _promote, "generate": _generate, "serve": _serve, "batch": _batch, "load": _load, "loop": _loop}

"""The stages of the command line: what each does, which settings it reads, an example, and its short forms."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

CONFIGS = Path(__file__).parent / "configs"
GENERAL = ("name", "storage", "ray_address", "tracking")
"""Settings of every stage."""
MODEL = ("promote.model_name", "promote.alias")
"""Settings that say which champion a stage decodes with."""


@dataclass(frozen=True)
class Flag:
    """A command-line flag that stands for an override. `text`: its help."""

    name: str
    override: str
    text: str


@dataclass(frozen=True)
class Stage:
    """One stage, as the command line knows it.

    `reads`: sections, or single settings, that its help lists. `short`: short name of a setting -> its dotted name.
    `words`: the setting that words without `=` fill; `metavar`: their name in the help. `config`: default of `--config`.
    """

    summary: str
    reads: tuple[str, ...]
    example: str
    short: dict[str, str] = field(default_factory=dict)
    words: str | None = None
    metavar: str = ""
    flags: tuple[Flag, ...] = ()
    config: Path | None = None


STAGES: dict[str, Stage] = {
    "quickstart": Stage(
        "the whole chain, small, on this machine: distill, train, tree, bench, promote, serve and batch",
        ("base", "prompts", "distill", "train", "tree", "ngram", "draft_model", "bench", "promote", "serve", "batch"),
        "hydra-heads quickstart", config=CONFIGS / "quickstart.yaml"),
    "distill": Stage(
        "prompts in; the base's own answers and hidden states out",
        ("base", "prompts", "distill"),
        "hydra-heads distill base.model=/models/mine name=mine prompts.count=2000"),
    "train": Stage(
        "train draft heads on those rows",
        ("base", "train"),
        "hydra-heads train base.model=/models/mine name=mine train.lr=5e-4",
        flags=(Flag("--dry-run", "train.dry_run=true", "train nothing; save untrained heads, to try serving with"),)),
    "ablate": Stage(
        "train variants on the same rows and compare them",
        ("base", "train", "ablate"),
        "hydra-heads ablate --config jobs/configs/ablations/smollm2_135m.yaml"),
    "curve": Stage(
        "what more training rows would bring: trainings on growing shares of the rows, and a curve through them",
        ("base", "train", "curve"),
        "hydra-heads curve base.model=/models/mine name=mine curve.drafters=[hydra]"),
    "datacard": Stage(
        "describe a run's rows: lengths, languages, sources, tasks, and how well trained heads draft each",
        ("base", "prompts", "train.drafters", "train.only", "datacard"),
        "hydra-heads datacard base.model=/models/mine name=mine prompts.source=jsonl prompts.path=/data/prompts.jsonl"),
    "tree": Stage(
        "find the draft tree that is fastest on this machine",
        ("base", "tree", "train.drafters", "train.only"),
        "hydra-heads tree base.model=/models/mine name=mine tree.curves=true"),
    "bench": Stage(
        "time plain decoding, transformers, n-gram lookup, every drafter and the champion on the same prompts",
        ("base", "ngram", "draft_model", "bench", "serve.model", *MODEL),
        "hydra-heads bench base.model=/models/mine name=mine limit=48 max_new_tokens=128",
        short={"prompts": "bench.prompts", "heads": "bench.heads", "limit": "bench.limit",
               "max_new_tokens": "bench.max_new_tokens"}),
    "compare": Stage(
        "compare runs from MLflow: what differs in every stage, speed, acceptance, learning curves, cost",
        ("compare",),
        "hydra-heads compare quickstart mine", words="compare.runs", metavar="RUN"),
    "promote": Stage(
        "register the fastest lossless configuration as champion, if it passes the gates",
        ("base", "promote"),
        "hydra-heads promote base.model=/models/mine name=mine",
        flags=(Flag("--dry-run", "promote.dry_run=true", "print the decision; write and register nothing"),
               Flag("--rollback", "promote.rollback=true", "give the alias back to the champion before; again: further back"))),
    "loop": Stage(
        "train on what the endpoint has recorded, from the champion on, and promote what is better",
        ("loop", "base", "prompts", "distill", "train", "tree", "ngram", "draft_model", "bench", "promote", "serve.model",
         "serve.app_name", "serve.record"),
        "hydra-heads loop base.model=/models/mine name=mine loop.standing=/data/questions.jsonl"),
    "generate": Stage(
        "answer prompts in this process, with a champion or the bundled heads",
        ("base", "generate", *MODEL),
        'hydra-heads generate "Why is the sky blue?"',
        short={"model": "generate.model", "max_new_tokens": "generate.max_new_tokens"},
        words="generate.prompts", metavar="PROMPT"),
    "serve": Stage(
        "start an OpenAI-compatible endpoint that decodes speculatively",
        ("base", "serve", *MODEL),
        "hydra-heads serve base.model=/models/mine serve.port=8000",
        flags=(Flag("--update", "serve.update=true", "give the running application other heads, and end"),)),
    "batch": Stage(
        "answer a file of prompts; resumable",
        ("base", "batch", "serve", *MODEL),
        "hydra-heads batch batch.input=/data/prompts.jsonl batch.output=/data/answers"),
    "load": Stage(
        "send requests at constant rates, up to twice what the endpoint can answer",
        ("base", "load", "serve", *MODEL),
        "hydra-heads load load.prompts=/data/prompts.jsonl load.rates=[0.5,1,2]",
        flags=(Flag("--soak", "load.soak=true", "minutes of kills, swaps and clients that leave; checks that nothing is lost"),)),
}

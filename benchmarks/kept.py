"""Bundles with random weights that take minutes to write: written once, and kept."""

import hashlib
import logging
import shutil
from collections.abc import Callable
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from tqdm import tqdm

from benchmarks.settings import ROOT
from policy_models.spec import PolicySpec
from policy_server.bundle import Bundle, load_bundle
from policy_server.errors import StartupError

Write = Callable[[Path, Any, PolicySpec], None]


def kept_bundle(path: Path, config: Any, spec: PolicySpec, write: Write, hint: str) -> Bundle:
    """Return the bundle at `path`, written first if it is not there, not whole, or made by other code.

    Args:
        path: Its folder.
        config: Of its family.
        spec: What it needs and gives.
        write: Writes it; a function that a process can be started with.
        hint: How large it is and how long that takes, for whoever waits.
    """
    makers, note = _makers(), path.with_suffix(".made-by")
    if path.exists():
        try:
            bundle = load_bundle(path)
        except StartupError as error:
            tqdm.write(f"{path} is not whole: {error}")
        else:
            same_code = note.exists() and note.read_text(encoding="ascii") == makers
            if same_code and (bundle.config, bundle.spec) == (config, spec):
                return bundle
            tqdm.write(f"{path} is of another make")
        shutil.rmtree(path)
    tqdm.write(f"writing {path}: {hint}")
    # In a process of its own, since torch and what it needed for this would stay with this one.
    process = get_context("spawn").Process(target=_write, args=(write, path, config, spec))
    process.start()
    process.join()
    bundle = load_bundle(path)
    note.write_text(makers, encoding="ascii")
    return bundle


def _makers() -> str:
    """Return a digest of the code that a bundle's graphs and its golden case come from."""
    digest = hashlib.sha256()
    for folder in ("models/policy_models", "policy_server/export"):
        for file in sorted((ROOT / folder).rglob("*.py")):
            digest.update(file.read_bytes())
    return digest.hexdigest()


def _write(write: Write, path: Path, config: Any, spec: PolicySpec) -> None:
    import torch

    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("  %(message)s"))
    logger = logging.getLogger("policy_server.export")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    torch.manual_seed(0)
    write(path, config, spec)

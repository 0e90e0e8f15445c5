"""Where a figure comes from: the machine, the versions, the revision."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import re
import subprocess
from pathlib import Path
from typing import Any

import torch

import pyfastft
from pyfastft import _native
from pyfastft.native._cpu_engine import cpu_name

_BUSY_SHARE = 0.5  # of the cores, in runnable processes
PACKAGES = ("torch", "triton", "peft", "transformers", "numpy")
# The folder above an editable install's benchmarks; elsewhere no checkout.
CHECKOUT = Path(__file__).resolve().parent.parent


def default_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def slug(device: torch.device) -> str:
    """The machine's name as a folder: its GPU, or its CPU and the number of cores."""
    if device.type == "cuda":
        return _slug(torch.cuda.get_device_name(device))
    return _slug(f"{cpu_name()} {os.cpu_count()} cores")


def describe(device: torch.device) -> dict[str, Any]:
    """What a result records of its machine."""
    described: dict[str, Any] = {
        "name": slug(device),
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "isa": _isa(),
    }
    if device.type == "cuda":
        described["gpu"] = torch.cuda.get_device_name(device)
    return described


def provenance() -> dict[str, Any]:
    """What a result records of its software: versions, revision, and when."""
    versions = {"python": platform.python_version(), "pyfastft": pyfastft.__version__}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    now = datetime.datetime.now(datetime.timezone.utc)
    return {"date": now.strftime("%Y-%m-%d"), **revision(), "versions": versions}


def revision() -> dict[str, Any]:
    """The checkout's commit, and whether the code differs from it; none outside a checkout."""
    sha = _git("rev-parse", "--short=12", "HEAD")
    if sha is None:
        return {"git_sha": None, "dirty": None}
    # Writing results and the README does not change what was measured.
    code = ("--", ".", ":!benchmarks/results", ":!README.md")
    return {"git_sha": sha, "dirty": bool(_git("status", "--porcelain", *code))}


def load_average() -> float | None:
    """How busy the machine is: runnable processes, averaged over a minute."""
    return round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None


def is_busy(load: float | None) -> bool:
    """Whether that load says that somebody else is working: figures taken then are off."""
    return load is not None and load > _BUSY_SHARE * (os.cpu_count() or 1)


def _git(*arguments: str) -> str | None:
    if not (CHECKOUT / ".git").exists():
        return None
    command = ["git", "-C", str(CHECKOUT), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _isa() -> str | None:
    if _native.why_no_cpu():
        return None
    return _native.ISA_LEVELS[_native.cpu().isa()[1]]


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")

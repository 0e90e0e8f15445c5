"""Files read with every claim they make checked, and written whole or not at all."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import uuid
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """Errors about a file's content name the file, and are ValueErrors."""
    try:
        yield
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from error


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object; ValueError where it is none."""
    return parse_json(path.read_bytes())


def parse_json(text: str | bytes) -> dict[str, Any]:
    """The same of a file's part."""
    try:
        values = json.loads(text)
    except RecursionError:
        raise ValueError("expected a JSON object, got one nested too deeply") from None
    if not isinstance(values, dict):
        raise ValueError(f"expected a JSON object, got {type(values).__name__}")
    return values


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """A safetensors file's tensors; ValueError where it is damaged."""
    return read_tensors_and_metadata(path)[0]


def read_tensors_and_metadata(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """The same, and its header's metadata."""
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        with safe_open(path, framework="pt") as file:
            names = file.keys()
            return {name: file.get_tensor(name) for name in names}, file.metadata() or {}
    # A dtype that torch lacks is a KeyError there.
    except (SafetensorError, KeyError, ValueError, TypeError, OverflowError) as error:
        raise ValueError(f"{path}: expected a safetensors file, got a damaged one ({error})") from (
            error
        )


def file_of_originals(keep_original: str | os.PathLike[str] | None) -> Path | None:
    """The file that ``keep_original`` names, if it names one; FileExistsError where it is there."""
    if keep_original is None or keep_original == "cpu":
        return None
    file = Path(keep_original)
    if file.exists():
        raise FileExistsError(f"{file}: expected no such file to keep the weights in")
    return file


def write_tensors(
    path: Path, tensors: Mapping[str, torch.Tensor], metadata: dict[str, str] | None = None
) -> None:
    """Write a safetensors file; each tensor whole, whatever it is a view of."""
    from safetensors.torch import save

    stored = {name: t.detach().to("cpu", copy=True).contiguous() for name, t in tensors.items()}
    write_file(path, save(stored, metadata=metadata))


def read_exactly(path: Path, names: Collection[str]) -> dict[str, torch.Tensor]:
    """A safetensors file's tensors; ValueError unless they are those of these names."""
    stored = read_tensors(path)
    with naming(path):
        if differing := sorted(stored.keys() ^ set(names)):
            raise ValueError(f"expected the weights of this model, {differing[0]} differs")
    return stored


def write_folder(folder: Path, contents: Mapping[str, bytes], first: Collection[str]) -> None:
    """Write the files whole, under a temporary name each; a new folder appears at once.

    Args:
        first: in a folder that exists, those taken away before the others are put in place, and
            put back last: what is without them is nothing, never something wrong.
    """
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"{folder}: expected a folder, got a file")
    folder.parent.mkdir(parents=True, exist_ok=True)
    staging = folder.parent / f".{folder.name}.{uuid.uuid4().hex}"
    staging.mkdir()
    try:
        for name, content in contents.items():
            _write_through(staging / name, content)
        if not folder.exists():
            staging.rename(folder)
            return
        for name in first:
            (folder / name).unlink(missing_ok=True)
        for name in sorted(contents, key=lambda name: name in first):
            os.replace(staging / name, folder / name)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def write_file(path: Path, content: bytes) -> None:
    """Write one file whole, in the place of what is there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    staging = path.parent / f".{path.name}.{uuid.uuid4().hex}"
    try:
        _write_through(staging, content)
        os.replace(staging, path)
    finally:
        staging.unlink(missing_ok=True)


def _write_through(path: Path, content: bytes) -> None:
    with open(path, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def some(names: Collection[str]) -> str:
    """The first few names, and how many more there are."""
    names = list(names)
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more

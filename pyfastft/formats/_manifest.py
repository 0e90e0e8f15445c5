"""Safetensors files with a manifest.

The metadata has one entry: a line with the sha256 of manifest and tensors, then the manifest, in
JSON.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from pyfastft.formats._files import naming, parse_json, read_tensors_and_metadata, write_tensors
from pyfastft.sparsity.delta import sha256_of


@dataclass(frozen=True)
class Kind:
    """One kind of such files.

    Attributes:
        key: of the metadata's entry.
        what: what errors call a file of this kind.
        version: of the files that are written, and the only one that is read.
        fields: the manifest's keys beside its version, and the type of each.
    """

    key: str
    what: str
    version: int
    fields: Mapping[str, type]

    def write(
        self, path: Path, manifest: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]
    ) -> None:
        """Write a file, whole or not at all."""
        text = json.dumps({"version": self.version, **manifest})
        write_tensors(path, tensors, {self.key: f"{sha256_of_content(text, tensors)}\n{text}"})

    def read(self, path: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
        """A file's manifest and tensors.

        Raises:
            FileNotFoundError: there is none.
            ValueError: it is damaged, of another kind or of another version.
        """
        tensors, metadata = read_tensors_and_metadata(path)
        with naming(path):
            if self.key not in metadata:
                raise ValueError(
                    f"expected a {self.what}, got a safetensors file without {self.key}"
                )
            digest, _, text = metadata[self.key].partition("\n")
            if digest != sha256_of_content(text, tensors):
                raise ValueError("expected content of the sha256 that it states, got another")
            manifest = parse_json(text)
            version = manifest.get("version")
            if version != self.version:
                raise ValueError(f"expected version {self.version}, got {version!r}")
            expect_fields(manifest, {"version": int, **self.fields})
        return manifest, tensors


def expect_fields(values: Mapping[str, Any], fields: Mapping[str, type]) -> None:
    """These keys and no others, each of its type."""
    if differing := sorted(values.keys() ^ fields.keys()):
        raise ValueError(f"expected the keys {', '.join(fields)}, {differing[0]} differs")
    for key, kind in fields.items():
        if type(values[key]) is not kind:
            raise ValueError(f"expected {key} of type {kind.__name__}, got {values[key]!r}")


def sha256_of_content(text: str, tensors: Mapping[str, torch.Tensor]) -> str:
    """Of the manifest's text, and of each tensor in the order of their names."""
    parts = [f"{name} {sha256_of(tensor)}" for name, tensor in sorted(tensors.items())]
    return hashlib.sha256("\n".join([text, *parts]).encode()).hexdigest()

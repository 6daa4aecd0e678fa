"""Tensors of safetensors files by their names."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from jax_mhc import _errors
from jax_mhc._errors import Refusal
from jax_mhc._limits import STREAM_DTYPES

SUFFIX, INDEX = ".safetensors", ".safetensors.index.json"
# The format's words for the dtypes that parameters are stored in.
_DTYPES = {"F64", "F32", "F16", "BF16"}


class Files:
    """Tensors of a file, of the files of an index, or of all files of a folder.

    Attributes:
        names: the tensors' names, and the file of each.
        config: what the config.json beside them holds; None where there is none.
    """

    names: dict[str, Path]
    config: dict[str, Any] | None

    def __init__(self, op: str, path: Path) -> None:
        """Reads names and config.json, and no tensors."""
        self._op = op
        self._open = _errors.require(op, "safetensors", "safetensors").safe_open
        if not path.exists():
            raise Refusal(ValueError, op, "path_or_mapping").expected(
                "a file or folder that is there", repr(str(path)), "Check the path."
            )
        folder = path if path.is_dir() else path.parent
        config = folder / "config.json"
        self.config = self._json(config) if config.exists() else None
        self.names = self._find(path)

    def read(self, names: Iterable[str]) -> dict[str, np.ndarray]:
        """The tensors of these names; each file is opened once."""
        by_file: dict[Path, list[str]] = {}
        for name in names:
            by_file.setdefault(self.names[name], []).append(name)
        tensors = {}
        for path, of_file in by_file.items():
            with self._opened(path) as file:
                there = set(file.keys())
                for name in of_file:
                    dtype = file.get_slice(name).get_dtype() if name in there else None
                    if dtype not in _DTYPES:
                        raise Refusal(TypeError, self._op, name).expected(
                            f"a tensor of dtype {', '.join(STREAM_DTYPES)} in {path.name}",
                            dtype or "none of this name",
                            "Quantised tensors have to be multiplied by their scales; an index "
                            "and its files belong together.",
                        )
                    tensors[name] = file.get_tensor(name)
        return tensors

    def _find(self, path: Path) -> dict[str, Path]:
        indices = [path] if path.name.endswith(INDEX) else []
        if path.is_dir():
            indices = sorted(path.glob(f"*{INDEX}"))
        if len(indices) == 1:
            index = self._json(indices[0])
            files = index.get("weight_map")
            if isinstance(files, dict) and all(isinstance(file, str) for file in files.values()):
                paths = {file: indices[0].parent / file for file in set(files.values())}
                return {name: paths[file] for name, file in files.items()}
            self._refuse(indices[0], "an index with a weight_map")
        parts = sorted(path.glob(f"*{SUFFIX}")) if path.is_dir() else [path]
        if len(indices) > 1 or not parts:
            raise Refusal(ValueError, self._op, "path_or_mapping").expected(
                f"a folder with files {SUFFIX}, and one index at most",
                f"one with {len(parts)} files and {len(indices)} indices",
                "Pass the path of a file or of an index.",
            )
        names: dict[str, Path] = {}
        for each in parts:
            with self._opened(each) as file:
                for name in file.keys():
                    if name in names:
                        raise Refusal(ValueError, self._op, name).expected(
                            "a name that is in one file",
                            f"one in {names[name].name} and in {each.name}",
                            "Pass the path of the file or index that is meant.",
                        )
                    names[name] = each
        return names

    def _json(self, path: Path) -> dict[str, Any]:
        try:
            value = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            value = None
        if not isinstance(value, dict):
            self._refuse(path, "an object in JSON")
        return value

    def _opened(self, path: Path) -> Any:
        try:
            return self._open(path, framework="numpy")
        except Exception:  # of several types, which the package does not promise
            self._refuse(path, "a whole safetensors file")

    def _refuse(self, path: Path, expected: str) -> NoReturn:
        raise Refusal(ValueError, self._op, "path_or_mapping").expected(
            f"{expected} in {path.name}", "something else", "Download or save it again."
        )

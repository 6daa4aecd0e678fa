"""Weights of a plain residual model, and their places in one with hyper-connections."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jax_mhc._errors import Refusal, typed

# The steps to a weight, from the whole model.
Path = tuple[str, ...]

# What a connection owns.
OWN = ("phi", "alpha", "bias", "norm_scale")

# What modules of norms call their scale.
_SCALES = ("scale", "weight")


def is_array(leaf: object) -> bool:
    """True of what moves, and of the shapes alone, which are refused; not of a model's settings."""
    return isinstance(leaf, jax.Array | np.ndarray | jax.ShapeDtypeStruct)


class Move(NamedTuple):
    """A move of weights: `op`, the names of its arguments, and what `names` says."""

    op: str
    plain: str
    model: str
    names: Mapping[Path, Path]

    @classmethod
    def of(cls, op: str, plain: str, model: str, names: object) -> Move:
        """A move, with `names` checked."""
        given = {} if names is None else names
        if not isinstance(given, Mapping) or not all(
            isinstance(name, str) for pair in given.items() for name in pair
        ):
            raise Refusal(TypeError, op, "names").expected(
                f"a mapping of paths in {model} to paths in {plain}",
                typed(names),
                "Separate the steps of a path by dots: {'block.attention': 'block.attn'}.",
            )
        return cls(op, plain, model, {_steps(k): _steps(v) for k, v in given.items()})

    def source(self, path: Path, connections: Collection[Path]) -> Path:
        """The path in the plain model: by `names`, and else without the wrappers."""
        named = next((end for end in range(len(path), 0, -1) if path[:end] in self.names), 0)
        rest = (
            path[at]
            for at in range(named, len(path))
            if not (path[at] == "layer" and path[:at] in connections)
        )
        return (*self.names.get(path[:named], ()), *rest)

    def run(
        self, plain: Mapping[Path, Any], model: Mapping[Path, Any], connections: Collection[Path]
    ) -> dict[Path, jax.Array]:
        """The values of a model: those of its connections, and all others from the plain one."""
        if not connections:
            raise Refusal(ValueError, self.op, self.model).expected(
                "a model with hyper-connections",
                "none",
                "Wrap its layers in MHC; the plain model comes first.",
            )
        for path in self.names:
            if not any(each[: len(path)] == path for each in model):
                raise Refusal(ValueError, self.op, "names").expected(
                    f"a path in {self.model}",
                    repr(_dotted(path)),
                    f"There are such paths as {_dotted(next(iter(model)))!r}.",
                )
        values: dict[Path, Any] = {}
        sources: dict[Path, Path] = {}
        scales = []
        for path, value in model.items():
            own = path[:-1] in connections and path[-1] in OWN
            source = self.source(path, connections)
            if own and path[-1] == "norm_scale" and source not in plain:
                scales.append(path)
            elif own and path[-1] != "norm_scale":
                values[path] = self._array(self.model, path, value)
            else:
                sources[path] = source
        free = [each for each in plain.keys() - set(sources.values()) if each[-1] in _SCALES]
        for path in scales:
            layer = self.source(path[:-1], connections)
            found = [each for each in free if each[: len(layer)] == layer]
            # The norm that the layer had; others are left over, and refused.
            sources[path] = found[0] if len(found) == 1 else (*layer, "norm_scale")
            free = [each for each in free if each != sources[path]]
        used = set(sources.values())
        left = [_dotted(path) for path in plain if path not in used]
        for path, source in sources.items():
            values[path] = self._moved(path, model[path], source, plain, left)
        if left:
            raise Refusal(ValueError, self.op, f"{self.plain}.{left[0]}").expected(
                f"a place in {self.model}",
                f"none, as for {len(left) - 1} more" if len(left) > 1 else "none",
                f"Build both models of the same layers, or name its place: "
                f"names={{path in {self.model}: {left[0]!r}}}.",
            )
        return values

    def _moved(
        self, path: Path, target: Any, source: Path, plain: Mapping[Path, Any], left: list[str]
    ) -> jax.Array:
        argument = f"{self.model}.{_dotted(path)}"
        if source not in plain:
            what = f"a weight {_dotted(source)}"
            if path[-1] == "norm_scale" and source[-1] == "norm_scale":
                what = f"the scale of one norm below {_dotted(source[:-1]) or 'the root'}"
            more = f" and {len(left) - 1} more" if len(left) > 1 else ""
            raise Refusal(ValueError, self.op, argument).expected(
                f"{what} in {self.plain}",
                f"none; left over there: {left[0]}{more}" if left else "none",
                f"Build both models of the same layers, or name it: "
                f"names={{{_dotted(path)!r}: path in {self.plain}}}.",
            )
        value = self._array(self.plain, source, plain[source])
        if (value.shape, value.dtype) != (target.shape, target.dtype):
            raise Refusal(
                ValueError if value.dtype == target.dtype else TypeError,
                self.op,
                f"{self.plain}.{_dotted(source)}",
            ).expected(
                f"{target.dtype}{list(target.shape)} as {argument}",
                f"{value.dtype}{list(value.shape)}",
                "Build both models of the same sizes and dtypes.",
            )
        return jnp.asarray(value)

    def _array(self, argument: str, path: Path, value: Any) -> Any:
        if not isinstance(value, jax.Array | np.ndarray):
            raise Refusal(TypeError, self.op, f"{argument}.{_dotted(path)}").expected(
                "an array", type(value).__name__, "Make the model itself, not its shapes alone."
            )
        return value


def _steps(path: str) -> Path:
    return tuple(path.split("."))


def _dotted(path: Path) -> str:
    return ".".join(path)

"""The one table of layouts and kinds of meshes, and what collectives each of them takes.

`test_mesh.py` tests every op under each row; `benches/collectives.py` counts them.
"""

import dataclasses
import functools
import math
from typing import Any

import jax
from cases import OPS, Case, value_and_vjp
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jax_mhc import presets

CASE = Case((8, 8), 4, 64)
K = CASE.config.num_coefficients(CASE.streams)


@dataclasses.dataclass(frozen=True)
class MeshLayout:
    """The mesh axes over which batch, sequence and hidden width are sharded."""

    batch: tuple[str, ...] = ()
    sequence: tuple[str, ...] = ()
    hidden: tuple[str, ...] = ()

    def spec(self, *last: Any) -> P:
        """Of an array of tokens."""
        return P(self.batch or None, self.sequence or None, *last)

    def specs(self, tree: Any) -> Any:
        """Of the operands and results of an op, by their names."""
        return jax.tree_util.tree_map_with_path(self._spec_of, tree)

    def _spec_of(self, path: Any, leaf: Any) -> P:
        last = path[-1] if path else None
        name = getattr(last, "key", None) or getattr(last, "name", None)
        hidden = self.hidden or None
        if name in ("x", "x_new", "_deferred"):
            return self.spec(None, hidden)
        if name in ("u", "y"):
            return self.spec(hidden)
        if name in ("h_pre", "h_post"):
            return self.spec(None)
        if name in ("h_res", "logits"):
            return self.spec(None, None)
        return P()  # parameters

    def axes(self) -> tuple[str, ...]:
        """All of them."""
        return (*self.batch, *self.sequence, *self.hidden)

    def tokens(self, mesh: Any) -> int:
        """Tokens of a device."""
        shards = (mesh.shape[axis] for axis in (*self.batch, *self.sequence))
        return math.prod(CASE.tokens) // math.prod(shards)

    def channels(self, mesh: Any) -> int:
        """Channels of a device."""
        return CASE.hidden // math.prod(mesh.shape[axis] for axis in self.hidden)


LAYOUTS = {
    "batch": MeshLayout(batch=("a",)),
    "batch over two axes": MeshLayout(batch=("a", "b")),
    "batch and sequence": MeshLayout(batch=("a",), sequence=("b",)),
    "hidden": MeshLayout(hidden=("b",)),
    "hidden over two axes": MeshLayout(hidden=("a", "b")),
    "batch and hidden": MeshLayout(batch=("a",), hidden=("b",)),
}

# The kind of each of the mesh axes a and b, and which of them are those of a shard_map.
MODES = {
    "auto": (AxisType.Auto, AxisType.Auto, ()),
    "explicit": (AxisType.Explicit, AxisType.Explicit, ()),
    "manual": (AxisType.Auto, AxisType.Auto, ("a", "b")),
    "manual, auto": (AxisType.Auto, AxisType.Auto, ("a",)),
    "manual, explicit": (AxisType.Explicit, AxisType.Explicit, ("a",)),
    "explicit, auto": (AxisType.Explicit, AxisType.Auto, ()),
}


def rows() -> list[tuple[str, str]]:
    """Every mode with every layout, but C over axes of two kinds.

    And of two devices no axes of two kinds, of which one would have a single device.
    """
    return [
        (mode, layout)
        for mode, (a, b, manual) in MODES.items()
        for layout in LAYOUTS
        if (a == b and len(manual) != 1)
        or (layout != "hidden over two axes" and jax.device_count() > 2)
    ]


def make_mesh(mode: str, layout: MeshLayout = LAYOUTS["batch"]) -> Any:
    """Two axes over all devices; of two devices the one that tells more."""
    num = jax.device_count()
    shape = (num // 2, 2) if num > 2 else (1, 2) if "b" in layout.hidden else (2, 1)
    return jax.make_mesh(shape, ("a", "b"), axis_types=MODES[mode][:2])


def only(spec: P, axes: Any) -> P:
    """A spec without other axes."""
    entries = [e if isinstance(e, tuple) else (e,) if e else () for e in spec]
    kept = [tuple(axis for axis in entry if axis in axes) for entry in entries]
    return P(*(entry or None for entry in kept))


def spread(
    function: Any, mode: str, layout: MeshLayout, mesh: Any, arrays: Any, results: Any
) -> Any:
    """`function(*arrays, hidden_axis_name=...)`, on the mesh, and the sharded arrays."""
    specs = [layout.specs(array) for array in arrays]
    placed = [
        jax.tree.map(lambda leaf, s: jax.device_put(leaf, NamedSharding(mesh, s)), *pair)
        for pair in zip(arrays, specs, strict=True)
    ]
    if not (manual := MODES[mode][2]):
        return function, placed
    own = functools.partial(only, axes=manual)
    is_spec = functools.partial(lambda leaf: isinstance(leaf, P))
    in_specs, out_specs = (
        jax.tree.map(own, tree, is_leaf=is_spec) for tree in (tuple(specs), layout.specs(results))
    )
    hidden = tuple(axis for axis in layout.hidden if axis in manual)
    on_one = functools.partial(function, hidden_axis_name=hidden or None)
    return (
        jax.shard_map(
            on_one, mesh=mesh, in_specs=in_specs, out_specs=out_specs, axis_names=set(manual)
        ),
        placed,
    )


def forward(op: str, operands: Any, hidden_axis_name: Any = None) -> Any:
    """The fused op."""
    return OPS[op].run(operands, presets.PAPER, "fused", **where(hidden_axis_name))


def both(
    op: str,
    operands: Any,
    cotangents: Any,
    hidden_axis_name: Any = None,
    config: Any = presets.PAPER,
) -> Any:
    """The fused op and its gradients."""
    options = where(hidden_axis_name)
    return value_and_vjp(op, config, "fused", operands, cotangents, **options)


def where(hidden_axis_name: Any) -> dict[str, Any]:
    """The option of the ops."""
    return {"hidden_axis_name": hidden_axis_name} if hidden_axis_name else {}


# ---- collectives --------------------------------------------------------------------------------

# Of one token (or of one matrix): what the all-reduces sum up where C is split.
SUMS = {
    # op: forward, backward
    "pre": (K + 1, CASE.streams),
    "post": (0, CASE.streams + CASE.streams**2),
    "post_pre": (K + 1, K),
    "sinkhorn": (0, 0),
    "head": (CASE.streams + 1, CASE.streams),
    "two_sublayers": (2 * (K + 1), 2 * K),
    # And n for the first u and for the exit's.
    "delayed": (2 * (K + 1), 2 * K + 2 * CASE.streams),
}


def num_parameters(op: str, channels: int) -> tuple[int, int]:
    """Numbers of parameters that have channels, and of the others."""
    n = CASE.streams
    if op in ("post", "sinkhorn"):
        return 0, 0
    num = 2 if op in ("two_sublayers", "delayed") else 1
    return (n * channels * n, 1 + n) if op == "head" else (num * n * channels * K, num * (3 + K))


def expected(op: str, mode: str, layout: MeshLayout, mesh: Any) -> tuple[dict, dict]:
    """The most that `collectives` may give, forward and backward: the kinds and their sizes."""
    tokens, channels = layout.tokens(mesh), layout.channels(mesh)
    forward_sums, backward_sums = (tokens * size * bool(layout.hidden) for size in SUMS[op])
    by_hand = layout.hidden and MODES[mode][2] and layout.hidden[0] in MODES[mode][2]
    of_phi, others = num_parameters(op, CASE.hidden if by_hand else channels)
    if not (layout.batch or layout.sequence or by_hand):
        of_phi = 0
    # Over axes of two kinds sums are taken one after the other.
    times = len({(MODES[mode][axis == "b"], axis in MODES[mode][2]) for axis in layout.axes()})
    whole, _ = num_parameters(op, CASE.hidden)
    gathered = 0 if by_hand or not layout.hidden else whole
    return (
        {"all-reduce": times * forward_sums},
        {
            "all-reduce": times * (forward_sums + backward_sums + of_phi + others),
            "all-gather": gathered,
        },
    )


# ---- the table of collectives -------------------------------------------------------------------


def main() -> None:
    """Prints what every op takes in every row: python tests/meshes.py"""
    from cases import assert_trees_close, exact, limit, make_cotangents, make_operands
    from collectives import collectives

    def listed(function: Any, placed: Any) -> tuple[str, Any]:
        compiled = jax.jit(function).lower(*placed).compile()
        found = collectives(compiled.as_text())
        kinds = (f"{num} {kind} ({size})" for kind, (num, size) in sorted(found.items()))
        return ", ".join(kinds) or "none", compiled(*placed)

    num, platform = jax.device_count(), jax.devices()[0].device_kind
    print(
        f"jax {jax.__version__}, {num} devices ({platform}), tokens {CASE.tokens}, n = 4, C = 64\n"
    )
    print("| op | layout | axes | forward | forward and backward | values |")
    print("|---|---|---|---|---|---|")
    for op in SUMS:
        arrays = make_operands(op, CASE), make_cotangents(op, CASE)
        wanted = exact(op, presets.PAPER, *arrays)
        for mode, name in rows():
            layout = LAYOUTS[name]
            mesh = make_mesh(mode, layout)
            with jax.set_mesh(mesh):
                once, _ = listed(
                    *spread(
                        functools.partial(forward, op), mode, layout, mesh, arrays[:1], wanted[0]
                    )
                )
                twice, results = listed(
                    *spread(functools.partial(both, op), mode, layout, mesh, arrays, wanted)
                )
            assert_trees_close(results, wanted, limit(CASE, layers=2))
            print(f"| {op} | {name} | {mode} | {once} | {twice} | right |", flush=True)


if __name__ == "__main__":
    import sys
    from pathlib import Path

    sys.path.append(str(Path(__file__).parents[1] / "benches"))
    jax.config.update("jax_enable_x64", True)
    main()

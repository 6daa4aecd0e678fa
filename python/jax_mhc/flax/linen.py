"""Hyper-connections as modules of Flax Linen.

    from jax_mhc.flax.linen import MHC

    x = MHC(Attention(...), C, streams=4)(x)    # in place of x + Attention(...)(x)

`Head` leaves the streams; `stack` runs blocks one after the other; `from_plain` takes over the
variables of a trained model without hyper-connections.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.core import Scope
from jax.typing import DTypeLike

import jax_mhc
from jax_mhc import _errors, _module, _plain
from jax_mhc._call.dispatch import Implementation
from jax_mhc._closures import warn_if_hidden
from jax_mhc._ops.streams import Streams
from jax_mhc._types import HeadParams, Layer, MHCConfig, MHCParams
from jax_mhc.flax._linen_stack import stack
from jax_mhc.presets import PAPER

if TYPE_CHECKING:
    from jaxtyping import Float

__all__ = ["MHC", "Head", "from_plain", "stack"]


class MHC(nn.Module):
    """A layer and its manifold-constrained hyper-connection (equation 3).

    The counterpart of `x + layer(x)`: `jax_mhc.mhc_residual` with parameters of its own, which see
    for the equation, dtypes and derivatives. In the collection `params` they are phi `[nC, K]`,
    alpha `[3]` and bias `[K]` (with static the bias alone), and norm_scale `[C]` where there is a
    norm, with the initial values of `jax_mhc.init_params`, and ones. As always in Linen, a layer
    made inside of another module's call keeps its variables there, under its own name; other
    layers have theirs under `layer`. Either way the layer draws the keys that it would draw under
    its own name or in the place of this module, so that with one seed a model starts from the same
    weights with and without hyper-connections.

    h_res `[..., n, n]` is sown into the collection `intermediates`, for `jax_mhc.diagnostics`.

    A layer that is a function over a module with variables of its own (`module.bind(variables)`)
    gives a warning: the model does not have them.

    Attributes:
        layer: a module or function, `layer(u, ...)` with u `[..., C]`, which returns y `[..., C]`
            of u's dtype, or a tuple that begins with it.
        hidden: C.
        streams: n, from 1 to 16.
        config: settings.
        static: coefficients from the bias alone, without phi and alpha.
        norm: u is normalised, by the RMSNorm that layers begin with, in the same kernel; the layer
            should have none of its own then.
        norm_scale_eps: the eps of that norm.
        implementation: None, "fused" or "reference"; see `jax_mhc.pre`.
        param_dtype: in which parameters are stored: float32, bfloat16 or float16, from which they
            are widened to float32 in the call, or float64, for float64 streams. Those that have
            less precision in the call, as of a model that was cast whole, are refused.
        axis_names: for a parameter by its name a name, or None, for each of its dimensions, as
            `nn.with_logical_partitioning` takes them: `{"phi": ("embed", None)}`. phi's rows
            are n times C, and are whole while they are used, however they are stored.
    """

    layer: Layer
    hidden: int
    streams: int = 4
    config: MHCConfig = PAPER
    static: bool = False
    norm: bool = False
    norm_scale_eps: float = 1e-6
    implementation: Implementation = None
    param_dtype: DTypeLike = jnp.float32
    axis_names: Mapping[str, Sequence[str | None]] | None = None

    def __post_init__(self) -> None:
        """For Linen."""
        super().__post_init__()
        if self.scope is not None:
            _without_step(self.layer, self.scope, "layer")

    def __call__(
        self, x: Float[jax.Array, "*tokens n C"] | Streams, *args: object, **kwargs: object
    ) -> Any:
        """Runs the layer on the streams.

        Args:
            x: the streams `[..., n, C]`.
            *args: handed on to the layer, after u.
            **kwargs: handed on to the layer.

        Returns:
            The new streams `[..., n, C]`, or `Streams` where x is; of a layer that returns
            `(y, *rest)`, `(streams, *rest)`.

        Raises:
            ValueError, TypeError: x that is not streams of the module's n and C; a layer that
                returns another shape or dtype; parameters with less precision than param_dtype;
                what `jax_mhc.init_params` and `jax_mhc.pre` raise.
        """
        out, h_res = self.with_h_res(x, *args, **kwargs)
        self.sow("intermediates", "h_res", h_res)
        return out

    @nn.compact
    def with_h_res(
        self, x: Float[jax.Array, "*tokens n C"] | Streams, *args: object, **kwargs: object
    ) -> tuple[Any, Float[jax.Array, "*tokens n n"]]:
        """Runs the layer on the streams, and returns h_res, which the call computes anyway.

        Args:
            x: the streams `[..., n, C]`.
            *args: handed on to the layer, after u.
            **kwargs: handed on to the layer.

        Returns:
            What a call returns, and h_res `[..., n, n]`: `h_res[..., i, j]` is the weight of stream
            j in new stream i. Differentiable; for `jax_mhc.diagnostics`.

        Raises:
            ValueError, TypeError: what a call raises.
        """
        op = "flax.linen.MHC"
        _module.settings(
            op,
            layer=self.layer,
            static=self.static,
            norm=self.norm,
            norm_scale_eps=self.norm_scale_eps,
            implementation=self.implementation,
        )
        warn_if_hidden(op, self.layer, nn.Module, partial(_is_bound_elsewhere, self))
        x = _module.streams(op, x, self.streams, self.hidden)
        names = _module.axis_names(op, self.axis_names)
        param = _parameters(self, op, jax_mhc.init_params, names)
        phi, alpha = (None, None) if self.static else (param("phi"), param("alpha"))
        scale = None
        if self.norm:
            scale = param("norm_scale", lambda _, dtype: jnp.ones(self.hidden, dtype))
        return _module.residual(
            op,
            self.layer,
            x,
            MHCParams(phi, alpha, param("bias")),
            args,
            kwargs,
            config=self.config,
            norm_scale=scale,
            norm_scale_eps=self.norm_scale_eps,
            implementation=self.implementation,
        )


class Head(nn.Module):
    """Leaves the streams by a learned weighted mean, `[..., n, C]` -> `[..., C]`.

    `jax_mhc.head` with parameters of its own, which see: phi `[nC, n]`, alpha `[1]` and bias `[n]`,
    with the initial values of `jax_mhc.init_head`.

    Attributes:
        hidden: C.
        streams: n, from 1 to 16.
        config: settings; those of norm and of h_pre enter.
        implementation: None, "fused" or "reference"; see `jax_mhc.pre`.
        param_dtype: in which parameters are stored; see `MHC`.
        axis_names: names of the dimensions of phi, alpha and bias; see `MHC`.
    """

    hidden: int
    streams: int = 4
    config: MHCConfig = PAPER
    implementation: Implementation = None
    param_dtype: DTypeLike = jnp.float32
    axis_names: Mapping[str, Sequence[str | None]] | None = None

    @nn.compact
    def __call__(
        self, x: Float[jax.Array, "*tokens n C"] | Streams
    ) -> Float[jax.Array, "*tokens C"]:
        """Collapses the streams x `[..., n, C]` to `[..., C]`; raises what `MHC` does for them."""
        op = "flax.linen.Head"
        x = _module.streams(op, x, self.streams, self.hidden)
        names = _module.axis_names(op, self.axis_names, ("phi", "alpha", "bias"))
        param = _parameters(self, op, jax_mhc.init_head, names)
        params = HeadParams(param("phi"), param("alpha"), param("bias"))
        return jax_mhc.head(x, params, config=self.config, implementation=self.implementation)


def from_plain(
    plain_variables: Mapping[str, Any],
    mhc_variables: Mapping[str, Any],
    *,
    names: Mapping[str, str] | None = None,
) -> Any:
    """Variables of a model with hyper-connections, with those of a trained one without.

    Every variable of the plain model moves to its place: `params.mlp.up.kernel` to
    `params.mlp.layer.up.kernel`, where mlp is an `MHC` that `setup` made; layers made in a compact
    call keep their place. The connections keep their initial values, so that the model computes
    what the plain one does, to rounding, with any n.

    With norm=True, norm_scale is the scale of the one RMSNorm that the plain layer has and the
    wrapped one has not; the eps of both have to be the same. In a compact call a connection's place
    does not tell its layer; `names` has to:
    `{"params.MHC_0.norm_scale": "params.Attention_0.RMSNorm_0.scale"}`.

    A connection is recognised by its variables: phi, alpha and bias, or, with static, a bias alone
    that the plain model does not have.

    Args:
        plain_variables: those of the trained model; or a pytree like them, such as a moment of
            Adam.
        mhc_variables: those of the same model with hyper-connections, as initialised.
        names: paths in mhc_variables of what has another place in plain_variables, and its path
            there, steps separated by dots: a weight, or a module with all that is below it.

    Returns:
        New variables, with the structure of mhc_variables.

    Raises:
        ValueError, TypeError: a variable that is left over or missing, or that has another shape or
            dtype; what is no mapping, or has no connection in it.
    """
    move = _plain.Move.of("flax.linen.from_plain", "plain_variables", "mhc_variables", names)
    for name, variables in ((move.plain, plain_variables), (move.model, mhc_variables)):
        if not isinstance(variables, Mapping):
            raise _errors.Refusal(TypeError, move.op, name).expected(
                "variables, a mapping", type(variables).__name__, "Give what model.init returns."
            )
    plain = {path: nn.meta.unbox(leaf) for path, leaf in _leaves(plain_variables)}
    leaves = _leaves(mhc_variables)
    model = {path: nn.meta.unbox(leaf) for path, leaf in leaves}
    values = move.run(plain, model, _connections(move, plain, model))
    new = (
        leaf.replace_boxed(values[path]) if _is_boxed(leaf) else values[path]
        for path, leaf in leaves
    )
    structure = jax.tree.structure(mhc_variables, is_leaf=_is_boxed)
    return jax.tree.unflatten(structure, new)


def _is_boxed(value: object) -> bool:
    return isinstance(value, nn.meta.AxisMetadata)


def _leaves(variables: Any) -> list[tuple[_plain.Path, Any]]:
    return [
        (tuple(jax.tree_util.keystr((step,), simple=True) for step in path), leaf)
        for path, leaf in jax.tree.leaves_with_path(variables, is_leaf=_is_boxed)
    ]


def _connections(
    move: _plain.Move, plain: Mapping[_plain.Path, Any], model: Iterable[_plain.Path]
) -> set[_plain.Path]:
    """Paths of connections, in each collection."""
    found: set[_plain.Path] = set()
    collections = {path[0] for path in model}
    steps: dict[_plain.Path, set[str]] = {}
    for path in model:
        for at, step in enumerate(path):
            steps.setdefault(path[:at], set()).add(step)
    for bias in sorted((path for path in model if path[-1] == "bias"), key=len):
        node = bias[:-1]
        if steps[node] - {*_plain.OWN, "layer"}:
            continue
        static = "phi" not in steps[node] and move.source(bias, found) not in plain
        if {"phi", "alpha"} <= steps[node] or static:
            found.update((collection, *node[1:]) for collection in collections)
    return found


def _without_step(value: Any, scope: Scope, step: str) -> None:
    """Lets the modules in a value draw keys as if one step below a scope were not in their path.

    Linen folds the path of a module into its keys, and has bound those that are attributes.
    """
    for module in jax.tree.leaves(value, is_leaf=lambda leaf: isinstance(leaf, nn.Module)):
        if not isinstance(module, nn.Module) or module.scope is None:
            continue
        if module.scope.path[: len(scope.path) + 1] != (*scope.path, step):
            continue
        for name, rng in module.scope.rngs.items():
            above = getattr(scope.rngs[name], "suffix", ())
            if rng.suffix[: len(above) + 1] == (*above, step):
                suffix = above + rng.suffix[len(above) + 1 :]
                module.scope.rngs[name] = dataclasses.replace(rng, suffix=suffix)
        for field in dataclasses.fields(module):
            if field.name not in ("parent", "name"):
                _without_step(getattr(module, field.name), scope, step)


def _parameters(
    module: MHC | Head, op: str, init: Callable[..., Any], names: _module.AxisNames
) -> Callable[..., jax.Array]:
    """A function that returns a parameter by its name, as the functions of jax_mhc take it."""
    stored = _module.param_dtype(op, module.param_dtype)

    def of_init(name: str, key: jax.Array) -> jax.Array:
        # In Linen each parameter has a key of its own.
        sizes = {"streams": module.streams, "hidden": module.hidden, "config": module.config}
        if getattr(module, "static", False):
            sizes["static"] = True
        return getattr(_module.initial(init, _module.key(key), stored, **sizes), name)

    def parameter(name: str, make: Callable[..., jax.Array] | None = None) -> jax.Array:
        value: Callable[..., Any] = partial(make, dtype=stored) if make else partial(of_init, name)
        if name in names:
            value = nn.with_logical_partitioning(value, names[name])
        return _module.widened(op, name, module.param(name, value), stored)

    return parameter


def _is_bound_elsewhere(module: nn.Module, value: object) -> bool:
    """Whether a value is a module with parameters that are none of the model's."""
    if not isinstance(value, nn.Module) or value.scope is None or module.scope is None:
        return False
    return value.scope.root is not module.scope.root and bool(value.variables.get("params"))

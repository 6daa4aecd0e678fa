"""Hyper-connections as modules of Equinox. They need jax-mhc[equinox].

    from jax_mhc.equinox import MHC

    self.attention = MHC(Attention(..., key=key), C, streams=4, key=key)
    x = self.attention(x)                       # in place of x + attention(x)

`Head` leaves the streams; `stack` runs blocks one after the other; `from_plain` takes over the
weights of a trained model without hyper-connections.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

import jax_mhc
from jax_mhc import _check, _errors, _labels, _module, _plain
from jax_mhc._blocks import Blocks, Opened, run_blocks, run_sublayers
from jax_mhc._call.dispatch import Implementation
from jax_mhc._closures import warn_if_hidden
from jax_mhc._ops.streams import Streams
from jax_mhc._types import HeadParams, Layer, MHCConfig, MHCParams, Tree
from jax_mhc.presets import PAPER

if TYPE_CHECKING:
    from jaxtyping import Float

_errors.require("equinox", "equinox", "equinox")

import equinox as eqx  # noqa: E402 - where it is missing, the line above says so

Model = TypeVar("Model")

__all__ = ["MHC", "Head", "from_plain", "stack"]


@_labels.connection
class MHC(eqx.Module):
    """A layer and its manifold-constrained hyper-connection (equation 3).

    The counterpart of `x + layer(x)`: `jax_mhc.mhc_residual` with parameters of its own, which see
    for the equation, dtypes and derivatives. The parameters are arrays, with the initial values of
    `jax_mhc.init_params`; all else but the layer is static.

    x is the streams of one example, under `jax.vmap`, or of a whole batch. A layer for single
    tokens is vectorised with `eqx.filter_vmap(layer)`; `jax.vmap(layer)` is a function that hides
    the layer's parameters, as `lambda u: layer(u)` is: both give a warning.

    Args:
        layer: a module or function, `layer(u, ...)` with u `[..., C]`, which returns y `[..., C]`
            of u's dtype, or a tuple that begins with it.
        hidden: C.
        streams: n, from 1 to 16.
        config: settings.
        static: coefficients from the bias alone; phi and alpha are None.
        norm: u is normalised, by the RMSNorm that layers begin with, in the same kernel; the layer
            should have none of its own then.
        norm_scale_eps: the eps of that norm.
        implementation: None, "fused" or "reference"; see `jax_mhc.pre`.
        param_dtype: in which parameters are stored: float32, bfloat16 or float16, from which they
            are widened to float32 in the call, or float64, for float64 streams. Those that have
            less precision in the call, as of a model that was cast whole, are refused.
        key: for the initial values; each module wants its own, which may be that of its layer:
            `MHC(Attention(..., key=key), C, key=key)`. A constant is folded into it, and the layers
            of a model need no other keys than without hyper-connections.

    Attributes:
        layer: the layer.
        phi: projection `[nC, K]`, or None.
        alpha: gates `[3]` (`[2]` for constraint "identity"), or None.
        bias: static part `[K]`.
        norm_scale: of the norm `[C]`, initially ones, or None.

    Raises:
        ValueError, TypeError: what `jax_mhc.init_params` raises; a layer that cannot be called;
            settings that are none.
    """

    layer: Layer
    phi: jax.Array | None
    alpha: jax.Array | None
    bias: jax.Array
    norm_scale: jax.Array | None
    hidden: int = eqx.field(static=True)
    streams: int = eqx.field(static=True)
    config: MHCConfig = eqx.field(static=True)
    norm_scale_eps: float = eqx.field(static=True)
    implementation: Implementation = eqx.field(static=True)
    param_dtype: np.dtype = eqx.field(static=True)

    def __init__(
        self,
        layer: Layer,
        hidden: int,
        *,
        streams: int = 4,
        config: MHCConfig = PAPER,
        static: bool = False,
        norm: bool = False,
        norm_scale_eps: float = 1e-6,
        implementation: Implementation = None,
        param_dtype: DTypeLike = jnp.float32,
        key: jax.Array,
    ):
        """See the class."""
        op = "equinox.MHC"
        _module.settings(
            op,
            layer=layer,
            static=static,
            norm=norm,
            norm_scale_eps=norm_scale_eps,
            implementation=implementation,
        )
        dtype = _module.param_dtype(op, param_dtype)
        _check.key(op, "key", key)
        sizes = {"streams": streams, "hidden": hidden, "config": config, "static": static}
        params = _module.initial(jax_mhc.init_params, _module.key(key), dtype, **sizes)
        remedy = "For single tokens that is eqx.filter_vmap(layer)."
        warn_if_hidden(op, layer, eqx.Module, _has_parameters, remedy=remedy)
        self.layer = layer
        self.phi, self.alpha, self.bias = params.phi, params.alpha, params.bias
        self.norm_scale = jnp.ones(hidden, dtype) if norm else None
        self.hidden, self.streams, self.config = hidden, streams, config
        self.norm_scale_eps, self.implementation = norm_scale_eps, implementation
        self.param_dtype = dtype

    @property
    def params(self) -> MHCParams:
        """The parameters, as the functions of jax_mhc take them: float32, or float64 as they are.

        Raises:
            TypeError: parameters with less precision than param_dtype.
        """
        params = MHCParams(self.phi, self.alpha, self.bias)
        return _module.all_widened("equinox.MHC", params, self.param_dtype)

    @property
    def _scale(self) -> jax.Array | None:
        """norm_scale likewise."""
        return _module.widened("equinox.MHC", "norm_scale", self.norm_scale, self.param_dtype)

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
            `(y, *rest)`, such as a state, `(streams, *rest)`.

        Raises:
            ValueError, TypeError: x that is not streams of the module's n and C; a layer that
                returns another shape or dtype; parameters with less precision than param_dtype;
                what `jax_mhc.pre` raises.
        """
        return self.with_h_res(x, *args, **kwargs)[0]

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
        op = "equinox.MHC"
        return _module.residual(
            op,
            self.layer,
            _module.streams(op, x, self.streams, self.hidden),
            self.params,
            args,
            kwargs,
            config=self.config,
            norm_scale=self._scale,
            norm_scale_eps=self.norm_scale_eps,
            implementation=self.implementation,
        )


@_labels.connection
class Head(eqx.Module):
    """Leaves the streams by a learned weighted mean, `[..., n, C]` -> `[..., C]`.

    `jax_mhc.head` with parameters of its own, which see. They have the initial values of
    `jax_mhc.init_head`.

    Args:
        hidden: C.
        streams: n, from 1 to 16.
        config: settings; those of norm and of h_pre enter.
        implementation: None, "fused" or "reference"; see `jax_mhc.pre`.
        param_dtype: in which parameters are stored; see `MHC`.
        key: for the initial values; it may be one that a layer has, as for `MHC`.

    Attributes:
        phi: projection `[nC, n]`.
        alpha: gate `[1]`.
        bias: static part `[n]`.

    Raises:
        ValueError, TypeError: what `jax_mhc.init_head` raises.
    """

    phi: jax.Array
    alpha: jax.Array
    bias: jax.Array
    hidden: int = eqx.field(static=True)
    streams: int = eqx.field(static=True)
    config: MHCConfig = eqx.field(static=True)
    implementation: Implementation = eqx.field(static=True)
    param_dtype: np.dtype = eqx.field(static=True)

    def __init__(
        self,
        hidden: int,
        *,
        streams: int = 4,
        config: MHCConfig = PAPER,
        implementation: Implementation = None,
        param_dtype: DTypeLike = jnp.float32,
        key: jax.Array,
    ):
        """See the class."""
        _check.implementation("equinox.Head", implementation)
        dtype = _module.param_dtype("equinox.Head", param_dtype)
        _check.key("equinox.Head", "key", key)
        sizes = {"streams": streams, "hidden": hidden, "config": config}
        params = _module.initial(jax_mhc.init_head, _module.key(key), dtype, **sizes)
        self.phi, self.alpha, self.bias = params.phi, params.alpha, params.bias
        self.hidden, self.streams, self.config = hidden, streams, config
        self.implementation, self.param_dtype = implementation, dtype

    @property
    def params(self) -> HeadParams:
        """The parameters, as `jax_mhc.head` takes them; see `MHC`."""
        params = HeadParams(self.phi, self.alpha, self.bias)
        return _module.all_widened("equinox.Head", params, self.param_dtype)

    def __call__(
        self, x: Float[jax.Array, "*tokens n C"] | Streams
    ) -> Float[jax.Array, "*tokens C"]:
        """Collapses the streams x `[..., n, C]` to `[..., C]`; raises what `MHC` does for them."""
        x = _module.streams("equinox.Head", x, self.streams, self.hidden)
        return jax_mhc.head(x, self.params, config=self.config, implementation=self.implementation)


def from_plain(plain: object, mhc_model: Model, *, names: Mapping[str, str] | None = None) -> Model:
    """A model with hyper-connections and the weights of a trained one without.

    Every array of the plain model moves to its place: `blocks.0.mlp.layers.0.weight` to
    `blocks.0.mlp.layer.layers.0.weight`, where blocks[0].mlp is an `MHC`. `eqx.filter_vmap` around
    a layer is no step. The connections keep their initial values, so that the model computes what
    the plain one does, to rounding, with any n. With norm=True, norm_scale is the weight of the one
    RMSNorm that the plain layer has and the wrapped one has not; the eps of both have to be the
    same. What is no array stays as mhc_model has it.

    Args:
        plain: the trained model; or a pytree like it, such as a moment of Adam.
        mhc_model: the same model with hyper-connections, as initialised.
        names: paths in mhc_model of what has another place in plain, and its path there, steps
            separated by dots: a weight, or a module with all that is below it.

    Returns:
        A new model, made as mhc_model.

    Raises:
        ValueError, TypeError: an array that is left over or missing, or that has another shape or
            dtype; a model without hyper-connections.
    """
    move = _plain.Move.of("equinox.from_plain", "plain", "mhc_model", names)
    leaves, structure = jax.tree.flatten_with_path(mhc_model)
    arrays = {_steps(path): leaf for path, leaf in leaves if _plain.is_array(leaf)}
    of_plain = {
        _steps(p): leaf for p, leaf in jax.tree.leaves_with_path(plain) if _plain.is_array(leaf)
    }
    connections = set(_connections(mhc_model, ()))
    values = move.run(of_plain, arrays, connections)
    new = (values[_steps(path)] if _plain.is_array(leaf) else leaf for path, leaf in leaves)
    return jax.tree.unflatten(structure, new)


def _steps(path: tuple[Any, ...]) -> _plain.Path:
    """The steps of a path, without those into what `eqx.filter_vmap` made."""
    steps = (jax.tree_util.keystr((step,), simple=True) for step in path)
    return tuple(step for step in steps if step != "_fun")


def _connections(tree: object, above: tuple[Any, ...]) -> Iterator[_plain.Path]:
    """Paths of connections, those in layers of others too."""
    for path, leaf in jax.tree.leaves_with_path(
        tree, is_leaf=lambda node: isinstance(node, MHC | Head)
    ):
        if isinstance(leaf, MHC | Head):
            yield _steps(above + path)
        if isinstance(leaf, MHC):
            layer = (*above, *path, jax.tree_util.GetAttrKey("layer"))
            yield from _connections(leaf.layer, layer)


def _has_parameters(value: object) -> bool:
    return isinstance(value, eqx.Module) and any(map(eqx.is_inexact_array, jax.tree.leaves(value)))


def stack(
    blocks: eqx.Module | Sequence[eqx.Module],
    x: Float[jax.Array, "*tokens n C"] | Streams,
    sublayers: Sequence[str] | Mapping[str, Mapping[str, Any]] | None = None,
    *,
    arguments: Mapping[str, Any] | None = None,
    xs: Mapping[str, Any] | None = None,
    has_aux: bool | Literal["sum"] = False,
    **options: Any,
) -> Any:
    """Runs all blocks, one after the other: stacked ones in `jax_mhc.scan`.

        for block in blocks:
            x = block(x, **arguments)

    Differentiable with respect to the arrays of the blocks, to x and to the arguments.

    With names of sublayers `jax_mhc.stack` runs these, and not the blocks' own call, so that it
    can recompute streams without running a layer again:

        x = getattr(block, name)(x, **arguments of the name)

    Args:
        blocks: a module whose arrays are stacked over the blocks, as `eqx.filter_vmap` makes them;
            or a list or tuple of blocks, which run in a Python loop.
        x: the streams `[..., n, C]`, or `Streams`.
        sublayers: None, or the names of attributes of blocks, in the order in which they run. Each
            is an `MHC`. A mapping gives keyword arguments for each layer, the same for all blocks:
            `{"attention": {"mask": mask}, "mlp": {}}`.
        arguments: keyword arguments of each block's call, the same for all blocks; without names.
        xs: keyword arguments that are stacked over the blocks, each `[num_blocks, ...]`, such as
            keys for dropout: `{"key": jax.random.split(key, num_blocks)}`; with names of each
            sublayer: `{"attention": {"key": keys}}`.
        has_aux: blocks return `(x, aux)`, such as the loss of experts or a new cache, or several
            values after x; layers `(y, aux)`. "sum": aux is summed over all blocks, or sublayers,
            but those that return none.
        **options: of `jax_mhc.stack`: unroll, and beside names hidden_axis_name and recompute.

    Returns:
        The new streams `[..., n, C]`, or `Streams` where x is. With has_aux `(streams, aux)`: aux
        stacked over the blocks, or of a sequence of blocks a tuple; with names the aux of each
        layer by its name; or the one sum.

    Raises:
        ValueError, TypeError: x that is not streams of the modules' n and C; a block that returns
            anything but streams; a sublayer that is no `MHC`, or has other settings than the
            first; what `jax_mhc.stack` and `jax_mhc.scan` raise.
    """
    is_stacked = not isinstance(blocks, Sequence)
    modules = list(blocks) if isinstance(blocks, Sequence) else [blocks]
    given = Blocks("equinox.stack", MHC, modules, is_stacked, lambda each: list(map(_open, each)))
    if sublayers is None:
        out, _ = run_blocks(given, x, arguments, xs, has_aux, options)
    else:
        out, _ = run_sublayers(given, x, sublayers, arguments, xs, has_aux, options)
    return out


def _open(module: Any) -> Opened:
    """A module, or a mapping of layers, as a function of its arrays."""
    arrays, static = eqx.partition(module, eqx.is_array)

    def run(arrays: Tree, use: Callable[[Any], Any]) -> tuple[Any, Tree]:
        return use(eqx.combine(arrays, static)), None

    return Opened(arrays, run)

"""Hyper-connections as modules of Flax NNX.

    from jax_mhc.flax.nnx import MHC

    self.attention = MHC(Attention(..., rngs=rngs), C, streams=4, rngs=rngs)
    x = self.attention(x)                       # in place of x + attention(x)

`Head` leaves the streams; `stack` and `stack_with_samples` run blocks one after the other;
`from_plain` takes over the weights of a trained model without hyper-connections.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

import jax_mhc
from jax_mhc import _check, _errors, _labels, _module, _plain
from jax_mhc._blocks import Blocks, run_blocks, run_sublayers
from jax_mhc._call.dispatch import Implementation
from jax_mhc._closures import warn_if_hidden
from jax_mhc._ops.streams import Streams
from jax_mhc._types import HeadParams, Layer, MHCConfig, MHCParams
from jax_mhc.flax._nnx_blocks import open_modules, update
from jax_mhc.presets import PAPER

if TYPE_CHECKING:
    from jaxtyping import Float

Model = TypeVar("Model", bound=nnx.Module)

__all__ = ["MHC", "Head", "from_plain", "stack", "stack_with_samples"]


@_labels.connection
class MHC(nnx.Module):
    """A layer and its manifold-constrained hyper-connection (equation 3).

    The counterpart of `x + layer(x)`: `jax_mhc.mhc_residual` with parameters of its own, which see
    for the equation, dtypes and derivatives. The parameters are `nnx.Param`, with the initial
    values of `jax_mhc.init_params`. Their keys come of the stream `params` of rngs and leave it as
    it is, so that with one seed a model starts from the same weights with and without
    hyper-connections. With a stream `mhc` they are drawn from that: `nnx.Rngs(0, mhc=1)`.

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
        axis_names: for a parameter by its name a name, or None, for each of its dimensions, as
            `nnx.with_partitioning` takes them: `{"phi": ("embed", None)}`. phi's rows
            are n times C, and are whole while they are used, however they are stored.
        rngs: for the initial values.

    Attributes:
        layer: the layer.
        phi: projection `[nC, K]`, or None.
        alpha: gates `[3]` (`[2]` for constraint "identity"), or None.
        bias: static part `[K]`.
        norm_scale: of the norm `[C]`, initially ones, or None.

    Raises:
        ValueError, TypeError: what `jax_mhc.init_params` raises; a layer that cannot be called;
            settings or rngs that are none.

    A layer that is a function over a module, such as `lambda u: conv(u)`, gives a warning: the
    model does not have the parameters of conv.
    """

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
        axis_names: Mapping[str, Sequence[str | None]] | None = None,
        rngs: nnx.Rngs,
    ):
        """See the class."""
        op = "flax.nnx.MHC"
        _module.settings(
            op,
            layer=layer,
            static=static,
            norm=norm,
            norm_scale_eps=norm_scale_eps,
            implementation=implementation,
        )
        dtype, names = _module.param_dtype(op, param_dtype), _module.axis_names(op, axis_names)
        sizes = {"streams": streams, "hidden": hidden, "config": config, "static": static}
        params = _module.initial(jax_mhc.init_params, _key(op, rngs), dtype, **sizes)
        warn_if_hidden(op, layer, nnx.Module, _has_parameters)
        self.layer = layer
        make = partial(_param, names)
        self.phi = None if params.phi is None else make("phi", params.phi)
        self.alpha = None if params.alpha is None else make("alpha", params.alpha)
        self.bias = make("bias", params.bias)
        self.norm_scale = make("norm_scale", jnp.ones(hidden, dtype)) if norm else None
        self.hidden, self.streams, self.config = hidden, streams, config
        self.norm_scale_eps, self.implementation = norm_scale_eps, implementation
        self.param_dtype = dtype

    @property
    def params(self) -> MHCParams:
        """The parameters, as the functions of jax_mhc take them: float32, or float64 as they are.

        Raises:
            TypeError: parameters with less precision than param_dtype.
        """
        params = MHCParams(_value(self.phi), _value(self.alpha), self.bias[...])
        return _module.all_widened("flax.nnx.MHC", params, self.param_dtype)

    @property
    def _scale(self) -> jax.Array | None:
        """norm_scale likewise."""
        value, dtype = _value(self.norm_scale), self.param_dtype
        return _module.widened("flax.nnx.MHC", "norm_scale", value, dtype)

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
        op = "flax.nnx.MHC"
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
class Head(nnx.Module):
    """Leaves the streams by a learned weighted mean, `[..., n, C]` -> `[..., C]`.

    `jax_mhc.head` with parameters of its own, which see. They have the initial values of
    `jax_mhc.init_head`, with keys as those of `MHC`.

    Args:
        hidden: C.
        streams: n, from 1 to 16.
        config: settings; those of norm and of h_pre enter.
        implementation: None, "fused" or "reference"; see `jax_mhc.pre`.
        param_dtype: in which parameters are stored; see `MHC`.
        axis_names: names of the dimensions of phi, alpha and bias; see `MHC`.
        rngs: for the initial values.

    Attributes:
        phi: projection `[nC, n]`.
        alpha: gate `[1]`.
        bias: static part `[n]`.

    Raises:
        ValueError, TypeError: what `jax_mhc.init_head` raises.
    """

    def __init__(
        self,
        hidden: int,
        *,
        streams: int = 4,
        config: MHCConfig = PAPER,
        implementation: Implementation = None,
        param_dtype: DTypeLike = jnp.float32,
        axis_names: Mapping[str, Sequence[str | None]] | None = None,
        rngs: nnx.Rngs,
    ):
        """See the class."""
        op = "flax.nnx.Head"
        _check.implementation(op, implementation)
        dtype = _module.param_dtype(op, param_dtype)
        names = _module.axis_names(op, axis_names, ("phi", "alpha", "bias"))
        sizes = {"streams": streams, "hidden": hidden, "config": config}
        params = _module.initial(jax_mhc.init_head, _key(op, rngs), dtype, **sizes)
        self.phi = _param(names, "phi", params.phi)
        self.alpha = _param(names, "alpha", params.alpha)
        self.bias = _param(names, "bias", params.bias)
        self.hidden, self.streams, self.config = hidden, streams, config
        self.implementation, self.param_dtype = implementation, dtype

    @property
    def params(self) -> HeadParams:
        """The parameters, as `jax_mhc.head` takes them; see `MHC`."""
        params = HeadParams(self.phi[...], self.alpha[...], self.bias[...])
        return _module.all_widened("flax.nnx.Head", params, self.param_dtype)

    def __call__(
        self, x: Float[jax.Array, "*tokens n C"] | Streams
    ) -> Float[jax.Array, "*tokens C"]:
        """Collapses the streams x `[..., n, C]` to `[..., C]`; raises what `MHC` does for them."""
        x = _module.streams("flax.nnx.Head", x, self.streams, self.hidden)
        return jax_mhc.head(x, self.params, config=self.config, implementation=self.implementation)


def from_plain(
    plain: nnx.Module, mhc_model: Model, *, names: Mapping[str, str] | None = None
) -> Model:
    """A model with hyper-connections and the weights of a trained one without.

    Every variable of the plain model moves to its place: `blocks.0.mlp.up.kernel` to
    `blocks.0.mlp.layer.up.kernel`, where blocks.0.mlp is an `MHC`. The connections keep their
    initial values, so that the model computes what the plain one does, to rounding, with any n.
    With norm=True, norm_scale is the scale of the one RMSNorm that the plain layer has and the
    wrapped one has not; the eps of both have to be the same.

    Args:
        plain: the trained model.
        mhc_model: the same model with hyper-connections, as initialised.
        names: paths in mhc_model of what has another place in plain, and its path there, steps
            separated by dots: a weight, or a module with all that is below it.

    Returns:
        A new model, made as mhc_model. It shares arrays with both, and no variables.

    Raises:
        ValueError, TypeError: a variable that is left over or missing, or that has another shape or
            dtype; what is no model, or no model with hyper-connections.
    """
    move = _plain.Move.of("flax.nnx.from_plain", "plain", "mhc_model", names)
    for name, module in (("plain", plain), ("mhc_model", mhc_model)):
        if not isinstance(module, nnx.Pytree):
            raise _errors.Refusal(TypeError, move.op, name).expected(
                "a module", type(module).__name__, "Give the two models, the plain one first."
            )
    graphdef, state = nnx.split(mhc_model)
    connections = {
        _strings(path)
        for path, module in nnx.iter_graph(mhc_model)
        if isinstance(module, MHC | Head)
    }
    values = move.run(_arrays(nnx.state(plain)), _arrays(state), connections)

    def moved(path: tuple[Any, ...], leaf: Any) -> Any:
        value = values.get(_strings(path), leaf)
        return leaf.replace(value) if isinstance(leaf, nnx.Variable) else value

    flat = ((path, moved(path, leaf)) for path, leaf in nnx.to_flat_state(state))
    return nnx.merge(graphdef, nnx.from_flat_state(flat))


def stack(
    blocks: nnx.Module | Sequence[nnx.Module],
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

    Variables that a call changes are updated in blocks: counts of random numbers (dropout), caches,
    batch statistics, intermediates. Differentiable with respect to the variables of the blocks, to
    x and to the arguments.

    With names of sublayers `jax_mhc.stack` runs these, and not the blocks' own call, so that it
    can recompute streams without running a layer again:

        x = getattr(block, name)(x, **arguments of the name)

    Args:
        blocks: a module whose variables are stacked over the blocks, as `nnx.vmap` makes them; or
            an `nnx.List` or other sequence of blocks, which run in a Python loop.
        x: the streams `[..., n, C]`, or `Streams`.
        sublayers: None, or the names of attributes of blocks, in the order in which they run. Each
            is an `MHC`. A mapping gives keyword arguments for each layer, the same for all blocks:
            `{"attention": {"mask": mask}, "mlp": {}}`.
        arguments: keyword arguments of each block's call, the same for all blocks; without names.
        xs: keyword arguments that are stacked over the blocks, each `[num_blocks, ...]`; with names
            of each sublayer: `{"attention": {"window": windows}}`.
        has_aux: blocks return `(x, aux)`, such as the loss of experts, or several values after x;
            layers `(y, aux)`. "sum": aux is summed over all blocks, or sublayers, but those that
            return none.
        **options: of `jax_mhc.stack`: unroll, and beside names hidden_axis_name and recompute.

    Returns:
        The new streams `[..., n, C]`, or `Streams` where x is. With has_aux `(streams, aux)`: aux
        stacked over the blocks, or of a sequence of blocks a tuple; with names the aux of each
        layer by its name; or the one sum.

    Raises:
        ValueError, TypeError: x that is not streams of the modules' n and C; a block that returns
            anything but streams; a sublayer that is no `MHC`, or has other settings than the
            first; a variable that several sublayers have in common, and that changes, beside
            names; what `jax_mhc.stack` and `jax_mhc.scan` raise.
    """
    return _stack(_STACK, blocks, x, sublayers, arguments, xs, has_aux, options)


def stack_with_samples(
    blocks: nnx.Module | Sequence[nnx.Module],
    x: Float[jax.Array, "*tokens n C"] | Streams,
    sublayers: Sequence[str] | Mapping[str, Mapping[str, Any]],
    *,
    sample_tokens: int,
    xs: Mapping[str, Any] | None = None,
    has_aux: bool | Literal["sum"] = False,
    **options: Any,
) -> tuple[Any, ...]:
    """Runs `stack`, and returns h_res of some tokens, by `jax_mhc.stack_with_samples`.

    Args:
        blocks: the blocks; see `stack`.
        x: the streams `[..., n, C]`, or `Streams`.
        sublayers: the names of attributes of blocks, or a mapping of them to arguments.
        sample_tokens: the number of tokens S, at least 1.
        xs: keyword arguments that are stacked over the blocks, by name.
        has_aux: layers return `(y, aux)`.
        **options: of `jax_mhc.stack`: hidden_axis_name, recompute and unroll.

    Returns:
        What `stack` returns, `(streams, h_res)` or `(streams, aux, h_res)`, with h_res
        `[L, S, n, n]` of all L sublayers in their order.

    Raises:
        ValueError, TypeError: what `stack` and `jax_mhc.stack_with_samples` raise.
    """
    options = {**options, "sample_tokens": sample_tokens}
    # Without names there is nothing to sample.
    names = () if sublayers is None else sublayers
    return _stack(_STACK, blocks, x, names, None, xs, has_aux, options)


def _strings(path: Iterable[object]) -> _plain.Path:
    return tuple(map(str, path))


def _arrays(state: Any) -> dict[_plain.Path, Any]:
    """The values of variables, and arrays that are none."""
    values = (
        (_strings(path), leaf.get_raw_value() if isinstance(leaf, nnx.Variable) else leaf)
        for path, leaf in nnx.to_flat_state(state)
    )
    return {path: value for path, value in values if _plain.is_array(value)}


_STACK = "flax.nnx.stack"


def _stack(
    op: str,
    blocks: Any,
    x: jax.Array | Streams,
    sublayers: Any,
    arguments: Any,
    xs: Any,
    has_aux: Any,
    options: dict[str, Any],
) -> Any:
    is_stacked = not isinstance(blocks, Sequence | nnx.List)
    modules = [blocks] if is_stacked else list(blocks)
    given = Blocks(op, MHC, modules, is_stacked, partial(open_modules, op))
    if sublayers is None:
        out, changes = run_blocks(given, x, arguments, xs, has_aux, options)
        if is_stacked:
            nnx.update(blocks, changes)
        return out
    out, by_name = run_sublayers(given, x, sublayers, arguments, xs, has_aux, options)
    update(modules, by_name)
    return out


# For each stream of keys its count when the last connection was made, and how many at that count.
_made: weakref.WeakKeyDictionary[Any, tuple[object, int]] = weakref.WeakKeyDictionary()


def _key(op: str, rngs: nnx.Rngs) -> jax.Array:
    """The key of a connection: it is drawn from a stream `mhc` alone, and else of the next draw.

    A stream counts what layers draw. How many connections share a count cannot be written into
    rngs, whose structure transforms keep, and is remembered here.
    """
    if isinstance(rngs, nnx.Rngs) and "mhc" in rngs:
        return rngs.mhc()
    stream = getattr(rngs, "params", None) if isinstance(rngs, nnx.Rngs) else None
    if stream is None:
        raise _errors.Refusal(TypeError, op, "rngs").expected(
            "nnx.Rngs with a stream mhc or params",
            _errors.typed(rngs),
            "Make them with nnx.Rngs(seed).",
        )
    count = stream.count.get_raw_value()
    last, number = _made.get(stream, (None, 0))
    number = number + 1 if last is count else 0
    _made[stream] = count, number
    return _module.key(stream.key[...], stream.count[...], number)


def _value(variable: nnx.Param[Any] | None) -> jax.Array | None:
    return None if variable is None else variable[...]


def _param(names: _module.AxisNames, name: str, value: jax.Array) -> nnx.Param[jax.Array]:
    """A parameter whose dimensions have names, or none."""
    named = nnx.with_partitioning(lambda: value, names[name]) if name in names else lambda: value
    return nnx.Param(named())


def _has_parameters(value: object) -> bool:
    if isinstance(value, nnx.Module):
        return bool(jax.tree.leaves(nnx.state(value, nnx.Param)))
    return isinstance(value, nnx.Param)

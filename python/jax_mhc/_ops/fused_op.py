"""Parts that the ops share: their calls by name, and an op as a function with a derivative.

An op is, from the outside in,

    reverse_mode_only -> custom_vjp -> first_order -> the call under vmap, on all devices

whose last steps are those of `fused_call`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Mapping
from typing import Any, TypeAlias, TypeVar

import jax
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import NamedSharding, PartitionSpec, reshard

from jax_mhc import _check
from jax_mhc._axes import spec_axes
from jax_mhc._call import (
    Implementation,
    Settings,
    Values,
    configuration_of_op,
    first_order,
    reverse_mode_only,
    use_fused,
)
from jax_mhc._errors import Refusal
from jax_mhc._mesh import Spread, batched
from jax_mhc._types import MHCConfig

Results = TypeVar("Results")

#: Results of forward calls that nothing reads but the backward pass, which keeps them.
KEPT = ("m", "r", "rho")


# ---- calls --------------------------------------------------------------------------------------


def fused_call(
    name: str,
    settings: Settings,
    operands: Mapping[str, jax.Array],
    *,
    kept_alone: Collection[str] = KEPT,
    **attributes: bool | float,
) -> Values:
    """Runs the call `name` on all devices. It cannot be differentiated.

    Args:
        name: the name of its row in the table.
        settings: the settings of the op.
        operands: the operands by name, without those that are absent; phi is `[n·C, K]`, and so is
            its gradient.
        kept_alone: the results that nothing reads but what keeps them for the backward pass.
        attributes: the attributes that the call has beside those of the settings.

    Returns:
        The results by name.
    """
    call = settings.call(name, operands, **attributes)
    given = {name: first_order(call.op, operand) for name, operand in _split_rows(operands).items()}
    results = batched(Spread(call, hidden_axes=settings.hidden_axes))(given)
    if not call.is_forward:
        return _join_rows(results, operands)
    # Where a scan stacks a result, XLA for GPUs lets the call write it to its place (dynamic-slice
    # fusion). If somebody else in the loop reads that result, the versions of JAX 0.11 leave a
    # second call for him (openxla/xla#45799).
    return {
        result: value if result in kept_alone else jax.lax.optimization_barrier(value)
        for result, value in results.items()
    }


def normalizers(results: Values) -> Values:
    """The m, r and rho of the results of a forward call, as far as they are there."""
    return {name: results[name] for name in KEPT if name in results}


def present(**operands: jax.Array | None) -> Values:
    """The operands that are not None."""
    return {name: operand for name, operand in operands.items() if operand is not None}


def _split_rows(operands: Mapping[str, jax.Array]) -> Mapping[str, jax.Array]:
    """Operands with phi `[n*C, K]` as calls take it, `[n, C, K]`; n is that of x."""
    if "phi" not in operands:
        return operands
    phi, n = operands["phi"], operands["x"].shape[-2]
    sharding = jax.typeof(phi).sharding
    if spec_axes(sharding.spec):
        # Rows, n times C, cannot be sharded as C is.
        phi = reshard(phi, NamedSharding(sharding.mesh, PartitionSpec()))
    return dict(operands) | {"phi": phi.reshape(n, phi.shape[0] // n, phi.shape[1])}


def _join_rows(gradients: Values, operands: Mapping[str, jax.Array]) -> Values:
    """Gradients with d_phi `[n, C, K]` in the form that phi has in `operands`."""
    if "d_phi" not in gradients:
        return gradients
    phi, d_phi = operands["phi"], gradients["d_phi"]
    sharding = jax.typeof(phi).sharding
    d_phi = d_phi.reshape(phi.shape)
    if spec_axes(sharding.spec):
        d_phi = reshard(d_phi, sharding)
    return gradients | {"d_phi": d_phi}


# ---- ops ----------------------------------------------------------------------------------------

# Results of the op, and what its backward pass keeps, from the operands and the call's results.
Forward: TypeAlias = Callable[[Values, Values], tuple[Results, Values]]
# Gradients by name, from settings, what was kept, and the cotangents of the results. Any of these
# may be a SymbolicZero.
Backward: TypeAlias = Callable[[Settings, Values, Any], Values]
# Results of the forward call, as `named_call` gives them, from settings and operands.
Run: TypeAlias = Callable[[Settings, Values], Values]
# The op, from operands (of which the streams come first), settings and implementation; the last
# argument is the op in plain JAX.
FusedOp: TypeAlias = Callable[[Values, Settings, Implementation, Callable[[], Results]], Results]

# The names of results for policies of `jax.checkpoint`; those of all others are coefficients.
_NAMES = {"x_new": "mhc_streams", "u": "mhc_layer_input"}


def of_form(op: str, implementation: Implementation, config: MHCConfig | None) -> Implementation:
    """The implementation of an op with these settings: one form of coefficients has kernels."""
    if config is None or config.form == "mhc":
        return implementation
    _check.implementation(op, implementation)
    if implementation == "fused":
        raise Refusal(ValueError, op, "implementation='fused'").expected(
            "config.form 'mhc'",
            repr(config.form),
            "Leave implementation out: coefficients of other forms are plain JAX.",
        )
    return "reference"


def named_call(name: str, settings: Settings, operands: Values) -> Values:
    """`fused_call` of a forward call whose results have names for policies of `jax.checkpoint`."""
    return {
        result: checkpoint_name(value, _NAMES.get(result, "mhc_coefficients"))
        for result, value in fused_call(name, settings, operands).items()
    }


def fused_op(
    op: str, forward: Forward[Results], backward: Backward, run_forward: Run | None = None
) -> FusedOp[Results]:
    """An op as a function with a derivative, from what its two calls take and give.

    run_forward: the forward pass, where it is not the call of the op's name alone.
    """
    run_forward = run_forward or functools.partial(named_call, f"{op}_fwd")

    def call(settings: Settings, operands: Values) -> tuple[Results, Values]:
        return forward(operands, run_forward(settings, operands))

    @functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
    def run(settings: Settings, operands: Values) -> Results:
        return call(settings, operands)[0]

    def run_fwd(settings: Settings, operands: dict[str, Any]) -> tuple[Results, Values]:
        return call(settings, {name: operand.value for name, operand in operands.items()})

    def run_bwd(settings: Settings, saved: Values, cotangents: Any) -> tuple[Values]:
        gradients = backward(settings, saved, cotangents)
        return ({name.removeprefix("d_"): value for name, value in gradients.items()},)

    run.defvjp(run_fwd, run_bwd, symbolic_zeros=True)

    def fused(
        operands: Values,
        settings: Settings,
        implementation: Implementation,
        plain: Callable[[], Results],
    ) -> Results:
        first, *others = operands
        if op in ("pre", "post_pre"):
            implementation = of_form(op, implementation, settings.config)
        with jax.named_scope(f"mhc_{op}"):
            streams = operands[first]
            configuration = configuration_of_op(op, operands, settings)
            axes = settings.hidden_axes
            if not use_fused(op, implementation, streams.dtype, axes, configuration):
                return plain()
            settings = settings._replace(fused=implementation == "fused")
            streams, of_others = reverse_mode_only(
                op, streams, {name: operands[name] for name in others}
            )
            return run(settings, {first: streams} | of_others)

    return fused

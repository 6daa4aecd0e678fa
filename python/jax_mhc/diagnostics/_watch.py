"""A watch over gains, inside of a jitted step too."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.custom_batching import custom_vmap

from jax_mhc import _errors
from jax_mhc._errors import Refusal
from jax_mhc.diagnostics import _checks
from jax_mhc.diagnostics._numbers import BAND, Gain

_OP = "diagnostics.watch_gain"


class GainWarning(UserWarning):
    """A gain is outside of its band, or not finite.

    Attributes:
        name: of what.
        step: of the training, or None.
        band: the least and the largest gain that are in order.
        forward, backward: the least and the largest gain that there are, or NaN.
    """

    def __init__(
        self,
        name: str,
        step: int | None,
        band: tuple[float, float],
        forward: tuple[float, float],
        backward: tuple[float, float],
    ) -> None:
        """Takes the attributes."""
        super().__init__(name, step, band, forward, backward)
        self.name, self.step, self.band = name, step, band
        self.forward, self.backward = forward, backward

    def __str__(self) -> str:
        """The message."""
        at = "" if self.step is None else f" at step {self.step}"
        directions = (
            f"{direction} {low:.4g} to {high:.4g}"
            for direction, (low, high) in (("forward", self.forward), ("backward", self.backward))
        )
        return (
            f"{self.name}{at}: expected from {self.band[0]:g} to {self.band[1]:g}, got "
            f"{', '.join(directions)}. With constraint 'birkhoff', give MHCConfig more "
            "sinkhorn_iters, or the parameters of the connections a smaller learning rate; "
            "constraint 'none' keeps no gain in bounds: use 'birkhoff', or a wider band."
        )


def watch_gain(
    gain: Gain,
    *,
    band: tuple[float, float] = BAND,
    step: int | jax.Array | None = None,
    name: str = "composite gain",
    callback: Callable[[GainWarning], Any] | None = None,
) -> None:
    """Warns if any gain, forward or backward, is outside of a band or not finite.

    Inside of `jit` (and `scan`, `vmap`, `grad`) the least and the largest gains are computed, and
    only if one of them is outside, a callback hands four numbers to the host, while the device goes
    on: wait with `jax.effects_barrier()` for those that are on their way. Under `jax.checkpoint`
    the backward pass looks again, and may warn a second time. In a program on auto or explicit axes
    of a mesh one process warns, for all tokens; in `jax.shard_map` each device whose own tokens are
    outside (not in a map over some of several explicit axes, in which JAX has no callbacks).
    JAX before 0.11 keeps no program with a callback in its persistent compilation cache. Where that
    matters, return the gains from the step and watch them outside: of values that are known it
    warns at once, and of NumPy's it asks no device.

    Nothing else depends on it: results and gradients are what they are without.

    Args:
        gain: of `amax_gain`, of any shape.
        band: the least and the largest gain that are in order, both above 0; by default 0.25 and 4.
        step: what the warning is to say of the training step; may be an array of the jitted step.
        name: what the warning is to call the gain.
        callback: takes the `GainWarning`, on the host. None: `warnings.warn`, so that filters of
            warnings apply: `warnings.simplefilter("ignore", GainWarning)` silences it, and "error"
            raises it (inside of a jitted step the step fails, and JAX's error quotes it).

    Raises:
        ValueError, TypeError: gain that is no `Gain` of numbers; a band that is none; step that is
            no integer; a name or a callback that is none.
    """
    low, high = _checks.band(_OP, band)
    values = _checks.gain(_OP, "gain", gain)
    step = _checked_step(step)
    _errors.text(_OP, "name", name)
    if callback is not None:
        remedy = "Leave it out to be warned by warnings.warn."
        _errors.function(_OP, "callback", callback, "a function of a GainWarning, or None", remedy)

    def report(bounds: Any, step: Any) -> None:
        # NumPy's: JAX may not compute anything inside of a callback.
        forward, backward = map(tuple, np.asarray(bounds).tolist())
        at = None if step is None else int(step)
        (callback or _warn)(GainWarning(name, at, (low, high), forward, backward))

    if all(isinstance(value, np.ndarray) for value in values):
        # Without JAX, whose GPU may be busy with the next step.
        bounds: Any = np.array([_least_and_most(np, value) for value in values])
    else:
        # The two may have different dtypes.
        is_double = any(value.dtype == np.float64 for value in values)
        wide = np.float64 if is_double else np.float32
        bounds = jnp.stack([_bounds(jax.lax.stop_gradient(v)).astype(wide) for v in values])
    inside = ((bounds[:, 0] >= low) & (bounds[:, 1] <= high)).all()  # false for NaN
    if any(isinstance(value, jax.core.Tracer) for value in (inside, step)):
        # One condition for all of a batch: of many vmap would make a cond that runs both branches.
        jax.lax.cond(
            inside, lambda *_: None, lambda *found: jax.debug.callback(report, *found), bounds, step
        )
    elif not inside:
        report(bounds, step)


def _least_and_most(numpy: Any, values: Any) -> list[Any]:
    """Returns the bounds of the values; no values lie in any band."""
    return [numpy.min(values, initial=np.inf), numpy.max(values, initial=-np.inf)]


@custom_vmap
def _bounds(values: jax.Array) -> jax.Array:
    """The least and the largest value, of a whole batch under vmap."""
    return jnp.stack(_least_and_most(jnp, values))


@_bounds.def_vmap
def _(axis_size: int, in_batched: Any, values: jax.Array) -> tuple[jax.Array, bool]:
    return _bounds(values), False


def _warn(warning: GainWarning) -> None:
    warnings.warn(warning, stacklevel=2)


def _checked_step(step: Any) -> Any:
    is_array = isinstance(step, np.ndarray | jax.Array) and np.ndim(step) == 0
    is_number = isinstance(step, int | np.integer) and not isinstance(step, bool)
    if step is None or is_number or (is_array and jnp.issubdtype(step.dtype, jnp.integer)):
        return step
    raise Refusal(TypeError, _OP, "step").expected(
        "an int, or an array of one", _errors.shown(step), "Pass the number of the training step."
    )

"""Pictures of gains and of mixing, drawn with matplotlib, the extra `jax-mhc[plots]`."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from jax_mhc import _check, _errors
from jax_mhc._errors import Refusal
from jax_mhc.diagnostics import _checks
from jax_mhc.diagnostics._numbers import BAND, Gain, Mixing, mixing

if TYPE_CHECKING:
    from jaxtyping import Float
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from numpy.typing import ArrayLike

# Okabe-Ito without the yellow, which is too light for lines: told apart by colour-blind readers.
COLORS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#000000")
GREY = "#777777"
DASHED = (0, (4, 2))
THICK, THIN = 1.8, 0.7
# Of these the figure writes the numbers into the cells.
MAX_NUMBERED_STREAMS = 4


def plot_gain(
    gains: Gain | Mapping[str, Gain],
    *,
    x: ArrayLike | None = None,
    xlabel: str | None = None,
    band: tuple[float, float] | None = BAND,
    axes: Axes | None = None,
) -> Figure:
    """Gains on a logarithmic axis, against depth or against the training step.

    Forward gains are solid, backward ones dashed. Of several tokens the thick line is the median,
    and the thin one the largest. What is not finite is left out.

    Args:
        gains: one, or several by their labels; `[L]`, or `[L, ...]` with tokens behind.
        x: where on the x axis each of the L is, such as the training steps; None: 1, 2, ..., L,
            the number of sublayers of a `composite`.
        xlabel: None: "sublayers", or with x "training step".
        band: what to shade, as in `watch_gain`; None for nothing.
        axes: to draw into; None makes a new figure.

    Returns:
        The figure; `figure.savefig("gain.png")` writes it.

    Raises:
        ValueError, TypeError: gains of no or of other lengths or types, or traced ones; x, a band
            or axes that do not fit.
        ImportError: matplotlib is not installed.
    """
    op = "diagnostics.plot_gain"
    curves = _checked_gains(op, gains)
    x = None if x is None else _checked_x(op, x, curves)
    if xlabel is not None:
        _errors.text(op, "xlabel", xlabel)
    if band is not None:
        band = _checks.band(op, band)
    if axes is None:
        axes = _new_figure(op, (7, 4.5)).subplots()
    else:
        _check_axes(op, axes, [axes])
    if band is not None:
        axes.axhspan(*band, color=GREY, alpha=0.12, lw=0, label=f"{band[0]:g} to {band[1]:g}")
    axes.axhline(1, color=GREY, lw=1, ls=":", label="residual connection")
    num_tokens = 1
    for place, (label, gain) in enumerate(curves.items()):
        # On top of each other lie those of 1: the later the thinner.
        style: dict[str, Any] = {
            "color": COLORS[place % len(COLORS)],
            "lw": THICK + len(curves) - 1 - place,
        }
        at = np.arange(1, len(gain.forward) + 1) if x is None else x
        _curve(axes, at, gain.forward, label=label, **style)
        num_tokens = max(num_tokens, _curve(axes, at, gain.backward, ls=DASHED, **style))
    for label, dashes in (("forward", "-"), ("backward", DASHED)):
        axes.plot([], [], color=GREY, lw=THICK, ls=dashes, label=label)
    _logarithmic(axes)
    axes.set_ylabel("Amax gain")
    axes.set_xlabel(xlabel or ("sublayers" if x is None else "training step"))
    _finish(axes)
    _legend(axes, num_tokens)
    return _figure_of(axes)


def plot_mixing(
    h_res: Float[jax.Array, "L *tokens n n"] | Mixing,
    *,
    sublayers: Sequence[int] | None = None,
    axes: Sequence[Axes] | None = None,
) -> Figure:
    """Plots how the sublayers of a model mix their streams.

    Curves over the sublayers: the errors of sums of rows and columns on a logarithmic axis (those
    below the precision of the dtype as if they were that), the distance from the identity and the
    entropy, with that of the mean of all streams, log(n). Of several tokens the thick line is the
    median and the thin one the largest. And, for some sublayers, the mean of h_res over tokens:
    h_res[i, j] is the weight of stream j in new stream i.

    Args:
        h_res: `[L, ..., n, n]` float32 or float64, the first sublayer first; or their `mixing`,
            which gives the curves alone, without log(n).
        sublayers: whose mean is shown, counted from 0; None: the first, the middle and the last.
        axes: to draw into, those of the three curves and then one for each of `sublayers`; None
            makes a new figure.

    Returns:
        The figure.

    Raises:
        ValueError, TypeError: h_res of another shape or dtype; sublayers that are not there; axes
            of another number.
        ImportError: matplotlib is not installed.
    """
    op = "diagnostics.plot_mixing"
    matrices = None
    if not isinstance(h_res, Mixing):
        matrices = _check.matrices(op, "h_res", h_res)
        if matrices.ndim < 3 or matrices.size == 0:
            raise Refusal(ValueError, op, "h_res").expected(
                "shape [L, ..., n, n], or mixing of it",
                list(matrices.shape),
                "Stack the matrices of all sublayers: jnp.stack([...]).",
            )
        h_res = mixing(matrices)
    values = _checks.curves(op, "h_res", h_res)
    matrices = jax.device_get(matrices)
    shown = _checked_sublayers(op, sublayers, matrices, len(values.entropy))
    if axes is None:
        axes = _mixing_axes(_new_figure(op, (10, 6.2 if shown else 3.2)), len(shown))
    else:
        _check_axes(op, axes, axes)
        if len(axes) != 3 + len(shown):
            raise Refusal(ValueError, op, "axes").expected(
                f"3 for the curves and {len(shown)} for sublayers",
                len(axes),
                "Give one for each, in this order.",
            )
    _draw_mixing(axes[:3], values, None if matrices is None else matrices.shape[-1])
    if matrices is not None:
        _draw_matrices(axes[3:], matrices, shown)
    return _figure_of(axes[0])


# ---- what is drawn ------------------------------------------------------------------------------


def _curve(axes: Axes, x: np.ndarray, values: ArrayLike, **style: Any) -> int:
    """Draws the median of all tokens and, of several, the largest; returns their number."""
    values = np.asarray(values)
    values = values.reshape(len(values), -1)
    middle, most = (
        np.where(np.isfinite(of_all), of_all, np.nan)
        for of_all in (np.median(values, 1), values.max(1))
    )
    style = {"lw": THICK, "marker": "o" if len(values) == 1 else "", **style}
    axes.plot(x, middle, **style)
    if values.shape[1] > 1:
        axes.plot(x, most, **{**style, "lw": THIN, "label": None})
    return values.shape[1]


def _draw_mixing(axes: Sequence[Axes], values: Mixing, n: int | None) -> None:
    errors, distance, entropy = axes
    x = np.arange(len(values.entropy))
    least = np.finfo(values.row_error.dtype).eps
    _curve(errors, x, np.maximum(values.row_error, least), color=COLORS[0], label="rows")
    num_tokens = _curve(
        errors,
        x,
        np.maximum(values.column_error, least),
        color=COLORS[1],
        ls=DASHED,
        label="columns",
    )
    _logarithmic(errors)
    errors.set_title("Distance of sums from 1", fontsize=10)
    _legend(errors, num_tokens)
    _curve(distance, x, values.identity_distance, color=COLORS[0])
    distance.set_title("Distance from no mixing, ‖h_res − I‖", fontsize=10)
    _curve(entropy, x, values.entropy, color=COLORS[0])
    entropy.set_title("Entropy of rows, nats", fontsize=10)
    if n is not None:
        label = f"mean of all streams: log {n}"
        entropy.axhline(math.log(n), color=GREY, lw=1, ls=":", label=label)
        _legend(entropy)
    for each in (distance, entropy):
        each.set_ylim(bottom=0)
    for each in axes:
        each.set_xlabel("sublayer")
        each.locator_params(axis="x", integer=True)
        _finish(each)


def _draw_matrices(axes: Sequence[Axes], matrices: np.ndarray, shown: Sequence[int]) -> None:
    n = matrices.shape[-1]
    means = [matrices[at].reshape(-1, n, n).mean(0) for at in shown]
    has_numbers = n <= MAX_NUMBERED_STREAMS
    # Next to numbers a shade means the same in every figure.
    sizes = np.abs(np.where(np.isfinite(means), means, 0))
    most = sizes.max(initial=1.0 if has_numbers else 1e-6)
    signed = any((mean < 0).any() for mean in means)
    colors, least = ("PuOr", -most) if signed else ("Blues", 0.0)
    for place, (panel, at, mean) in enumerate(zip(axes, shown, means, strict=True)):
        image = panel.imshow(mean, cmap=colors, vmin=least, vmax=most)
        panel.set_title(f"mean h_res, sublayer {at}", fontsize=10)
        panel.set_xticks(range(n))
        panel.set_yticks(range(n))
        panel.tick_params(length=0)
        panel.spines[:].set_visible(False)
        panel.set_xlabel("from stream j")
        if place == 0:
            panel.set_ylabel("to new stream i")
        for i, j in np.ndindex(n, n) if has_numbers else ():
            panel.text(
                j,
                i,
                f"{np.round(mean[i, j], 2) + 0.0:.2f}",  # never -0.00
                ha="center",
                va="center",
                fontsize=9,
                color="white" if sizes[place, i, j] > 0.6 * most else "black",
            )
    if len(axes) and not has_numbers:
        _figure_of(axes[0]).colorbar(image, ax=list(axes), label="weight")


def _logarithmic(axes: Axes) -> None:
    """A logarithmic axis of y, which has numbers at 1, 2 and 5 where powers of 10 are too few."""
    axes.set_yscale("log")
    low, high = axes.get_ylim()
    if high < 100 * low:
        locator: Any = axes.yaxis.get_major_locator()  # a LogLocator
        locator.set_params(subs=(1, 2, 5))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter("")


def _legend(axes: Axes, num_tokens: int = 1) -> None:
    """A legend below, where it hides no line."""
    if num_tokens > 1:
        axes.plot([], [], color=GREY, lw=THIN, label="largest token")
    axes.legend(fontsize=8, frameon=False, ncols=3, loc="upper center", bbox_to_anchor=(0.5, -0.2))


def _finish(axes: Axes) -> None:
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)


def _new_figure(op: str, size: tuple[float, float]) -> Figure:
    _errors.require(op, "matplotlib", "plots")
    from matplotlib.figure import Figure  # not pyplot, whose figures stay until they are closed

    return Figure(figsize=size, layout="constrained")


def _mixing_axes(figure: Figure, num_matrices: int) -> list[Axes]:
    if not num_matrices:
        return list(figure.subplots(1, 3))
    halves: Any = figure.subfigures(2, 1)
    above, below = halves
    matrices = above.subplots(1, num_matrices, squeeze=False)[0]
    return [*below.subplots(1, 3), *matrices]


def _figure_of(axes: Axes) -> Figure:
    # The figure of a subfigure is the one around it.
    return axes.figure.figure


# ---- checks -------------------------------------------------------------------------------------


def _checked_gains(op: str, gains: object) -> dict[str, Gain]:
    if isinstance(gains, Gain):
        gains = {"": gains}
    if not (
        isinstance(gains, Mapping) and gains and all(isinstance(g, Gain) for g in gains.values())
    ):
        got = type(gains).__name__
        if isinstance(gains, Mapping):
            got += f" of {', '.join(sorted({type(g).__name__ for g in gains.values()})) or 'none'}"
        raise Refusal(TypeError, op, "gains").expected(
            "a Gain, or a dict of labels and Gains",
            got,
            "Make them with jax_mhc.diagnostics.amax_gain.",
        )
    return {
        label: _checks.curves(op, f"gains[{label!r}]" if label else "gains", gain)
        for label, gain in gains.items()
    }


def _checked_x(op: str, x: ArrayLike, curves: dict[str, Gain]) -> np.ndarray:
    try:
        x = np.asarray(x)
    except (TypeError, ValueError):
        x = np.empty((), object)
    if x.ndim and x.dtype.kind not in "biufmM":
        raise Refusal(TypeError, op, "x").expected(
            "numbers", f"dtype {x.dtype}", "Give the numbers of the steps."
        )
    lengths = {len(gain.forward) for gain in curves.values()}
    if x.ndim != 1 or lengths - {len(x)}:
        raise Refusal(ValueError, op, "x").expected(
            f"shape [L] of gains with L = {sorted(lengths)}",
            list(x.shape),
            "Give one value for each of the gains; curves of other lengths go into the same axes "
            "with another call.",
        )
    return x


def _check_axes(op: str, given: object, axes: object) -> None:
    """Checks that all of `axes`, the argument itself or a list made of it, are matplotlib's."""
    _errors.require(op, "matplotlib", "plots")
    from matplotlib.axes import Axes

    if not isinstance(axes, Sequence | np.ndarray) or not all(isinstance(a, Axes) for a in axes):
        raise Refusal(TypeError, op, "axes").expected(
            "axes of matplotlib",
            _errors.shown(given),
            "Make them with matplotlib's subplots, or leave them out for a new figure.",
        )


def _checked_sublayers(
    op: str, sublayers: object, matrices: np.ndarray | None, num: int
) -> list[int]:
    if matrices is None:
        if sublayers is not None and not (isinstance(sublayers, Sequence) and not sublayers):
            raise Refusal(ValueError, op, "sublayers").expected(
                "None where there are no matrices",
                _errors.shown(sublayers),
                "Pass h_res in place of its mixing.",
            )
        return []
    if sublayers is None:
        return sorted({0, num // 2, num - 1})
    if not isinstance(sublayers, Iterable):
        raise Refusal(TypeError, op, "sublayers").expected(
            "a sequence of ints", _errors.typed(sublayers), "Put it into a list."
        )
    remedy = "Sublayers are counted from 0."
    return [_errors.integer(op, "sublayers", at, 0, num - 1, remedy) for at in sublayers]

"""Labels of parameters, by which an optimizer tells those of hyper-connections from others."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeAlias, TypeVar

import jax
import numpy as np

from jax_mhc._errors import Refusal, typed
from jax_mhc._limits import MAX_PERMUTED_STREAMS, MAX_STREAMS
from jax_mhc._types import WORDS, HeadParams, MHCConfig, MHCParams, Tree

_LABELS = {"phi": "projection", "alpha": "gate", "bias": "bias", "norm_scale": "norm"}

_DYNAMIC = frozenset({"phi", "alpha", "bias"})
# Keys that the dict of a module may have whose coefficients are static.
_STATIC = frozenset({"bias", "norm_scale", "layer"})

# K of every number of streams and every constraint. Types do not tell that the table of words has
# the constraints alone.
_NUM_COEFFICIENTS = frozenset(
    MHCConfig(constraint=constraint).num_coefficients(streams)  # type: ignore[arg-type]
    for constraint in WORDS["constraint"]
    for streams in range(1, MAX_STREAMS + 1)
    if constraint != "permutations" or streams <= MAX_PERMUTED_STREAMS
)

_Shape: TypeAlias = tuple[int, ...] | None
_Type = TypeVar("_Type", bound=type)
_types: list[type] = [MHCParams, HeadParams]


def connection(cls: _Type) -> _Type:
    """Decorator of a pytree whose children phi, alpha, bias and norm_scale are a connection's."""
    _types.append(cls)
    return cls


def param_labels(params: Tree) -> Tree:
    """Labels each array of a model, for `optax.multi_transform` and for masks.

    A hyper-connection, or a head, is known by its type where it is `MHCParams`, `HeadParams` or a
    module `MHC` or `Head` of Flax NNX or Equinox. In dicts, such as the variables of Flax Linen or
    an `nnx.State`, its arrays are known by what stands beside them:

    - phi, alpha and bias in one dict, with the shapes of a connection (stacked over blocks on any
      axis), and norm_scale beside them;
    - where coefficients are static, a bias of a possible K in a dict that has nothing else but
      norm_scale and layer. Another module's bias can look like that; it gets the label "bias" too.
      That of form "channels" has no K of its own, and so is known by its type alone.

    A dict of which a filter left a part may be judged otherwise: label first, then filter. Names
    that are joined, such as "block.phi", are not taken apart.

    Args:
        params: a pytree of parameters, gradients, or of anything else with their structure, whole
            or wrapped by Optax. Boxes of Flax, such as `nnx.Param`, are no obstacle.

    Returns:
        A pytree of the same structure, of strings: "projection" for phi, "gate" for alpha, "bias"
        for the bias and "norm" for norm_scale of hyper-connections; "other" for all else, and for
        everything in a model without any.

    Raises:
        TypeError: params in which nothing is an array.
    """
    leaves = jax.tree.leaves(params)
    if params is None or (leaves and not any(map(_is_array, leaves))):
        raise Refusal(TypeError, "param_labels", "params").expected(
            "a pytree of arrays",
            typed(params),
            "Pass parameters: those of a module of Flax are variables['params'] in Linen and "
            "nnx.state(model, nnx.Param) in NNX.",
        )
    return _labels(params)


def _labels(tree: Tree) -> Tree:
    return jax.tree.map(_label, tree, is_leaf=_is_connection)


def _label(node: Any) -> Tree:
    """Labels of a connection and of the layer in it, or of a leaf."""
    if not _is_connection(node):
        return "other"
    children, structure = jax.tree_util.tree_flatten_with_path(
        node, is_leaf=lambda each: each is not node
    )
    labels = []
    for (key,), child in children:
        label = _LABELS.get(str(getattr(key, "name", getattr(key, "key", key))))
        labels.append(
            jax.tree.map(lambda _, label=label: label, child) if label else _labels(child)
        )
    return jax.tree.unflatten(structure, labels)


def _is_connection(node: object) -> bool:
    if not isinstance(node, Mapping):
        return isinstance(node, tuple(_types))
    if node.keys() >= _DYNAMIC:
        return _is_dynamic(*(_shape(node[name]) for name in ("phi", "alpha", "bias")))
    return "bias" in node and node.keys() <= _STATIC and _is_static(_shape(node["bias"]))


def _is_dynamic(phi: _Shape, alpha: _Shape, bias: _Shape) -> bool:
    """True of `[nC, K]`, 1 to 3 gates and `[K]`, with further axes where they are stacked.

    What has no shape, such as an array that Optax has masked, speaks for neither.
    """
    if phi is None or alpha is None or bias is None:
        return True
    return (
        len(phi) == len(bias) + 1 == len(alpha) + 1
        and (set(bias) <= set(phi) or _is_of_hyper_connections(phi, bias))
        and any(size in alpha for size in (1, 2, 3))
    )


def _is_of_hyper_connections(phi: tuple[int, ...], bias: tuple[int, ...]) -> bool:
    """True of phi `[C, n + 2]` and bias `[n² + 2n]`, stacked or not."""
    return any(n + 2 in phi and n * (n + 2) in bias for n in range(1, MAX_STREAMS + 1))


def _is_static(bias: _Shape) -> bool:
    return bias is None or not _NUM_COEFFICIENTS.isdisjoint(bias)


def _shape(child: object) -> _Shape:
    """The shape of an array, boxed or not; none where it is masked, and () of a module."""
    leaves = jax.tree.leaves(child)
    if isinstance(child, Mapping) or len(leaves) > 1:
        return ()
    return tuple(leaves[0].shape) if leaves and hasattr(leaves[0], "shape") else None


def _is_array(leaf: object) -> bool:
    return hasattr(leaf, "shape") or isinstance(leaf, int | float | complex | np.generic)

"""Bytes that a call must read or write at least, in u: C values a token in the streams' dtype."""

from __future__ import annotations


def of_calls(n: int) -> dict[str, int]:
    """The u of each call with n streams, inside a chain of sublayers.

    X, its gradient and X' are n u each, y, u and their gradients one. Coefficients and parameters
    are left out.
    """
    return {
        "pre_fwd": n + 1,
        "post_fwd": 2 * n + 1,
        "post_pre_fwd": 2 * n + 2,
        "post_bwd": 2 * n + 2,
        "pre_bwd": 3 * n + 1,
        "post_pre_bwd": 3 * n + 3,
        "head_fwd": n + 1,
        "head_bwd": 2 * n + 1,
    }


def of_stack(n: int, sublayers: int) -> tuple[int, int]:
    """The u of a stack's forward and of its backward pass: 5n + 5 a sublayer in both together."""
    u = of_calls(n)
    seams = sublayers - 1
    return (
        u["pre_fwd"] + seams * u["post_pre_fwd"] + u["post_fwd"],
        u["post_bwd"] + seams * u["post_pre_bwd"] + u["pre_bwd"],
    )


def of_head(n: int) -> tuple[int, int]:
    """The u of a head, forward and backward."""
    u = of_calls(n)
    return u["head_fwd"], u["head_bwd"]

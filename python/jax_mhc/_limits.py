"""Limits of the kernels, and the dtypes that they take.

They stand here, beside the library's description of itself, because arguments are checked and
platforms told apart where there is no library too. A test compares the two.
"""

from __future__ import annotations

#: Streams of a token, n. The kernels keep one token's coefficients in registers and on the stack.
#: A larger number is nearly always a tensor laid out [..., hidden, streams].
MAX_STREAMS = 16

#: Streams of a token for constraint "permutations", which has n! coefficients: 5 have 120.
MAX_PERMUTED_STREAMS = 4

#: Iterations of Sinkhorn, whose matrices the backward pass holds.
MAX_SINKHORN_ITERS = 10_000

#: Dtypes of streams that the ops accept.
STREAM_DTYPES = ("float32", "bfloat16", "float16", "float64")

#: Platforms with kernels, and the streams' dtypes that those take.
KERNEL_DTYPES = {"cpu": STREAM_DTYPES, "cuda": ("float32", "bfloat16", "float16")}

"""A float64 NumPy transcription of docs/mathematics.md, the judge of values.

Written from the equations alone and as literally as possible: loops, no shared code with the
package, every published Sinkhorn iteration spelled out in the orientation in which its authors
wrote it and only then turned to ours (`h_res[i, j]` is the weight of stream j in new stream i).
Arguments may have any dtype; they are read as float64, complex ones as complex128, for derivatives
by complex steps: every function is analytic where it is smooth. `config` is anything with the
fields of `MHCConfig`.
"""

import dataclasses
import math
from typing import NamedTuple

import numpy as np


class Pre(NamedTuple):
    """Results of pre for tokens of shape [...]."""

    u: np.ndarray  # [..., C]
    h_pre: np.ndarray  # [..., n]
    h_post: np.ndarray  # [..., n]
    h_res: np.ndarray  # [..., n, n]


def wide(array):
    """The array as float64, or complex128."""
    array = np.asarray(array)
    return array.astype(np.complex128 if np.iscomplexobj(array) else np.float64, copy=False)


def sigmoid(z):
    """1 / (1 + exp(-z)), written so that it does not overflow."""
    return 0.5 * (1.0 + np.tanh(0.5 * z))


def transpose(matrix):
    """Swap the last two axes."""
    return np.swapaxes(matrix, -1, -2)


# The Sinkhorn iterations of the published implementations. Axis -2 counts rows and axis -1 counts
# columns, so a sum over axis -1 is a row sum.


def sinkhorn_paper(z, iters):
    """Equation 9: M <- T_r(T_c(M)) from exp(z - max); post contracts the columns j of H[i, j]."""
    matrix = np.exp(z - z.max(axis=(-2, -1), keepdims=True))
    for _ in range(iters):
        matrix = matrix / matrix.sum(axis=-2, keepdims=True)
        matrix = matrix / matrix.sum(axis=-1, keepdims=True)
    return matrix


def sinkhorn_deepseek_v4(z, iters, eps):
    """The iteration of DeepSeek-V4 on `comb`, whose first index is the one post contracts."""
    comb = np.exp(z - z.max(axis=-1, keepdims=True))
    comb = comb / comb.sum(axis=-1, keepdims=True) + eps
    comb = comb / (comb.sum(axis=-2, keepdims=True) + eps)
    for _ in range(iters - 1):
        comb = comb / (comb.sum(axis=-1, keepdims=True) + eps)
        comb = comb / (comb.sum(axis=-2, keepdims=True) + eps)
    return comb


def sinkhorn_megatron(z, iters, eps):
    """The iteration of Megatron: rows, then columns; post contracts the columns j of H[i, j]."""
    matrix = np.exp(z - z.max(axis=-1, keepdims=True))
    for _ in range(iters):
        matrix = matrix / np.maximum(matrix.sum(axis=-1, keepdims=True), eps)
        matrix = matrix / np.maximum(matrix.sum(axis=-2, keepdims=True), eps)
    return matrix


def sinkhorn(z, config):
    """H_res from logits z[i, j], each in our orientation, for any settings.

    The two iterations with eps are written rows first; columns first is the same on the transpose.
    """
    z = wide(z)
    if config.sinkhorn_iters == 0:
        return np.exp(z)
    if config.sinkhorn_eps == 0 and config.order == "column_row":
        return sinkhorn_paper(z, config.sinkhorn_iters)
    rows_first = {"add": sinkhorn_deepseek_v4, "clamp": sinkhorn_megatron}[config.sinkhorn_eps_mode]
    if config.order == "row_column":
        return rows_first(z, config.sinkhorn_iters, config.sinkhorn_eps)
    return transpose(rows_first(transpose(z), config.sinkhorn_iters, config.sinkhorn_eps))


def permutations(n):
    """All permutations of n streams in lexicographic order, the images of 0 to n - 1."""
    if n == 0:
        return [()]
    return sorted((*p[:at], n - 1, *p[at:]) for p in permutations(n - 1) for at in range(n))


def mixed_permutations(z, n):
    """H_res of mHC-lite from z [..., n!]: permutation matrices with weights softmax(z)."""
    weights = np.exp(z - z.max(axis=-1, keepdims=True))
    weights = weights / weights.sum(axis=-1, keepdims=True)
    h_res = np.zeros((*z.shape[:-1], n, n), z.dtype)
    for p, images in enumerate(permutations(n)):
        for i, j in enumerate(images):
            h_res[..., i, j] += weights[..., p]
    return h_res


# Logits of h_res of n streams, by the word of a constraint.
NUM_RES = {
    "birkhoff": lambda n: n * n,
    "none": lambda n: n * n,
    "identity": lambda n: 0,
    "permutations": math.factorial,
}


def inverse_rms(x, config):
    """Equation 15 for x [..., n, C]: r [...]."""
    mean = np.mean(np.square(x), axis=(-2, -1))
    if config.norm_eps_mode == "inside":
        return 1.0 / np.sqrt(mean + config.norm_eps)
    return 1.0 / (np.sqrt(mean) + config.norm_eps)


def project(x, phi, config):
    """Equation 14: m = r vec(x) phi, [..., K]."""
    flat = x.reshape(*x.shape[:-2], x.shape[-2] * x.shape[-1])
    return inverse_rms(x, config)[..., None] * (flat @ phi)


def rms_norm(u, scale, eps):
    """w u / sqrt(mean(u^2) + eps) for u [..., C]."""
    return scale * u / np.sqrt(np.mean(u**2, axis=-1, keepdims=True) + eps)


def pre(x, params, config, norm_scale=None, norm_scale_eps=None):
    """Width connection, equations 14 to 19, for x [..., n, C]; params.phi may be None (static)."""
    x = wide(x)
    bias = wide(params.bias)
    *tokens, n, _ = x.shape
    if params.phi is None:
        z = np.broadcast_to(bias, (*tokens, bias.size))
    else:
        alpha, phi = wide(params.alpha), wide(params.phi)
        gates = np.repeat(alpha, [n, n, bias.size - 2 * n][: alpha.size])
        z = gates * project(x, phi, config) + bias
    z_pre, z_post, z_res = z[..., :n], z[..., n : 2 * n], z[..., 2 * n :]

    h_pre = sigmoid(z_pre) + config.pre_eps
    h_post = config.post_scale * sigmoid(z_post) + config.post_eps
    if config.constraint == "identity":
        h_res = np.broadcast_to(np.eye(n), (*tokens, n, n))
    elif config.constraint == "none":
        h_res = z_res.reshape(*tokens, n, n)
    elif config.constraint == "permutations":
        h_res = mixed_permutations(z_res, n)
    elif config.constraint == "birkhoff":
        h_res = sinkhorn(z_res.reshape(*tokens, n, n), config)
    else:
        raise NotImplementedError(config.constraint)
    u = np.einsum("...i,...ic->...c", h_pre, x)
    if norm_scale is not None:
        u = rms_norm(u, wide(norm_scale), norm_scale_eps)
    return Pre(u, h_pre, h_post, h_res)


def hyper_connections(x, params, config):
    """Hyper-connections as published (arXiv 2409.19606), with a norm and gates of their own each.

    params.phi [C, n + 2] holds theta_pre, theta_post and the rows of theta_res; h_res[k, j] belongs
    to new stream k and old stream j.
    """
    x, phi, alpha, bias = (wide(a) for a in (x, params.phi, params.alpha, params.bias))
    *tokens, n, _ = x.shape
    h_pre, h_post, h_res = np.zeros((*tokens, n)), np.zeros((*tokens, n)), np.zeros((*tokens, n, n))
    b_res = bias[2 * n :].reshape(n, n)
    for i in range(n):
        square = np.mean(x[..., i, :] ** 2, axis=-1, keepdims=True)
        norm = x[..., i, :] / (
            np.sqrt(square + config.norm_eps)
            if config.norm_eps_mode == "inside"
            else np.sqrt(square) + config.norm_eps
        )
        h_pre[..., i] = alpha[0] * np.tanh(norm @ phi[:, 0]) + bias[i]
        h_post[..., i] = alpha[1] * np.tanh(norm @ phi[:, 1]) + bias[n + i]
        for k in range(n):
            h_res[..., k, i] = alpha[2] * np.tanh(norm @ phi[:, 2 + k]) + b_res[k, i]
    return Pre(np.einsum("...i,...ic->...c", h_pre, x), h_pre, h_post, h_res)


def channels(x, params, config):
    """Static coefficients with h_pre and h_post [n, C]."""
    x, bias = wide(x), wide(params.bias)
    *tokens, n, hidden = x.shape
    z_pre, z_post = bias[: 2 * n * hidden].reshape(2, n, hidden)
    h_pre = sigmoid(z_pre) + config.pre_eps
    h_post = config.post_scale * sigmoid(z_post) + config.post_eps
    static = dataclasses.replace(params, bias=np.append(np.zeros(2 * n), bias[2 * n * hidden :]))
    return Pre(np.einsum("ic,...ic->...c", h_pre, x), h_pre, h_post, pre(x, static, config).h_res)


def post(y, x, h_post, h_res):
    """Depth connection: X'[i] = sum_j H_res[i, j] X[j] + h_post[i] y, [..., n, C]."""
    y, x, h_post, h_res = (wide(array) for array in (y, x, h_post, h_res))
    return np.einsum("...ij,...jc->...ic", h_res, x) + h_post[..., :, None] * y[..., None, :]


def collapse(x, h_pre):
    """The sum of the streams with given weights, [..., C]."""
    return np.einsum("...i,...ic->...c", wide(h_pre), wide(x))


def head(x, params, config):
    """The learned exit: u = sum_i (sigmoid(alpha m_i + b_i) + eps) X[i], [..., C]."""
    x = wide(x)
    alpha, bias, phi = (wide(p) for p in (params.alpha, params.bias, params.phi))
    h_pre = sigmoid(alpha * project(x, phi, config) + bias) + config.pre_eps
    return np.einsum("...i,...ic->...c", h_pre, x)


class DeepSeekV4(NamedTuple):
    """Results of a hyper-connection of DeepSeek-V4, in its own orientation."""

    collapsed: np.ndarray  # [..., C]
    pre: np.ndarray  # [..., n]
    post: np.ndarray  # [..., n]
    comb: np.ndarray  # [..., n, n]; the first index is the one post contracts


def deepseek_v4(x, fn, base, scale, *, iters=20, eps=1e-6, norm_eps=1e-6, post_scale=2.0):
    """The row `deepseek_v4` in its own layout: fn [K, nC], base [K], scale [3], comb = H_res^T."""
    *tokens, n, hidden = x.shape
    flat = x.reshape(*tokens, n * hidden)
    flat = flat / np.sqrt(np.mean(flat**2, axis=-1, keepdims=True) + norm_eps)
    mixes = flat @ fn.T
    pre_weights = sigmoid(mixes[..., :n] * scale[0] + base[:n]) + eps
    post_weights = post_scale * sigmoid(mixes[..., n : 2 * n] * scale[1] + base[n : 2 * n])
    logits = (mixes[..., 2 * n :] * scale[2] + base[2 * n :]).reshape(*tokens, n, n)
    comb = sinkhorn_deepseek_v4(logits, iters, eps)
    return DeepSeekV4(
        np.einsum("...i,...ic->...c", pre_weights, x), pre_weights, post_weights, comb
    )


def deepseek_v4_post(y, x, post_weights, comb):
    """Depth connection of DeepSeek-V4: sum over the first index of comb."""
    return post_weights[..., :, None] * y[..., None, :] + np.einsum("...ji,...jc->...ic", comb, x)


def deepseek_v4_head(x, hc_fn, hc_base, hc_scale, *, eps=1e-6, norm_eps=1e-6):
    """The head of DeepSeek-V4: hc_fn [n, nC], hc_base [n], hc_scale [1]."""
    *tokens, n, hidden = x.shape
    flat = x.reshape(*tokens, n * hidden)
    flat = flat / np.sqrt(np.mean(flat**2, axis=-1, keepdims=True) + norm_eps)
    weights = sigmoid(flat @ hc_fn.T * hc_scale + hc_base) + eps
    return np.einsum("...i,...ic->...c", weights, x)


def megatron(x, weight, alpha, bias, *, iters=20, eps=1e-6, norm_eps=1e-6, post_scale=2.0):
    """The row `megatron` in its own layout: weight [K, nC], alpha [3], bias [K]."""
    *tokens, n, hidden = x.shape
    flat = x.reshape(*tokens, n * hidden)
    norm = np.sqrt(np.mean(flat**2, axis=-1, keepdims=True)) + norm_eps
    mixes = flat @ weight.T / norm * np.repeat(alpha, [n, n, n * n]) + bias
    h_pre = sigmoid(mixes[..., :n])
    h_post = post_scale * sigmoid(mixes[..., n : 2 * n])
    h_res = sinkhorn_megatron(mixes[..., 2 * n :].reshape(*tokens, n, n), iters, eps)
    return Pre(np.einsum("...i,...ic->...c", h_pre, x), h_pre, h_post, h_res)

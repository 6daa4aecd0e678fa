//! The RMSNorm of the layer's input that may follow the sum over streams: ũ = w · rho · u with
//! rho = 1 / sqrt(mean(u²) + eps), and its backward pass.

use crate::contract::limits::MAX_STREAMS;
use crate::cpu::scratch::{Exhausted, collected};
use crate::cpu::simd::{Isa, Kernel, MAX_LANES, Real, Vector};
use crate::cpu::stream::{Acc, Rows, RowsMut, Stream, for_blocks};

/// w in vectors, with zeros behind the last channel.
pub fn pack<V: Vector>(norm_scale: &[V::Real]) -> Result<Vec<V>, Exhausted> {
    let pack_block = |block: &[V::Real]| {
        let mut lanes = [V::Real::default(); MAX_LANES];
        lanes[..block.len()].copy_from_slice(block);
        V::load(&lanes)
    };
    let blocks = norm_scale.chunks(V::LANES);
    collected(blocks.len(), blocks.map(pack_block))
}

/// ũ and rho. u is summed up before it is rounded, and rounded once, as ũ.
pub struct CollapseNormalized<'a, S: Stream, I: Isa, const N: usize> {
    /// Streams.
    pub x: Rows<'a, S>,
    /// Weights of the streams in u `[n]` a token.
    pub h_pre: Rows<'a, S::Real>,
    /// Scale of the norm, as [`pack`] lays it out.
    pub norm_scale: &'a [Acc<S, I>],
    /// Term added to mean(u²).
    pub eps: f64,
    /// Number of tokens, up to a chunk.
    pub tokens: usize,
    pub u: RowsMut<'a, S>,
    pub rho: RowsMut<'a, S::Real>,
    /// Room for u of one token.
    pub sums: &'a mut [Acc<S, I>],
}

impl<S: Stream, I: Isa, const N: usize> Kernel<I> for CollapseNormalized<'_, S, I, N> {
    #[inline(always)]
    fn run(mut self) {
        let lanes = Acc::<S, I>::LANES;
        for token in 0..self.tokens {
            let (x, h_pre, u) = (self.x.row(token), self.h_pre.row(token), self.u.row(token));
            let c = u.len();
            let mut squares = Acc::<S, I>::zero();
            let h = splat_all::<Acc<S, I>, N>(h_pre);
            for_blocks!(c, lanes, at, WHOLE => {
                let sum = collapse::<S, I, N, WHOLE>(x, &h, h_pre.len(), c, at);
                squares = sum.mul_add(sum, squares);
                self.sums[at / lanes] = sum;
            });
            let mean = squares.sum() / S::Real::from_f64(c as f64);
            let (one, eps) = (S::Real::from_f64(1.0), S::Real::from_f64(self.eps));
            let rho = one / (mean + eps).sqrt();
            self.rho.row(token)[0] = rho;
            let rho = Acc::<S, I>::splat(rho);
            for_blocks!(c, lanes, at, WHOLE => {
                let value = self.sums[at / lanes] * rho * self.norm_scale[at / lanes];
                S::store::<I, WHOLE>(value, &mut u[at..]);
            });
        }
    }
}

/// Gradients through the norm, from the cotangent g of ũ: du = rho w g − (rho³ <w g, u> / C) u,
/// dh_pre[i] = `from_h`[i] + <du, X[i]> and dw = sum over tokens of g rho u.
///
/// u is computed again, and so is not rounded. The second pass over the token reads the cache.
pub struct CollapseNormalizedBackward<'a, S: Stream, I: Isa, const N: usize> {
    /// Streams.
    pub x: Rows<'a, S>,
    /// Weights of the streams in u `[n]` a token.
    pub h_pre: Rows<'a, S::Real>,
    /// Scale of the norm, as [`pack`] lays it out.
    pub norm_scale: &'a [Acc<S, I>],
    /// 1 / rms(u) of the forward pass `[1]` a token.
    pub rho: Rows<'a, S::Real>,
    pub d_u: Rows<'a, S>,
    /// Cotangent of h_pre, without the part that comes from u.
    pub from_h: Rows<'a, S::Real>,
    /// Number of tokens, up to a chunk.
    pub tokens: usize,
    pub d_h_pre: RowsMut<'a, S::Real>,
    /// Result: du, not rounded, as many vectors a token as w has.
    pub d_sum: &'a mut [Acc<S, I>],
    /// Gradient of the norm's scale, to which dw is added.
    pub d_norm_scale: &'a mut [Acc<S, I>],
}

impl<S: Stream, I: Isa, const N: usize> Kernel<I> for CollapseNormalizedBackward<'_, S, I, N> {
    #[inline(always)]
    fn run(mut self) {
        let (lanes, blocks) = (Acc::<S, I>::LANES, self.norm_scale.len());
        for token in 0..self.tokens {
            let (x, d_u) = (self.x.row(token), self.d_u.row(token));
            let (h_pre, from_h) = (self.h_pre.row(token), self.from_h.row(token));
            let d_sum = &mut self.d_sum[token * blocks..][..blocks];
            let (n, c) = (if N == MAX_STREAMS { h_pre.len() } else { N }, d_u.len());
            let h = splat_all::<Acc<S, I>, N>(h_pre);
            let rho = Acc::<S, I>::splat(self.rho.row(token)[0]);

            let mut dot = Acc::<S, I>::zero();
            for_blocks!(c, lanes, at, WHOLE => {
                let block = at / lanes;
                let u = collapse::<S, I, N, WHOLE>(x, &h, n, c, at);
                let g = S::load::<I, WHOLE>(&d_u[at..]);
                dot = (g * self.norm_scale[block]).mul_add(u, dot);
                let d_w = &mut self.d_norm_scale[block];
                *d_w = (g * rho).mul_add(u, *d_w);
                d_sum[block] = u;
            });
            let mean = Acc::<S, I>::splat(dot.sum() / S::Real::from_f64(c as f64));
            let factor = Acc::<S, I>::zero() - rho * rho * rho * mean;

            let mut dots = [Acc::<S, I>::zero(); N];
            for_blocks!(c, lanes, at, WHOLE => {
                let block = at / lanes;
                let v = S::load::<I, WHOLE>(&d_u[at..]) * self.norm_scale[block];
                let du = factor.mul_add(d_sum[block], rho * v);
                d_sum[block] = du;
                for i in 0..n {
                    dots[i] = du.mul_add(S::load::<I, WHOLE>(&x[i * c + at..(i + 1) * c]), dots[i]);
                }
            });
            let d_h_pre = self.d_h_pre.row(token);
            for i in 0..n {
                d_h_pre[i] = from_h[i] + dots[i].sum();
            }
        }
    }
}

/// Every weight in a vector of its own.
#[inline(always)]
fn splat_all<V: Vector, const N: usize>(h: &[V::Real]) -> [V; N] {
    let mut vectors = [V::zero(); N];
    for (vector, h) in vectors.iter_mut().zip(h) {
        *vector = V::splat(*h);
    }
    vectors
}

/// One vector of sum over i of h[i] X[i], from channel `at` on.
#[inline(always)]
fn collapse<S: Stream, I: Isa, const N: usize, const WHOLE: bool>(
    x: &[S],
    h: &[Acc<S, I>; N],
    n: usize,
    c: usize,
    at: usize,
) -> Acc<S, I> {
    let n = if N == MAX_STREAMS { n } else { N };
    let mut sum = h[0] * S::load::<I, WHOLE>(&x[at..c]);
    for i in 1..n {
        sum = h[i].mul_add(S::load::<I, WHOLE>(&x[i * c + at..(i + 1) * c]), sum);
    }
    sum
}

/// The sum of some [`pack`]ed rows, in their order.
pub struct SumPacked<'a, V: Vector> {
    /// Rows.
    pub parts: &'a [Vec<V>],
    /// Result `[C]`, or empty.
    pub to: &'a mut [V::Real],
}

impl<V: Vector, I: Isa> Kernel<I> for SumPacked<'_, V> {
    #[inline(always)]
    fn run(self) {
        for (block, to) in self.to.chunks_mut(V::LANES).enumerate() {
            let mut total = V::zero();
            for part in self.parts {
                total = total + part[block];
            }
            let mut lanes = [V::Real::default(); MAX_LANES];
            total.store(&mut lanes);
            to.copy_from_slice(&lanes[..to.len()]);
        }
    }
}

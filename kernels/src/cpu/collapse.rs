//! The sum over the streams that a layer reads, u = sum over i of h_pre[i] X[i], and its gradient with
//! respect to h_pre: a part of pre, and a call of its own where the channels are split over devices.

use crate::contract::limits::MAX_STREAMS;
use crate::cpu::chunks::run_chunks;
use crate::cpu::parallel::Pool;
use crate::cpu::scratch::Exhausted;
use crate::cpu::simd::{Isa, Job, Kernel, Real, Vector, for_streams};
use crate::cpu::stream::{Acc, Rows, RowsMut, Stream, for_blocks};

/// Tokens in one piece of work.
pub const CHUNK: usize = 32;

/// u = sum over i of h_pre[i] X[i]
pub fn forward_chunk<S: Stream, I: Isa>(
    x: Rows<S>,
    h_pre: Rows<S::Real>,
    tokens: usize,
    u: RowsMut<S>,
) {
    for_streams!(h_pre.width(), N => I::enter(ForwardChunk::<_, N> { x, h_pre, tokens, u }));
}

struct ForwardChunk<'a, S: Stream, const N: usize> {
    x: Rows<'a, S>,
    h_pre: Rows<'a, S::Real>,
    tokens: usize,
    u: RowsMut<'a, S>,
}

impl<S: Stream, I: Isa, const N: usize> Kernel<I> for ForwardChunk<'_, S, N> {
    #[inline(always)]
    fn run(mut self) {
        for token in 0..self.tokens {
            let (x, h_pre, u) = (self.x.row(token), self.h_pre.row(token), self.u.row(token));
            let (n, c) = (if N == MAX_STREAMS { h_pre.len() } else { N }, u.len());
            let mut h = [Acc::<S, I>::zero(); N];
            for i in 0..n {
                h[i] = Acc::<S, I>::splat(h_pre[i]);
            }
            for_blocks!(c, Acc::<S, I>::LANES, at, WHOLE => {
                let mut sum = h[0] * S::load::<I, WHOLE>(&x[at..c]);
                for i in 1..n {
                    sum = h[i].mul_add(S::load::<I, WHOLE>(&x[i * c + at..(i + 1) * c]), sum);
                }
                S::store::<I, WHOLE>(sum, &mut u[at..]);
            });
        }
    }
}

/// dh_pre[i] = <du, X[i]>, and what else there is of it
pub fn backward_chunk<S: Stream, I: Isa>(
    x: Rows<S>,
    d_u: Rows<S>,
    others: Option<Rows<S::Real>>,
    tokens: usize,
    d_h_pre: RowsMut<S::Real>,
) {
    let n = d_h_pre.as_rows().width();
    for_streams!(n, N => {
        I::enter(BackwardChunk::<_, N> { x, d_u, others, tokens, d_h_pre });
    });
}

struct BackwardChunk<'a, S: Stream, const N: usize> {
    x: Rows<'a, S>,
    d_u: Rows<'a, S>,
    others: Option<Rows<'a, S::Real>>,
    tokens: usize,
    d_h_pre: RowsMut<'a, S::Real>,
}

impl<S: Stream, I: Isa, const N: usize> Kernel<I> for BackwardChunk<'_, S, N> {
    #[inline(always)]
    fn run(mut self) {
        for token in 0..self.tokens {
            let (x, d_u) = (self.x.row(token), self.d_u.row(token));
            let d_h_pre = self.d_h_pre.row(token);
            let (n, c) = (if N == MAX_STREAMS { d_h_pre.len() } else { N }, d_u.len());
            let mut sums = [Acc::<S, I>::zero(); N];
            for_blocks!(c, Acc::<S, I>::LANES, at, WHOLE => {
                let d_u = S::load::<I, WHOLE>(&d_u[at..]);
                for i in 0..n {
                    sums[i] = d_u.mul_add(S::load::<I, WHOLE>(&x[i * c + at..(i + 1) * c]), sums[i]);
                }
            });
            for i in 0..n {
                d_h_pre[i] = sums[i].sum();
            }
            if let Some(others) = self.others {
                for (sum, other) in d_h_pre.iter_mut().zip(others.row(token)) {
                    *sum = *other + *sum;
                }
            }
        }
    }
}

/// The forward call on `tokens` tokens.
pub struct Forward<'a, S: Stream> {
    /// Streams `[n·C]` a token.
    pub x: Rows<'a, S>,
    /// `[n]` a token.
    pub h_pre: Rows<'a, S::Real>,
    /// Result `[C]` a token.
    pub u: RowsMut<'a, S>,
    pub tokens: usize,
    pub pool: &'a dyn Pool,
}

/// Runs the forward call.
pub fn forward<S: Stream>(call: Forward<S>) -> Result<(), Exhausted> {
    S::Real::dispatch(call)
}

impl<S: Stream> Job for Forward<'_, S> {
    fn run<I: Isa>(mut self) -> Result<(), Exhausted> {
        run_chunks(
            self.pool,
            self.tokens,
            CHUNK,
            |tokens| {
                let (x, h_pre) = (self.x.split_off(tokens), self.h_pre.split_off(tokens));
                (x, h_pre, self.u.split_off(tokens))
            },
            || Ok(()),
            |(), tokens, (x, h_pre, u)| forward_chunk::<S, I>(x, h_pre, tokens, u),
        )
    }
}

/// The backward call on `tokens` tokens.
pub struct Backward<'a, S: Stream> {
    /// Streams `[n·C]` a token.
    pub x: Rows<'a, S>,
    /// Cotangent of u.
    pub d_u: Rows<'a, S>,
    /// Result `[n]` a token.
    pub d_h_pre: RowsMut<'a, S::Real>,
    pub tokens: usize,
    pub pool: &'a dyn Pool,
}

/// Runs the backward call.
pub fn backward<S: Stream>(call: Backward<S>) -> Result<(), Exhausted> {
    S::Real::dispatch(call)
}

impl<S: Stream> Job for Backward<'_, S> {
    fn run<I: Isa>(mut self) -> Result<(), Exhausted> {
        run_chunks(
            self.pool,
            self.tokens,
            CHUNK,
            |tokens| {
                let (x, d_u) = (self.x.split_off(tokens), self.d_u.split_off(tokens));
                (x, d_u, self.d_h_pre.split_off(tokens))
            },
            || Ok(()),
            |(), tokens, (x, d_u, d_h_pre)| backward_chunk::<S, I>(x, d_u, None, tokens, d_h_pre),
        )
    }
}

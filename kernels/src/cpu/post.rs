//! The depth connection: X'[i] = sum over j of H_res[i, j] X[j], plus h_post[i] y.

use crate::contract::limits::MAX_STREAMS;
use crate::cpu::chunks::run_chunks;
use crate::cpu::parallel::Pool;
use crate::cpu::scratch::Exhausted;
use crate::cpu::simd::{Isa, Job, Kernel, Real, Vector, for_streams};
use crate::cpu::stream::{Acc, Rows, RowsMut, Stream, for_blocks};

/// Tokens in one piece of work.
pub const CHUNK: usize = 32;

/// Operands of post for some tokens.
#[derive(Clone, Copy)]
pub struct Inputs<'a, S: Stream> {
    /// Streams `[n·C]` a token.
    pub x: Rows<'a, S>,
    /// Layer output `[C]` a token.
    pub y: Rows<'a, S>,
    /// `[n]` a token.
    pub h_post: Rows<'a, S::Real>,
    /// `[n·n]` a token.
    pub h_res: Rows<'a, S::Real>,
}

impl<S: Stream> Inputs<'_, S> {
    /// Cuts off the first tokens.
    pub fn split_off(&mut self, tokens: usize) -> Self {
        Self {
            x: self.x.split_off(tokens),
            y: self.y.split_off(tokens),
            h_post: self.h_post.split_off(tokens),
            h_res: self.h_res.split_off(tokens),
        }
    }
}

/// The coefficients of one token, in vectors of equal lanes.
struct Mixing<V, const N: usize> {
    h_post: [V; N],
    h_res: [[V; N]; N],
}

impl<V: Vector, const N: usize> Mixing<V, N> {
    #[inline(always)]
    fn new(n: usize, h_post: &[V::Real], h_res: &[V::Real]) -> Self {
        let mut mixing = Self {
            h_post: [V::zero(); N],
            h_res: [[V::zero(); N]; N],
        };
        for i in 0..n {
            mixing.h_post[i] = V::splat(h_post[i]);
            for j in 0..n {
                mixing.h_res[i][j] = V::splat(h_res[i * n + j]);
            }
        }
        mixing
    }
}

/// Forward pass of some tokens.
pub fn forward_chunk<S: Stream, I: Isa>(inputs: Inputs<S>, tokens: usize, x_new: RowsMut<S>) {
    let n = inputs.h_post.width();
    for_streams!(n, N => I::enter(ForwardChunk::<_, N> { inputs, tokens, x_new }));
}

struct ForwardChunk<'a, S: Stream, const N: usize> {
    inputs: Inputs<'a, S>,
    tokens: usize,
    x_new: RowsMut<'a, S>,
}

impl<S: Stream, I: Isa, const N: usize> Kernel<I> for ForwardChunk<'_, S, N> {
    #[inline(always)]
    fn run(self) {
        let Self {
            inputs,
            tokens,
            mut x_new,
        } = self;
        for token in 0..tokens {
            let (x, y) = (inputs.x.row(token), inputs.y.row(token));
            let (h_post, h_res) = (inputs.h_post.row(token), inputs.h_res.row(token));
            let (n, c) = (if N == MAX_STREAMS { h_post.len() } else { N }, y.len());
            let h = Mixing::<Acc<S, I>, N>::new(n, h_post, h_res);
            let x_new = x_new.row(token);
            for_blocks!(c, Acc::<S, I>::LANES, at, WHOLE => {
                let y = S::load::<I, WHOLE>(&y[at..]);
                let mut xs = [Acc::<S, I>::zero(); N];
                for j in 0..n {
                    xs[j] = S::load::<I, WHOLE>(&x[j * c + at..(j + 1) * c]);
                }
                for i in 0..n {
                    // y, usually the largest term, comes last: fewer roundings at its size.
                    let mut sum = h.h_res[i][0] * xs[0];
                    for j in 1..n {
                        sum = h.h_res[i][j].mul_add(xs[j], sum);
                    }
                    sum = h.h_post[i].mul_add(y, sum);
                    S::store::<I, WHOLE>(sum, &mut x_new[i * c + at..(i + 1) * c]);
                }
            });
        }
    }
}

/// Results of post's backward pass for some tokens. There is no d_x: pre's backward makes it of the same
/// d_x_new.
pub struct Gradients<'a, S: Stream> {
    /// `[C]` a token.
    pub d_y: RowsMut<'a, S>,
    /// `[n]` a token.
    pub d_h_post: RowsMut<'a, S::Real>,
    /// `[n·n]` a token.
    pub d_h_res: RowsMut<'a, S::Real>,
}

impl<S: Stream> Gradients<'_, S> {
    /// Cuts off the first tokens.
    pub fn split_off(&mut self, tokens: usize) -> Self {
        Self {
            d_y: self.d_y.split_off(tokens),
            d_h_post: self.d_h_post.split_off(tokens),
            d_h_res: self.d_h_res.split_off(tokens),
        }
    }
}

/// Backward pass of some tokens, with G = d_x_new.
pub fn backward_chunk<S: Stream, I: Isa>(
    inputs: Inputs<S>,
    d_x_new: Rows<S>,
    tokens: usize,
    out: Gradients<S>,
) {
    let n = inputs.h_post.width();
    for_streams!(n, N => I::enter(BackwardChunk::<_, N> { inputs, d_x_new, tokens, out }));
}

struct BackwardChunk<'a, S: Stream, const N: usize> {
    inputs: Inputs<'a, S>,
    d_x_new: Rows<'a, S>,
    tokens: usize,
    out: Gradients<'a, S>,
}

impl<S: Stream, I: Isa, const N: usize> Kernel<I> for BackwardChunk<'_, S, N> {
    #[inline(always)]
    fn run(self) {
        let Self {
            inputs,
            d_x_new,
            tokens,
            mut out,
        } = self;
        for token in 0..tokens {
            let (x, y, g) = (inputs.x.row(token), inputs.y.row(token), d_x_new.row(token));
            let (h_post, d_y) = (inputs.h_post.row(token), out.d_y.row(token));
            let (n, c) = (if N == MAX_STREAMS { h_post.len() } else { N }, y.len());
            let h = Mixing::<Acc<S, I>, N>::new(n, h_post, inputs.h_res.row(token));
            let mut d_h = Mixing::<Acc<S, I>, N>::new(0, &[], &[]);
            for_blocks!(c, Acc::<S, I>::LANES, at, WHOLE => {
                let mut gs = [Acc::<S, I>::zero(); N];
                for i in 0..n {
                    gs[i] = S::load::<I, WHOLE>(&g[i * c + at..(i + 1) * c]);
                }
                // dy = sum over i of h_post[i] G[i], and dh_post[i] = <G[i], y>
                let y = S::load::<I, WHOLE>(&y[at..]);
                let mut sum = h.h_post[0] * gs[0];
                for i in 1..n {
                    sum = h.h_post[i].mul_add(gs[i], sum);
                }
                S::store::<I, WHOLE>(sum, &mut d_y[at..]);
                for i in 0..n {
                    d_h.h_post[i] = gs[i].mul_add(y, d_h.h_post[i]);
                }
                // dH_res[i, j] = <G[i], X[j]>
                for j in 0..n {
                    let x = S::load::<I, WHOLE>(&x[j * c + at..(j + 1) * c]);
                    for i in 0..n {
                        d_h.h_res[i][j] = gs[i].mul_add(x, d_h.h_res[i][j]);
                    }
                }
            });
            let (d_h_post, d_h_res) = (out.d_h_post.row(token), out.d_h_res.row(token));
            for i in 0..n {
                d_h_post[i] = d_h.h_post[i].sum();
                for j in 0..n {
                    d_h_res[i * n + j] = d_h.h_res[i][j].sum();
                }
            }
        }
    }
}

/// The forward call on `tokens` tokens.
pub struct Forward<'a, S: Stream> {
    pub inputs: Inputs<'a, S>,
    pub x_new: RowsMut<'a, S>,
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
            |tokens| (self.inputs.split_off(tokens), self.x_new.split_off(tokens)),
            || Ok(()),
            |(), tokens, (inputs, x_new)| forward_chunk::<S, I>(inputs, tokens, x_new),
        )
    }
}

/// The backward call on `tokens` tokens.
pub struct Backward<'a, S: Stream> {
    pub inputs: Inputs<'a, S>,
    /// Cotangent of x_new.
    pub d_x_new: Rows<'a, S>,
    pub out: Gradients<'a, S>,
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
                let (inputs, d_x_new) = (
                    self.inputs.split_off(tokens),
                    self.d_x_new.split_off(tokens),
                );
                (inputs, d_x_new, self.out.split_off(tokens))
            },
            || Ok(()),
            |(), tokens, (inputs, d_x_new, out)| {
                backward_chunk::<S, I>(inputs, d_x_new, tokens, out)
            },
        )
    }
}

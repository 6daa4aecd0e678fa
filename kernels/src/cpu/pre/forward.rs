//! The forward pass.

use super::norm::{self, CollapseNormalized};
use super::{CHUNK, Params};
use crate::contract::config::{Config, NormEpsMode};
use crate::cpu::chunks::run_chunks;
use crate::cpu::coefficients::{self, CoefficientsMut, Gates};
use crate::cpu::collapse;
use crate::cpu::parallel::Pool;
use crate::cpu::projection::{Packed, STAGE, Staged, project, stage, stages};
use crate::cpu::scratch::{Exhausted, filled};
use crate::cpu::simd::{Isa, Job, Kernel, Real, Vector, for_streams};
use crate::cpu::stream::{Acc, Rows, RowsMut, Stream};

/// Results of pre for some tokens.
pub struct Outputs<'a, S: Stream> {
    /// Layer input `[C]` a token.
    pub u: RowsMut<'a, S>,
    /// Coefficients.
    pub h: CoefficientsMut<'a, S::Real>,
    /// r · vec(X) phi `[K]` a token; empty for static coefficients.
    pub m: RowsMut<'a, S::Real>,
    /// `[1]` a token.
    pub r: RowsMut<'a, S::Real>,
    /// 1 / rms(u) `[1]` a token; empty where the layer's input is not normalised.
    pub rho: RowsMut<'a, S::Real>,
}

impl<S: Stream> Outputs<'_, S> {
    /// Cuts off the first tokens.
    pub fn split_off(&mut self, tokens: usize) -> Self {
        Self {
            u: self.u.split_off(tokens),
            h: self.h.split_off(tokens),
            m: self.m.split_off(tokens),
            r: self.r.split_off(tokens),
            rho: self.rho.split_off(tokens),
        }
    }
}

/// Room for one chunk of the forward pass.
pub struct ForwardScratch<V> {
    staged: Vec<Staged<V>>,
    totals: Vec<V>,
    squares: Vec<V>,
    norm_scale: Vec<V>,
    sums: Vec<V>,
    coefficients: coefficients::Scratch<V>,
}

impl<V: Vector> ForwardScratch<V> {
    /// Makes room for the chunks of a call with `tokens` tokens.
    pub fn new<I: Isa>(params: &Params<V::Real>, tokens: usize) -> Result<Self, Exhausted>
    where
        V::Real: Real<Vector<I> = V>,
    {
        let Gates { config, layout, .. } = params.gates;
        let (chunk, columns) = (tokens.min(CHUNK), params.shape::<I>().padded_columns());
        let norm_scale: Vec<V> = norm::pack(params.norm_scale)?;
        Ok(Self {
            sums: filled(V::zero(), norm_scale.len())?,
            norm_scale,
            staged: filled([V::zero(); STAGE], chunk)?,
            totals: filled(V::zero(), chunk * columns)?,
            squares: filled(V::zero(), chunk)?,
            coefficients: coefficients::Scratch::new(config, layout, false)?,
        })
    }
}

/// r of one token [15].
#[inline(always)]
fn inverse_norm<R: Real>(config: &Config, sum_of_squares: R, numel: usize) -> R {
    let (one, eps) = (R::from_f64(1.0), R::from_f64(config.norm_eps));
    let mean = sum_of_squares / R::from_f64(numel as f64);
    match config.norm_eps_mode {
        NormEpsMode::Inside => one / (mean + eps).sqrt(),
        NormEpsMode::Outside => one / (mean.sqrt() + eps),
    }
}

/// Forward pass of up to [`CHUNK`] tokens, whose u has weights of its own or those that are given.
pub fn forward_chunk<S: Stream, I: Isa>(
    params: &Params<S::Real>,
    phi: &Packed<Acc<S, I>>,
    x: Rows<S>,
    given: Option<Rows<S::Real>>,
    tokens: usize,
    out: &mut Outputs<S>,
    scratch: &mut ForwardScratch<Acc<S, I>>,
) {
    let gates = &params.gates;
    if phi.padded_columns() > 0 {
        let (m, r) = (out.m.reborrow(), out.r.reborrow());
        I::enter(Project::<S, I> {
            params,
            phi,
            x,
            tokens,
            m,
            r,
            scratch,
        });
    } else {
        (0..tokens).for_each(|token| out.r.row(token).fill(S::Real::default()));
    }
    let m = out.m.as_rows();
    coefficients::forward::<_, I>(gates, m, tokens, &mut out.h, &mut scratch.coefficients);
    let h_pre = given.unwrap_or(out.h.h_pre.as_rows());
    let u = out.u.reborrow();
    if params.norm_scale.is_empty() {
        collapse::forward_chunk::<S, I>(x, h_pre, tokens, u);
        return;
    }
    let ForwardScratch {
        norm_scale, sums, ..
    } = scratch;
    for_streams!(gates.layout.n, N => {
        let (rho, eps) = (out.rho.reborrow(), gates.config.norm_scale_eps);
        I::enter(CollapseNormalized::<S, I, N> { x, h_pre, norm_scale, eps, tokens, u, rho, sums });
    });
}

/// r and m [14, 15].
struct Project<'a, S: Stream, I: Isa> {
    params: &'a Params<'a, S::Real>,
    phi: &'a Packed<Acc<S, I>>,
    x: Rows<'a, S>,
    tokens: usize,
    m: RowsMut<'a, S::Real>,
    r: RowsMut<'a, S::Real>,
    scratch: &'a mut ForwardScratch<Acc<S, I>>,
}

impl<S: Stream, I: Isa> Kernel<I> for Project<'_, S, I> {
    #[inline(always)]
    fn run(mut self) {
        let Self {
            params,
            phi,
            x,
            tokens,
            ..
        } = self;
        let (n, shape) = (params.gates.layout.n, params.shape::<I>());
        let columns = shape.padded_columns();
        let ForwardScratch {
            staged,
            totals,
            squares,
            ..
        } = self.scratch;
        totals.fill(Acc::<S, I>::zero());
        squares.fill(Acc::<S, I>::zero());
        for stream in 0..n {
            for blocks in stages(shape) {
                stage::<S, I>(&x, tokens, stream, shape, blocks, staged);
                prefetch_next_stage::<S, I>(&x, tokens, stream * shape.c, blocks);
                for (square, staged) in squares.iter_mut().zip(&staged[..tokens]) {
                    let mut sum = Acc::<S, I>::zero();
                    for x in &staged[..blocks.1] {
                        sum = x.mul_add(*x, sum);
                    }
                    *square = *square + sum;
                }
                project(&staged[..tokens], phi, stream, blocks, totals);
            }
        }
        for token in 0..tokens {
            let r = inverse_norm(params.gates.config, squares[token].sum(), n * params.c);
            self.r.row(token)[0] = r;
            for (k, m) in self.m.row(token).iter_mut().enumerate() {
                *m = r * totals[token * columns + k].sum();
            }
        }
    }
}

/// Rows are read in short runs, which the processor does not foresee: asks for the next run while the
/// products of this one are computed.
#[inline(always)]
fn prefetch_next_stage<S: Stream, I: Isa>(
    x: &Rows<S>,
    tokens: usize,
    first_channel: usize,
    (first, count): (usize, usize),
) {
    let lanes = Acc::<S, I>::LANES;
    for token in 0..tokens {
        let row = x.row(token);
        let next = row.len().min(first_channel + (first + count) * lanes);
        I::prefetch(&row[next..row.len().min(next + STAGE * lanes)]);
    }
}

/// The forward call on `tokens` tokens.
pub struct Forward<'a, S: Stream> {
    pub params: Params<'a, S::Real>,
    /// Streams `[n·C]` a token.
    pub x: Rows<'a, S>,
    pub out: Outputs<'a, S>,
    pub tokens: usize,
    pub pool: &'a dyn Pool,
}

/// Runs the forward call.
pub fn forward<S: Stream>(call: Forward<S>) -> Result<(), Exhausted> {
    S::Real::dispatch(call)
}

impl<S: Stream> Job for Forward<'_, S> {
    fn run<I: Isa>(mut self) -> Result<(), Exhausted> {
        let shape = self.params.shape::<I>();
        let phi = Packed::pack::<I>(self.params.phi, shape, self.pool)?;
        run_chunks(
            self.pool,
            self.tokens,
            CHUNK,
            |tokens| (self.x.split_off(tokens), self.out.split_off(tokens)),
            || ForwardScratch::new::<I>(&self.params, self.tokens),
            |scratch, tokens, (x, mut out)| {
                forward_chunk::<S, I>(&self.params, &phi, x, None, tokens, &mut out, scratch);
            },
        )
    }
}

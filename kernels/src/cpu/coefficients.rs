//! The coefficients of a token from its projection, and their gradients (equations 16 to 19).
//!
//! Tokens are taken in groups of as many as a vector has lanes, one token a lane.

use crate::contract::config::{Config, Constraint, NormEpsMode};
use crate::contract::layout::CoefficientLayout;
use crate::cpu::permutations;
use crate::cpu::scratch::{Exhausted, filled};
use crate::cpu::simd::{Isa, Kernel, MAX_LANES, Real, Vector, for_streams};
use crate::cpu::sinkhorn::{self, gather, scatter};
use crate::cpu::stream::{Rows, RowsMut};

/// alpha and bias, and how coefficients follow from them.
#[derive(Clone, Copy)]
pub struct Gates<'a, R> {
    pub config: &'a Config,
    /// Columns.
    pub layout: CoefficientLayout,
    /// Gates.
    pub alpha: &'a [R],
    /// Static part `[K]`.
    pub bias: &'a [R],
}

/// The coefficients of some tokens, to write.
pub struct CoefficientsMut<'a, R> {
    /// `[n]` a token.
    pub h_pre: RowsMut<'a, R>,
    /// `[n]` a token; empty in a head.
    pub h_post: RowsMut<'a, R>,
    /// `[n * n]` a token; empty in a head.
    pub h_res: RowsMut<'a, R>,
}

impl<R> CoefficientsMut<'_, R> {
    /// Cuts off the first tokens.
    pub fn split_off(&mut self, tokens: usize) -> Self {
        Self {
            h_pre: self.h_pre.split_off(tokens),
            h_post: self.h_post.split_off(tokens),
            h_res: self.h_res.split_off(tokens),
        }
    }
}

/// The cotangents of the coefficients of some tokens.
#[derive(Clone, Copy)]
pub struct Cotangents<'a, R> {
    /// `[n]` a token.
    pub h_pre: Rows<'a, R>,
    /// `[n]` a token; empty in a head.
    pub h_post: Rows<'a, R>,
    /// `[n * n]` a token; empty in a head.
    pub h_res: Rows<'a, R>,
}

impl<R> Cotangents<'_, R> {
    /// Cuts off the first tokens.
    pub fn split_off(&mut self, tokens: usize) -> Self {
        Self {
            h_pre: self.h_pre.split_off(tokens),
            h_post: self.h_post.split_off(tokens),
            h_res: self.h_res.split_off(tokens),
        }
    }
}

/// Room for one group of tokens.
pub struct Scratch<V> {
    z: Vec<V>,
    h: Vec<V>,
    g: Vec<V>,
    history: Vec<V>,
}

impl<V: Vector> Scratch<V> {
    /// Makes room for [`forward`], and for [`backward`] where `differentiate`.
    pub fn new(
        config: &Config,
        layout: CoefficientLayout,
        differentiate: bool,
    ) -> Result<Self, Exhausted> {
        let zeros = |len| filled(V::zero(), len);
        let needs_history = differentiate && uses_sinkhorn(config, layout);
        let history_len = if needs_history {
            sinkhorn::history_len(config, layout.n)
        } else {
            0
        };
        Ok(Self {
            z: zeros(layout.num())?,
            h: zeros(layout.n * layout.n)?,
            g: zeros(layout.num())?,
            history: zeros(history_len)?,
        })
    }
}

fn uses_sinkhorn(config: &Config, layout: CoefficientLayout) -> bool {
    layout.num_res > 0 && config.constraint == Constraint::Birkhoff
}

/// 1 / (1 + e^-z)
#[inline(always)]
fn sigmoid<V: Vector>(z: V) -> V {
    let one = V::splat(V::Real::from_f64(1.0));
    one / (one + (V::zero() - z).exp())
}

#[inline(always)]
fn constant<V: Vector>(value: f64) -> V {
    V::splat(V::Real::from_f64(value))
}

/// z = alpha_group · m + b [16]; z = b where there is no projection.
#[inline(always)]
fn logits<V: Vector>(
    gates: &Gates<V::Real>,
    m: &Rows<V::Real>,
    first: usize,
    count: usize,
    z: &mut [V],
) {
    if m.width() > 0 {
        gather(m, first, count, z);
    }
    for (c, z) in z.iter_mut().enumerate() {
        let bias = V::splat(gates.bias[c]);
        *z = if m.width() > 0 {
            z.mul_add(V::splat(gates.alpha[gates.layout.gate(c)]), bias)
        } else {
            bias
        };
    }
}

/// h_pre, h_post and H_res of `tokens` tokens from their m.
pub fn forward<R: Real, I: Isa>(
    gates: &Gates<R>,
    m: Rows<R>,
    tokens: usize,
    out: &mut CoefficientsMut<R>,
    scratch: &mut Scratch<R::Vector<I>>,
) {
    for_streams!(gates.layout.n, N => {
        I::enter(Forward::<R, I, N> { gates, m, tokens, out, scratch });
    });
}

struct Forward<'a, 'b, R: Real, I: Isa, const N: usize> {
    gates: &'a Gates<'a, R>,
    m: Rows<'a, R>,
    tokens: usize,
    out: &'a mut CoefficientsMut<'b, R>,
    scratch: &'a mut Scratch<R::Vector<I>>,
}

impl<R: Real, I: Isa, const N: usize> Kernel<I> for Forward<'_, '_, R, I, N> {
    #[inline(always)]
    fn run(self) {
        let Self {
            gates,
            m,
            tokens,
            out,
            scratch,
        } = self;
        forward_with::<R::Vector<I>, N>(gates, &m, tokens, out, scratch);
    }
}

#[inline(always)]
fn forward_with<V: Vector, const N: usize>(
    gates: &Gates<V::Real>,
    m: &Rows<V::Real>,
    tokens: usize,
    out: &mut CoefficientsMut<V::Real>,
    scratch: &mut Scratch<V>,
) {
    let Gates { config, layout, .. } = *gates;
    let n = layout.n;
    for first in (0..tokens).step_by(V::LANES) {
        let count = (tokens - first).min(V::LANES);
        logits(gates, m, first, count, &mut scratch.z);
        let (z_pre, z) = scratch.z.split_at_mut(n);
        let (z_post, z_res) = z.split_at_mut(layout.num_post);
        for z in z_pre.iter_mut() {
            *z = sigmoid(*z) + constant(config.pre_eps); // [17]
        }
        scatter(z_pre, first, count, &mut out.h_pre);
        if layout.num_post == 0 {
            continue;
        }
        for z in z_post.iter_mut() {
            *z = sigmoid(*z).mul_add(constant(config.post_scale), constant(config.post_eps)); // [18]
        }
        scatter(z_post, first, count, &mut out.h_post);
        match config.constraint {
            Constraint::Birkhoff => {
                sinkhorn::forward::<V, N>(config, n, z_res, &mut scratch.h, &mut []); // [19]
                scatter(&scratch.h, first, count, &mut out.h_res);
            }
            Constraint::Permutations => {
                permutations::forward::<V, N>(n, z_res, &mut scratch.h);
                scatter(&scratch.h, first, count, &mut out.h_res);
            }
            Constraint::None => scatter(z_res, first, count, &mut out.h_res),
            Constraint::Identity => {
                for (at, h) in scratch.h.iter_mut().enumerate() {
                    *h = constant(if at % (n + 1) == 0 { 1.0 } else { 0.0 });
                }
                scatter(&scratch.h, first, count, &mut out.h_res);
            }
        }
    }
}

/// h_pre alone of `tokens` tokens from their m [17].
pub fn h_pre<R: Real, I: Isa>(
    gates: &Gates<R>,
    m: Rows<R>,
    tokens: usize,
    out: RowsMut<R>,
    scratch: &mut Scratch<R::Vector<I>>,
) {
    I::enter(HPre::<R, I> {
        gates,
        m,
        tokens,
        out,
        scratch,
    });
}

struct HPre<'a, R: Real, I: Isa> {
    gates: &'a Gates<'a, R>,
    m: Rows<'a, R>,
    tokens: usize,
    out: RowsMut<'a, R>,
    scratch: &'a mut Scratch<R::Vector<I>>,
}

impl<R: Real, I: Isa> Kernel<I> for HPre<'_, R, I> {
    #[inline(always)]
    fn run(mut self) {
        let Gates { config, layout, .. } = *self.gates;
        let z = &mut self.scratch.z[..layout.n];
        for first in (0..self.tokens).step_by(R::Vector::<I>::LANES) {
            let count = (self.tokens - first).min(R::Vector::<I>::LANES);
            logits(self.gates, &self.m, first, count, z);
            for z in z.iter_mut() {
                *z = sigmoid(*z) + constant(config.pre_eps);
            }
            scatter(z, first, count, &mut self.out);
        }
    }
}

/// Sums over tokens of the gradients of alpha and bias.
#[derive(Clone)]
pub struct GateSums {
    /// Gradient of alpha.
    pub d_alpha: Vec<f64>,
    /// Gradient of bias `[K]`.
    pub d_bias: Vec<f64>,
}

impl GateSums {
    /// Makes sums that are zero.
    pub fn new(num_alpha: usize, layout: CoefficientLayout) -> Result<Self, Exhausted> {
        Ok(Self {
            d_alpha: filled(0.0, num_alpha)?,
            d_bias: filled(0.0, layout.num())?,
        })
    }
    /// Adds the sums of other tokens.
    pub fn add(&mut self, other: &Self) {
        for (a, b) in self.d_alpha.iter_mut().zip(&other.d_alpha) {
            *a += b;
        }
        for (a, b) in self.d_bias.iter_mut().zip(&other.d_bias) {
            *a += b;
        }
    }
}

/// Factors of d_x that the backward pass of the coefficients makes for each token.
pub struct StreamFactors<'a, R> {
    /// r · dm `[K]`, zero in columns behind K.
    pub r_dm: RowsMut<'a, R>,
    /// Factor of -X in d_x that comes of r `[1]`.
    pub r_factor: RowsMut<'a, R>,
    /// h_pre again `[n]`.
    pub h_pre: RowsMut<'a, R>,
}

/// Operands of the backward pass of the coefficients.
pub struct BackwardInputs<'a, R> {
    /// alpha, bias, settings.
    pub gates: &'a Gates<'a, R>,
    /// r · vec(X) phi of the forward pass `[K]` a token.
    pub m: Rows<'a, R>,
    /// 1 / rms(X) of the forward pass `[1]` a token.
    pub r: Rows<'a, R>,
    /// Cotangents of the coefficients.
    pub cotangents: Cotangents<'a, R>,
    pub tokens: usize,
    /// n·C, the number of elements that r's mean runs over.
    pub numel: usize,
}

/// Writes `factors`, and adds to `sums`, from the cotangents of the coefficients.
pub fn backward<R: Real, I: Isa>(
    inputs: BackwardInputs<R>,
    factors: StreamFactors<R>,
    sums: &mut GateSums,
    scratch: &mut Scratch<R::Vector<I>>,
) {
    for_streams!(inputs.gates.layout.n, N => {
        I::enter(Backward::<R, I, N> { inputs, factors, sums, scratch });
    });
}

struct Backward<'a, R: Real, I: Isa, const N: usize> {
    inputs: BackwardInputs<'a, R>,
    factors: StreamFactors<'a, R>,
    sums: &'a mut GateSums,
    scratch: &'a mut Scratch<R::Vector<I>>,
}

impl<R: Real, I: Isa, const N: usize> Kernel<I> for Backward<'_, R, I, N> {
    #[inline(always)]
    fn run(self) {
        backward_with::<R::Vector<I>, N>(self.inputs, self.factors, self.sums, self.scratch);
    }
}

#[inline(always)]
fn backward_with<V: Vector, const N: usize>(
    inputs: BackwardInputs<V::Real>,
    mut factors: StreamFactors<V::Real>,
    sums: &mut GateSums,
    scratch: &mut Scratch<V>,
) {
    let BackwardInputs {
        gates,
        m,
        r,
        cotangents,
        tokens,
        numel,
    } = inputs;
    let Gates { config, layout, .. } = *gates;
    let n = layout.n;
    for first in (0..tokens).step_by(V::LANES) {
        let count = (tokens - first).min(V::LANES);
        logits(gates, &m, first, count, &mut scratch.z);
        let (z_pre, z) = scratch.z.split_at_mut(n);
        let (z_post, z_res) = z.split_at_mut(layout.num_post);
        let (g_pre, g) = scratch.g.split_at_mut(n);
        let (g_post, g_res) = g.split_at_mut(layout.num_post);

        gather(&cotangents.h_pre, first, count, g_pre);
        for (g, z) in g_pre.iter_mut().zip(z_pre.iter_mut()) {
            let h = sigmoid(*z);
            *g = *g * h * sigmoid(V::zero() - *z);
            *z = h + constant(config.pre_eps);
        }
        scatter(z_pre, first, count, &mut factors.h_pre);
        if layout.num_post > 0 {
            gather(&cotangents.h_post, first, count, g_post);
            for (g, z) in g_post.iter_mut().zip(z_post) {
                let slope = sigmoid(*z) * sigmoid(V::zero() - *z);
                *g = *g * slope * constant(config.post_scale);
            }
        }
        if layout.num_res > 0 {
            let Scratch { h, history, .. } = scratch;
            match config.constraint {
                Constraint::Birkhoff => {
                    gather(&cotangents.h_res, first, count, g_res);
                    sinkhorn::forward::<V, N>(config, n, z_res, h, history);
                    sinkhorn::backward::<V, N>(config, n, h, history, g_res);
                }
                Constraint::Permutations => {
                    gather(&cotangents.h_res, first, count, h);
                    permutations::backward::<V, N>(n, z_res, h, g_res);
                }
                Constraint::None => gather(&cotangents.h_res, first, count, g_res),
                Constraint::Identity => {} // It has no columns.
            }
        }

        let mut dm_dot_m = [V::Real::default(); MAX_LANES];
        for (c, dz) in scratch.g.iter().enumerate() {
            let mut lanes = [V::Real::default(); MAX_LANES];
            dz.store(&mut lanes);
            let gate = layout.gate(c);
            for (l, dz) in lanes.into_iter().enumerate().take(count) {
                sums.d_bias[c] += dz.to_f64();
                if m.width() > 0 {
                    let m = m.row(first + l)[c];
                    let dm = gates.alpha[gate] * dz;
                    sums.d_alpha[gate] += dz.to_f64() * m.to_f64();
                    dm_dot_m[l] = dm_dot_m[l] + dm * m;
                    factors.r_dm.row(first + l)[c] = r.row(first + l)[0] * dm;
                }
            }
        }
        for (l, dm_dot_m) in dm_dot_m.into_iter().enumerate().take(count) {
            let r = r.row(first + l)[0];
            factors.r_factor.row(first + l)[0] = r_slope(config, r, numel) * dm_dot_m;
        }
    }
}

/// f with dr/dX = -f · r · X, so that f · (dm · m) · X is what r's gradient takes from d_x.
#[inline(always)]
fn r_slope<R: Real>(config: &Config, r: R, numel: usize) -> R {
    let r_over_numel = r / R::from_f64(numel as f64);
    match config.norm_eps_mode {
        NormEpsMode::Inside => r * r_over_numel,
        NormEpsMode::Outside => {
            let root_mean = R::from_f64(1.0) / r - R::from_f64(config.norm_eps);
            // sqrt has no derivative at a token of zeros; X = 0 takes nothing from d_x there.
            if root_mean > R::default() {
                r_over_numel / root_mean
            } else {
                R::default()
            }
        }
    }
}

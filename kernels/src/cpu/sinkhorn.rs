//! Projection onto the doubly stochastic matrices by Sinkhorn-Knopp (equation 9), for as many
//! matrices at once as a vector has lanes.
//!
//! A matrix is `n * n` vectors in row-major order; lane l of each belongs to matrix l. Every
//! published variant is one of the settings of docs/mathematics.md.

use crate::contract::config::{Config, EpsMode, Order};
use crate::contract::limits::MAX_STREAMS;
use crate::cpu::parallel::{Pool, for_each};
use crate::cpu::scratch::{Exhausted, filled, pieces};
use crate::cpu::simd::{Isa, Job, Kernel, MAX_LANES, Real, Vector, for_streams};
use crate::cpu::stream::{Rows, RowsMut};

/// Matrices that one task works on.
pub const CHUNK: usize = 256;

/// Elements of one row or column: those that one sum runs over.
#[derive(Clone, Copy)]
struct Axis {
    /// Distance between one group and the next.
    group: usize,
    /// Distance between two elements of a group.
    element: usize,
}

/// Groups of each axis in the order of normalisation.
fn axes(order: Order, n: usize) -> (Axis, Axis) {
    let column = Axis {
        group: 1,
        element: n,
    };
    let row = Axis {
        group: n,
        element: 1,
    };
    match order {
        Order::ColumnRow => (column, row),
        Order::RowColumn => (row, column),
    }
}

/// How many vectors [`forward`] records for [`backward`]: the result of each half step.
pub fn history_len(config: &Config, n: usize) -> usize {
    2 * config.sinkhorn_iters * n * n
}

#[inline(always)]
fn sum<V: Vector>(m: &[V], n: usize, axis: Axis, group: usize) -> V {
    let mut total = m[group * axis.group];
    for k in 1..n {
        total = total + m[group * axis.group + k * axis.element];
    }
    total
}

/// M <- M / (sum over the axis), with eps as configured.
#[inline(always)]
fn normalise<V: Vector>(m: &mut [V], n: usize, axis: Axis, eps: V, mode: EpsMode) {
    for group in 0..n {
        let total = sum(m, n, axis, group);
        let divisor = match mode {
            EpsMode::Add => total + eps,
            EpsMode::Clamp => eps.max(total),
        };
        let scale = V::splat(V::Real::from_f64(1.0)) / divisor;
        for k in 0..n {
            let at = group * axis.group + k * axis.element;
            m[at] = m[at] * scale;
        }
    }
}

/// The part that rounding took from `difference` = a - b, exactly (Knuth), up to 64: where it is more, numbers of
/// this size differ by more than 64. Where the difference is infinite, it is a number too.
#[inline(always)]
fn rounded_off<V: Vector>(a: V, b: V, difference: V) -> V {
    let less = difference - a;
    let excess = (b + less) - (a - (difference - less));
    let least = V::splat(V::Real::from_f64(-64.0));
    (V::zero() - excess.max(least)).max(least)
}

/// h <- project(z). `history` is empty, or has room for [`history_len`] vectors.
///
/// `N` is n where the compiler should know it, and [`MAX_STREAMS`] otherwise.
#[inline(always)]
pub fn forward<V: Vector, const N: usize>(
    config: &Config,
    n: usize,
    z: &[V],
    h: &mut [V],
    history: &mut [V],
) {
    let n = if N == MAX_STREAMS { n } else { N };
    let (z, h) = (&z[..n * n], &mut h[..n * n]);
    if config.sinkhorn_iters == 0 {
        for (h, z) in h.iter_mut().zip(z) {
            *h = z.exp();
        }
        return;
    }
    let (first, second) = axes(config.order, n);
    let (eps, mode) = (
        V::splat(V::Real::from_f64(config.sinkhorn_eps)),
        config.sinkhorn_eps_mode,
    );
    let one = V::splat(V::Real::from_f64(1.0));

    // Softmax over the first axis: the first half step, safe for any finite logits.
    let mut largest = [V::zero(); MAX_STREAMS];
    let mut scale = [V::zero(); MAX_STREAMS];
    for group in 0..n {
        let at = |k: usize| group * first.group + k * first.element;
        largest[group] = z[at(0)];
        for k in 1..n {
            largest[group] = largest[group].max(z[at(k)]);
        }
        for k in 0..n {
            h[at(k)] = (z[at(k)] - largest[group]).exp();
        }
        scale[group] = one / sum(h, n, first, group);
        for k in 0..n {
            h[at(k)] = h[at(k)] * scale[group];
        }
    }
    let mut record = history.chunks_exact_mut(n * n);
    let mut keep = |h: &[V]| {
        if let Some(step) = record.next() {
            step.copy_from_slice(h);
        }
    };
    keep(h);

    if config.sinkhorn_eps == 0.0 {
        // A whole group of the second axis may have vanished. Start again from the logits: here a
        // group's largest element is scaled to about 1 before anything is rounded away.
        for group in 0..n {
            let at = |k: usize| group * second.group + k * second.element;
            let mut shift = z[at(0)] - largest[0];
            for k in 1..n {
                shift = shift.max(z[at(k)] - largest[k]);
            }
            for k in 0..n {
                let below = z[at(k)] - largest[k];
                let lost = rounded_off(z[at(k)], largest[k], below);
                h[at(k)] = (below - shift + lost).exp() * scale[k];
            }
        }
    } else if mode == EpsMode::Add {
        for h in h.iter_mut() {
            *h = *h + eps;
        }
    }
    normalise(h, n, second, eps, mode);
    keep(h);
    for _ in 1..config.sinkhorn_iters {
        normalise(h, n, first, eps, mode);
        keep(h);
        normalise(h, n, second, eps, mode);
        keep(h);
    }
}

/// g holds dL/dh and becomes dL/dz. `h` and `history` are what [`forward`] wrote.
///
/// In log space each half step is G <- G - M * (sum of G over the axis), with M its result.
#[inline(always)]
pub fn backward<V: Vector, const N: usize>(
    config: &Config,
    n: usize,
    h: &[V],
    history: &[V],
    g: &mut [V],
) {
    let n = if N == MAX_STREAMS { n } else { N };
    let (h, g) = (&h[..n * n], &mut g[..n * n]);
    for (g, h) in g.iter_mut().zip(h) {
        *g = *g * *h;
    }
    if config.sinkhorn_iters == 0 {
        return;
    }
    let (first, second) = axes(config.order, n);
    let (eps, mode) = (
        V::splat(V::Real::from_f64(config.sinkhorn_eps)),
        config.sinkhorn_eps_mode,
    );
    let step = |k: usize| &history[k * n * n..][..n * n];
    for k in (0..2 * config.sinkhorn_iters).rev() {
        let axis = if k % 2 == 0 { first } else { second };
        let m = step(k);
        if k == 0 && mode == EpsMode::Add && config.sinkhorn_eps != 0.0 {
            for (g, p) in g.iter_mut().zip(m) {
                *g = *g * (*p / (*p + eps));
            }
        }
        for group in 0..n {
            let mut total = sum(g, n, axis, group);
            if k > 0 && mode == EpsMode::Clamp {
                total = total.zero_if_below(sum(step(k - 1), n, axis, group), eps);
            }
            for e in 0..n {
                let at = group * axis.group + e * axis.element;
                g[at] = g[at] - m[at] * total;
            }
        }
    }
}

/// Lane l of `lanes[c]` <- element c of row `first + l`; zero in lanes behind `count`.
#[inline(always)]
pub fn gather<V: Vector>(rows: &Rows<V::Real>, first: usize, count: usize, lanes: &mut [V]) {
    for (c, lane) in lanes.iter_mut().enumerate() {
        let mut values = [V::Real::default(); MAX_LANES];
        for (l, value) in values.iter_mut().enumerate().take(count) {
            *value = rows.row(first + l)[c];
        }
        *lane = V::load(&values);
    }
}

/// The reverse of [`gather`].
#[inline(always)]
pub fn scatter<V: Vector>(lanes: &[V], first: usize, count: usize, rows: &mut RowsMut<V::Real>) {
    for (c, lane) in lanes.iter().enumerate() {
        let mut values = [V::Real::default(); MAX_LANES];
        lane.store(&mut values);
        for (l, value) in values.iter().enumerate().take(count) {
            rows.row(first + l)[c] = *value;
        }
    }
}

/// The stand-alone op: `h_res` from `z`, or, with `d_h_res`, `d_z` from both.
pub struct Sinkhorn<'a, R> {
    pub config: &'a Config,
    /// Streams.
    pub n: usize,
    /// Logits `[matrices, n * n]`.
    pub z: Rows<'a, R>,
    /// Cotangent of the result, in the backward call.
    pub d_h_res: Option<Rows<'a, R>>,
    /// Result `[matrices, n * n]`.
    pub out: RowsMut<'a, R>,
    /// How many matrices.
    pub matrices: usize,
    pub pool: &'a dyn Pool,
}

/// Runs the op.
pub fn run<R: Real>(call: Sinkhorn<R>) -> Result<(), Exhausted> {
    R::dispatch(call)
}

impl<R: Real> Job for Sinkhorn<'_, R> {
    fn run<I: Isa>(mut self) -> Result<(), Exhausted> {
        let Self {
            config,
            n,
            matrices,
            pool,
            ..
        } = self;
        let differentiate = self.d_h_res.is_some();
        let chunks = pieces(matrices, CHUNK, |count| {
            let d_h_res = self.d_h_res.as_mut().map(|d| d.split_off(count));
            (
                self.z.split_off(count),
                d_h_res,
                self.out.split_off(count),
                count,
            )
        })?;
        for_each(
            "matrices",
            pool,
            chunks,
            || Scratch::<R::Vector<I>>::new(config, n, differentiate),
            |scratch, _, (z, d_h_res, out, count)| {
                for_streams!(n, N => {
                    I::enter(Chunk::<_, I, N> { config, n, z, d_h_res, out, count, scratch });
                });
                Ok(())
            },
        )
    }
}

/// Room for as many matrices as a vector has lanes.
struct Scratch<V> {
    z: Vec<V>,
    h: Vec<V>,
    g: Vec<V>,
    history: Vec<V>,
}

impl<V: Vector> Scratch<V> {
    fn new(config: &Config, n: usize, differentiate: bool) -> Result<Self, Exhausted> {
        let zeros = |len| filled(V::zero(), len);
        let history_len = if differentiate {
            history_len(config, n)
        } else {
            0
        };
        Ok(Self {
            z: zeros(n * n)?,
            h: zeros(n * n)?,
            g: zeros(n * n)?,
            history: zeros(history_len)?,
        })
    }
}

struct Chunk<'a, R: Real, I: Isa, const N: usize> {
    config: &'a Config,
    n: usize,
    z: Rows<'a, R>,
    d_h_res: Option<Rows<'a, R>>,
    out: RowsMut<'a, R>,
    count: usize,
    scratch: &'a mut Scratch<R::Vector<I>>,
}

impl<R: Real, I: Isa, const N: usize> Kernel<I> for Chunk<'_, R, I, N> {
    #[inline(always)]
    fn run(mut self) {
        let Self { config, n, .. } = self;
        let Scratch { z, h, g, history } = self.scratch;
        for first in (0..self.count).step_by(R::Vector::<I>::LANES) {
            let count = (self.count - first).min(R::Vector::<I>::LANES);
            gather(&self.z, first, count, z);
            forward::<_, N>(config, n, z, h, history);
            match &self.d_h_res {
                None => scatter(h, first, count, &mut self.out),
                Some(d_h_res) => {
                    gather(d_h_res, first, count, g);
                    backward::<_, N>(config, n, h, history, g);
                    scatter(g, first, count, &mut self.out);
                }
            }
        }
    }
}

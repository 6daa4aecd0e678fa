//! The backward pass.

use super::norm::{self, CollapseNormalizedBackward};
use super::{CHUNK, ParamGradients, ParamSums, Params, group_tokens};
use crate::contract::limits::MAX_STREAMS;
use crate::cpu::coefficients::{self, Cotangents, Gates, StreamFactors};
use crate::cpu::collapse;
use crate::cpu::parallel::{Pool, for_each};
use crate::cpu::projection::{
    Packed, STAGE, Shape, Staged, accumulate_d_phi, project_back, stage, stages,
};
use crate::cpu::scratch::{Exhausted, filled, pieces};
use crate::cpu::simd::{Isa, Job, Kernel, Real, Vector, for_streams};
use crate::cpu::stream::{Acc, Rows, RowsMut, Stream};

/// Operands of pre's backward pass for some tokens besides X and d_x_in.
#[derive(Clone, Copy)]
pub struct BackwardInputs<'a, S: Stream> {
    /// r · vec(X) phi of the forward pass `[K]` a token; empty for static coefficients.
    pub m: Rows<'a, S::Real>,
    /// 1 / rms(X) of the forward pass `[1]` a token.
    pub r: Rows<'a, S::Real>,
    /// 1 / rms(u) of the forward pass `[1]` a token; empty where the layer's input is not normalised.
    pub rho: Rows<'a, S::Real>,
    /// Cotangent of the layer input.
    pub d_u: Rows<'a, S>,
    /// Cotangents of the coefficients.
    pub d_h: Cotangents<'a, S::Real>,
}

impl<S: Stream> BackwardInputs<'_, S> {
    /// Cuts off the first tokens.
    pub fn split_off(&mut self, tokens: usize) -> Self {
        Self {
            m: self.m.split_off(tokens),
            r: self.r.split_off(tokens),
            rho: self.rho.split_off(tokens),
            d_u: self.d_u.split_off(tokens),
            d_h: self.d_h.split_off(tokens),
        }
    }
}

/// Room for one chunk of the backward pass.
pub struct BackwardScratch<V: Vector> {
    staged: Vec<Staged<V>>,
    mixed: Vec<Staged<V>>,
    d_h_pre: Vec<V::Real>,
    r_dm: Vec<V::Real>,
    r_factor: Vec<V::Real>,
    h_pre: Vec<V::Real>,
    norm_scale: Vec<V>,
    d_sum: Vec<V>,
    coefficients: coefficients::Scratch<V>,
}

impl<V: Vector> BackwardScratch<V> {
    /// Makes room for chunks of up to [`CHUNK`] tokens.
    pub fn new<I: Isa>(params: &Params<V::Real>) -> Result<Self, Exhausted>
    where
        V::Real: Real<Vector<I> = V>,
    {
        let Gates { config, layout, .. } = params.gates;
        let shape = params.shape::<I>();
        let norm_scale: Vec<V> = norm::pack(params.norm_scale)?;
        let zeros = |width: usize| filled(V::Real::default(), CHUNK * width);
        Ok(Self {
            staged: filled([V::zero(); STAGE], CHUNK)?,
            mixed: filled([V::zero(); STAGE], CHUNK * layout.n)?,
            d_h_pre: zeros(layout.n)?,
            r_dm: zeros(shape.padded_columns())?,
            r_factor: zeros(1)?,
            h_pre: zeros(layout.n)?,
            d_sum: filled(V::zero(), CHUNK * norm_scale.len())?,
            norm_scale,
            coefficients: coefficients::Scratch::new(config, layout, true)?,
        })
    }
}

/// The kind of d_x_in, the cotangent that d_x is added to, in the memory that becomes d_x.
#[derive(Clone, Copy)]
pub enum DxIn<'a, R> {
    /// No d_x_in: the memory of d_x holds anything.
    Absent,
    /// The cotangent of x.
    OfX,
    /// G, the cotangent of the streams that post makes of x, so that H_resᵀ G is the cotangent of x.
    Deferred {
        /// H_res of post `[n·n]` a token.
        h_res: Rows<'a, R>,
    },
}

impl<R> DxIn<'_, R> {
    /// Cuts off the first tokens.
    pub fn split_off(&mut self, tokens: usize) -> Self {
        match self {
            Self::Absent => Self::Absent,
            Self::OfX => Self::OfX,
            Self::Deferred { h_res } => Self::Deferred {
                h_res: h_res.split_off(tokens),
            },
        }
    }
}

/// Weights of the streams in u that are not those of its sublayer.
pub struct Given<'a, R> {
    /// `[n]` a token.
    pub h: Rows<'a, R>,
    /// Gradient of them `[n]` a token.
    pub d_h: RowsMut<'a, R>,
}

impl<R> Given<'_, R> {
    /// Cuts off the first tokens.
    pub fn split_off(&mut self, tokens: usize) -> Self {
        Self {
            h: self.h.split_off(tokens),
            d_h: self.d_h.split_off(tokens),
        }
    }
}

/// Backward pass of up to [`CHUNK`] tokens: d_x = d_x_in + the gradient through u and the coefficients.
#[allow(clippy::too_many_arguments)] // each is one line of the equation above
pub fn backward_chunk<S: Stream, I: Isa>(
    params: &Params<S::Real>,
    phi: &Packed<Acc<S, I>>,
    x: Rows<S>,
    d_x_in: DxIn<S::Real>,
    inputs: &BackwardInputs<S>,
    given: Option<Given<S::Real>>,
    tokens: usize,
    d_x: RowsMut<S>,
    sums: &mut ParamSums<Acc<S, I>>,
    scratch: &mut BackwardScratch<Acc<S, I>>,
) {
    let gates = &params.gates;
    let n = gates.layout.n;
    let BackwardInputs {
        m,
        r,
        rho,
        d_u,
        d_h,
    } = *inputs;
    let BackwardScratch {
        staged,
        mixed,
        d_h_pre,
        r_dm,
        r_factor,
        h_pre,
        norm_scale,
        d_sum,
        coefficients,
    } = scratch;

    let from_u = RowsMut::new(d_h_pre, n);
    let from_h = d_h.h_pre;
    let mut h_given = None;
    if let Some(Given { h, d_h }) = given {
        collapse::backward_chunk::<S, I>(x, d_u, None, tokens, d_h);
        h_given = Some(h);
    } else if norm_scale.is_empty() {
        collapse::backward_chunk::<S, I>(x, d_u, Some(from_h), tokens, from_u);
    } else {
        let rows = RowsMut::new(h_pre, n);
        coefficients::h_pre::<_, I>(gates, m, tokens, rows, coefficients);
        for_streams!(n, N => {
            I::enter(CollapseNormalizedBackward::<S, I, N> {
                x,
                h_pre: Rows::new(h_pre, n),
                norm_scale,
                rho,
                d_u,
                from_h,
                tokens,
                d_h_pre: from_u,
                d_sum,
                d_norm_scale: &mut sums.d_norm_scale,
            });
        });
    }
    let inputs = coefficients::BackwardInputs {
        gates,
        m,
        r,
        cotangents: Cotangents {
            h_pre: h_given.map_or(Rows::new(d_h_pre, n), |_| from_h),
            ..d_h
        },
        tokens,
        numel: n * params.c,
    };
    let factors = StreamFactors {
        r_dm: RowsMut::new(r_dm, phi.padded_columns()),
        r_factor: RowsMut::new(r_factor, 1),
        h_pre: RowsMut::new(h_pre, n),
    };
    coefficients::backward::<_, I>(inputs, factors, &mut sums.gates, coefficients);
    let d_phi = &mut sums.d_phi;
    let shape = params.shape::<I>();
    let streams = StreamsBackward::<S, I> {
        shape,
        phi,
        x,
        d_x_in,
        d_u,
        d_sum,
        tokens,
        r_dm,
        r_factor,
        weights: h_given.unwrap_or(Rows::new(h_pre, n)),
        n,
        d_x,
        d_phi,
        staged,
        mixed,
    };
    I::enter(streams);
}

/// d_phi and d_x of one chunk, stage by stage.
struct StreamsBackward<'a, S: Stream, I: Isa> {
    shape: Shape,
    phi: &'a Packed<Acc<S, I>>,
    x: Rows<'a, S>,
    d_x_in: DxIn<'a, S::Real>,
    d_u: Rows<'a, S>,
    /// The cotangent of u before its norm, if it has one.
    d_sum: &'a [Acc<S, I>],
    tokens: usize,
    r_dm: &'a [S::Real],
    r_factor: &'a [S::Real],
    /// Weights of the streams in u.
    weights: Rows<'a, S::Real>,
    n: usize,
    d_x: RowsMut<'a, S>,
    d_phi: &'a mut Packed<Acc<S, I>>,
    /// X, one stream of a stage.
    staged: &'a mut [Staged<Acc<S, I>>],
    /// H_resᵀ G, all streams of a stage, not rounded.
    mixed: &'a mut [Staged<Acc<S, I>>],
}

impl<S: Stream, I: Isa> Kernel<I> for StreamsBackward<'_, S, I> {
    #[inline(always)]
    fn run(mut self) {
        let Self { shape, tokens, .. } = self;
        for blocks in stages(shape) {
            if let DxIn::Deferred { h_res } = self.d_x_in {
                for_streams!(self.n, N => self.mix::<N>(h_res, blocks));
            }
            for stream in 0..self.n {
                stage::<S, I>(&self.x, tokens, stream, shape, blocks, self.staged);
                let staged = &self.staged[..tokens];
                accumulate_d_phi(staged, self.r_dm, stream, blocks, self.d_phi);
                self.write_stage(stream, blocks);
            }
        }
    }
}

impl<S: Stream, I: Isa> StreamsBackward<'_, S, I> {
    /// mixed[j] = sum over i of H_res[i, j] G[i] for one stage, with G where d_x goes.
    #[inline(always)]
    fn mix<const N: usize>(&mut self, h_res: Rows<S::Real>, (first, count): (usize, usize)) {
        let n = if N == MAX_STREAMS { self.n } else { N };
        let lanes = Acc::<S, I>::LANES;
        let whole = self.shape.whole_blocks(first, count, lanes);
        for token in 0..self.tokens {
            let h_res = h_res.row(token);
            let mut h = [[Acc::<S, I>::zero(); N]; N];
            for i in 0..n {
                for j in 0..n {
                    h[i][j] = Acc::<S, I>::splat(h_res[i * n + j]);
                }
            }
            for block in 0..whole {
                self.mix_block::<N, true>(&h, n, token, first, block);
            }
            if whole < count {
                self.mix_block::<N, false>(&h, n, token, first, whole);
            }
        }
    }

    #[inline(always)]
    fn mix_block<const N: usize, const WHOLE: bool>(
        &mut self,
        h: &[[Acc<S, I>; N]; N],
        n: usize,
        token: usize,
        first: usize,
        block: usize,
    ) {
        let (c, at) = (self.shape.c, (first + block) * Acc::<S, I>::LANES);
        let g = self.d_x.row(token);
        let mut gs = [Acc::<S, I>::zero(); N];
        for i in 0..n {
            gs[i] = S::load::<I, WHOLE>(&g[i * c + at..(i + 1) * c]);
        }
        for j in 0..n {
            let mut sum = h[0][j] * gs[0];
            for i in 1..n {
                sum = h[i][j].mul_add(gs[i], sum);
            }
            self.mixed[j * CHUNK + token][block] = sum;
        }
    }

    /// d_x of one stage, in tiles of tokens and blocks.
    #[inline(always)]
    fn write_stage(&mut self, stream: usize, (first, count): (usize, usize)) {
        let tile = Acc::<S, I>::TILE;
        let mut block = 0;
        while block < count {
            let whole = self
                .shape
                .whole_blocks(first + block, count - block, Acc::<S, I>::LANES);
            let mut token = 0;
            while token < self.tokens {
                let step = if whole > 0 && self.tokens - token >= tile {
                    tile
                } else {
                    1
                };
                match (step, whole) {
                    (8, 2..) => self.write::<8, 2, true>(token, stream, first, block),
                    (8, _) => self.write::<8, 1, true>(token, stream, first, block),
                    (4, 2..) => self.write::<4, 2, true>(token, stream, first, block),
                    (4, _) => self.write::<4, 1, true>(token, stream, first, block),
                    (_, 2..) => self.write::<1, 2, true>(token, stream, first, block),
                    (_, 1..) => self.write::<1, 1, true>(token, stream, first, block),
                    (_, 0) => self.write::<1, 1, false>(token, stream, first, block),
                }
                token += step;
            }
            block += whole.clamp(1, 2);
        }
    }

    /// d_x = d_x_in + weights[i] · du + (r · dm) phiᵀ − r_factor · X for `T` tokens and `B` blocks.
    #[inline(always)]
    fn write<const T: usize, const B: usize, const WHOLE: bool>(
        &mut self,
        token: usize,
        stream: usize,
        first: usize,
        block: usize,
    ) {
        let c = self.shape.c;
        let r_dm = &self.r_dm[token * self.shape.padded_columns()..];
        // What the product is added to comes from memory in short runs, which the processor does not
        // foresee: asks for it while the product is computed.
        let at = stream * c + (first + block) * Acc::<S, I>::LANES;
        let channels = at..((stream + 1) * c).min(at + B * Acc::<S, I>::LANES);
        if let DxIn::OfX = self.d_x_in {
            for token in token..token + T {
                I::prefetch(&self.d_x.row(token)[channels.clone()]);
            }
        }
        let sums = project_back::<_, T, B>(r_dm, self.phi, stream, first + block);
        for (t, sums) in sums.into_iter().enumerate() {
            let token = token + t;
            let weight = Acc::<S, I>::splat(self.weights.row(token)[stream]);
            let minus_f = Acc::<S, I>::splat(S::Real::default() - self.r_factor[token]);
            let d_u = self.d_u.row(token);
            let d_x = &mut self.d_x.row(token)[stream * c..][..c];
            for (b, sum) in sums.into_iter().enumerate() {
                let at = (first + block + b) * Acc::<S, I>::LANES;
                let d_u = if self.d_sum.is_empty() {
                    S::load::<I, WHOLE>(&d_u[at..])
                } else {
                    self.d_sum[token * self.shape.blocks + first + block + b]
                };
                let sum = weight.mul_add(d_u, sum);
                let mut sum = minus_f.mul_add(self.staged[token][block + b], sum);
                match self.d_x_in {
                    DxIn::Absent => {}
                    DxIn::OfX => sum = S::load::<I, WHOLE>(&d_x[at..]) + sum,
                    DxIn::Deferred { .. } => {
                        sum = self.mixed[stream * CHUNK + token][block + b] + sum;
                    }
                }
                S::store::<I, WHOLE>(sum, &mut d_x[at..]);
            }
        }
    }
}

/// The backward call on `tokens` tokens.
pub struct Backward<'a, S: Stream> {
    pub params: Params<'a, S::Real>,
    /// Streams `[n·C]` a token.
    pub x: Rows<'a, S>,
    /// Other operands.
    pub inputs: BackwardInputs<'a, S>,
    /// Gradient of X `[n·C]` a token; holds d_x_in before the call.
    pub d_x: RowsMut<'a, S>,
    /// Kind of the cotangent that d_x is added to.
    pub d_x_in: DxIn<'a, S::Real>,
    pub d_params: ParamGradients<'a, S::Real>,
    pub tokens: usize,
    pub pool: &'a dyn Pool,
}

/// Runs the backward call.
pub fn backward<S: Stream>(call: Backward<S>) -> Result<(), Exhausted> {
    S::Real::dispatch(call)
}

impl<S: Stream> Job for Backward<'_, S> {
    fn run<I: Isa>(mut self) -> Result<(), Exhausted> {
        let shape = self.params.shape::<I>();
        let phi = Packed::pack::<I>(self.params.phi, shape, self.pool)?;
        let step = group_tokens(self.tokens);
        let mut sums: Vec<Option<ParamSums<Acc<S, I>>>> = pieces(self.tokens, step, |_| None)?;
        let mut of_group = sums.iter_mut();
        let groups = pieces(self.tokens, step, |tokens| BackwardGroup::<S, I> {
            params: &self.params,
            phi: &phi,
            x: self.x.split_off(tokens),
            d_x_in: self.d_x_in.split_off(tokens),
            inputs: self.inputs.split_off(tokens),
            d_x: self.d_x.split_off(tokens),
            tokens,
            sums: of_group.next().expect("one for each group"),
        })?;
        for_each(
            "groups of tokens",
            self.pool,
            groups,
            || BackwardScratch::new::<I>(&self.params),
            |scratch, _, group| group.run(shape, scratch),
        )?;
        self.d_params.write::<I>(&self.params, sums, self.pool)
    }
}

/// The tokens whose parameter gradients are summed together.
struct BackwardGroup<'a, S: Stream, I: Isa> {
    params: &'a Params<'a, S::Real>,
    phi: &'a Packed<Acc<S, I>>,
    x: Rows<'a, S>,
    d_x_in: DxIn<'a, S::Real>,
    inputs: BackwardInputs<'a, S>,
    d_x: RowsMut<'a, S>,
    tokens: usize,
    sums: &'a mut Option<ParamSums<Acc<S, I>>>,
}

impl<S: Stream, I: Isa> BackwardGroup<'_, S, I> {
    fn run(
        mut self,
        shape: Shape,
        scratch: &mut BackwardScratch<Acc<S, I>>,
    ) -> Result<(), Exhausted> {
        let sums = self.sums.insert(ParamSums::new(self.params, shape)?);
        for first in (0..self.tokens).step_by(CHUNK) {
            let tokens = CHUNK.min(self.tokens - first);
            backward_chunk::<S, I>(
                self.params,
                self.phi,
                self.x.split_off(tokens),
                self.d_x_in.split_off(tokens),
                &self.inputs.split_off(tokens),
                None,
                tokens,
                self.d_x.split_off(tokens),
                sums,
                scratch,
            );
        }
        Ok(())
    }
}

//! Post of one sublayer and pre of the next, in one pass over X: each chunk of X' is projected while
//! it is still in the cache. The backward pass recomputes X' from X and y. The weights of the streams in u
//! may be given.

use crate::cpu::chunks::run_chunks;
use crate::cpu::parallel::{Pool, for_each};
use crate::cpu::post;
use crate::cpu::pre::{
    self, BackwardInputs, CHUNK, DxIn, Given, Outputs, ParamGradients, ParamSums, Params,
};
use crate::cpu::projection::{Packed, Shape};
use crate::cpu::scratch::{Exhausted, filled, pieces};
use crate::cpu::simd::{Isa, Job, Real};
use crate::cpu::stream::{Acc, Rows, RowsMut, Stream};

/// The forward call on `tokens` tokens.
pub struct Forward<'a, S: Stream> {
    /// Operands of post.
    pub inputs: post::Inputs<'a, S>,
    /// Parameters of the next sublayer.
    pub params: Params<'a, S::Real>,
    /// Weights of the streams in u `[n]` a token, where they are given.
    pub h_given: Option<Rows<'a, S::Real>>,
    /// Streams after post `[n·C]` a token.
    pub x_new: RowsMut<'a, S>,
    /// Results of pre.
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
            |tokens| {
                let (inputs, x_new) = (self.inputs.split_off(tokens), self.x_new.split_off(tokens));
                let given = self.h_given.as_mut().map(|given| given.split_off(tokens));
                (inputs, given, x_new, self.out.split_off(tokens))
            },
            || pre::ForwardScratch::new::<I>(&self.params, self.tokens),
            |scratch, tokens, (inputs, given, mut x_new, mut out)| {
                post::forward_chunk::<S, I>(inputs, tokens, x_new.reborrow());
                let x_new = x_new.as_rows();
                let params = &self.params;
                pre::forward_chunk::<S, I>(params, &phi, x_new, given, tokens, &mut out, scratch);
            },
        )
    }
}

/// The backward call on `tokens` tokens.
pub struct Backward<'a, S: Stream> {
    /// Operands of post.
    pub inputs: post::Inputs<'a, S>,
    /// Parameters of the next sublayer.
    pub params: Params<'a, S::Real>,
    /// Other operands of pre's backward pass.
    pub pre_inputs: BackwardInputs<'a, S>,
    /// Weights of the streams in u and their gradient, where they are given.
    pub given: Option<Given<'a, S::Real>>,
    /// Gradient of X', all its parts `[n·C]` a token; holds d_x_new_in before the call.
    pub d_x_new: RowsMut<'a, S>,
    /// Kind of the cotangent that d_x_new is added to.
    pub d_x_in: DxIn<'a, S::Real>,
    /// Results of post's backward.
    pub out: post::Gradients<'a, S>,
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
        let step = pre::group_tokens(self.tokens);
        let mut sums: Vec<Option<ParamSums<Acc<S, I>>>> = pieces(self.tokens, step, |_| None)?;
        let mut of_group = sums.iter_mut();
        let groups = pieces(self.tokens, step, |tokens| BackwardGroup::<S, I> {
            inputs: self.inputs.split_off(tokens),
            params: &self.params,
            phi: &phi,
            pre_inputs: self.pre_inputs.split_off(tokens),
            given: self.given.as_mut().map(|given| given.split_off(tokens)),
            d_x_new: self.d_x_new.split_off(tokens),
            d_x_in: self.d_x_in.split_off(tokens),
            out: self.out.split_off(tokens),
            tokens,
            sums: of_group.next().expect("one for each group"),
        })?;
        let params = &self.params;
        for_each(
            "groups of tokens",
            self.pool,
            groups,
            || Scratch::<S, I>::new(params),
            |scratch, _, group| group.run(shape, scratch),
        )?;
        self.d_params.write::<I>(params, sums, self.pool)
    }
}

/// Room for one chunk of the backward pass.
struct Scratch<S: Stream, I: Isa> {
    x_new: Vec<S>,
    pre: pre::BackwardScratch<Acc<S, I>>,
}

impl<S: Stream, I: Isa> Scratch<S, I> {
    fn new(params: &Params<S::Real>) -> Result<Self, Exhausted> {
        let len = CHUNK * params.gates.layout.n * params.c;
        Ok(Self {
            x_new: filled(S::default(), len)?,
            pre: pre::BackwardScratch::new::<I>(params)?,
        })
    }
}

/// The tokens whose parameter gradients are summed together.
struct BackwardGroup<'a, S: Stream, I: Isa> {
    inputs: post::Inputs<'a, S>,
    params: &'a Params<'a, S::Real>,
    phi: &'a Packed<Acc<S, I>>,
    pre_inputs: BackwardInputs<'a, S>,
    given: Option<Given<'a, S::Real>>,
    d_x_new: RowsMut<'a, S>,
    d_x_in: DxIn<'a, S::Real>,
    out: post::Gradients<'a, S>,
    tokens: usize,
    sums: &'a mut Option<ParamSums<Acc<S, I>>>,
}

impl<S: Stream, I: Isa> BackwardGroup<'_, S, I> {
    fn run(mut self, shape: Shape, scratch: &mut Scratch<S, I>) -> Result<(), Exhausted> {
        let mut sums = ParamSums::new(self.params, shape)?;
        for first in (0..self.tokens).step_by(CHUNK) {
            let tokens = CHUNK.min(self.tokens - first);
            self.run_chunk(tokens, &mut sums, scratch);
        }
        *self.sums = Some(sums);
        Ok(())
    }

    fn run_chunk(
        &mut self,
        tokens: usize,
        sums: &mut ParamSums<Acc<S, I>>,
        scratch: &mut Scratch<S, I>,
    ) {
        let (inputs, out) = (self.inputs.split_off(tokens), self.out.split_off(tokens));
        let width = self.params.gates.layout.n * self.params.c;
        let Scratch { x_new, pre } = scratch;
        let mut x_new = RowsMut::new(x_new, width);
        let mut d_x_new = self.d_x_new.split_off(tokens);
        post::forward_chunk::<S, I>(inputs, tokens, x_new.reborrow());
        pre::backward_chunk::<S, I>(
            self.params,
            self.phi,
            x_new.as_rows(),
            self.d_x_in.split_off(tokens),
            &self.pre_inputs.split_off(tokens),
            self.given.as_mut().map(|given| given.split_off(tokens)),
            tokens,
            d_x_new.reborrow(),
            sums,
            pre,
        );
        post::backward_chunk::<S, I>(inputs, d_x_new.as_rows(), tokens, out);
    }
}

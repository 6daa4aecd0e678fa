//! The width connection: r, m, the coefficients and the layer's input (equations 14 to 18), its
//! norm, and the same with h_pre alone (the head).

mod backward;
mod forward;
mod norm;
mod param_sums;

use crate::contract::layout::CoefficientLayout;
use crate::cpu::coefficients::Gates;
use crate::cpu::projection::Shape;
use crate::cpu::simd::{Isa, Real, Vector};

pub use backward::{
    Backward, BackwardInputs, BackwardScratch, DxIn, Given, backward, backward_chunk,
};
pub use forward::{Forward, ForwardScratch, Outputs, forward, forward_chunk};
pub use param_sums::{ParamGradients, ParamSums, group_tokens};

/// Tokens that share what is read of phi, and the size of one piece of forward work.
pub const CHUNK: usize = 16;

/// Parameters and sizes of pre, which all tokens share.
#[derive(Clone, Copy)]
pub struct Params<'a, R> {
    /// Channels of one stream.
    pub c: usize,
    /// `[n·C, K]`, or empty for static coefficients.
    pub phi: &'a [R],
    /// alpha, bias, settings.
    pub gates: Gates<'a, R>,
    /// w of the norm of the layer's input `[C]`, or empty for none.
    pub norm_scale: &'a [R],
}

impl<R: Real> Params<'_, R> {
    /// Sizes of phi for the vectors of `I`.
    pub fn shape<I: Isa>(&self) -> Shape {
        let CoefficientLayout { n, .. } = self.gates.layout;
        let columns = if self.phi.is_empty() {
            0
        } else {
            self.gates.layout.num()
        };
        Shape::new(n, self.c, columns, R::Vector::<I>::LANES)
    }
}

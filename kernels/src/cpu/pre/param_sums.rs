//! Gradients of the parameters: sums over tokens in an order that no number of threads changes.

use super::norm::SumPacked;
use super::{CHUNK, Params};
use crate::cpu::coefficients::{GateSums, Gates};
use crate::cpu::parallel::Pool;
use crate::cpu::projection::{Packed, Shape};
use crate::cpu::scratch::{Exhausted, filled, with_capacity};
use crate::cpu::simd::{Isa, Real, Vector};

/// Tokens whose gradients of the parameters are summed before they meet those of other tokens.
///
/// The number is fixed, so that sums over tokens are the same whatever the number of threads; large, because each
/// group holds a gradient of phi of its own.
const GROUP: usize = 8 * CHUNK;

/// The most groups of one call: more tokens make larger groups.
const MAX_GROUPS: usize = 64;

/// Tokens in each group of a call with `tokens` tokens.
pub fn group_tokens(tokens: usize) -> usize {
    tokens
        .div_ceil(MAX_GROUPS)
        .next_multiple_of(CHUNK)
        .max(GROUP)
}

/// Gradients of the parameters, summed over some tokens.
pub struct ParamSums<V> {
    /// Gradient of phi.
    pub d_phi: Packed<V>,
    /// Gradients of alpha and bias.
    pub gates: GateSums,
    /// Gradient of the norm's scale, in vectors; empty where there is none.
    pub d_norm_scale: Vec<V>,
}

impl<V: Vector> ParamSums<V> {
    /// Makes sums that are zero.
    pub fn new(params: &Params<V::Real>, shape: Shape) -> Result<Self, Exhausted> {
        let Gates { layout, alpha, .. } = params.gates;
        Ok(Self {
            d_phi: Packed::zeros(shape)?,
            gates: GateSums::new(alpha.len(), layout)?,
            d_norm_scale: filled(V::zero(), params.norm_scale.len().div_ceil(V::LANES))?,
        })
    }
}

/// Gradients of the parameters, to write.
pub struct ParamGradients<'a, R> {
    /// Gradient of phi `[n·C, K]`, or empty.
    pub d_phi: &'a mut [R],
    /// Gradient of alpha: `[3]`, or `[1]` in a head.
    pub d_alpha: &'a mut [R],
    /// Gradient of bias `[K]`.
    pub d_bias: &'a mut [R],
    /// Gradient of the norm's scale `[C]`, or empty.
    pub d_norm_scale: &'a mut [R],
}

impl<R: Real> ParamGradients<'_, R> {
    /// Adds up the groups in their order.
    pub fn write<I: Isa>(
        self,
        params: &Params<R>,
        groups: Vec<Option<ParamSums<R::Vector<I>>>>,
        pool: &dyn Pool,
    ) -> Result<(), Exhausted> {
        let mut gates = GateSums::new(self.d_alpha.len(), params.gates.layout)?;
        let mut parts = with_capacity(groups.len())?;
        let mut norm_parts = with_capacity(groups.len())?;
        for group in groups.into_iter().flatten() {
            gates.add(&group.gates);
            parts.push(group.d_phi);
            norm_parts.push(group.d_norm_scale);
        }
        Packed::unpack_sum::<I>(&parts, params.shape::<I>(), self.d_phi, pool)?;
        I::enter(SumPacked {
            parts: &norm_parts,
            to: self.d_norm_scale,
        });
        for (to, from) in self.d_alpha.iter_mut().zip(gates.d_alpha) {
            *to = R::from_f64(from);
        }
        for (to, from) in self.d_bias.iter_mut().zip(gates.d_bias) {
            *to = R::from_f64(from);
        }
        Ok(())
    }
}

//! The learned exit from the streams: u = sum over i of (sigmoid(alpha m_i + b_i) + eps) X[i].
//!
//! The head is pre with h_pre as the only coefficients.

use crate::cpu::coefficients::{CoefficientsMut, Cotangents};
use crate::cpu::parallel::Pool;
use crate::cpu::pre::{self, BackwardInputs, Outputs, ParamGradients, Params};
use crate::cpu::scratch::{Exhausted, filled};
use crate::cpu::stream::{Rows, RowsMut, Stream};

/// The forward call on `tokens` tokens.
pub struct Forward<'a, S: Stream> {
    pub params: Params<'a, S::Real>,
    /// Streams `[n·C]` a token.
    pub x: Rows<'a, S>,
    /// Result `[C]` a token.
    pub u: RowsMut<'a, S>,
    /// r · vec(X) phi `[n]` a token.
    pub m: RowsMut<'a, S::Real>,
    /// `[1]` a token.
    pub r: RowsMut<'a, S::Real>,
    pub tokens: usize,
    pub pool: &'a dyn Pool,
}

/// Runs the forward call.
pub fn forward<S: Stream>(call: Forward<S>) -> Result<(), Exhausted> {
    let Forward {
        params,
        x,
        u,
        m,
        r,
        tokens,
        pool,
    } = call;
    let n = params.gates.layout.n;
    let mut h_pre = filled(S::Real::default(), tokens.saturating_mul(n))?;
    let h = CoefficientsMut {
        h_pre: RowsMut::new(&mut h_pre, n),
        h_post: RowsMut::new(&mut [], 0),
        h_res: RowsMut::new(&mut [], 0),
    };
    pre::forward(pre::Forward {
        params,
        x,
        out: Outputs {
            u,
            h,
            m,
            r,
            rho: RowsMut::new(&mut [], 0),
        },
        tokens,
        pool,
    })
}

/// The backward call on `tokens` tokens.
pub struct Backward<'a, S: Stream> {
    pub params: Params<'a, S::Real>,
    /// Streams `[n·C]` a token.
    pub x: Rows<'a, S>,
    /// r · vec(X) phi of the forward pass `[n]` a token.
    pub m: Rows<'a, S::Real>,
    /// 1 / rms(X) of the forward pass `[1]` a token.
    pub r: Rows<'a, S::Real>,
    /// Cotangent of u.
    pub d_u: Rows<'a, S>,
    /// Result `[n·C]` a token.
    pub d_x: RowsMut<'a, S>,
    pub d_params: ParamGradients<'a, S::Real>,
    pub tokens: usize,
    pub pool: &'a dyn Pool,
}

/// Runs the backward call.
pub fn backward<S: Stream>(call: Backward<S>) -> Result<(), Exhausted> {
    let Backward {
        params,
        x,
        m,
        r,
        d_u,
        d_x,
        d_params,
        tokens,
        pool,
    } = call;
    let n = params.gates.layout.n;
    let no_cotangent = filled(S::Real::default(), tokens.saturating_mul(n))?;
    let d_h = Cotangents {
        h_pre: Rows::new(&no_cotangent, n),
        h_post: Rows::new(&[], 0),
        h_res: Rows::new(&[], 0),
    };
    let inputs = BackwardInputs {
        m,
        r,
        rho: Rows::new(&[], 0),
        d_u,
        d_h,
    };
    pre::backward(pre::Backward {
        params,
        x,
        d_x_in: pre::DxIn::Absent,
        inputs,
        d_x,
        d_params,
        tokens,
        pool,
    })
}

//! The coefficients that a token has, and where each group of them lies.

use crate::contract::config::Constraint;
use crate::contract::limits::MAX_PERMUTED;

/// Which coefficients a token has, in the order pre, post, res.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CoefficientLayout {
    /// Streams.
    pub n: usize,
    /// Columns of h_post: n, or 0 in a head.
    pub num_post: usize,
    /// Columns of H_res: n², or n! for permutations, or 0 in a head or where H_res is the identity.
    pub num_res: usize,
}

impl CoefficientLayout {
    /// The coefficients of `pre`.
    pub fn pre(n: usize, constraint: Constraint) -> Self {
        let num_res = match constraint {
            Constraint::Birkhoff | Constraint::None => n * n,
            Constraint::Identity => 0,
            Constraint::Permutations => number(n),
        };
        Self {
            n,
            num_post: n,
            num_res,
        }
    }
    /// The coefficients of `head`.
    pub fn head(n: usize) -> Self {
        Self {
            n,
            num_post: 0,
            num_res: 0,
        }
    }
    /// K of `pre` at most, whatever the constraint.
    pub fn max_num(n: usize) -> usize {
        let permutations = if n > MAX_PERMUTED { 0 } else { number(n) };
        2 * n + permutations.max(n * n)
    }
    /// K
    pub fn num(&self) -> usize {
        self.n + self.num_post + self.num_res
    }
    /// Which of alpha's gates belongs to column `c`.
    #[inline(always)]
    pub fn gate(&self, c: usize) -> usize {
        usize::from(c >= self.n) + usize::from(c >= self.n + self.num_post)
    }
}

/// n!
pub const fn number(n: usize) -> usize {
    if n < 2 { 1 } else { n * number(n - 1) }
}

//! The coefficients that a token has, and where each group of them lies.

use crate::contract::config::Constraint;

/// Coefficients of a token, in the order pre, post, res.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CoefficientLayout {
    /// Streams.
    pub n: usize,
    /// Columns of h_post: n, or 0 in a head.
    pub num_post: usize,
    /// Columns of H_res, by its constraint (constraints.rs); 0 in a head.
    pub num_res: usize,
}

impl CoefficientLayout {
    /// The coefficients of `pre`.
    pub fn pre(n: usize, constraint: Constraint) -> Self {
        Self {
            n,
            num_post: n,
            num_res: constraint.num_columns(n),
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

    /// The largest number of coefficients of `pre`, whatever the constraint.
    pub fn max_num(n: usize) -> usize {
        let constraints = Constraint::ALL.iter();
        let possible = constraints.filter(|constraint| n <= constraint.max_streams());
        let most = possible.map(|constraint| constraint.num_columns(n)).max();
        2 * n + most.unwrap_or(0)
    }

    /// Number of coefficients, K.
    pub fn num(&self) -> usize {
        self.n + self.num_post + self.num_res
    }

    /// Number of gates of alpha: one for each group that has columns.
    pub fn num_gates(&self) -> usize {
        1 + usize::from(self.num_post > 0) + usize::from(self.num_res > 0)
    }

    /// Index of the gate of alpha that belongs to column `c`.
    #[inline(always)]
    pub fn gate(&self, c: usize) -> usize {
        usize::from(c >= self.n) + usize::from(c >= self.n + self.num_post)
    }
}

/// n!, the number of permutations of n streams.
pub const fn factorial(n: usize) -> usize {
    if n < 2 { 1 } else { n * factorial(n - 1) }
}

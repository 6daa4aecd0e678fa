//! The settings of one call: the fields of `MHCConfig` under their own names, and what else a call
//! carries.

/// Which set the matrix H_res is kept on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Constraint {
    /// Doubly stochastic matrices, by Sinkhorn-Knopp.
    Birkhoff,
    /// Any matrix: H_res = z_res (unconstrained hyper-connections).
    None,
    /// H_res = I; no coefficients for it.
    Identity,
    /// Weighted means of permutation matrices.
    Permutations,
}

/// Which axis of h_res[i, j] each Sinkhorn iteration normalises first.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Order {
    /// Columns (sums over i) first, so that rows sum to 1 at the end.
    ColumnRow,
    /// Rows (sums over j) first, so that columns sum to 1 at the end.
    RowColumn,
}

/// How `sinkhorn_eps` enters the divisions.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum EpsMode {
    /// Divide by (sum + eps), and add eps once after the first softmax.
    Add,
    /// Divide by max(sum, eps).
    Clamp,
}

/// How `norm_eps` enters r.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum NormEpsMode {
    /// r = 1 / sqrt(mean(x^2) + eps)
    Inside,
    /// r = 1 / (sqrt(mean(x^2)) + eps)
    Outside,
}

/// The most Sinkhorn iterations: the backward pass holds the matrices of all of them.
pub const MAX_SINKHORN_ITERS: usize = 10_000;

/// The settings of one call.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Config {
    /// Which set H_res is kept on.
    pub constraint: Constraint,
    /// t_max of equation 9.
    pub sinkhorn_iters: usize,
    /// See [`EpsMode`].
    pub sinkhorn_eps: f64,
    /// See [`EpsMode`].
    pub sinkhorn_eps_mode: EpsMode,
    /// See [`Order`].
    pub order: Order,
    /// See [`NormEpsMode`].
    pub norm_eps: f64,
    /// See [`NormEpsMode`].
    pub norm_eps_mode: NormEpsMode,
    /// Added to h_pre after the sigmoid.
    pub pre_eps: f64,
    /// h_post = post_scale * sigmoid(z_post).
    pub post_scale: f64,
    /// Added to mean(u²) where the layer's input is normalised ([`Op::can_normalize`]).
    ///
    /// [`Op::can_normalize`]: crate::Op::can_normalize
    pub norm_scale_eps: f64,
    /// Whether the cotangent that a call adds to ([`Op::can_defer`]) is that of the streams which post
    /// made, so that the transposed h_res has yet to be applied.
    ///
    /// [`Op::can_defer`]: crate::Op::can_defer
    pub deferred: bool,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            constraint: Constraint::Birkhoff,
            sinkhorn_iters: 20,
            sinkhorn_eps: 0.0,
            sinkhorn_eps_mode: EpsMode::Add,
            order: Order::ColumnRow,
            norm_eps: 1e-6,
            norm_eps_mode: NormEpsMode::Inside,
            pre_eps: 0.0,
            post_scale: 2.0,
            norm_scale_eps: 1e-6,
            deferred: false,
        }
    }
}

/// Implements `FromStr` with the spelling that Python uses, and lists it.
macro_rules! spelled {
    ($type:ident, $field:literal, $($text:literal => $value:ident),+) => {
        impl $type {
            /// The spelling of every value.
            pub const WORDS: &[&str] = &[$($text),+];
        }

        impl std::str::FromStr for $type {
            type Err = String;
            fn from_str(text: &str) -> Result<Self, String> {
                match text {
                    $($text => Ok(Self::$value),)+
                    _ => Err(format!(
                        concat!("attribute `", $field, "`: expected one of {:?}, got {:?}"),
                        Self::WORDS, text,
                    )),
                }
            }
        }
    };
}

spelled!(
    Constraint, "constraint",
    "birkhoff" => Birkhoff, "none" => None, "identity" => Identity, "permutations" => Permutations
);
spelled!(Order, "order", "column_row" => ColumnRow, "row_column" => RowColumn);
spelled!(EpsMode, "sinkhorn_eps_mode", "add" => Add, "clamp" => Clamp);
spelled!(NormEpsMode, "norm_eps_mode", "inside" => Inside, "outside" => Outside);

//! The settings of one call: the fields of `MHCConfig` under their own names, and what else a call
//! carries.
//!
//! Bounds, checked in one place ([`Config::check`]) for every device:
//!
//! - The real numbers are finite and not negative. Every eps guards a division or a root, which a
//!   negative one would let vanish; there is no largest one, since too large an eps gives small numbers
//!   and no wrong ones. `pre_eps`, `post_scale` and `post_eps` keep the coefficients in the range that the
//!   equations give them, [0, inf). (0 is no error here. Python asks for a `post_scale` above 0, since streams that no
//!   layer adds to are a mistake there.)
//! - They are finite as the kernels see them: as float32, but where the streams are float64. Otherwise 1e39
//!   would be an infinity in one dtype and a number in another.
//! - Smaller than the smallest normal number of that type is 0 ([`Config::rounded`]). XLA's threads flush
//!   subnormal numbers to 0, and then every decision that asks for eps = 0 must find it.
//! - `sinkhorn_iters` is at most [`MAX_SINKHORN_ITERS`].

use crate::contract::layout::factorial;
use crate::contract::limits::{MAX_PERMUTED, MAX_SINKHORN_ITERS, MAX_STREAMS};
use crate::contract::table::Group;
use crate::contract::view::DType;

/// Defines [`Constraint`] by the rows of constraints.rs.
macro_rules! constraints {
    ($($(#[$doc:meta])* $name:ident = $number:literal, $word:literal, $columns:expr, $max:expr;)+) => {
        /// The set that the matrix H_res is kept on. Its number is the one that CUDA kernels know it by.
        #[derive(Debug, Clone, Copy, PartialEq, Eq)]
        #[repr(i32)]
        pub enum Constraint {
            $($(#[$doc])* $name = $number,)+
        }

        impl Constraint {
            /// Every constraint, in the order of [`Constraint::WORDS`].
            pub const ALL: &[Constraint] = &[$(Self::$name),+];

            /// Number of coefficients that make up H_res of n streams.
            pub(crate) fn num_columns(self, n: usize) -> usize {
                let columns: fn(usize) -> usize = match self {
                    $(Self::$name => $columns,)+
                };
                columns(n)
            }

            /// The most streams that the constraint is there for.
            pub(crate) const fn max_streams(self) -> usize {
                match self {
                    $(Self::$name => $max,)+
                }
            }

            /// The spelling that Python uses.
            pub const fn word(self) -> &'static str {
                match self {
                    $(Self::$name => $word,)+
                }
            }
        }

        spelled!(Constraint, "constraint", $($word => $name),+);
    };
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

include!("constraints.rs");

/// The axis of h_res[i, j] that each Sinkhorn iteration normalises first.
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

/// The settings of one call.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Config {
    /// The set that H_res is kept on.
    pub constraint: Constraint,
    /// t_max of equation 9.
    pub sinkhorn_iters: usize,
    /// Term in the divisions of Sinkhorn-Knopp, added or a least divisor ([`EpsMode`]).
    pub sinkhorn_eps: f64,
    /// Use of `sinkhorn_eps`.
    pub sinkhorn_eps_mode: EpsMode,
    /// Axis that each Sinkhorn iteration normalises first.
    pub order: Order,
    /// Term in r that keeps it finite where X is zero ([`NormEpsMode`]).
    pub norm_eps: f64,
    /// Place of `norm_eps` in r.
    pub norm_eps_mode: NormEpsMode,
    /// Added to h_pre after the sigmoid.
    pub pre_eps: f64,
    /// Factor of h_post = post_scale * sigmoid(z_post) + post_eps.
    pub post_scale: f64,
    /// Added to h_post after that.
    pub post_eps: f64,
    /// Whether the call has the values of [`Group::Dynamic`].
    pub dynamic: bool,
    /// Whether the call has the values of [`Group::Norm`].
    pub norm: bool,
    /// Whether the call has the values of [`Group::Given`].
    pub given: bool,
    /// Term added to mean(u²) where the layer's input is normalised.
    pub norm_scale_eps: f64,
    /// Whether the cotangent that a call adds to ([`Call::adds_in_place`](crate::Call::adds_in_place)) is that of the
    /// streams which post made, so that the transposed h_res has yet to be applied.
    pub deferred: bool,
}

/// The value of an attribute, as a program carries it.
#[derive(Debug, Clone, Copy)]
pub enum AttributeValue<'a> {
    /// A word.
    String(&'a str),
    /// An integer.
    Int64(i64),
    /// A number.
    Float64(f64),
}

impl Config {
    /// Whether a call with these settings has the values of a group.
    pub fn has(&self, group: Group) -> bool {
        match group {
            Group::Dynamic => self.dynamic,
            Group::Norm => self.norm,
            Group::Given => self.given,
        }
    }

    /// Sets the field of an attribute.
    ///
    /// # Errors
    /// The value is not one of those that the table of calls allows: the attribute, what was expected, what
    /// there is.
    pub fn set(&mut self, name: &str, value: AttributeValue) -> Result<(), String> {
        use AttributeValue::{Float64, Int64, String};
        let flag = |value: i64| match value {
            0 => Ok(false),
            1 => Ok(true),
            _ => Err(format!("attribute `{name}`: expected 0 or 1, got {value}")),
        };
        match (name, value) {
            ("constraint", String(word)) => self.constraint = word.parse()?,
            ("sinkhorn_eps_mode", String(word)) => self.sinkhorn_eps_mode = word.parse()?,
            ("order", String(word)) => self.order = word.parse()?,
            ("norm_eps_mode", String(word)) => self.norm_eps_mode = word.parse()?,
            ("sinkhorn_iters", Int64(value)) => {
                self.sinkhorn_iters = usize::try_from(value)
                    .map_err(|_| format!("attribute `{name}`: expected 0 or more, got {value}"))?;
            }
            ("dynamic", Int64(value)) => self.dynamic = flag(value)?,
            ("norm", Int64(value)) => self.norm = flag(value)?,
            ("given", Int64(value)) => self.given = flag(value)?,
            ("deferred", Int64(value)) => self.deferred = flag(value)?,
            (_, Float64(value)) => {
                let mut reals = self.reals().into_iter();
                let found = reals.find(|(field, _)| *field == name);
                *found
                    .ok_or_else(|| format!("attribute `{name}`: no such number"))?
                    .1 = value;
            }
            _ => return Err(format!("attribute `{name}`: no such setting")),
        }
        Ok(())
    }

    /// The real numbers, by their names.
    fn reals(&mut self) -> [(&'static str, &mut f64); 6] {
        [
            ("sinkhorn_eps", &mut self.sinkhorn_eps),
            ("norm_eps", &mut self.norm_eps),
            ("pre_eps", &mut self.pre_eps),
            ("post_scale", &mut self.post_scale),
            ("post_eps", &mut self.post_eps),
            ("norm_scale_eps", &mut self.norm_scale_eps),
        ]
    }

    /// The first setting out of its bounds for streams of this type: its name, what was expected, and what
    /// it is.
    pub(crate) fn check(mut self, dtype: DType) -> Result<(), (&'static str, String, String)> {
        if self.sinkhorn_iters > MAX_SINKHORN_ITERS {
            let expected = format!("at most {MAX_SINKHORN_ITERS}");
            return Err(("sinkhorn_iters", expected, self.sinkhorn_iters.to_string()));
        }
        let (largest, of) = match dtype {
            DType::F64 => (f64::MAX, "float64"),
            _ => (f64::from(f32::MAX), "float32"),
        };
        for (name, value) in self.reals() {
            // NaN is in no range.
            if !(0.0..=largest).contains(value) {
                let expected = format!("a number of 0 or more that is finite in {of}");
                return Err((name, expected, format!("{value:?}")));
            }
        }
        Ok(())
    }

    /// The settings as kernels for streams of this type see them.
    pub(crate) fn rounded(mut self, dtype: DType) -> Self {
        for (_, value) in self.reals() {
            let (rounded, smallest) = match dtype {
                DType::F64 => (*value, f64::MIN_POSITIVE),
                _ => (f64::from(*value as f32), f64::from(f32::MIN_POSITIVE)),
            };
            *value = if rounded < smallest { 0.0 } else { rounded };
        }
        self
    }
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
            post_eps: 0.0,
            dynamic: true,
            norm: false,
            given: false,
            norm_scale_eps: 1e-6,
            deferred: false,
        }
    }
}

spelled!(Order, "order", "column_row" => ColumnRow, "row_column" => RowColumn);
spelled!(EpsMode, "sinkhorn_eps_mode", "add" => Add, "clamp" => Clamp);
spelled!(NormEpsMode, "norm_eps_mode", "inside" => Inside, "outside" => Outside);

#[cfg(test)]
mod tests {
    use super::*;

    const FIELDS: [&str; 6] = [
        "sinkhorn_eps",
        "norm_eps",
        "pre_eps",
        "post_scale",
        "post_eps",
        "norm_scale_eps",
    ];

    fn with(field: usize, value: f64) -> Config {
        let mut config = Config::default();
        *config.reals()[field].1 = value;
        config
    }

    #[test]
    fn every_number_has_its_bounds() {
        for (field, name) in FIELDS.into_iter().enumerate() {
            for value in [f64::NAN, f64::INFINITY, f64::NEG_INFINITY, -1e-6, -1.0] {
                for dtype in [DType::F32, DType::F64, DType::Bf16, DType::F16] {
                    let (refused, expected, got) = with(field, value).check(dtype).unwrap_err();
                    assert_eq!(refused, name);
                    assert!(expected.starts_with("a number of 0 or more"), "{expected}");
                    assert_eq!(got, format!("{value:?}"));
                }
            }
            for value in [0.0, -0.0, 1e-320, 1e-6, 3.4e38] {
                assert!(with(field, value).check(DType::Bf16).is_ok());
            }
            assert!(with(field, 1e39).check(DType::F64).is_ok());
            let (refused, expected, _) = with(field, 1e39).check(DType::F16).unwrap_err();
            assert_eq!(refused, name);
            assert!(expected.ends_with("finite in float32"), "{expected}");
        }
        let many = Config {
            sinkhorn_iters: 10_001,
            ..Config::default()
        };
        assert_eq!(many.check(DType::F32).unwrap_err().0, "sinkhorn_iters");
    }

    #[test]
    fn constraints_have_their_numbers_and_columns() {
        let of = |word: &str| word.parse::<Constraint>().unwrap();
        let numbers = Constraint::WORDS.iter().map(|word| of(word) as usize);
        assert!(numbers.eq(0..Constraint::ALL.len()));
        for constraint in Constraint::ALL {
            assert_eq!(of(constraint.word()), *constraint);
        }
        let columns_and_streams = ["birkhoff", "none", "identity", "permutations"].map(|word| {
            let constraint = of(word);
            (constraint.num_columns(3), constraint.max_streams())
        });
        assert_eq!(columns_and_streams, [(9, 16), (9, 16), (0, 16), (6, 4)]);
    }

    #[test]
    fn what_kernels_cannot_tell_from_zero_is_zero() {
        for field in 0..FIELDS.len() {
            let rounded = |value, dtype| *with(field, value).rounded(dtype).reals()[field].1;
            for value in [-0.0, 1e-320, 1e-50, 1e-40] {
                assert_eq!(rounded(value, DType::Bf16).to_bits(), 0);
            }
            assert_eq!(rounded(1e-50, DType::F64), 1e-50);
            assert_eq!(rounded(1e-6, DType::F32), f64::from(1e-6_f32));
        }
    }
}

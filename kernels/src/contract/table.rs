//! The table of calls as data: what docs/calls.md says of every value and attribute by its name.
//!
//! Checks ([`CheckedCall`](crate::contract::check::CheckedCall)) read it, and the shared library describes itself with it.

use serde::Serialize;

use crate::contract::check::Call;
use crate::contract::config::{Constraint, EpsMode, NormEpsMode, Order};
use crate::contract::limits::MAX_SINKHORN_ITERS;

/// One dimension of a value, under the letter that the table of docs/calls.md has for it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub enum Dim {
    /// Streams.
    #[serde(rename = "n")]
    Streams,
    /// Channels of one stream.
    #[serde(rename = "C")]
    Hidden,
    /// Channels of all streams.
    #[serde(rename = "nC")]
    Flat,
    /// Coefficients.
    #[serde(rename = "K")]
    Coefficients,
    /// Columns of phi: K, or 0 for static coefficients.
    #[serde(rename = "P")]
    Columns,
    /// Gates: 3, or 1 in a head.
    #[serde(rename = "A")]
    Gates,
    /// Values of norm_scale: C, or 0 where the layer's input is not normalised.
    #[serde(rename = "W")]
    NormWidth,
    /// 1 where the layer's input is normalised, otherwise 0.
    #[serde(rename = "w")]
    Norms,
}

/// Which dtype a value has.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Precision {
    /// That of the streams.
    Streams,
    /// That of accumulations: float32, or float64 where the streams are float64.
    Accumulation,
}

/// What the table says of the operands and results of one name.
#[derive(Debug, Clone, Copy, Serialize)]
pub struct Value {
    /// Its dtype.
    pub precision: Precision,
    /// Whether all leading dimensions of the streams come before those in `dims`.
    pub has_tokens: bool,
    /// The dimensions of a token, or all of them where there are no tokens.
    pub dims: &'static [Dim],
}

impl Value {
    /// What the table says of a name: `d_<name>` is as `<name>`.
    ///
    /// # Panics
    /// The table has no such name.
    pub fn named(name: &str) -> Self {
        use Dim::*;
        use Precision::*;
        let value = name.strip_prefix("d_").unwrap_or(name);
        let (precision, has_tokens, dims): (_, _, &'static [Dim]) = match value {
            "x" | "x_new" | "x_in" | "x_new_in" => {
                (Precision::Streams, true, &[Dim::Streams, Hidden])
            }
            "y" | "u" => (Precision::Streams, true, &[Hidden]),
            "h_pre" | "h_post" => (Accumulation, true, &[Dim::Streams]),
            "h_res" | "h_res_new" | "z" => (Accumulation, true, &[Dim::Streams, Dim::Streams]),
            "m" => (Accumulation, true, &[Columns]),
            "r" => (Accumulation, true, &[]),
            "rho" => (Accumulation, true, &[Norms]),
            "u_norm" => (Precision::Streams, true, &[NormWidth]),
            "norm_scale" => (Accumulation, false, &[NormWidth]),
            "phi" => (Accumulation, false, &[Flat, Columns]),
            "alpha" => (Accumulation, false, &[Gates]),
            "bias" => (Accumulation, false, &[Coefficients]),
            _ => unreachable!("no `{name}` in the table of calls"),
        };
        Self {
            precision,
            has_tokens,
            dims,
        }
    }
}

/// One attribute of a call: its type and what it may be.
#[derive(Debug, Clone, Copy, Serialize)]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum Setting {
    /// One of these words.
    String {
        /// The words.
        choices: &'static [&'static str],
    },
    /// A number from 0 to `max`.
    Int64 {
        /// The largest.
        max: usize,
    },
    /// A number.
    Float64,
}

/// A call with all that the table says of it.
#[derive(Debug, Serialize)]
pub struct Row {
    name: &'static str,
    operands: Vec<Named<Value>>,
    results: Vec<Named<Value>>,
    /// Whether the first result may lie where the last operand lies.
    adds_in_place: bool,
    attributes: Vec<Named<Setting>>,
}

#[derive(Debug, Serialize)]
struct Named<T> {
    name: &'static str,
    #[serde(flatten)]
    what: T,
}

impl Call {
    /// The row of the table of calls.
    pub fn table_row(self) -> Row {
        let values = |names: &[&'static str]| {
            let named = names.iter().map(|&name| Named {
                name,
                what: Value::named(name),
            });
            named.collect()
        };
        Row {
            name: self.name(),
            operands: values(self.operands()),
            results: values(self.results()),
            adds_in_place: self.adds_in_place(),
            attributes: self.settings(),
        }
    }

    /// The attributes: the fields of [`Config`](crate::Config) by their names, or none.
    fn settings(self) -> Vec<Named<Setting>> {
        if !self.has_config() {
            return Vec::new();
        }
        let words = |choices| Setting::String { choices };
        let mut settings = vec![
            ("constraint", words(Constraint::WORDS)),
            (
                "sinkhorn_iters",
                Setting::Int64 {
                    max: MAX_SINKHORN_ITERS,
                },
            ),
            ("sinkhorn_eps", Setting::Float64),
            ("sinkhorn_eps_mode", words(EpsMode::WORDS)),
            ("order", words(Order::WORDS)),
            ("norm_eps", Setting::Float64),
            ("norm_eps_mode", words(NormEpsMode::WORDS)),
            ("pre_eps", Setting::Float64),
            ("post_scale", Setting::Float64),
        ];
        if self.can_normalize() {
            settings.push(("norm_scale_eps", Setting::Float64));
        }
        if self.can_defer() {
            settings.push(("deferred", Setting::Int64 { max: 1 }));
        }
        let named = settings
            .into_iter()
            .map(|(name, what)| Named { name, what });
        named.collect()
    }
}

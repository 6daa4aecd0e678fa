//! The table of calls as data: the operands, results and attributes of every call, by name.
//!
//! The check of a call, the decoding of its attributes, the shared library's description of itself (and by
//! it Python, the fuzzer and docs/calls.md) all read this table.

use serde::Serialize;

use crate::contract::config::{Constraint, EpsMode, NormEpsMode, Order};
use crate::contract::limits::MAX_SINKHORN_ITERS;

/// The version of the table, a part of every target's name. Compiled programs outlive the library, so any
/// change of meaning raises it.
pub const TARGET_VERSION: u32 = 5;

/// A call that this library answers: one direction of an op.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Call {
    /// Width connection.
    PreFwd,
    /// Gradients of the width connection.
    PreBwd,
    /// Depth connection.
    PostFwd,
    /// Gradients of the depth connection.
    PostBwd,
    /// Post of one sublayer and pre of the next.
    PostPreFwd,
    /// Gradients of post and the next pre.
    PostPreBwd,
    /// Projection onto the doubly stochastic matrices.
    SinkhornFwd,
    /// Gradient of the projection.
    SinkhornBwd,
    /// Learned exit from the streams.
    HeadFwd,
    /// Gradients of the learned exit.
    HeadBwd,
    /// Weighted sum over the streams alone.
    CollapseFwd,
    /// Gradient of that sum with respect to h_pre.
    CollapseBwd,
}

/// A row of the table: what a call has, in the order in which it has it.
///
/// `d_<name>` is the cotangent of `<name>`. The kernel adds what it computes for the streams to the cotangent
/// that ends in `_in`, or to its product with the transposed h_res where that cotangent is deferred, in the
/// memory that becomes the first result.
struct Row {
    call: Call,
    name: &'static str,
    operands: &'static [&'static str],
    results: &'static [&'static str],
    /// Groups of values that the call may lack.
    groups: &'static [Group],
    /// Whether the attributes are the settings of coefficients.
    has_config: bool,
    /// Whether the first result may lie where the last operand lies, to which the kernel adds.
    adds_in_place: bool,
}

const OF_PRE: &[Group] = &[Group::Dynamic, Group::Norm];
const OF_POST_PRE: &[Group] = &Group::ALL;

#[rustfmt::skip]
const ROWS: [Row; 12] = [
    Row {
        call: Call::PreFwd, name: "pre_fwd",
        operands: &["x", "phi", "alpha", "bias", "norm_scale"],
        results: &["u", "h_pre", "h_post", "h_res", "m", "r", "rho"],
        groups: OF_PRE, has_config: true, adds_in_place: false,
    },
    Row {
        call: Call::PreBwd, name: "pre_bwd",
        operands: &["x", "phi", "alpha", "bias", "norm_scale", "m", "r", "rho", "h_res",
                    "d_u", "d_h_pre", "d_h_post", "d_h_res", "d_x_in"],
        results: &["d_x", "d_phi", "d_alpha", "d_bias", "d_norm_scale"],
        groups: OF_PRE, has_config: true, adds_in_place: true,
    },
    Row {
        call: Call::PostFwd, name: "post_fwd",
        operands: &["x", "y", "h_post", "h_res"],
        results: &["x_new"],
        groups: &[], has_config: false, adds_in_place: false,
    },
    Row {
        call: Call::PostBwd, name: "post_bwd",
        operands: &["x", "y", "h_post", "h_res", "d_x_new"],
        results: &["d_y", "d_h_post", "d_h_res"],
        groups: &[], has_config: false, adds_in_place: false,
    },
    Row {
        call: Call::PostPreFwd, name: "post_pre_fwd",
        operands: &["x", "y", "h_post", "h_res", "phi", "alpha", "bias", "norm_scale", "h_given"],
        results: &["x_new", "u", "h_pre", "h_post", "h_res", "m", "r", "rho"],
        groups: OF_POST_PRE, has_config: true, adds_in_place: false,
    },
    Row {
        call: Call::PostPreBwd, name: "post_pre_bwd",
        operands: &["x", "y", "h_post", "h_res", "phi", "alpha", "bias", "norm_scale",
                    "m", "r", "rho", "u_norm", "h_given", "h_res_new",
                    "d_u", "d_h_pre", "d_h_post", "d_h_res", "d_x_new_in"],
        results: &["d_x_new", "d_y", "d_h_post", "d_h_res", "d_phi", "d_alpha", "d_bias", "d_norm_scale",
                   "d_h_given"],
        groups: OF_POST_PRE, has_config: true, adds_in_place: true,
    },
    Row {
        call: Call::SinkhornFwd, name: "sinkhorn_fwd",
        operands: &["z"],
        results: &["h_res"],
        groups: &[], has_config: true, adds_in_place: false,
    },
    Row {
        call: Call::SinkhornBwd, name: "sinkhorn_bwd",
        operands: &["z", "d_h_res"],
        results: &["d_z"],
        groups: &[], has_config: true, adds_in_place: false,
    },
    Row {
        call: Call::HeadFwd, name: "head_fwd",
        operands: &["x", "phi", "alpha", "bias"],
        results: &["u", "m", "r"],
        groups: &[], has_config: true, adds_in_place: false,
    },
    Row {
        call: Call::HeadBwd, name: "head_bwd",
        operands: &["x", "phi", "alpha", "bias", "m", "r", "d_u"],
        results: &["d_x", "d_phi", "d_alpha", "d_bias"],
        groups: &[], has_config: true, adds_in_place: false,
    },
    Row {
        call: Call::CollapseFwd, name: "collapse_fwd",
        operands: &["x", "h_pre"],
        results: &["u"],
        groups: &[], has_config: false, adds_in_place: false,
    },
    Row {
        call: Call::CollapseBwd, name: "collapse_bwd",
        operands: &["x", "d_u"],
        results: &["d_h_pre"],
        groups: &[], has_config: false, adds_in_place: false,
    },
];

impl Call {
    /// Every call, in the order of the table.
    pub const ALL: [Call; ROWS.len()] = {
        let mut all = [Call::PreFwd; ROWS.len()];
        let mut at = 0;
        while at < ROWS.len() {
            assert!(
                ROWS[at].call as usize == at,
                "rows are in the order of the calls"
            );
            all[at] = ROWS[at].call;
            at += 1;
        }
        all
    };

    const fn row(self) -> &'static Row {
        &ROWS[self as usize]
    }

    /// The name that every layer uses, such as `pre_fwd`.
    pub const fn name(self) -> &'static str {
        self.row().name
    }

    /// Whether the first result may lie where the last operand lies, to which the kernel adds.
    pub const fn adds_in_place(self) -> bool {
        self.row().adds_in_place
    }

    /// Whether the call carries a [`Config`](crate::Config).
    pub const fn has_config(self) -> bool {
        self.row().has_config
    }

    /// Whether the call is of the learned exit, whose coefficients are h_pre alone.
    pub const fn is_head(self) -> bool {
        matches!(self, Call::HeadFwd | Call::HeadBwd)
    }

    /// The groups of values that the call may lack.
    pub const fn groups(self) -> &'static [Group] {
        self.row().groups
    }

    /// The operands in order, without those of absent groups.
    pub fn operands(self, has: impl Fn(Group) -> bool) -> impl Iterator<Item = Value> {
        self.present(self.row().operands, has)
    }

    /// The results in order, without those of absent groups.
    pub fn results(self, has: impl Fn(Group) -> bool) -> impl Iterator<Item = Value> {
        self.present(self.row().results, has)
    }

    /// The name of the first operand: the streams, or the logits of Sinkhorn.
    pub const fn first_operand(self) -> &'static str {
        self.row().operands[0]
    }

    /// The name of the first result.
    pub const fn first_result(self) -> &'static str {
        self.row().results[0]
    }

    /// The name of the last operand, which is in every call that has it.
    pub const fn last_operand(self) -> &'static str {
        self.row().operands[self.row().operands.len() - 1]
    }

    fn present(
        self,
        names: &'static [&'static str],
        has: impl Fn(Group) -> bool,
    ) -> impl Iterator<Item = Value> {
        let values = names.iter().map(move |name| self.value(name));
        values.filter(move |value| value.group.is_none_or(&has))
    }

    /// The value of a name in this call: only groups that the call may lack are named.
    fn value(self, name: &'static str) -> Value {
        let value = Value::named(name);
        let group = value.group.filter(|group| self.groups().contains(group));
        Value { group, ..value }
    }

    /// The attributes, in no order.
    pub fn attributes(self) -> impl Iterator<Item = Attribute> {
        ATTRIBUTES
            .into_iter()
            .filter(move |attribute| match attribute.of {
                Of::Config => self.has_config(),
                Of::Group(group) => self.groups().contains(&group),
                Of::AddsInPlace => self.adds_in_place(),
            })
    }
}

/// Values that a call has all of, or none.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Group {
    /// phi, alpha and what follows from them: absent for static coefficients, which are the same for all
    /// tokens.
    Dynamic,
    /// norm_scale and what follows from it: absent where the layer's input is not normalised.
    Norm,
    /// h_given and its gradient: absent where the layer's input has the weights of its own sublayer. No call has
    /// them and norm_scale.
    Given,
}

impl Group {
    /// Every group.
    pub const ALL: [Group; 3] = [Group::Dynamic, Group::Norm, Group::Given];

    /// The attribute of the calls that may lack the group: 1 where they have it, 0 where they do not.
    pub const fn name(self) -> &'static str {
        match self {
            Group::Dynamic => "dynamic",
            Group::Norm => "norm",
            Group::Given => "given",
        }
    }

    /// A sentence for docs/calls.md: when the values of the group are absent.
    pub const fn meaning(self) -> &'static str {
        match self {
            Group::Dynamic => "Absent for static coefficients, which are the same for all tokens.",
            Group::Norm => "Absent where the layer's input is not normalised.",
            Group::Given => {
                "Absent where u has the weights of its own sublayer, h_pre. Not together with those of norm."
            }
        }
    }
}

/// A dimension of a value, under its letter in docs/calls.md.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub enum Dim {
    /// Streams.
    #[serde(rename = "n")]
    Streams,
    /// Channels of one stream.
    #[serde(rename = "C")]
    Hidden,
    /// Coefficients.
    #[serde(rename = "K")]
    Coefficients,
    /// Gates of the coefficients, one for each group that has columns: 3, 2 where H_res has none, or 1 in a head.
    #[serde(rename = "A")]
    Gates,
    /// One.
    #[serde(rename = "1")]
    One,
}

/// The kind of dtype that a value has.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Precision {
    /// The dtype of the streams.
    Streams,
    /// The dtype of accumulations: float32, or float64 where the streams are float64.
    Accumulation,
}

/// An operand or result.
#[derive(Debug, Clone, Copy, Serialize)]
pub struct Value {
    /// Name, such as `h_res`.
    pub name: &'static str,
    /// Kind of dtype.
    pub precision: Precision,
    /// Whether all leading dimensions of the streams come before those in `dims`.
    pub has_tokens: bool,
    /// Dimensions of a token, or all of them where there are no tokens.
    pub dims: &'static [Dim],
    /// Group with which the value is absent.
    pub group: Option<Group>,
}

impl Value {
    /// The value of a name: `d_<name>` is as `<name>`.
    ///
    /// # Panics
    /// The table has no such name.
    fn named(name: &'static str) -> Self {
        use Dim::{Coefficients, Gates, Hidden, One, Streams as N};
        use Precision::{Accumulation, Streams};
        const DYNAMIC: Option<Group> = Some(Group::Dynamic);
        const NORM: Option<Group> = Some(Group::Norm);
        const GIVEN: Option<Group> = Some(Group::Given);
        let (precision, has_tokens, dims, group): (_, _, &'static [Dim], _) =
            match name.strip_prefix("d_").unwrap_or(name) {
                "x" | "x_new" | "x_in" | "x_new_in" => (Streams, true, &[N, Hidden], None),
                "y" | "u" => (Streams, true, &[Hidden], None),
                "u_norm" => (Streams, true, &[Hidden], NORM),
                "h_pre" | "h_post" => (Accumulation, true, &[N], None),
                "h_given" => (Accumulation, true, &[N], GIVEN),
                "h_res" | "h_res_new" | "z" => (Accumulation, true, &[N, N], None),
                "m" => (Accumulation, true, &[Coefficients], DYNAMIC),
                "r" => (Accumulation, true, &[], None),
                "rho" => (Accumulation, true, &[One], NORM),
                "phi" => (Accumulation, false, &[N, Hidden, Coefficients], DYNAMIC),
                "alpha" => (Accumulation, false, &[Gates], DYNAMIC),
                "bias" => (Accumulation, false, &[Coefficients], None),
                "norm_scale" => (Accumulation, false, &[Hidden], NORM),
                _ => unreachable!("no `{name}` in the table of calls"),
            };
        Self {
            name,
            precision,
            has_tokens,
            dims,
            group,
        }
    }
}

/// The type of an attribute, and the values that it may have.
#[derive(Debug, Clone, Copy, Serialize)]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum Setting {
    /// A word out of `choices`.
    String {
        /// Words that the attribute may be.
        choices: &'static [&'static str],
    },
    /// A number from 0 to `max`.
    Int64 {
        /// Largest value.
        max: usize,
    },
    /// A number.
    Float64,
}

/// An attribute of calls.
#[derive(Debug, Clone, Copy, Serialize)]
pub struct Attribute {
    /// Name: that of a field of `MHCConfig`, of a group, or one of the call's own.
    pub name: &'static str,
    /// Type and values.
    #[serde(flatten)]
    pub setting: Setting,
    #[serde(skip)]
    of: Of,
}

/// The calls that have an attribute.
#[derive(Debug, Clone, Copy)]
enum Of {
    /// Calls with settings of coefficients.
    Config,
    /// Calls that may lack the group.
    Group(Group),
    /// Calls that add to a cotangent.
    AddsInPlace,
}

const FLAG: Setting = Setting::Int64 { max: 1 };

#[rustfmt::skip]
const ATTRIBUTES: [Attribute; 15] = [
    Attribute { name: "constraint", of: Of::Config, setting: Setting::String { choices: Constraint::WORDS } },
    Attribute { name: "sinkhorn_iters", of: Of::Config, setting: Setting::Int64 { max: MAX_SINKHORN_ITERS } },
    Attribute { name: "sinkhorn_eps", of: Of::Config, setting: Setting::Float64 },
    Attribute { name: "sinkhorn_eps_mode", of: Of::Config, setting: Setting::String { choices: EpsMode::WORDS } },
    Attribute { name: "order", of: Of::Config, setting: Setting::String { choices: Order::WORDS } },
    Attribute { name: "norm_eps", of: Of::Config, setting: Setting::Float64 },
    Attribute { name: "norm_eps_mode", of: Of::Config, setting: Setting::String { choices: NormEpsMode::WORDS } },
    Attribute { name: "pre_eps", of: Of::Config, setting: Setting::Float64 },
    Attribute { name: "post_scale", of: Of::Config, setting: Setting::Float64 },
    Attribute { name: "post_eps", of: Of::Config, setting: Setting::Float64 },
    Attribute { name: Group::Dynamic.name(), of: Of::Group(Group::Dynamic), setting: FLAG },
    Attribute { name: Group::Norm.name(), of: Of::Group(Group::Norm), setting: FLAG },
    Attribute { name: "norm_scale_eps", of: Of::Group(Group::Norm), setting: Setting::Float64 },
    Attribute { name: Group::Given.name(), of: Of::Group(Group::Given), setting: FLAG },
    Attribute { name: "deferred", of: Of::AddsInPlace, setting: FLAG },
];

/// A row of the table as the shared library describes it.
#[derive(Debug, Serialize)]
pub struct Description {
    name: &'static str,
    operands: Vec<Value>,
    results: Vec<Value>,
    adds_in_place: bool,
    has_config: bool,
    attributes: Vec<Attribute>,
}

impl Call {
    /// The row of the call with the values of all groups.
    pub fn describe(self) -> Description {
        Description {
            name: self.name(),
            operands: self.operands(|_| true).collect(),
            results: self.results(|_| true).collect(),
            adds_in_place: self.adds_in_place(),
            has_config: self.has_config(),
            attributes: self.attributes().collect(),
        }
    }
}

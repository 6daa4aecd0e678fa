//! The calls: the names of their operands and results. The one check of a call by the table of calls,
//! whichever device runs it.

use crate::contract::config::Constraint;
use crate::contract::layout::CoefficientLayout;
use crate::contract::limits::MAX_PERMUTED;
use crate::contract::limits::MAX_STREAMS;
use crate::contract::table::{Dim, Precision, Value};
use crate::contract::view::{DType, View, product};
use crate::{Config, Error};

/// Every call that this library answers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Call {
    /// Width connection.
    PreFwd,
    /// Its backward pass.
    PreBwd,
    /// Depth connection.
    PostFwd,
    /// Its backward pass.
    PostBwd,
    /// Post of one sublayer and pre of the next.
    PostPreFwd,
    /// Its backward pass.
    PostPreBwd,
    /// Projection onto the doubly stochastic matrices.
    SinkhornFwd,
    /// Its backward pass.
    SinkhornBwd,
    /// The learned exit from the streams.
    HeadFwd,
    /// Its backward pass.
    HeadBwd,
    /// The sum over the streams alone.
    CollapseFwd,
    /// Its gradient with respect to h_pre.
    CollapseBwd,
}

impl Call {
    /// Every op, in the order of the table of handlers.
    pub const ALL: [Call; 12] = [
        Call::PreFwd,
        Call::PreBwd,
        Call::PostFwd,
        Call::PostBwd,
        Call::PostPreFwd,
        Call::PostPreBwd,
        Call::SinkhornFwd,
        Call::SinkhornBwd,
        Call::HeadFwd,
        Call::HeadBwd,
        Call::CollapseFwd,
        Call::CollapseBwd,
    ];

    /// The name that every layer uses, such as `pre_fwd`.
    pub const fn name(self) -> &'static str {
        self.row().0
    }

    /// Its operands, in order. `d_<name>` is the cotangent of `<name>`; the kernel adds what it computes
    /// for the streams to the one that ends in `_in`, or to its product with the transposed h_res where
    /// that cotangent is deferred, in the memory that becomes the first result.
    pub(crate) const fn operands(self) -> &'static [&'static str] {
        self.row().1
    }

    /// Its results, in order.
    pub(crate) const fn results(self) -> &'static [&'static str] {
        self.row().2
    }

    #[rustfmt::skip]
    const fn row(self) -> (&'static str, &'static [&'static str], &'static [&'static str]) {
        match self {
            Call::PreFwd => (
                "pre_fwd",
                &["x", "phi", "alpha", "bias", "norm_scale"],
                &["u", "h_pre", "h_post", "h_res", "m", "r", "rho"],
            ),
            Call::PreBwd => (
                "pre_bwd",
                &["x", "phi", "alpha", "bias", "norm_scale", "m", "r", "rho", "h_res",
                  "d_u", "d_h_pre", "d_h_post", "d_h_res", "d_x_in"],
                &["d_x", "d_phi", "d_alpha", "d_bias", "d_norm_scale"],
            ),
            Call::PostFwd => ("post_fwd", &["x", "y", "h_post", "h_res"], &["x_new"]),
            Call::PostBwd => (
                "post_bwd",
                &["x", "y", "h_post", "h_res", "d_x_new"],
                &["d_y", "d_h_post", "d_h_res"],
            ),
            Call::PostPreFwd => (
                "post_pre_fwd",
                &["x", "y", "h_post", "h_res", "phi", "alpha", "bias", "norm_scale"],
                &["x_new", "u", "h_pre", "h_post", "h_res", "m", "r", "rho"],
            ),
            Call::PostPreBwd => (
                "post_pre_bwd",
                &["x", "y", "h_post", "h_res", "phi", "alpha", "bias", "norm_scale",
                  "m", "r", "rho", "u_norm", "h_res_new",
                  "d_u", "d_h_pre", "d_h_post", "d_h_res", "d_x_new_in"],
                &["d_x_new", "d_y", "d_h_post", "d_h_res", "d_phi", "d_alpha", "d_bias",
                  "d_norm_scale"],
            ),
            Call::SinkhornFwd => ("sinkhorn_fwd", &["z"], &["h_res"]),
            Call::SinkhornBwd => ("sinkhorn_bwd", &["z", "d_h_res"], &["d_z"]),
            Call::HeadFwd => ("head_fwd", &["x", "phi", "alpha", "bias"], &["u", "m", "r"]),
            Call::HeadBwd => (
                "head_bwd",
                &["x", "phi", "alpha", "bias", "m", "r", "d_u"],
                &["d_x", "d_phi", "d_alpha", "d_bias"],
            ),
            Call::CollapseFwd => ("collapse_fwd", &["x", "h_pre"], &["u"]),
            Call::CollapseBwd => ("collapse_bwd", &["x", "d_u"], &["d_h_pre"]),
        }
    }

    /// Whether the first result may lie where the last operand lies, to which it is added.
    pub const fn adds_in_place(self) -> bool {
        matches!(self, Call::PreBwd | Call::PostPreBwd)
    }

    /// Whether the call carries a [`Config`].
    pub const fn has_config(self) -> bool {
        !matches!(
            self,
            Call::PostFwd | Call::PostBwd | Call::CollapseFwd | Call::CollapseBwd
        )
    }

    /// Whether it can normalise the layer's input, or can be the backward pass of that: the attribute
    /// `norm_scale_eps`.
    pub const fn can_normalize(self) -> bool {
        matches!(
            self,
            Call::PreFwd | Call::PreBwd | Call::PostPreFwd | Call::PostPreBwd
        )
    }

    /// Whether the cotangent that it adds to can be deferred: the attribute `deferred`.
    pub const fn can_defer(self) -> bool {
        matches!(self, Call::PreBwd | Call::PostPreBwd)
    }

    /// Which coefficients the call has.
    pub(crate) fn layout(self, n: usize, config: &Config) -> CoefficientLayout {
        match self {
            Call::HeadFwd | Call::HeadBwd => CoefficientLayout::head(n),
            _ => CoefficientLayout::pre(n, config.constraint),
        }
    }

    /// An error about one argument.
    pub(crate) fn error(self, name: &str, expected: &str, got: &str) -> Error {
        let op = self.name();
        Error::Refused(format!("{op}: `{name}`: expected {expected}, got {got}"))
    }
}

/// One call, checked: its sizes, and its operands and results by name.
#[derive(Debug, Clone, Copy)]
pub struct CheckedCall<'a> {
    /// Which one.
    pub kind: Call,
    /// Its settings; of no meaning where the op has none.
    pub config: &'a Config,
    /// Of the streams, or of z.
    pub dtype: DType,
    /// Product of the leading dimensions; matrices, where the first operand is z.
    pub tokens: usize,
    /// Streams.
    pub n: usize,
    /// Channels of one stream; n where there are no streams.
    pub c: usize,
    /// Columns of phi and m: all coefficients, or 0 for static ones and where there is no phi.
    pub columns: usize,
    /// Values of norm_scale: C, or 0 where the layer's input is not normalised.
    pub norm_width: usize,
    /// Which coefficients there are.
    pub layout: CoefficientLayout,
    lead: &'a [i64],
    args: &'a [View<'a>],
    rets: &'a [View<'a>],
}

/// What the table says of one name.
struct Shape {
    dtype: DType,
    has_tokens: bool,
    row: [usize; 2],
    rank: usize,
}

impl Shape {
    fn row(&self) -> &[usize] {
        &self.row[..self.rank]
    }
}

impl<'a> CheckedCall<'a> {
    /// Checks a call: operands and results as in the table of docs/calls.md, with one more result
    /// or none, the workspace of devices that need it (float32, one-dimensional).
    ///
    /// # Errors
    /// A wrong number of operands or results, or one of the wrong shape, dtype or alignment.
    pub fn check(
        kind: Call,
        args: &'a [View<'a>],
        rets: &'a [View<'a>],
        config: &'a Config,
    ) -> Result<Self, Error> {
        let call = Self::sizes(kind, args, rets, config)?;
        if let Err((field, expected, got)) = config.check(call.dtype) {
            return Err(kind.error(field, &expected, &got));
        }
        call.check_all(kind.operands(), args, "an operand")?;
        call.check_all(kind.results(), rets, "a result")?;
        let (operands, results) = (kind.operands().len(), kind.results().len());
        match &rets[results..] {
            _ if args.len() > operands => {}
            [] => return Ok(call),
            [view] if view.dtype == DType::F32 && view.dims.len() == 1 => {
                if is_sound(view) {
                    return Ok(call);
                }
                return Err(kind.error("workspace", SOUND, "something else"));
            }
            _ => {}
        }
        let got = format!(
            "{} and {} more",
            args.len() - operands,
            rets.len() - results
        );
        Err(kind.error("operands and results", "no more", &got))
    }

    /// The same call with settings that kernels read in place of those that were checked.
    pub fn with_config(self, config: &'a Config) -> Self {
        Self { config, ..self }
    }

    /// Takes the sizes from the first operand, from phi and from norm_scale.
    fn sizes(
        kind: Call,
        args: &'a [View<'a>],
        rets: &'a [View<'a>],
        config: &'a Config,
    ) -> Result<Self, Error> {
        let Some(first) = args.first() else {
            return Err(kind.error("operands", "at least one", "none"));
        };
        let name = kind.operands()[0];
        let [lead @ .., n, c] = first.dims else {
            let got = format!("{:?}", first.dims);
            return Err(kind.error(name, "at least 2 dimensions", &got));
        };
        let is_z = name == "z";
        if is_z && !matches!(first.dtype, DType::F32 | DType::F64) {
            return Err(kind.error(name, "float32 or float64", first.dtype.name()));
        }
        let possible = (1..=MAX_STREAMS as i64).contains(n)
            && if is_z { n == c } else { *c >= 1 }
            && n.checked_mul(*c).is_some();
        let tokens = product(lead).filter(|_| possible);
        let Some(tokens) = tokens else {
            let expected = if is_z {
                "[..., n, n] with 1 <= n <= 16"
            } else {
                "[..., n, C] with 1 <= n <= 16 and C >= 1"
            };
            return Err(kind.error(name, expected, &format!("{:?}", first.dims)));
        };
        let (n, c) = (*n as usize, *c as usize);
        let permutes = kind.has_config() && config.constraint == Constraint::Permutations;
        if permutes && n > MAX_PERMUTED && !matches!(kind, Call::HeadFwd | Call::HeadBwd) {
            let expected = format!("one for {n} streams");
            return Err(kind.error("constraint", &expected, "permutations"));
        }
        let layout = kind.layout(n, config);
        let dims = |name| {
            let at = kind.operands().iter().position(|other| *other == name)?;
            args.get(at).map(|view| view.dims)
        };
        let columns = match dims("phi") {
            None => 0,
            Some([_, 0]) if layout.num_post > 0 => 0,
            Some(_) => layout.num(),
        };
        let norm_width = match dims("norm_scale") {
            None | Some([0]) => 0,
            Some(_) => c,
        };
        Ok(Self {
            kind,
            config,
            dtype: first.dtype,
            tokens,
            n,
            c,
            columns,
            norm_width,
            layout,
            lead,
            args,
            rets,
        })
    }

    fn check_all(&self, names: &[&str], views: &[View], what: &str) -> Result<(), Error> {
        for (at, name) in names.iter().enumerate() {
            let Some(view) = views.get(at) else {
                return Err(self.kind.error(name, what, "none"));
            };
            let shape = self.shape(name);
            let row = shape.row();
            let lead = if shape.has_tokens { self.lead } else { &[] };
            let fits = view.dtype == shape.dtype
                && view.dims.len() == lead.len() + row.len()
                && view.dims.starts_with(lead)
                && (view.dims[lead.len()..].iter())
                    .zip(row)
                    .all(|(got, want)| *got == *want as i64);
            if !fits {
                let row: Vec<i64> = row.iter().map(|dim| *dim as i64).collect();
                let expected = format!("{}{:?}", shape.dtype.name(), [lead, &row].concat());
                let got = format!("{}{:?}", view.dtype.name(), view.dims);
                return Err(self.kind.error(name, &expected, &got));
            }
            if !is_sound(view) {
                return Err(self.kind.error(name, SOUND, "something else"));
            }
        }
        Ok(())
    }

    /// What the table says of a name, with the sizes of this call.
    fn shape(&self, name: &str) -> Shape {
        let value = Value::named(name);
        let dtype = match (value.precision, self.dtype) {
            (Precision::Streams, dtype) => dtype,
            (Precision::Accumulation, DType::F64) => DType::F64,
            (Precision::Accumulation, _) => DType::F32,
        };
        let mut row = [0; 2];
        for (size, dim) in row.iter_mut().zip(value.dims) {
            *size = self.size(*dim);
        }
        Shape {
            dtype,
            has_tokens: value.has_tokens,
            row,
            rank: value.dims.len(),
        }
    }

    fn size(&self, dim: Dim) -> usize {
        match dim {
            Dim::Streams => self.n,
            Dim::Hidden => self.c,
            Dim::Flat => self.n * self.c,
            Dim::Coefficients => self.layout.num(),
            Dim::Columns => self.columns,
            Dim::Gates if self.layout.num_post > 0 => 3,
            Dim::Gates => 1,
            Dim::NormWidth => self.norm_width,
            Dim::Norms => self.norm_width.min(1),
        }
    }

    /// Elements a token of an operand or result, or of all of it where it has no tokens.
    pub fn width(&self, name: &str) -> usize {
        self.shape(name).row().iter().product()
    }

    /// An operand.
    ///
    /// # Panics
    /// The call has none of this name.
    pub fn operand(&self, name: &str) -> &'a View<'a> {
        &self.args[self.position(self.kind.operands(), name)]
    }

    /// A result.
    ///
    /// # Panics
    /// The call has none of this name.
    pub fn result(&self, name: &str) -> &'a View<'a> {
        &self.rets[self.position(self.kind.results(), name)]
    }

    /// Address of an operand, 0 where the call has none of this name: what a kernel gets as its argument.
    pub fn operand_address(&self, name: &str) -> u64 {
        let at = self.kind.operands().iter().position(|other| *other == name);
        at.map_or(0, |at| self.args[at].data as u64)
    }

    /// Address of a result, 0 where the call has none of this name.
    pub fn result_address(&self, name: &str) -> u64 {
        let at = self.kind.results().iter().position(|other| *other == name);
        at.map_or(0, |at| self.rets[at].data as u64)
    }

    fn position(&self, names: &[&str], name: &str) -> usize {
        let found = names.iter().position(|other| *other == name);
        found.unwrap_or_else(|| panic!("{}: no `{name}` among {names:?}", self.kind.name()))
    }

    /// Address of the workspace and its number of floats, where the call has one.
    pub fn workspace(&self) -> Option<(u64, usize)> {
        let view = self.rets.get(self.kind.results().len())?;
        Some((view.data as u64, view.num_elements()?))
    }
}

const SOUND: &str = "aligned memory of a possible size";

/// Whether its memory can be what it says.
fn is_sound(view: &View) -> bool {
    match view.num_bytes() {
        Some(0) => true,
        Some(bytes) => {
            let start = view.data as usize;
            start != 0
                && start.is_multiple_of(view.dtype.num_bytes())
                && start.checked_add(bytes).is_some()
        }
        None => false,
    }
}

/// A call of given sizes without its memory, for tests.
#[cfg(test)]
pub struct Example {
    kind: Call,
    config: Config,
    args: Vec<(DType, Vec<i64>)>,
    rets: Vec<(DType, Vec<i64>)>,
}

#[cfg(test)]
impl Example {
    /// The operands and results that the table asks for.
    pub fn new(
        kind: Call,
        dtype: DType,
        tokens: usize,
        [n, c]: [usize; 2],
        config: Config,
    ) -> Self {
        let c = if kind.operands()[0] == "z" { n } else { c };
        let layout = kind.layout(n, &config);
        let lead = [tokens as i64];
        let call = CheckedCall {
            kind,
            config: &config,
            dtype,
            tokens,
            n,
            c,
            columns: layout.num(),
            norm_width: 0,
            layout,
            lead: &lead,
            args: &[],
            rets: &[],
        };
        let types = |names: &[&str]| {
            let types = names.iter().map(|name| {
                let shape = call.shape(name);
                let lead = if shape.has_tokens { &lead[..] } else { &[] };
                let row = shape.row().iter().map(|dim| *dim as i64);
                (shape.dtype, lead.iter().copied().chain(row).collect())
            });
            types.collect()
        };
        Self {
            args: types(kind.operands()),
            rets: types(kind.results()),
            kind,
            config,
        }
    }

    /// The same with static coefficients, where there can be.
    pub fn into_static(mut self) -> Self {
        if matches!(self.kind, Call::HeadFwd | Call::HeadBwd) {
            return self;
        }
        for (names, types) in [
            (self.kind.operands(), &mut self.args),
            (self.kind.results(), &mut self.rets),
        ] {
            for (name, (_, dims)) in names.iter().zip(types) {
                if matches!(*name, "phi" | "m" | "d_phi") {
                    *dims.last_mut().unwrap() = 0;
                }
            }
        }
        self
    }

    /// The same with a norm of the layer's input, where there can be.
    pub fn with_norm(mut self) -> Self {
        let hidden = *self.args[0].1.last().unwrap();
        for (names, types) in [
            (self.kind.operands(), &mut self.args),
            (self.kind.results(), &mut self.rets),
        ] {
            for (name, (_, dims)) in names.iter().zip(types) {
                match *name {
                    "norm_scale" | "d_norm_scale" | "u_norm" => *dims.last_mut().unwrap() = hidden,
                    "rho" => *dims.last_mut().unwrap() = 1,
                    _ => {}
                }
            }
        }
        self
    }

    /// With one more result.
    pub fn with_workspace(mut self, len: usize) -> Self {
        self.rets.push((DType::F32, vec![len as i64]));
        self
    }

    /// Hands out op, operands, results and settings, in memory of their own.
    pub fn with_memory<T>(&self, then: impl FnOnce(Call, &[View], &[View], &Config) -> T) -> T {
        type Room = Vec<Vec<f64>>;
        fn room(types: &[(DType, Vec<i64>)]) -> Room {
            let len = |dims: &[i64]| dims.iter().product::<i64>() as usize;
            types.iter().map(|(_, dims)| vec![0.0; len(dims)]).collect()
        }
        fn views<'a>(types: &'a [(DType, Vec<i64>)], room: &mut Room) -> Vec<View<'a>> {
            let views = types.iter().zip(room).map(|((dtype, dims), room)| View {
                data: room.as_mut_ptr().cast(),
                dims,
                dtype: *dtype,
            });
            views.collect()
        }
        let (mut args, mut rets) = (room(&self.args), room(&self.rets));
        let (args, rets) = (views(&self.args, &mut args), views(&self.rets, &mut rets));
        then(self.kind, &args, &rets, &self.config)
    }

    /// Hands out the call, if it passes. Nothing lies at its addresses.
    pub fn check<T>(&self, then: impl FnOnce(Result<CheckedCall, Error>) -> T) -> T {
        fn views(types: &[(DType, Vec<i64>)], first: usize) -> Vec<View<'_>> {
            let views = types.iter().zip(first..).map(|((dtype, dims), at)| View {
                data: std::ptr::without_provenance_mut(at << 40),
                dims,
                dtype: *dtype,
            });
            views.collect()
        }
        let args = views(&self.args, 1);
        let rets = views(&self.rets, 1 + args.len());
        then(CheckedCall::check(self.kind, &args, &rets, &self.config))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Every op in small.
    fn examples() -> impl Iterator<Item = Example> {
        let example = |kind| Example::new(kind, DType::F32, 3, [2, 5], Config::default());
        Call::ALL.into_iter().map(example)
    }

    fn refusal(example: &Example) -> String {
        example.check(|call| call.expect_err("a refusal").to_string())
    }

    #[test]
    fn calls_of_the_table_pass() {
        for example in examples() {
            example.check(|call| assert_eq!(call.unwrap().tokens, 3));
            let example = example.with_workspace(7);
            example.check(|call| assert_eq!(call.unwrap().workspace().unwrap().1, 7));
        }
        for example in examples() {
            example.with_norm().check(|call| {
                let call = call.unwrap();
                let width = if call.kind.can_normalize() { call.c } else { 0 };
                assert_eq!(call.norm_width, width);
            });
        }
        for example in examples() {
            example.into_static().check(|call| {
                let call = call.unwrap();
                let is_head = matches!(call.kind, Call::HeadFwd | Call::HeadBwd);
                assert!(is_head || call.columns == 0);
            });
        }
    }

    #[test]
    fn only_few_streams_are_permuted() {
        let config = Config {
            constraint: Constraint::Permutations,
            ..Config::default()
        };
        for kind in [
            Call::PreFwd,
            Call::PreBwd,
            Call::PostPreFwd,
            Call::PostPreBwd,
        ] {
            let example = |n| Example::new(kind, DType::F32, 3, [n, 5], config);
            example(4).check(|call| assert_eq!(call.unwrap().columns, 32));
            let refusal = refusal(&example(5));
            assert!(
                refusal.contains("`constraint`: expected one for 5"),
                "{refusal}"
            );
        }
        // The head has no H_res.
        let head = Example::new(Call::HeadFwd, DType::F32, 3, [5, 5], config);
        head.check(|call| assert_eq!(call.unwrap().columns, 5));
    }

    #[test]
    fn every_operand_and_result_is_looked_at() {
        type Types = Vec<(DType, Vec<i64>)>;
        let parts: [fn(&mut Example) -> &mut Types; 2] =
            [|example| &mut example.args, |example| &mut example.rets];
        for (part, missing) in parts.into_iter().zip(["an operand", "a result"]) {
            for kind in Call::ALL {
                let good = || Example::new(kind, DType::Bf16, 3, [2, 5], Config::default());
                let names = [kind.operands(), kind.results()][usize::from(missing == "a result")];
                for (at, name) in names.iter().enumerate() {
                    let first = at == 0 && missing == "an operand";
                    let mut example = good();
                    part(&mut example)[at].0 = DType::F64;
                    if !first {
                        let refusal = refusal(&example);
                        assert!(refusal.contains(&format!("`{name}`")), "{refusal}");
                    }
                    let mut example = good();
                    part(&mut example)[at].1.push(2);
                    assert!(refusal(&example).starts_with(kind.name()));
                    let mut example = good();
                    part(&mut example).truncate(at);
                    let wanted = if first { "at least one" } else { missing };
                    let refusal = refusal(&example);
                    assert!(refusal.contains(&format!("expected {wanted}")), "{refusal}");
                }
                let mut example = good();
                part(&mut example).push((DType::F32, vec![3, 4]));
                assert!(refusal(&example).contains("no more"));
            }
        }
    }
}

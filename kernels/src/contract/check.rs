//! The one check of a call by the table of calls, whichever device runs it.

use crate::contract::layout::CoefficientLayout;
use crate::contract::limits::MAX_STREAMS;
use crate::contract::table::{Call, Dim, Group, Precision, Value};
use crate::contract::view::{DType, View, product};
use crate::{Config, Error};

#[cfg(test)]
mod example;
#[cfg(test)]
mod tests;

#[cfg(test)]
pub use example::Example;

impl Call {
    /// The coefficients that the call has.
    pub(crate) fn layout(self, n: usize, config: &Config) -> CoefficientLayout {
        if self.is_head() {
            CoefficientLayout::head(n)
        } else {
            CoefficientLayout::pre(n, config.constraint)
        }
    }

    /// An error about one argument.
    pub(crate) fn error(self, name: &str, expected: &str, got: &str) -> Error {
        let op = self.name();
        Error::Refused(format!("{op}: `{name}`: expected {expected}, got {got}"))
    }
}

/// A call that was checked: its sizes, and its operands and results by name.
#[derive(Debug, Clone, Copy)]
pub struct CheckedCall<'a> {
    /// Row of the table.
    pub kind: Call,
    /// Settings; the default ones where the call has none.
    pub config: &'a Config,
    /// Dtype of the streams, or of z.
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
    /// Coefficients of a token.
    pub layout: CoefficientLayout,
    lead: &'a [i64],
    args: &'a [View<'a>],
    rets: &'a [View<'a>],
}

/// The shape that a value has in this call.
struct Shape {
    dtype: DType,
    row: [usize; 3],
    rank: usize,
}

impl Shape {
    fn row(&self) -> &[usize] {
        &self.row[..self.rank]
    }
}

impl<'a> CheckedCall<'a> {
    /// Checks a call: operands and results as in docs/calls.md, with one more result
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
        if call.norm_width > 0 && call.is_given() {
            return Err(kind.error("given", "0 with `norm` 1", "1"));
        }
        if let Err((field, expected, got)) = config.check(call.dtype) {
            return Err(kind.error(field, &expected, &got));
        }
        let operands =
            call.check_all(kind.operands(|group| config.has(group)), args, "an operand")?;
        let results = call.check_all(kind.results(|group| config.has(group)), rets, "a result")?;
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

    /// A call of no tokens and without memory: every address is 0. Plans are measured on it. `sizes` are n, C, columns
    /// of phi and values of norm_scale, which have to be possible.
    pub fn without_memory(
        kind: Call,
        config: &'a Config,
        dtype: DType,
        [n, c, columns, norm_width]: [usize; 4],
    ) -> Self {
        Self {
            kind,
            config,
            dtype,
            tokens: 0,
            n,
            c,
            columns,
            norm_width,
            layout: kind.layout(n, config),
            lead: &[0],
            args: &[],
            rets: &[],
        }
    }

    /// A copy of the call with settings that kernels read in place of those that were checked.
    pub fn with_config(self, config: &'a Config) -> Self {
        Self { config, ..self }
    }

    /// Takes the sizes from the first operand, and from the settings what the call has.
    fn sizes(
        kind: Call,
        args: &'a [View<'a>],
        rets: &'a [View<'a>],
        config: &'a Config,
    ) -> Result<Self, Error> {
        let Some(first) = args.first() else {
            return Err(kind.error("operands", "at least one", "none"));
        };
        let name = kind.first_operand();
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
                format!("[..., n, n] with 1 <= n <= {MAX_STREAMS}")
            } else {
                format!("[..., n, C] with 1 <= n <= {MAX_STREAMS} and C >= 1")
            };
            return Err(kind.error(name, &expected, &format!("{:?}", first.dims)));
        };
        let (n, c) = (*n as usize, *c as usize);
        let mixes = kind.has_config() && !kind.is_head();
        if mixes && n > config.constraint.max_streams() {
            let expected = format!("one for {n} streams");
            return Err(kind.error("constraint", &expected, config.constraint.word()));
        }
        let layout = kind.layout(n, config);
        let has = |name: &str| {
            let mut operands = kind.operands(|group| config.has(group));
            operands.any(|value| value.name == name)
        };
        let columns = if has("phi") { layout.num() } else { 0 };
        let norm_width = if has("norm_scale") { c } else { 0 };
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

    /// Checks the views of some values, and returns their number.
    fn check_all(
        &self,
        values: impl Iterator<Item = Value>,
        views: &[View],
        what: &str,
    ) -> Result<usize, Error> {
        let mut num = 0;
        for (at, value) in values.enumerate() {
            num = at + 1;
            let name = value.name;
            let Some(view) = views.get(at) else {
                return Err(self.kind.error(name, what, "none"));
            };
            let shape = self.shape(&value);
            let row = shape.row();
            let lead = if value.has_tokens { self.lead } else { &[] };
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
        Ok(num)
    }

    /// The shape of a value, with the sizes of this call.
    fn shape(&self, value: &Value) -> Shape {
        let dtype = match (value.precision, self.dtype) {
            (Precision::Streams, dtype) => dtype,
            (Precision::Accumulation, DType::F64) => DType::F64,
            (Precision::Accumulation, _) => DType::F32,
        };
        let mut row = [0; 3];
        for (size, dim) in row.iter_mut().zip(value.dims) {
            *size = self.size(*dim);
        }
        Shape {
            dtype,
            row,
            rank: value.dims.len(),
        }
    }

    fn size(&self, dim: Dim) -> usize {
        match dim {
            Dim::Streams => self.n,
            Dim::Hidden => self.c,
            Dim::Coefficients => self.layout.num(),
            Dim::Gates => self.layout.num_gates(),
            Dim::One => 1,
        }
    }

    /// The operands that the call has, in order.
    pub fn operands(&self) -> impl Iterator<Item = Value> {
        let config = *self.config;
        self.kind.operands(move |group| config.has(group))
    }

    /// The results that the call has, in order, but for the workspace.
    pub fn results(&self) -> impl Iterator<Item = Value> {
        let config = *self.config;
        self.kind.results(move |group| config.has(group))
    }

    /// Whether u has weights that are given, which no other schedule than those for such calls knows.
    pub fn is_given(&self) -> bool {
        self.kind.groups().contains(&Group::Given) && self.config.given
    }

    /// Elements a token of an operand or result, or of all of it where it has no tokens; 0 where the call
    /// has none of this name.
    pub fn width(&self, name: &str) -> usize {
        let mut values = self.operands().chain(self.results());
        let value = values.find(|value| value.name == name);
        value.map_or(0, |value| self.shape(&value).row().iter().product())
    }

    /// An operand; None where the call has none of this name.
    pub fn operand(&self, name: &str) -> Option<&'a View<'a>> {
        let at = self.operands().position(|value| value.name == name)?;
        self.args.get(at)
    }

    /// A result; None where the call has none of this name.
    pub fn result(&self, name: &str) -> Option<&'a View<'a>> {
        let at = self.results().position(|value| value.name == name)?;
        self.rets.get(at)
    }

    /// Address of an operand, 0 where the call has none of this name: what a kernel gets as its argument.
    pub fn operand_address(&self, name: &str) -> u64 {
        self.operand(name).map_or(0, |view| view.data as u64)
    }

    /// Address of a result, 0 where the call has none of this name.
    pub fn result_address(&self, name: &str) -> u64 {
        self.result(name).map_or(0, |view| view.data as u64)
    }

    /// Address of the workspace and its number of floats, where the call has one.
    pub fn workspace(&self) -> Option<(u64, usize)> {
        let view = self.rets.get(self.results().count())?;
        Some((view.data as u64, view.num_elements()?))
    }
}

const SOUND: &str = "aligned memory of a possible size";

/// Whether memory of the view's address, dtype and dimensions is possible.
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

//! Valid frames: any call of the table, in any size that is quick.

use fastrand::Rng;

use crate::call::dtype;
use crate::frame::{Attr, Attribute, Buffer, Frame, Place, Schedule, Style, When};
use crate::library::{Op, Precision, Setting, Value};
use crate::memory::SLOT_BYTES;
use crate::rules;

/// A random item of the list.
pub fn pick<T: Copy>(rng: &mut Rng, items: &[T]) -> T {
    items[rng.usize(..items.len())]
}

/// True in so many of a hundred cases.
pub fn percent(rng: &mut Rng, chance: u32) -> bool {
    rng.u32(..100) < chance
}

/// The sizes of a call, as the letters of the table.
struct Sizes {
    tokens: Vec<i64>,
    n: i64,
    c: i64,
    k: i64,
    gates: i64,
    streams_dtype: i32,
}

impl Sizes {
    fn dim(&self, letter: &str) -> i64 {
        match letter {
            "n" => self.n,
            "C" => self.c,
            "K" => self.k,
            "A" => self.gates,
            "1" => 1,
            other => panic!("the table of calls has a dimension {other}, which is not made here"),
        }
    }

    fn buffer(&self, value: &Value, rng: &mut Rng) -> Buffer {
        let dtype = match (value.precision, self.streams_dtype) {
            (Precision::Streams, streams) => streams,
            (Precision::Accumulation, dtype::F64) => dtype::F64,
            (Precision::Accumulation, _) => dtype::F32,
        };
        let lead = if value.has_tokens {
            &self.tokens[..]
        } else {
            &[]
        };
        let mut dims = Vec::with_capacity(lead.len() + value.dims.len());
        dims.extend_from_slice(lead);
        dims.extend(value.dims.iter().map(|letter| self.dim(letter)));
        let is_empty = dims.contains(&0);
        let mut buffer = Buffer::new(&value.name, dtype, dims, percent(rng, 75));
        // Where there are no elements, there need not be memory.
        if is_empty && percent(rng, 70) {
            buffer.place = Place::Nowhere(pick(rng, &[0, 1, 64, usize::MAX]));
        }
        buffer
    }
}

/// A valid frame.
pub fn frame(ops: &[Op], rng: &mut Rng) -> Frame {
    let index = rng.usize(..ops.len());
    let op = &ops[index];
    let (n, constraint) = streams_and_constraint(op, rng);
    let attributes = attributes(op, constraint, rng);
    let iters = attributes
        .iter()
        .find_map(|attribute| match attribute.value {
            Attr::Int(iters) if attribute.name == "sinkhorn_iters" => Some(iters),
            _ => None,
        });
    let sizes = sizes(op, n, constraint, iters.unwrap_or(0), rng);
    let mut args = Vec::with_capacity(op.operands.len() + 2);
    let operands = op.operands_with(&attributes).into_iter();
    args.extend(operands.map(|value| sizes.buffer(value, rng)));
    let mut rets = Vec::with_capacity(op.results.len() + 2);
    let results = op.results_with(&attributes).into_iter();
    rets.extend(results.map(|value| sizes.buffer(value, rng)));
    if percent(rng, 5) {
        let dims = vec![rng.i64(0..9)];
        rets.push(Buffer::new("workspace", dtype::F32, dims, true));
    }
    if op.adds_in_place && percent(rng, 60) {
        share_sum(&mut args, &mut rets);
    }
    Frame {
        op: index,
        args,
        rets,
        attributes,
        style: match rng.u32(..40) {
            0 => Style::Large,
            1 => Style::Subnormal,
            2 => Style::Zero,
            3 | 4 => Style::WithNan,
            5 | 6 => Style::WithInf,
            _ => Style::Ordinary,
        },
        schedule: schedule(rng),
        changes: Vec::new(),
    }
}

/// Lays the first result where the last operand lies.
pub fn share_sum(args: &mut [Buffer], rets: &mut [Buffer]) {
    let last = args.len() - 1;
    if let Place::Own { .. } = args[last].place {
        rets[0].place = Place::Operand {
            index: last,
            offset: 0,
        };
    } else {
        rets[0].place = args[last].place;
    }
}

/// A pool, mostly one without threads of its own, which is faster by far.
fn schedule(rng: &mut Rng) -> Schedule {
    let when = match rng.u32(..100) {
        0..4 => When::Concurrently,
        4..16 => When::Afterwards,
        _ => When::AtOnce,
    };
    let num_threads = pick(rng, &[0, 1, 2, 3, 4, 16]);
    Schedule { num_threads, when }
}

/// Another schedule that results must not depend on.
pub fn other_schedule(rng: &mut Rng) -> Schedule {
    let when = match rng.u32(..10) {
        0..3 => When::Concurrently,
        3..6 => When::Afterwards,
        _ => When::AtOnce,
    };
    Schedule {
        num_threads: rng.i64(1..9),
        when,
    }
}

fn streams_and_constraint<'a>(op: &'a Op, rng: &mut Rng) -> (i64, Option<&'a str>) {
    let mut n = match percent(rng, 70) {
        true => pick(rng, &[1, 2, 3, 4, 8]),
        false => rng.i64(1..=16),
    };
    let choices = op
        .attributes
        .iter()
        .find_map(|attribute| match &attribute.setting {
            Setting::String { choices } if attribute.name == "constraint" => Some(choices),
            _ => None,
        });
    let constraint = choices.map(|choices| match percent(rng, 50) {
        true => choices[0].as_str(),
        false => choices[rng.usize(..choices.len())].as_str(),
    });
    if !op.is_head() {
        let (max_streams, _) = rules::constraint(constraint.unwrap_or_default().as_bytes(), n);
        n = (n - 1) % max_streams + 1;
    }
    (n, constraint)
}

fn sizes(op: &Op, n: i64, constraint: Option<&str>, iters: i64, rng: &mut Rng) -> Sizes {
    let (_, num_res) = rules::constraint(constraint.unwrap_or_default().as_bytes(), n);
    let k = if op.is_head() { n } else { 2 * n + num_res };
    let mut c = match rng.u32(..100) {
        0..10 => rng.i64(1..=100),
        _ => rng.i64(1..=40),
    };
    let mut tokens: Vec<i64> = match rng.u32(..100) {
        // Enough for several chunks of work.
        0..15 => vec![rng.i64(1..=300)],
        15..18 => vec![3, rng.i64(1..=100)],
        _ => (0..rng.usize(..4)).map(|_| rng.i64(1..=5)).collect(),
    };
    if let [first, ..] = tokens.as_mut_slice()
        && percent(rng, 6)
    {
        *first = 0;
    }
    if op.takes_logits() {
        c = n;
    }
    let columns = if op.takes("phi") { k } else { 0 };
    let budget = pick(
        rng,
        &[8_000, 8_000, 8_000, 8_000, 8_000, 60_000, 60_000, 400_000],
    );
    loop {
        let num_tokens: i64 = tokens.iter().product();
        let work = num_tokens * (n * c * (columns + 4) + n * n * iters) + n * c * columns;
        let elements = (n * c).max(n * n).max(k) * num_tokens;
        if work <= budget && elements.max(n * c * columns) * 8 <= SLOT_BYTES as i64 {
            break;
        }
        if c > num_tokens && !op.takes_logits() {
            c = (c / 2).max(1);
        } else if let Some(longest) = tokens.iter_mut().max().filter(|longest| **longest > 1) {
            *longest /= 2;
        } else if c > 1 && !op.takes_logits() {
            c /= 2;
        } else {
            break;
        }
    }
    let dtypes: &[i32] = match op.takes_logits() {
        true => &[dtype::F32, dtype::F32, dtype::F64],
        false => &[dtype::F32, dtype::BF16, dtype::F16, dtype::F64],
    };
    Sizes {
        tokens,
        n,
        c,
        k,
        gates: match k - 2 * n {
            _ if op.is_head() => 1,
            0 => 2,
            _ => 3,
        },
        streams_dtype: pick(rng, dtypes),
    }
}

/// The attributes, sorted by name as XLA does.
fn attributes(op: &Op, constraint: Option<&str>, rng: &mut Rng) -> Vec<Attribute> {
    let mut attributes = Vec::with_capacity(op.attributes.len() + 2);
    // Weights of u that are given, or a norm, or neither.
    let refused = pick(rng, &["norm", "given"]);
    for attribute in &op.attributes {
        let value = match (&attribute.setting, attribute.name.as_str()) {
            (_, "constraint") => Attr::Text(constraint.unwrap_or_default().into()),
            (Setting::String { choices }, _) => {
                Attr::Text(choices[rng.usize(..choices.len())].as_bytes().into())
            }
            (Setting::Int64 { max }, "sinkhorn_iters") => Attr::Int(match rng.u32(..200) {
                0 => rng.i64(max - 1..=*max),
                1..5 => rng.i64(24..=200),
                _ => rng.i64(0..24),
            }),
            (Setting::Int64 { .. }, "dynamic") => Attr::Int(i64::from(percent(rng, 75))),
            (_, name) if name == refused && op.takes("h_given") => Attr::Int(0),
            (Setting::Int64 { max }, _) => Attr::Int(rng.i64(0..=*max)),
            (Setting::Float64, _) => {
                Attr::Float(pick(rng, &[0.0, 1e-8, 1e-6, 1e-6, 1e-3, 0.5, 1.0, 2.0]))
            }
        };
        attributes.push(Attribute {
            name: attribute.name.clone(),
            value,
        });
    }
    attributes.sort_by(|a, b| a.name.cmp(&b.name));
    attributes
}

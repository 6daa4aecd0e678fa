//! The judge: whether a frame is one that the library has to answer, by rules of its own.
//!
//! The judge knows the table of calls and shares no code with the library's own checks.

use std::ops::Range;

use crate::call::{BUFFER, dtype};
use crate::frame::{Attr, Buffer, Frame};
use crate::library::{Op, Precision, Setting, Value};

/// The outcome that a frame has to have.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// An answer.
    Valid,
    /// A refusal, by this rule.
    Refused(&'static str),
    /// An answer or a refusal, for this reason.
    Either(&'static str),
}

/// The most streams.
const MAX_STREAMS: i64 = 16;

/// The most streams, and the columns of phi for H_res of n streams, by the word of a constraint.
pub fn constraint(word: &[u8], n: i64) -> (i64, i64) {
    match word {
        // A call without settings has no word.
        b"birkhoff" | b"none" | b"" => (MAX_STREAMS, n * n),
        b"identity" => (MAX_STREAMS, 0),
        b"permutations" => (4, (1..=n).product()),
        other => panic!(
            "the table of calls has a constraint {:?}, which has no rule here",
            String::from_utf8_lossy(other)
        ),
    }
}

/// Judges a frame whose buffers lie at these addresses.
pub fn judge(op: &Op, frame: &Frame, args: &[usize], rets: &[usize]) -> Verdict {
    let mut either = None;
    let refused = attributes(op, frame)
        .and_then(|()| buffers(op, frame))
        .and_then(|()| sizes(frame, &mut either))
        .and_then(|()| memory(frame, args, rets))
        .and_then(|()| overlap(op, frame, args, rets));
    match (refused, either) {
        (Err(rule), _) => Verdict::Refused(rule),
        (Ok(()), Some(reason)) => Verdict::Either(reason),
        (Ok(()), None) => Verdict::Valid,
    }
}

/// Checks that every attribute of the table is there, and no other; numbers in their range, as the streams' kernels
/// see them.
fn attributes(op: &Op, frame: &Frame) -> Result<(), &'static str> {
    let largest = match frame.args.first() {
        Some(streams) if streams.dtype == dtype::F64 => f64::MAX,
        _ => f64::from(f32::MAX),
    };
    if frame.attributes.len() != op.attributes.len() {
        return Err("number of attributes");
    }
    for attribute in &op.attributes {
        let mut found = (frame.attributes.iter()).filter(|other| other.name == attribute.name);
        let (Some(given), None) = (found.next(), found.next()) else {
            return Err("names of attributes");
        };
        match (&attribute.setting, &given.value) {
            (Setting::String { choices }, Attr::Text(text)) => {
                if !choices.iter().any(|choice| choice.as_bytes() == text) {
                    return Err("words of attributes");
                }
            }
            (Setting::Int64 { max }, Attr::Int(number)) => {
                if !(0..=*max).contains(number) {
                    return Err("range of attributes");
                }
            }
            (Setting::Float64, Attr::Float(number)) => {
                // NaN is in no range.
                if !(0.0..=largest).contains(number) {
                    return Err("range of attributes");
                }
            }
            _ => return Err("types of attributes"),
        }
    }
    let is_one = |name| {
        let mut all = frame.attributes.iter();
        all.any(|attribute| attribute.name == name && matches!(attribute.value, Attr::Int(1)))
    };
    if is_one("norm") && is_one("given") {
        return Err("a norm, or given weights");
    }
    Ok(())
}

fn word<'a>(frame: &'a Frame, name: &str) -> &'a [u8] {
    let found = (frame.attributes.iter()).find(|attribute| attribute.name == name);
    match found.map(|attribute| &attribute.value) {
        Some(Attr::Text(text)) => text,
        _ => b"",
    }
}

/// The sizes of a call, as the letters of the table.
struct Sizes<'a> {
    streams_dtype: i32,
    tokens: &'a [i64],
    n: i64,
    c: i64,
    k: i64,
    gates: i64,
}

impl Sizes<'_> {
    fn dim(&self, letter: &str) -> i64 {
        match letter {
            "n" => self.n,
            "C" => self.c,
            "K" => self.k,
            "A" => self.gates,
            "1" => 1,
            other => panic!("the table of calls has a dimension {other}, which has no rule here"),
        }
    }

    fn fits(&self, value: &Value, buffer: &Buffer) -> Result<(), &'static str> {
        let expected = match (value.precision, self.streams_dtype) {
            (Precision::Streams, streams) => streams,
            (Precision::Accumulation, dtype::F64) => dtype::F64,
            (Precision::Accumulation, _) => dtype::F32,
        };
        if buffer.dtype != expected {
            return Err("dtypes");
        }
        let lead = if value.has_tokens { self.tokens } else { &[] };
        let row = value.dims.iter().map(|letter| self.dim(letter));
        if !lead
            .iter()
            .copied()
            .chain(row)
            .eq(buffer.dims.iter().copied())
        {
            return Err("dimensions");
        }
        Ok(())
    }
}

/// Operands and results by the table of calls; as many as it says, and a workspace.
fn buffers(op: &Op, frame: &Frame) -> Result<(), &'static str> {
    let Frame { args, rets, .. } = frame;
    let operands = op.operands_with(&frame.attributes);
    let results = op.results_with(&frame.attributes);
    let workspace = rets.len() == results.len() + 1;
    if args.len() != operands.len() || !(rets.len() == results.len() || workspace) {
        return Err("number of operands and results");
    }
    if args.iter().chain(rets).any(|buffer| buffer.kind != BUFFER) {
        return Err("kinds of operands and results");
    }
    let [tokens @ .., n, c] = args[0].dims.as_slice() else {
        return Err("dimensions");
    };
    let (n, c) = (*n, *c);
    let streams_dtype = args[0].dtype;
    let supported: &[i32] = match op.takes_logits() {
        true => &[dtype::F32, dtype::F64],
        false => &[dtype::F32, dtype::F64, dtype::BF16, dtype::F16],
    };
    if !supported.contains(&streams_dtype) {
        return Err("dtypes");
    }
    if !(1..=MAX_STREAMS).contains(&n) || c < 1 {
        return Err("dimensions");
    }
    let (max_streams, num_res) = constraint(word(frame, "constraint"), n);
    if n > max_streams && !op.is_head() {
        return Err("streams of the constraint");
    }
    let k = if op.is_head() { n } else { 2 * n + num_res };
    let sizes = Sizes {
        streams_dtype,
        tokens,
        n,
        c,
        k,
        gates: match num_res {
            _ if op.is_head() => 1,
            0 => 2,
            _ => 3,
        },
    };
    let pairs = (operands.into_iter().zip(args)).chain(results.into_iter().zip(rets));
    for (value, buffer) in pairs {
        sizes.fits(value, buffer)?;
    }
    let fits = |buffer: &Buffer| buffer.dtype == dtype::F32 && buffer.dims.len() == 1;
    if workspace && !rets.last().is_some_and(fits) {
        return Err("the workspace");
    }
    Ok(())
}

/// No dimension is negative, and an address can count the bytes.
fn sizes(frame: &Frame, either: &mut Option<&'static str>) -> Result<(), &'static str> {
    for buffer in frame.args.iter().chain(&frame.rets) {
        if buffer.dims.iter().any(|dim| *dim < 0) {
            return Err("dimensions");
        }
        let full: Vec<i64> = buffer.dims.iter().copied().filter(|dim| *dim > 0).collect();
        let is_empty = full.len() < buffer.dims.len();
        let full = Buffer {
            dims: full,
            ..buffer.clone()
        };
        match (full.num_bytes(), is_empty) {
            (Some(_), _) => {}
            (None, false) => return Err("size of memory"),
            (None, true) => *either = Some("empty, and too large without its zero"),
        }
    }
    Ok(())
}

/// The rule that elements have memory, aligned for them.
fn memory(frame: &Frame, args: &[usize], rets: &[usize]) -> Result<(), &'static str> {
    let buffers = frame.args.iter().chain(&frame.rets);
    for (buffer, address) in buffers.zip(args.iter().chain(rets)) {
        if buffer.dims.contains(&0) {
            continue;
        }
        if *address == 0 {
            return Err("memory that is there");
        }
        if address % dtype::num_bytes(buffer.dtype) != 0 {
            return Err("alignment");
        }
    }
    Ok(())
}

/// No result shares memory with anything, but for the sum in place.
fn overlap(op: &Op, frame: &Frame, args: &[usize], rets: &[usize]) -> Result<(), &'static str> {
    let ranges = |buffers: &[Buffer], addresses: &[usize]| -> Vec<Range<usize>> {
        let range = |(buffer, address): (&Buffer, &usize)| {
            *address..address.saturating_add(buffer.num_bytes().unwrap_or(0))
        };
        buffers.iter().zip(addresses).map(range).collect()
    };
    let shared = |a: &Range<usize>, b: &Range<usize>| a.start.max(b.start) < a.end.min(b.end);
    let (args, rets) = (ranges(&frame.args, args), ranges(&frame.rets, rets));
    for (at, ret) in rets.iter().enumerate() {
        for (operand, arg) in args.iter().enumerate() {
            let is_sum = op.adds_in_place && at == 0 && operand + 1 == args.len() && ret == arg;
            if shared(ret, arg) && !is_sum {
                return Err("memory of its own");
            }
        }
        if rets[..at].iter().any(|other| shared(ret, other)) {
            return Err("memory of its own");
        }
    }
    Ok(())
}

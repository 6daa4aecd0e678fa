//! Changes of a valid frame, most of which make it one that the library has to refuse.

use fastrand::Rng;

use crate::call::{attribute, dtype};
use crate::frame::{Attr, Attribute, Buffer, Frame, Place};
use crate::generate::{percent, pick};
use crate::library::{Op, Setting};

/// A change; where a frame has nothing that it applies to, it leaves the frame alone.
type Change = fn(&mut Frame, &Op, &mut Rng);

const CHANGES: &[(&str, Change)] = &[
    ("dtype", set_dtype),
    ("dimension", set_dimension),
    ("dimension", set_dimension),
    ("rank", set_rank),
    ("order", swap),
    ("missing buffer", remove),
    ("more buffers", duplicate),
    ("shared memory", share_operand),
    ("shared results", share_result),
    ("no memory", remove_memory),
    ("alignment", shift),
    ("kind", set_kind),
    ("tokens beyond counting", set_huge_tokens),
    ("no tokens beyond counting", set_huge_and_empty),
    ("missing attribute", remove_attribute),
    ("more attributes", add_attribute),
    ("attribute's value", set_attribute),
    ("attribute's value", set_attribute),
    ("attribute's type", retype_attribute),
    ("attribute's name", rename_attribute),
];

/// Makes one to three changes.
pub fn change(frame: &mut Frame, op: &Op, rng: &mut Rng) {
    for _ in 0..pick(rng, &[1, 1, 1, 2, 3]) {
        let (name, apply) = CHANGES[rng.usize(..CHANGES.len())];
        frame.changes.push(name);
        apply(frame, op, rng);
    }
    frame.attributes.sort_by(|a, b| a.name.cmp(&b.name));
}

/// Operands or results, operands more often.
fn buffers<'a>(frame: &'a mut Frame, rng: &mut Rng) -> &'a mut Vec<Buffer> {
    if percent(rng, 60) {
        &mut frame.args
    } else {
        &mut frame.rets
    }
}

fn buffer<'a>(frame: &'a mut Frame, rng: &mut Rng) -> Option<&'a mut Buffer> {
    let buffers = buffers(frame, rng);
    let at = rng.usize(..buffers.len().max(1));
    buffers.get_mut(at)
}

fn set_dtype(frame: &mut Frame, _: &Op, rng: &mut Rng) {
    let dtype = match percent(rng, 50) {
        true => pick(rng, &[dtype::F32, dtype::F64, dtype::BF16, dtype::F16]),
        false => unknown_dtype(rng),
    };
    if let Some(buffer) = buffer(frame, rng) {
        buffer.dtype = dtype;
    }
}

/// Any number of a type, also of those that no version knows.
fn unknown_dtype(rng: &mut Rng) -> i32 {
    match percent(rng, 60) {
        true => rng.i32(0..=dtype::LAST),
        false => pick(
            rng,
            &[
                dtype::LAST + 1,
                35,
                36,
                99,
                127,
                4096,
                -1,
                i32::MIN,
                i32::MAX,
            ],
        ),
    }
}

fn set_dimension(frame: &mut Frame, _: &Op, rng: &mut Rng) {
    let step = pick(rng, &[-1, 1]);
    let number = pick(rng, HUGE);
    let is_step = percent(rng, 60);
    let at = rng.usize(..8);
    if let Some(Buffer { dims, .. }) = buffer(frame, rng)
        && !dims.is_empty()
    {
        let at = at % dims.len();
        dims[at] = if is_step {
            dims[at].wrapping_add(step)
        } else {
            number
        };
    }
}

/// Dimensions at the edges of what 32 and 64 bits count, with and without elements of several bytes.
const HUGE: &[i64] = &[
    0,
    -1,
    -2,
    i64::MIN,
    i64::MAX,
    1 << 31,
    1 << 32,
    1 << 33,
    1 << 40,
    1 << 59,
    1 << 60,
    1 << 61,
    1 << 62,
    i64::MAX - 1,
    i64::MAX / 2 + 1,
    i64::MAX / 4 + 1,
    i64::MAX / 8 + 1,
];

fn set_rank(frame: &mut Frame, _: &Op, rng: &mut Rng) {
    let (grows, dim, at) = (percent(rng, 50), rng.i64(0..4), rng.usize(..8));
    if let Some(Buffer { dims, .. }) = buffer(frame, rng) {
        if grows {
            dims.insert(at % (dims.len() + 1), dim);
        } else if !dims.is_empty() {
            dims.remove(at % dims.len());
        }
    }
}

fn swap(frame: &mut Frame, _: &Op, rng: &mut Rng) {
    let (a, b) = (rng.usize(..64), rng.usize(..64));
    let buffers = buffers(frame, rng);
    if !buffers.is_empty() {
        let len = buffers.len();
        buffers.swap(a % len, b % len);
    }
}

fn remove(frame: &mut Frame, _: &Op, rng: &mut Rng) {
    let at = rng.usize(..64);
    let buffers = buffers(frame, rng);
    if !buffers.is_empty() {
        buffers.remove(at % buffers.len());
    }
}

fn duplicate(frame: &mut Frame, _: &Op, rng: &mut Rng) {
    let at = rng.usize(..64);
    let buffers = buffers(frame, rng);
    if !buffers.is_empty() {
        let mut copy = buffers[at % buffers.len()].clone();
        copy.place = Place::Own {
            at_end: true,
            shift: 0,
        };
        buffers.push(copy);
    }
}

/// A result in the memory of an operand, in the same place or a little further.
fn share_operand(frame: &mut Frame, _: &Op, rng: &mut Rng) {
    let (index, at) = (rng.usize(..64), rng.usize(..64));
    let offset = if percent(rng, 60) {
        0
    } else {
        8 * rng.usize(..8)
    };
    let Frame { args, rets, .. } = frame;
    if args.is_empty() || rets.is_empty() {
        return;
    }
    let (index, at) = (index % args.len(), at % rets.len());
    // It has to fit, or the judge would have to tell which bytes are there.
    let fits = match (args[index].num_bytes(), rets[at].num_bytes()) {
        (Some(operand), Some(result)) => result.saturating_add(offset) <= operand,
        _ => false,
    };
    if fits && matches!(args[index].place, Place::Own { .. }) {
        rets[at].place = Place::Operand { index, offset };
    }
}

/// A result in the memory of the one after it.
fn share_result(frame: &mut Frame, _: &Op, rng: &mut Rng) {
    let at = rng.usize(..64);
    let rets = &mut frame.rets;
    if rets.len() < 2 {
        return;
    }
    let at = at % (rets.len() - 1);
    let fits = match (rets[at].num_bytes(), rets[at + 1].num_bytes()) {
        (Some(first), Some(second)) => first <= second,
        _ => false,
    };
    if fits && matches!(rets[at + 1].place, Place::Own { .. }) {
        rets[at].place = Place::Result { index: at + 1 };
    }
}

fn remove_memory(frame: &mut Frame, _: &Op, rng: &mut Rng) {
    if let Some(buffer) = buffer(frame, rng) {
        buffer.place = Place::Nowhere(0);
    }
}

fn shift(frame: &mut Frame, _: &Op, rng: &mut Rng) {
    let by = rng.usize(1..8);
    if let Some(Buffer {
        place: Place::Own { shift, .. },
        ..
    }) = buffer(frame, rng)
    {
        *shift = by;
    }
}

fn set_kind(frame: &mut Frame, _: &Op, rng: &mut Rng) {
    let kind = pick(rng, &[0, 2, 3, 7, 100, -1, i32::MAX]);
    if let Some(buffer) = buffer(frame, rng) {
        buffer.kind = kind;
    }
}

/// Equally many tokens everywhere, so that all dimensions agree.
fn set_huge_tokens(frame: &mut Frame, op: &Op, rng: &mut Rng) {
    let lead = match percent(rng, 50) {
        true => vec![pick(rng, HUGE).max(2)],
        false => vec![pick(rng, HUGE).max(2), pick(rng, HUGE).max(2)],
    };
    set_tokens(frame, op, &lead);
}

/// No tokens, in dimensions whose product without the zero nobody can count.
fn set_huge_and_empty(frame: &mut Frame, op: &Op, rng: &mut Rng) {
    let mut lead = vec![0, pick(rng, HUGE).max(1), pick(rng, HUGE).max(1)];
    lead.truncate(rng.usize(2..4));
    let len = lead.len();
    lead.swap(0, rng.usize(..len));
    set_tokens(frame, op, &lead);
}

fn set_tokens(frame: &mut Frame, op: &Op, lead: &[i64]) {
    let Some(first) = op.operands.first().zip(frame.args.first()) else {
        return;
    };
    let old = first.1.dims.len().saturating_sub(first.0.dims.len());
    let operands = op.operands_with(&frame.attributes).into_iter();
    let results = op.results_with(&frame.attributes).into_iter();
    let values = operands
        .zip(&mut frame.args)
        .chain(results.zip(&mut frame.rets));
    for (value, buffer) in values {
        if value.has_tokens && buffer.dims.len() >= old {
            buffer.dims.splice(..old, lead.iter().copied());
        }
    }
}

fn attribute<'a>(frame: &'a mut Frame, rng: &mut Rng) -> Option<&'a mut Attribute> {
    let at = rng.usize(..frame.attributes.len().max(1));
    frame.attributes.get_mut(at)
}

fn remove_attribute(frame: &mut Frame, _: &Op, rng: &mut Rng) {
    if !frame.attributes.is_empty() {
        frame.attributes.remove(rng.usize(..frame.attributes.len()));
    }
}

fn add_attribute(frame: &mut Frame, _: &Op, rng: &mut Rng) {
    let name = match attribute(frame, rng) {
        Some(attribute) if percent(rng, 50) => attribute.name.clone(),
        _ => pick(
            rng,
            &[
                "gain",
                "",
                "Constraint",
                "norm",
                "given",
                "norm_scale_eps",
                "deferred",
            ],
        )
        .into(),
    };
    let value = any_value(rng);
    frame.attributes.push(Attribute { name, value });
}

fn rename_attribute(frame: &mut Frame, _: &Op, rng: &mut Rng) {
    if let Some(attribute) = attribute(frame, rng) {
        attribute.name.push('s');
    }
}

/// Another value of the same type, possible or not.
fn set_attribute(frame: &mut Frame, op: &Op, rng: &mut Rng) {
    let (word, number, float) = (any_word(rng), pick(rng, INTEGERS), pick(rng, FLOATS));
    let Some(attribute) = attribute(frame, rng) else {
        return;
    };
    let row = op.attributes.iter().find(|row| row.name == attribute.name);
    attribute.value = match row.map(|row| &row.setting) {
        Some(Setting::String { .. }) => Attr::Text(word),
        Some(Setting::Int64 { max }) => Attr::Int(if number == 2 { max + 1 } else { number }),
        Some(Setting::Float64) => Attr::Float(float),
        None => return,
    };
}

const INTEGERS: &[i64] = &[0, 1, 2, -1, 1 << 31, 1 << 40, i64::MIN, i64::MAX];

const FLOATS: &[f64] = &[
    f64::NAN,
    -f64::NAN,
    f64::INFINITY,
    f64::NEG_INFINITY,
    f64::MAX,
    f64::MIN,
    -1e-6,
    -1.0,
    -0.0,
    0.0,
    5e-324,
    1e-40,
    1e30,
    3.5e38,
];

fn any_word(rng: &mut Rng) -> Vec<u8> {
    match rng.u32(..40) {
        0 => vec![b'q'; 1 << 20],
        1..4 => vec![b'q'; 5000],
        _ => {
            let words: &[&[u8]] = &[
                b"",
                b"birkhof",
                b"Birkhoff",
                b"birkhoff\0",
                b"add ",
                b"\xff\xfe\x80",
                b"none",
                b"add",
                b"row_column",
                b"inside",
                b"{}",
                b"%s%n",
            ];
            pick(rng, words).into()
        }
    }
}

fn retype_attribute(frame: &mut Frame, _: &Op, rng: &mut Rng) {
    let value = any_value(rng);
    if let Some(attribute) = attribute(frame, rng) {
        attribute.value = value;
    }
}

fn any_value(rng: &mut Rng) -> Attr {
    match rng.u32(..8) {
        0 => Attr::Float(pick(rng, FLOATS)),
        1 => Attr::Int(pick(rng, INTEGERS)),
        2 => Attr::Text(any_word(rng)),
        3 => Attr::Array(unknown_dtype(rng), [1, 2]),
        4 => Attr::Kind(attribute::DICTIONARY),
        5 => Attr::Kind(pick(rng, &[0, 5, 6, 77, -1, i32::MAX])),
        _ => match (unknown_dtype(rng), rng.u64(..)) {
            (dtype::F64, bits) => Attr::Float(f64::from_bits(bits)),
            (dtype::S64, bits) => Attr::Int(bits as i64),
            (dtype, bits) => Attr::Scalar(dtype, bits),
        },
    }
}

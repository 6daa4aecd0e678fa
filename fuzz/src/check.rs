//! One frame: laid into memory, called, and checked.

use std::ffi::{CStr, c_void};

use fastrand::Rng;

use crate::call::{
    FrameAttribute, FrameBuffer, FrameCall, INVALID_ARGUMENT, dtype, jax_mhc_call_frame,
};
use crate::change::change;
use crate::frame::{Attr, Buffer, Frame, Place, Schedule, When};
use crate::generate::{self, other_schedule, percent};
use crate::library::Op;
use crate::memory::{NUM_SLOTS, SLOT_BYTES, Slot};
use crate::pool::Pool;
use crate::rules::{Verdict, judge};
use crate::values::{Values, first_unwritten, is_untouched, mark};

/// Bytes beside a result that must stay as they are, on the side without a guard page.
const MARGIN: usize = 64;

/// Room for an error's message; what is longer is cut.
const MESSAGE: usize = 4096;

/// The outcome of a frame.
#[derive(Debug)]
pub enum Outcome {
    /// Nobody called it: it tells of memory that is not there, and nothing in it shows that.
    Skipped,
    /// It was answered, with so many calls.
    Accepted {
        /// Calls of the handler.
        calls: u64,
    },
    /// It was refused.
    Refused {
        /// The rule that it breaks.
        rule: &'static str,
    },
}

/// Something that must not be.
#[derive(Debug)]
pub struct Finding {
    /// What kind of thing: the same for all frames that show it.
    pub kind: String,
    /// What is particular to this frame.
    pub detail: String,
}

/// Everything that frames need, used again for each.
pub struct Checker {
    ops: Vec<Op>,
    slots: Vec<Slot>,
    values: Values,
    pool: Pool,
    message: Box<[std::ffi::c_char; MESSAGE]>,
    kept: Vec<Vec<u8>>,
}

/// A frame with the addresses of its buffers.
struct Placed {
    args: Vec<usize>,
    rets: Vec<usize>,
    /// Whether a buffer is not what it says.
    lies: bool,
}

impl Checker {
    /// # Errors
    /// The system gives no memory.
    pub fn new(ops: Vec<Op>) -> std::io::Result<Self> {
        Ok(Self {
            ops,
            slots: (0..NUM_SLOTS)
                .map(|_| Slot::new())
                .collect::<Result<_, _>>()?,
            values: Values::new(),
            pool: Pool::new(),
            message: Box::new([0; MESSAGE]),
            kept: Vec::new(),
        })
    }

    /// The table of calls.
    pub fn ops(&self) -> &[Op] {
        &self.ops
    }

    /// The frame of a seed.
    pub fn frame(&self, seed: u64) -> Frame {
        let mut rng = Rng::with_seed(seed);
        let mut frame = generate::frame(&self.ops, &mut rng);
        if percent(&mut rng, 60) {
            let op = &self.ops[frame.op];
            change(&mut frame, op, &mut rng);
        }
        frame
    }

    /// Calls a frame and checks what becomes of it.
    ///
    /// # Errors
    /// Something that must not be.
    pub fn check(&mut self, frame: &Frame, seed: u64) -> Result<Outcome, Finding> {
        let placed = self.place(frame);
        let verdict = judge(&self.ops[frame.op], frame, &placed.args, &placed.rets);
        if placed.lies && !matches!(verdict, Verdict::Refused(_)) {
            return Ok(Outcome::Skipped);
        }
        let is_refused = matches!(verdict, Verdict::Refused(_));
        self.fill(frame, &placed, seed, !is_refused);
        let code = self.call(frame, &placed, frame.schedule);
        let checked = match code {
            0 => self.check_accepted(frame, &placed, verdict),
            code => self.check_refused(frame, verdict, code),
        };
        if code == 0 && checked.is_err() {
            self.pool.finish();
            return checked;
        }
        let settled = self.check_afterwards(frame, &placed, code == 0);
        let outcome = checked?;
        settled?;
        if !matches!(outcome, Outcome::Accepted { .. }) {
            return Ok(outcome);
        }
        let mut rng = Rng::with_seed(!seed);
        let mut calls = 1;
        if percent(&mut rng, 20) {
            self.check_again(frame, &placed, seed, &mut rng)?;
            calls += 1;
        }
        Ok(Outcome::Accepted { calls })
    }

    fn place(&self, frame: &Frame) -> Placed {
        let mut placed = Placed {
            args: Vec::new(),
            rets: Vec::new(),
            lies: false,
        };
        let own = |index: usize, buffer: &Buffer, at_end: bool, shift: usize| {
            let num_bytes = buffer.num_bytes().unwrap_or(usize::MAX);
            let offset = Slot::offset(num_bytes.min(SLOT_BYTES), at_end);
            let offset = match at_end && offset > 0 {
                true => offset - shift.min(offset),
                false => offset + shift,
            };
            (index, offset)
        };
        let in_slot = |pointer: *mut u8, offset: usize| pointer.wrapping_add(offset) as usize;
        // An operand whose memory becomes a result has to be at the result's address.
        let is_written = |index: usize| {
            let in_it =
                |ret: &Buffer| matches!(ret.place, Place::Operand { index: at, .. } if at == index);
            frame.rets.iter().any(in_it)
        };
        for (index, buffer) in frame.args.iter().enumerate() {
            placed.lies |= lies(buffer);
            placed.args.push(match buffer.place {
                Place::Own { at_end, shift } => {
                    let (slot, offset) = own(index, buffer, at_end, shift);
                    let slot = &self.slots[slot];
                    in_slot(
                        if is_written(index) {
                            slot.writable
                        } else {
                            slot.read_only
                        },
                        offset,
                    )
                }
                Place::Nowhere(address) => address,
                Place::Operand { .. } | Place::Result { .. } => {
                    unreachable!("operands are no results")
                }
            });
        }
        // Results in the order of their slots; those that lie in others follow.
        for (index, buffer) in frame.rets.iter().enumerate() {
            placed.lies |= lies(buffer);
            placed.rets.push(match buffer.place {
                Place::Own { at_end, shift } => {
                    let (slot, offset) = own(frame.args.len() + index, buffer, at_end, shift);
                    in_slot(self.slots[slot].writable, offset)
                }
                Place::Nowhere(address) => address,
                Place::Operand { index, offset } => {
                    placed.lies |= !fits(buffer, frame.args.get(index), offset);
                    placed.args.get(index).map_or(0, |address| address + offset)
                }
                Place::Result { .. } => 0,
            });
        }
        for (index, buffer) in frame.rets.iter().enumerate() {
            if let Place::Result { index: other } = buffer.place {
                placed.lies |= !fits(buffer, frame.rets.get(other), 0);
                placed.rets[index] = placed.rets.get(other).copied().unwrap_or(0);
            }
        }
        placed
    }

    /// Writes operands, where they will be read, and marks results and what lies beside them.
    fn fill(&mut self, frame: &Frame, placed: &Placed, seed: u64, with_values: bool) {
        for (index, buffer) in frame.rets.iter().enumerate() {
            if let Some((slot, range)) = self.own_memory(frame, placed, index) {
                mark(buffer.dtype, &mut self.slots[slot].bytes()[range.clone()]);
                let margin = margin(&range);
                self.slots[slot].bytes()[margin].fill(0xa5);
            }
        }
        if !with_values {
            return;
        }
        let mut rng = Rng::with_seed(seed.rotate_left(32));
        for (index, buffer) in frame.args.iter().enumerate() {
            let Place::Own { .. } = buffer.place else {
                continue;
            };
            let slot = &mut self.slots[index];
            let first = placed.args[index]
                .wrapping_sub(slot.read_only as usize)
                .min(placed.args[index].wrapping_sub(slot.writable as usize));
            let num_bytes = buffer.num_bytes().unwrap_or(0);
            let memory = &mut slot.bytes()[first..first + num_bytes];
            self.values
                .fill(frame.style, buffer.dtype, memory, &mut rng);
        }
    }

    /// The slot of a result with memory of its own, and the bytes there.
    fn own_memory(
        &self,
        frame: &Frame,
        placed: &Placed,
        index: usize,
    ) -> Option<(usize, std::ops::Range<usize>)> {
        let buffer = &frame.rets[index];
        let Place::Own { .. } = buffer.place else {
            return None;
        };
        let slot = frame.args.len() + index;
        let first = placed.rets[index] - self.slots[slot].writable as usize;
        let num_bytes = buffer.num_bytes().unwrap_or(0);
        Some((slot, first..(first + num_bytes).min(SLOT_BYTES)))
    }

    fn call(&mut self, frame: &Frame, placed: &Placed, schedule: Schedule) -> i32 {
        let buffers = |buffers: &[Buffer], addresses: &[usize]| -> Vec<FrameBuffer> {
            let buffer = |(buffer, address): (&Buffer, &usize)| FrameBuffer {
                kind: buffer.kind,
                dtype: buffer.dtype,
                rank: buffer.dims.len() as i64,
                dims: buffer.dims.as_ptr(),
                data: *address as *mut u8,
            };
            buffers.iter().zip(addresses).map(buffer).collect()
        };
        let attributes: Vec<FrameAttribute> = (frame.attributes.iter())
            .map(|attribute| {
                let (dtype, value, size) = raw(&attribute.value);
                FrameAttribute {
                    name: attribute.name.as_ptr(),
                    name_size: attribute.name.len(),
                    kind: attribute.value.kind(),
                    dtype,
                    value,
                    size,
                }
            })
            .collect();
        let (args, rets) = (
            buffers(&frame.args, &placed.args),
            buffers(&frame.rets, &placed.rets),
        );
        let pool = self.pool.lend(schedule);
        let call = FrameCall {
            handler: self.ops[frame.op].handler,
            args: args.as_ptr(),
            num_args: args.len(),
            rets: rets.as_ptr(),
            num_rets: rets.len(),
            attributes: attributes.as_ptr(),
            num_attributes: attributes.len(),
            pool: &raw const pool,
            message: self.message.as_mut_ptr(),
            message_size: MESSAGE,
        };
        // SAFETY: everything is there until the call returns. That the handler does nothing else with it
        // than it may is what is being checked.
        unsafe { jax_mhc_call_frame(&raw const call) }
    }

    fn check_accepted(
        &mut self,
        frame: &Frame,
        placed: &Placed,
        verdict: Verdict,
    ) -> Result<Outcome, Finding> {
        let op = &self.ops[frame.op];
        if let Verdict::Refused(rule) = verdict {
            let kind = format!("accepted against the rule: {rule}");
            return Err(finding(op, kind, String::new()));
        }
        for (index, buffer) in frame.rets.iter().enumerate() {
            let Some((slot, range)) = self.own_memory(frame, placed, index) else {
                continue;
            };
            let op = &self.ops[frame.op];
            let memory = &self.slots[slot].bytes()[range.clone()];
            if index >= op.results_with(&frame.attributes).len() {
                if !is_untouched(buffer.dtype, memory) {
                    return Err(finding(op, "workspace written".into(), String::new()));
                }
            } else if let Some(element) = first_unwritten(buffer.dtype, memory) {
                let name = &buffer.name;
                let detail = format!("element {element} of {name}");
                return Err(finding(op, format!("{name} not written"), detail));
            }
            if self.slots[slot].bytes()[margin(&range)]
                .iter()
                .any(|byte| *byte != 0xa5)
            {
                let op = &self.ops[frame.op];
                let kind = format!("written beside {}", buffer.name);
                return Err(finding(op, kind, String::new()));
            }
        }
        Ok(Outcome::Accepted { calls: 1 })
    }

    fn check_refused(
        &mut self,
        frame: &Frame,
        verdict: Verdict,
        code: i32,
    ) -> Result<Outcome, Finding> {
        let op = &self.ops[frame.op];
        // SAFETY: it has a final zero, since there was an error.
        let message = unsafe { CStr::from_ptr(self.message.as_ptr()) };
        let message = message.to_string_lossy().into_owned();
        let rule = match verdict {
            Verdict::Valid => return Err(finding(op, "refused, though valid".into(), message)),
            Verdict::Refused(rule) | Verdict::Either(rule) => rule,
        };
        if code != INVALID_ARGUMENT {
            let kind = format!("refused with code {code}, not {INVALID_ARGUMENT}: {rule}");
            return Err(finding(op, kind, message));
        }
        let parts = [&format!("{}: ", op.name), "expected ", "got "];
        if !message.starts_with(parts[0]) || !parts.iter().all(|part| message.contains(part)) {
            let kind = format!("refused without op, expected and got: {rule}");
            return Err(finding(op, kind, message));
        }
        Ok(Outcome::Refused { rule })
    }

    /// Results stay as they are when what is left of a call runs, and are marked where it was refused.
    fn check_afterwards(
        &mut self,
        frame: &Frame,
        placed: &Placed,
        is_accepted: bool,
    ) -> Result<(), Finding> {
        let is_late = is_accepted && frame.schedule.when != When::AtOnce;
        if is_late {
            self.keep(frame, placed);
        }
        self.pool.finish();
        let op = &self.ops[frame.op];
        if is_late && let Some(name) = self.first_difference(frame, placed) {
            return Err(finding(
                op,
                format!("{name} written after the call"),
                String::new(),
            ));
        }
        if is_accepted {
            return Ok(());
        }
        for (index, buffer) in frame.rets.iter().enumerate() {
            let Some((slot, range)) = self.own_memory(frame, placed, index) else {
                continue;
            };
            if !is_untouched(buffer.dtype, &self.slots[slot].bytes()[range]) {
                let op = &self.ops[frame.op];
                let kind = format!("{} written, though refused", buffer.name);
                return Err(finding(op, kind, String::new()));
            }
        }
        Ok(())
    }

    /// The same frame with other threads, and with the first result in memory of its own: the same bits.
    fn check_again(
        &mut self,
        frame: &Frame,
        placed: &Placed,
        seed: u64,
        rng: &mut Rng,
    ) -> Result<(), Finding> {
        self.keep(frame, placed);
        let mut again = frame.clone();
        again.schedule = other_schedule(rng);
        let is_shared = |ret: &Buffer| matches!(ret.place, Place::Operand { .. });
        if again.rets.first().is_some_and(is_shared) && percent(rng, 50) {
            again.rets[0].place = Place::Own {
                at_end: true,
                shift: 0,
            };
        }
        let placed = self.place(&again);
        self.fill(&again, &placed, seed, true);
        let code = self.call(&again, &placed, again.schedule);
        let difference = self.first_difference(&again, &placed);
        self.pool.finish();
        let op = &self.ops[frame.op];
        let detail = format!("{:?} after {:?}", again.schedule, frame.schedule);
        if code != 0 {
            return Err(finding(op, "refused when called again".into(), detail));
        }
        match difference {
            Some(name) => Err(finding(op, format!("other bits of {name}"), detail)),
            None => Ok(()),
        }
    }

    /// The bytes of a result, wherever it lies.
    fn result<'a>(buffer: &Buffer, address: usize) -> &'a [u8] {
        match buffer.num_bytes() {
            None | Some(0) => &[],
            Some(num_bytes) => {
                // SAFETY: an accepted frame's results lie in slots, which stay, and tasks that are late
                // do not write them.
                unsafe { std::slice::from_raw_parts(address as *const u8, num_bytes) }
            }
        }
    }

    fn keep(&mut self, frame: &Frame, placed: &Placed) {
        self.kept.resize_with(frame.rets.len(), Vec::new);
        for (kept, (buffer, address)) in
            (self.kept.iter_mut()).zip(frame.rets.iter().zip(&placed.rets))
        {
            kept.clear();
            kept.extend_from_slice(Self::result(buffer, *address));
        }
    }

    /// The first result that is not as it was kept.
    fn first_difference(&self, frame: &Frame, placed: &Placed) -> Option<String> {
        let results = frame.rets.iter().zip(&placed.rets);
        let mut pairs = self.kept.iter().zip(results);
        let found = pairs
            .find(|(kept, (buffer, address))| kept.as_slice() != Self::result(buffer, **address));
        found.map(|(_, (buffer, _))| buffer.name.clone())
    }
}

fn finding(op: &Op, kind: String, detail: String) -> Finding {
    Finding {
        kind,
        detail: format!("{}: {detail}", op.name),
    }
}

/// Whether a result fits into the memory of another buffer, which must have memory of its own.
fn fits(result: &Buffer, other: Option<&Buffer>, offset: usize) -> bool {
    let bytes = |buffer: &Buffer| buffer.num_bytes();
    let own = other.filter(|other| matches!(other.place, Place::Own { shift: 0, .. }));
    match (bytes(result), own.and_then(bytes)) {
        (Some(0), _) => true,
        (Some(result), Some(other)) => result.saturating_add(offset) <= other,
        _ => false,
    }
}

/// Whether a buffer says that there is more memory than there is, and that it is not null.
fn lies(buffer: &Buffer) -> bool {
    match (buffer.num_bytes(), buffer.place) {
        (Some(0), _) => false,
        (None, _) | (_, Place::Nowhere(1..)) => true,
        (Some(num_bytes), _) => num_bytes + 8 > SLOT_BYTES,
    }
}

/// The bytes beside a result's, in its slot.
fn margin(range: &std::ops::Range<usize>) -> std::ops::Range<usize> {
    match range.end == SLOT_BYTES {
        true => range.start.saturating_sub(MARGIN)..range.start,
        false => range.end..(range.end + MARGIN).min(SLOT_BYTES),
    }
}

/// What an attribute points to: its dtype, the address, and how many there are.
fn raw(value: &Attr) -> (i32, *const c_void, usize) {
    match value {
        Attr::Float(number) => (dtype::F64, (&raw const *number).cast(), 1),
        Attr::Int(number) => (dtype::S64, (&raw const *number).cast(), 1),
        Attr::Text(text) => (0, text.as_ptr().cast(), text.len()),
        Attr::Scalar(dtype, bits) => (*dtype, (&raw const *bits).cast(), 1),
        Attr::Array(dtype, numbers) => (*dtype, numbers.as_ptr().cast(), numbers.len()),
        Attr::Kind(_) => (0, std::ptr::null(), 0),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The table of one call, in the library's words.
    const TABLE: &str = r#"[{
        "name": "collapse_fwd", "adds_in_place": false, "attributes": [],
        "operands": [
            {"name": "x", "precision": "streams", "has_tokens": true, "dims": ["n", "C"]},
            {"name": "h_pre", "precision": "accumulation", "has_tokens": true, "dims": ["n"]}
        ],
        "results": [{"name": "u", "precision": "streams", "has_tokens": true, "dims": ["C"]}]
    }]"#;

    /// A handler that takes every frame and does nothing.
    extern "C" fn take(_: *mut c_void) -> *mut c_void {
        std::ptr::null_mut()
    }

    #[test]
    fn a_handler_that_does_nothing_is_found() {
        let mut ops: Vec<Op> = serde_json::from_str(TABLE).unwrap();
        ops[0].handler = take as *const () as usize;
        let mut checker = Checker::new(ops).unwrap();
        let (mut unwritten, mut against_a_rule, mut passed) = (0, 0, 0);
        for seed in 0..2000 {
            let frame = checker.frame(seed);
            match checker.check(&frame, seed) {
                Err(Finding { kind, .. }) if kind == "u not written" => {
                    unwritten += 1;
                }
                Err(Finding { kind, .. }) => {
                    assert!(kind.starts_with("accepted against the rule"), "{kind}");
                    assert!(!frame.changes.is_empty(), "{frame:?}");
                    against_a_rule += 1;
                }
                // Nothing to write.
                Ok(_) => passed += 1,
            }
        }
        assert!(unwritten > 600 && against_a_rule > 400 && passed < 400);
    }

    #[test]
    fn a_seed_is_a_frame() {
        let ops = || serde_json::from_str(TABLE).unwrap();
        let (one, other) = (Checker::new(ops()).unwrap(), Checker::new(ops()).unwrap());
        for seed in [1, 7, u64::MAX] {
            let frames = [one.frame(seed), other.frame(seed)].map(|frame| format!("{frame:?}"));
            assert_eq!(frames[0], frames[1]);
        }
    }
}

//! The memory of a call on the CPU, as typed slices by the names of operands and results.

use half::{bf16, f16};

use crate::contract::check::CheckedCall;
use crate::contract::view::{DType, View};
use crate::cpu::pages::advise_large;
use crate::cpu::stream::{Rows, RowsMut};

/// A type that a view can have.
pub trait Element: Copy + 'static {
    /// Its name.
    const DTYPE: DType;
}

impl Element for f32 {
    const DTYPE: DType = DType::F32;
}
impl Element for f64 {
    const DTYPE: DType = DType::F64;
}
impl Element for bf16 {
    const DTYPE: DType = DType::Bf16;
}
impl Element for f16 {
    const DTYPE: DType = DType::F16;
}

/// Operands and results of a checked call as slices, by name.
pub struct Memory<'a> {
    call: CheckedCall<'a>,
    taken: Vec<&'static str>,
}

impl<'a> Memory<'a> {
    /// # Safety
    /// Every view of the call is valid for reads (operands) or writes (results) of all its elements for
    /// `'a`, and no result overlaps another view, but where [`Call::adds_in_place`] says so.
    ///
    /// [`Call::adds_in_place`]: crate::Call::adds_in_place
    pub unsafe fn new(call: CheckedCall<'a>) -> Self {
        Self {
            call,
            taken: Vec::with_capacity(call.results().count()),
        }
    }

    /// The call that this is the memory of.
    pub fn call(&self) -> CheckedCall<'a> {
        self.call
    }

    /// An operand; empty where the call has none of this name.
    ///
    /// # Panics
    /// The operand has another type, or it is the one whose memory becomes a result.
    pub fn slice<T: Element>(&self, name: &str) -> &'a [T] {
        let kind = self.call.kind;
        assert!(!(kind.adds_in_place() && kind.last_operand() == name));
        let view = self.call.operand(name);
        let Some((view, len)) = view.and_then(|view| Some((view, len::<T>(view)?))) else {
            return &[];
        };
        // SAFETY: `new` promises that the elements are there, and nobody writes them: the operand is not
        // the one that may share its memory.
        unsafe { std::slice::from_raw_parts(view.data.cast::<T>(), len) }
    }

    /// A result; empty where the call has none of this name. The one that is added to an operand holds that
    /// operand.
    ///
    /// # Panics
    /// The result has another type, or it has been taken.
    pub fn slice_mut<T: Element>(&mut self, name: &'static str) -> &'a mut [T] {
        assert!(!self.taken.contains(&name), "`{name}` is taken");
        self.taken.push(name);
        let view = self.call.result(name);
        let Some((view, len)) = view.and_then(|view| Some((view, len::<T>(view)?))) else {
            return &mut [];
        };
        let kind = self.call.kind;
        if kind.adds_in_place() && kind.first_result() == name {
            let added_to = self.call.operand(kind.last_operand());
            if let Some(from) = added_to.filter(|from| from.data != view.data) {
                // SAFETY: the table gives both the same type and shape, and `new` promises that they
                // overlap in no other way than lying in the same place.
                unsafe {
                    std::ptr::copy_nonoverlapping(from.data, view.data, len * size_of::<T>())
                };
            }
        }
        // SAFETY: `new` promises that the elements are there and in no other view that is handed out;
        // each result is taken once.
        let result = unsafe { std::slice::from_raw_parts_mut(view.data.cast::<T>(), len) };
        advise_large(result);
        result
    }

    /// An operand, a row for each token.
    ///
    /// # Panics
    /// As [`Memory::slice`].
    pub fn rows<T: Element>(&self, name: &str) -> Rows<'a, T> {
        Rows::new(self.slice(name), self.call.width(name))
    }

    /// A result, a row for each token.
    ///
    /// # Panics
    /// As [`Memory::slice_mut`].
    pub fn rows_mut<T: Element>(&mut self, name: &'static str) -> RowsMut<'a, T> {
        RowsMut::new(self.slice_mut(name), self.call.width(name))
    }
}

/// Number of elements of a checked view of this type, if it has any.
fn len<T: Element>(view: &View) -> Option<usize> {
    assert!(view.dtype == T::DTYPE, "a view of {}", view.dtype.name());
    view.num_elements().filter(|len| *len > 0)
}

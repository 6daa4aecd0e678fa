//! Memory that is lent for one call.

use half::{bf16, f16};

use crate::pages::advise_large;
use crate::signature::Call;
use crate::stream::{Rows, RowsMut};

/// Element types.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum DType {
    /// IEEE binary32.
    F32,
    /// IEEE binary64.
    F64,
    /// bfloat16.
    Bf16,
    /// IEEE binary16.
    F16,
}

impl DType {
    /// The name that JAX uses.
    pub const fn name(self) -> &'static str {
        match self {
            DType::F32 => "float32",
            DType::F64 => "float64",
            DType::Bf16 => "bfloat16",
            DType::F16 => "float16",
        }
    }

    /// The name in the symbols of kernels.
    pub const fn short_name(self) -> &'static str {
        match self {
            DType::F32 => "f32",
            DType::F64 => "f64",
            DType::Bf16 => "bf16",
            DType::F16 => "f16",
        }
    }

    /// Size of an element.
    pub const fn num_bytes(self) -> usize {
        match self {
            DType::F64 => 8,
            DType::F32 => 4,
            DType::Bf16 | DType::F16 => 2,
        }
    }
}

/// Memory lent for one call: a dense row-major array.
#[derive(Debug, Clone, Copy)]
pub struct View<'a> {
    /// First element; may be null or dangling where there are no elements.
    pub data: *mut u8,
    /// Sizes, outermost first.
    pub dims: &'a [i64],
    /// Element type.
    pub dtype: DType,
}

impl View<'_> {
    /// Number of elements, where memory can hold as many.
    pub fn num_elements(&self) -> Option<usize> {
        self.num_bytes().map(|bytes| bytes / self.dtype.num_bytes())
    }

    /// Number of bytes, where memory can hold as many: no more than `isize::MAX`, as Rust's slices want.
    /// Nobody else multiplies dimensions.
    pub fn num_bytes(&self) -> Option<usize> {
        let bytes = product(self.dims)?.checked_mul(self.dtype.num_bytes())?;
        isize::try_from(bytes).is_ok().then_some(bytes)
    }
}

/// The product of some dimensions, 0 where any of them is, however large the others are. None where it
/// does not fit or one is negative.
pub fn product(dims: &[i64]) -> Option<usize> {
    let dims = dims.iter().map(|dim| usize::try_from(*dim).ok());
    if dims.clone().any(|dim| dim == Some(0)) && dims.clone().all(|dim| dim.is_some()) {
        return Some(0);
    }
    dims.into_iter()
        .try_fold(1_usize, |product, dim| product.checked_mul(dim?))
}

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

/// The operands and results of a checked call as slices, by their names.
pub struct Memory<'a> {
    call: Call<'a>,
    taken: Vec<&'static str>,
}

impl<'a> Memory<'a> {
    /// # Safety
    /// Every view of the call is valid for reads (operands) or writes (results) of all its elements for
    /// `'a`, and no result overlaps another view, but where [`Op::adds_in_place`] says so.
    ///
    /// [`Op::adds_in_place`]: crate::Op::adds_in_place
    pub unsafe fn new(call: Call<'a>) -> Self {
        Self {
            call,
            taken: Vec::with_capacity(call.op.results().len()),
        }
    }

    /// The call that this is the memory of.
    pub fn call(&self) -> Call<'a> {
        self.call
    }

    /// An operand.
    ///
    /// # Panics
    /// There is no such operand of this type, or it is the one whose memory becomes a result.
    pub fn slice<T: Element>(&self, name: &str) -> &'a [T] {
        let op = self.call.op;
        assert!(!(op.adds_in_place() && op.operands().last() == Some(&name)));
        let view = self.call.operand(name);
        let Some(len) = len::<T>(view) else {
            return &[];
        };
        // SAFETY: `new` promises that the elements are there, and nobody writes them: the operand is not
        // the one that may share its memory.
        unsafe { std::slice::from_raw_parts(view.data.cast::<T>(), len) }
    }

    /// A result. The one that is added to an operand holds that operand.
    ///
    /// # Panics
    /// There is no such result of this type, or it has been taken.
    pub fn slice_mut<T: Element>(&mut self, name: &'static str) -> &'a mut [T] {
        assert!(!self.taken.contains(&name), "`{name}` is taken");
        self.taken.push(name);
        let view = self.call.result(name);
        let Some(len) = len::<T>(view) else {
            return &mut [];
        };
        let op = self.call.op;
        if op.adds_in_place() && op.results().first() == Some(&name) {
            let added_to = op.operands().last().map(|name| self.call.operand(name));
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

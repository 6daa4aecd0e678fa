//! Memory that is lent for one call.

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
    /// Every dtype that streams can have.
    pub const ALL: [DType; 4] = [DType::F32, DType::Bf16, DType::F16, DType::F64];

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

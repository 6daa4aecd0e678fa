//! Element types of the streams, and rows of tokens.

use half::{bf16, f16};

use crate::cpu::memory::Element;
use crate::cpu::simd::{Isa, MAX_LANES, Real, Vector, VectorF32};

/// The vector in which a stream of type `S` is computed.
pub type Acc<S, I> = <<S as Stream>::Real as Real>::Vector<I>;

/// Element type of a stream: read and written in its own type, computed in [`Stream::Real`].
pub trait Stream: Element + Default + Send + Sync {
    /// Accumulation type: float32, or float64 for float64 streams.
    type Real: Real + Stream<Real = Self::Real>;

    /// Rounds one value.
    #[cfg(test)]
    fn from_real(value: Self::Real) -> Self;
    /// Exact.
    #[cfg(test)]
    fn to_real(self) -> Self::Real;

    /// Exactly `LANES` elements or more.
    fn load_full<I: Isa>(from: &[Self]) -> Acc<Self, I>;
    /// Exactly `LANES` elements or more.
    fn store_full<I: Isa>(value: Acc<Self, I>, to: &mut [Self]);

    /// A whole block where `WHOLE`; otherwise as much as there is, and zeros behind it.
    #[inline(always)]
    fn load<I: Isa, const WHOLE: bool>(from: &[Self]) -> Acc<Self, I> {
        if WHOLE {
            return Self::load_full::<I>(from);
        }
        let mut padded = [Self::default(); MAX_LANES];
        padded[..from.len()].copy_from_slice(from);
        Self::load_full::<I>(&padded)
    }

    /// Rounds once and writes a whole block where `WHOLE`; otherwise as much as there is room for.
    #[inline(always)]
    fn store<I: Isa, const WHOLE: bool>(value: Acc<Self, I>, to: &mut [Self]) {
        if WHOLE {
            return Self::store_full::<I>(value, to);
        }
        let mut padded = [Self::default(); MAX_LANES];
        Self::store_full::<I>(value, &mut padded);
        let len = to.len();
        to.copy_from_slice(&padded[..len]);
    }
}

/// Runs `$body` for each block of `$lanes` channels of `$c`, with `$at` its first channel. What is left
/// of the channels comes last, with `$WHOLE` false: it needs calls, which would empty the registers
/// in the loop.
macro_rules! for_blocks {
    ($c:expr, $lanes:expr, $at:ident, $WHOLE:ident => $body:block) => {
        let (c, lanes) = ($c, $lanes);
        let mut $at = 0;
        while $at + lanes <= c {
            const $WHOLE: bool = true;
            $body
            $at += lanes;
        }
        if $at < c {
            const $WHOLE: bool = false;
            $body
        }
    };
}
pub(crate) use for_blocks;

macro_rules! stream {
    ($type:ty, $real:ty, $from:path, $load:path, $store:path) => {
        impl Stream for $type {
            type Real = $real;
            #[cfg(test)]
            fn from_real(value: $real) -> Self {
                $from(value)
            }
            #[cfg(test)]
            fn to_real(self) -> $real {
                self.into()
            }
            #[inline(always)]
            fn load_full<I: Isa>(from: &[Self]) -> Acc<Self, I> {
                $load(from)
            }
            #[inline(always)]
            fn store_full<I: Isa>(value: Acc<Self, I>, to: &mut [Self]) {
                $store(value, to);
            }
        }
    };
}

stream!(
    f32,
    f32,
    std::convert::identity,
    Vector::load,
    Vector::store
);
stream!(
    f64,
    f64,
    std::convert::identity,
    Vector::load,
    Vector::store
);
stream!(
    bf16,
    f32,
    bf16::from_f32,
    VectorF32::load_bf16,
    VectorF32::store_bf16
);
stream!(
    f16,
    f32,
    f16::from_f32,
    VectorF32::load_f16,
    VectorF32::store_f16
);

/// One row of `width` elements for each token.
#[derive(Clone, Copy)]
pub struct Rows<'a, T> {
    data: &'a [T],
    width: usize,
}

impl<'a, T> Rows<'a, T> {
    /// `data.len()` must be a multiple of `width`.
    pub fn new(data: &'a [T], width: usize) -> Self {
        Self { data, width }
    }
    /// Cuts off the first tokens.
    pub fn split_off(&mut self, tokens: usize) -> Self {
        let (head, tail) = self.data.split_at(tokens * self.width);
        self.data = tail;
        Self::new(head, self.width)
    }
    /// Elements a token.
    #[inline(always)]
    pub fn width(&self) -> usize {
        self.width
    }
    /// One token's row.
    #[inline(always)]
    pub fn row(&self, token: usize) -> &'a [T] {
        &self.data[token * self.width..][..self.width]
    }
}

/// [`Rows`] to write.
pub struct RowsMut<'a, T> {
    data: &'a mut [T],
    width: usize,
}

impl<'a, T> RowsMut<'a, T> {
    /// `data.len()` must be a multiple of `width`.
    pub fn new(data: &'a mut [T], width: usize) -> Self {
        Self { data, width }
    }
    /// Cuts off the first tokens.
    pub fn split_off(&mut self, tokens: usize) -> Self {
        let data = std::mem::take(&mut self.data);
        let (head, tail) = data.split_at_mut(tokens * self.width);
        self.data = tail;
        Self::new(head, self.width)
    }
    /// One token's row.
    #[inline(always)]
    pub fn row(&mut self, token: usize) -> &mut [T] {
        &mut self.data[token * self.width..][..self.width]
    }
    /// The rows, to read.
    #[inline(always)]
    pub fn as_rows(&self) -> Rows<'_, T> {
        Rows::new(self.data, self.width)
    }
    /// The rows, for a shorter time.
    #[inline(always)]
    pub fn reborrow(&mut self) -> RowsMut<'_, T> {
        RowsMut::new(self.data, self.width)
    }
}

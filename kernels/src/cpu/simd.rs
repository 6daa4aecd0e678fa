//! Vectors of float32 and float64, and the choice of instruction set at run time.
//!
//! Kernels are written once, generic over [`Isa`]. [`Real::dispatch`] is the only way to get one: it picks
//! what the machine was found to have, which is why the vector types of `x86` are private to this
//! module. The work of one thread on one chunk is a [`Kernel`] that goes through [`Isa::enter`], a
//! function compiled for that instruction set. Every function on the way from there to a vector
//! operation must be `#[inline(always)]` and no closure handed elsewhere: what is not inlined is
//! compiled without the instruction set.

use std::ops::{Add, Div, Mul, Sub};

use half::{bf16, f16};

use crate::contract::view::DType;
use crate::cpu::memory::Element;
use crate::cpu::scratch::Exhausted;

#[cfg(all(target_arch = "x86_64", not(miri)))]
mod x86;

/// The scalar in which sums are accumulated: float32 or float64.
pub trait Real:
    Element
    + Default
    + PartialOrd
    + Send
    + Sync
    + Add<Output = Self>
    + Sub<Output = Self>
    + Mul<Output = Self>
    + Div<Output = Self>
{
    /// The element's vector in an instruction set.
    type Vector<I: Isa>: Vector<Real = Self>;

    /// Runs `call` with the best instruction set of this machine for this type.
    fn dispatch(call: impl Job) -> Result<(), Exhausted>;
    /// Rounds to this type.
    fn from_f64(value: f64) -> Self;
    /// Exact.
    fn to_f64(self) -> f64;
    /// e^self
    fn exp(self) -> Self;
    /// Square root, correctly rounded.
    fn sqrt(self) -> Self;
}

/// A few [`Real`]s in one register (or several).
pub trait Vector:
    Copy
    + Send
    + Sync
    + Add<Output = Self>
    + Sub<Output = Self>
    + Mul<Output = Self>
    + Div<Output = Self>
    + 'static
{
    /// Type of one lane.
    type Real: Real;
    /// Number of lanes, at most [`MAX_LANES`].
    const LANES: usize;
    /// How many rows of three accumulators fit in the registers.
    const TILE: usize;

    /// The same value in every lane.
    fn splat(value: Self::Real) -> Self;
    /// The first `LANES` elements. Panics where there are fewer.
    fn load(from: &[Self::Real]) -> Self;
    /// Writes the first `LANES` elements. Panics where there are fewer.
    fn store(self, to: &mut [Self::Real]);
    /// self * b + c, fused where the instruction set can.
    fn mul_add(self, b: Self, c: Self) -> Self;
    /// The larger one, lane by lane.
    fn max(self, other: Self) -> Self;
    /// self where `limit` is at least `threshold`, zero elsewhere.
    fn zero_if_below(self, limit: Self, threshold: Self) -> Self;
    /// e^self, to within 2 units in the last place.
    fn exp(self) -> Self;

    /// All lanes are zero.
    #[inline(always)]
    fn zero() -> Self {
        Self::splat(Self::Real::default())
    }
    /// Sum of the lanes, always in the same order: halves, quarters, and so on.
    #[inline(always)]
    fn sum(self) -> Self::Real {
        let mut lanes = [Self::Real::default(); MAX_LANES];
        self.store(&mut lanes);
        let mut width = Self::LANES;
        while width > 1 {
            width /= 2;
            for i in 0..width {
                lanes[i] = lanes[i] + lanes[i + width];
            }
        }
        lanes[0]
    }
}

/// Conversions that only float32 vectors need.
pub trait VectorF32: Vector<Real = f32> {
    /// The first `LANES` elements, exactly.
    fn load_bf16(from: &[bf16]) -> Self;
    /// Rounds to nearest, ties to even.
    fn store_bf16(self, to: &mut [bf16]);
    /// The first `LANES` elements, exactly.
    fn load_f16(from: &[f16]) -> Self;
    /// Rounds to nearest, ties to even.
    fn store_f16(self, to: &mut [f16]);
}

/// The largest number of lanes of any vector.
pub const MAX_LANES: usize = 16;

/// An instruction set that this machine has.
pub trait Isa: Copy + Send + Sync + 'static {
    /// Vector of float32.
    type F32: VectorF32;
    /// Vector of float64.
    type F64: Vector<Real = f64>;

    /// Runs `kernel` compiled for this instruction set.
    fn enter(kernel: impl Kernel<Self>);

    /// Asks for memory that will be read soon.
    #[inline(always)]
    fn prefetch<T>(_soon: &[T]) {}
}

/// One thread's work on one chunk.
pub trait Kernel<I: Isa> {
    /// Must be `#[inline(always)]`.
    fn run(self);
}

/// Binds the constant `$N` to the number of streams `$n` where that is worth a path of its own, and to
/// [`MAX_STREAMS`] otherwise.
macro_rules! for_streams {
    ($n:expr, $N:ident => $body:expr) => {
        match $n {
            2 => {
                const $N: usize = 2;
                $body
            }
            4 => {
                const $N: usize = 4;
                $body
            }
            _ => {
                const $N: usize = $crate::contract::limits::MAX_STREAMS;
                $body
            }
        }
    };
}
pub(crate) use for_streams;

/// A whole call, which does its work through [`Isa::enter`].
pub trait Job {
    /// Runs with an instruction set that the machine has.
    fn run<I: Isa>(self) -> Result<(), Exhausted>;
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Level {
    #[cfg(all(target_arch = "x86_64", not(miri)))]
    Avx512,
    #[cfg(all(target_arch = "x86_64", not(miri)))]
    Avx2,
    Portable,
}

fn detect() -> Level {
    #[cfg(all(target_arch = "x86_64", not(miri)))]
    {
        if x86::has_avx512() {
            return Level::Avx512;
        }
        if x86::has_avx2() {
            return Level::Avx2;
        }
    }
    Level::Portable
}

/// The instruction set that kernels use on this machine.
pub fn instruction_set() -> &'static str {
    match detect() {
        #[cfg(all(target_arch = "x86_64", not(miri)))]
        Level::Avx512 => "avx512",
        #[cfg(all(target_arch = "x86_64", not(miri)))]
        Level::Avx2 => "avx2",
        Level::Portable => "portable",
    }
}

/// The instruction set that calls with streams of this type use.
pub fn instruction_set_of(dtype: DType) -> &'static str {
    match dtype {
        DType::F64 => "portable",
        _ => instruction_set(),
    }
}

/// float64 is for checks, not for speed: it has one path, which keeps the library small.
fn dispatch_f64(call: impl Job) -> Result<(), Exhausted> {
    call.run::<Portable>()
}

fn dispatch_f32(call: impl Job) -> Result<(), Exhausted> {
    match detect() {
        #[cfg(all(target_arch = "x86_64", not(miri)))]
        Level::Avx512 => call.run::<x86::Avx512>(),
        #[cfg(all(target_arch = "x86_64", not(miri)))]
        Level::Avx2 => call.run::<x86::Avx2>(),
        Level::Portable => call.run::<Portable>(),
    }
}

/// The instruction sets that this machine has.
#[cfg(test)]
pub fn instruction_sets() -> Vec<&'static str> {
    let have = [
        ("portable", true),
        #[cfg(all(target_arch = "x86_64", not(miri)))]
        ("avx2", x86::has_avx2()),
        #[cfg(all(target_arch = "x86_64", not(miri)))]
        ("avx512", x86::has_avx512()),
    ];
    let names = have.into_iter().filter(|(_, has)| *has);
    names.map(|(name, _)| name).collect()
}

/// Runs `call` with one of [`instruction_sets`].
#[cfg(test)]
pub fn dispatch_to(name: &str, call: impl Job) -> Result<(), Exhausted> {
    assert!(instruction_sets().contains(&name));
    match name {
        #[cfg(all(target_arch = "x86_64", not(miri)))]
        "avx512" => call.run::<x86::Avx512>(),
        #[cfg(all(target_arch = "x86_64", not(miri)))]
        "avx2" => call.run::<x86::Avx2>(),
        _ => call.run::<Portable>(),
    }
}

/// Plain Rust, for every machine and for Miri.
#[derive(Clone, Copy)]
pub struct Portable;

impl Isa for Portable {
    type F32 = Lanes<f32>;
    type F64 = Lanes<f64>;

    fn enter(kernel: impl Kernel<Self>) {
        kernel.run();
    }
}

/// Eight lanes in an array; the compiler turns loops over them into what vectors it has.
#[derive(Clone, Copy)]
#[repr(align(64))]
pub struct Lanes<R>([R; 8]);

macro_rules! lanes_operator {
    ($trait:ident, $method:ident) => {
        impl<R: Real> $trait for Lanes<R> {
            type Output = Self;
            #[inline(always)]
            fn $method(mut self, other: Self) -> Self {
                for i in 0..8 {
                    self.0[i] = self.0[i].$method(other.0[i]);
                }
                self
            }
        }
    };
}

lanes_operator!(Add, add);
lanes_operator!(Sub, sub);
lanes_operator!(Mul, mul);
lanes_operator!(Div, div);

impl<R: Real> Vector for Lanes<R> {
    type Real = R;
    const LANES: usize = 8;
    const TILE: usize = 4;

    #[inline(always)]
    fn splat(value: R) -> Self {
        Self([value; 8])
    }
    #[inline(always)]
    fn load(from: &[R]) -> Self {
        let mut lanes = [R::default(); 8];
        lanes.copy_from_slice(&from[..8]);
        Self(lanes)
    }
    #[inline(always)]
    fn store(self, to: &mut [R]) {
        to[..8].copy_from_slice(&self.0);
    }
    #[inline(always)]
    fn mul_add(self, b: Self, c: Self) -> Self {
        self * b + c
    }
    #[inline(always)]
    fn max(mut self, other: Self) -> Self {
        for i in 0..8 {
            // As x86 does it: the second one where either is NaN.
            self.0[i] = if self.0[i] > other.0[i] {
                self.0[i]
            } else {
                other.0[i]
            };
        }
        self
    }
    #[inline(always)]
    fn zero_if_below(mut self, limit: Self, threshold: Self) -> Self {
        for i in 0..8 {
            if limit.0[i] < threshold.0[i] {
                self.0[i] = R::default();
            }
        }
        self
    }
    #[inline(always)]
    fn exp(mut self) -> Self {
        for i in 0..8 {
            self.0[i] = self.0[i].exp();
        }
        self
    }
}

impl VectorF32 for Lanes<f32> {
    #[inline(always)]
    fn load_bf16(from: &[bf16]) -> Self {
        let mut lanes = [0.0; 8];
        for (lane, value) in lanes.iter_mut().zip(&from[..8]) {
            *lane = value.to_f32();
        }
        Self(lanes)
    }
    #[inline(always)]
    fn store_bf16(self, to: &mut [bf16]) {
        for (value, lane) in to[..8].iter_mut().zip(self.0) {
            *value = bf16::from_f32(lane);
        }
    }
    #[inline(always)]
    fn load_f16(from: &[f16]) -> Self {
        let mut lanes = [0.0; 8];
        for (lane, value) in lanes.iter_mut().zip(&from[..8]) {
            *lane = value.to_f32();
        }
        Self(lanes)
    }
    #[inline(always)]
    fn store_f16(self, to: &mut [f16]) {
        for (value, lane) in to[..8].iter_mut().zip(self.0) {
            *value = f16::from_f32(lane);
        }
    }
}

macro_rules! real {
    ($real:ident, $member:ident, $dispatch:ident) => {
        impl Real for $real {
            type Vector<I: Isa> = I::$member;
            fn dispatch(call: impl Job) -> Result<(), Exhausted> {
                $dispatch(call)
            }
            #[inline(always)]
            fn from_f64(value: f64) -> Self {
                value as $real
            }
            #[inline(always)]
            fn to_f64(self) -> f64 {
                f64::from(self)
            }
            #[inline(always)]
            fn exp(self) -> Self {
                $real::exp(self)
            }
            #[inline(always)]
            fn sqrt(self) -> Self {
                $real::sqrt(self)
            }
        }
    };
}

real!(f32, F32, dispatch_f32);
real!(f64, F64, dispatch_f64);

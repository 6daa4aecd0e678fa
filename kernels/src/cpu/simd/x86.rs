//! AVX2 with FMA and F16C, and AVX-512.
//!
//! Soundness of the safe methods: nothing outside `super` can name these types, and `super` hands
//! them out as an [`Isa`] only after it has asked the processor.

use std::arch::x86_64::*;
use std::ops::{Add, Div, Mul, Sub};

use half::{bf16, f16};

use super::{Isa, Kernel, Lanes, Vector, VectorF32};

pub fn has_avx2() -> bool {
    is_x86_feature_detected!("avx2")
        && is_x86_feature_detected!("fma")
        && is_x86_feature_detected!("f16c")
}

pub fn has_avx512() -> bool {
    has_avx2()
        && is_x86_feature_detected!("avx512f")
        && is_x86_feature_detected!("avx512bw")
        && is_x86_feature_detected!("avx512dq")
        && is_x86_feature_detected!("avx512vl")
}

#[target_feature(enable = "avx2,fma,f16c")]
fn run_avx2(kernel: impl Kernel<Avx2>) {
    kernel.run();
}

#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl")]
fn run_avx512(kernel: impl Kernel<Avx512>) {
    kernel.run();
}

#[inline(always)]
fn prefetch_lines<T>(soon: &[T]) {
    let first = soon.as_ptr().cast::<i8>();
    for at in (0..size_of_val(soon)).step_by(64) {
        // SAFETY: an address to prefetch need not even be valid, and this one is.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(first.add(at)) }
    }
}

#[derive(Clone, Copy)]
pub struct Avx2;

impl Isa for Avx2 {
    type F32 = F32x8;
    type F64 = Lanes<f64>;

    fn enter(kernel: impl Kernel<Self>) {
        // SAFETY: see the module.
        unsafe { run_avx2(kernel) }
    }

    #[inline(always)]
    fn prefetch<T>(soon: &[T]) {
        prefetch_lines(soon);
    }
}

#[derive(Clone, Copy)]
pub struct Avx512;

impl Isa for Avx512 {
    type F32 = F32x16;
    type F64 = Lanes<f64>;

    fn enter(kernel: impl Kernel<Self>) {
        // SAFETY: see the module.
        unsafe { run_avx512(kernel) }
    }

    #[inline(always)]
    fn prefetch<T>(soon: &[T]) {
        prefetch_lines(soon);
    }
}

/// e^x = 2^k · e^r with k = round(x / ln 2), |r| <= ln 2 / 2. The polynomial is the Taylor series of
/// e^r to degree 7, whose remainder there is below 1e-8.
const LOG2_E: f32 = std::f32::consts::LOG2_E;
/// The upper bits of ln 2, so that k · LN2_HIGH is exact.
const LN2_HIGH: f32 = 0.693_359_4;
const LN2_LOW: f32 = -2.121_944_4e-4;
const TAYLOR: [f32; 8] = [
    1.0 / 5040.0,
    1.0 / 720.0,
    1.0 / 120.0,
    1.0 / 24.0,
    1.0 / 6.0,
    0.5,
    1.0,
    1.0,
];
/// Beyond these, e^x is 0 or infinite in float32.
const EXP_LIMITS: (f32, f32) = (-104.0, 89.0);

macro_rules! operator {
    ($vector:ident, $trait:ident, $method:ident, $intrinsic:ident) => {
        impl $trait for $vector {
            type Output = Self;
            #[inline(always)]
            fn $method(self, other: Self) -> Self {
                // SAFETY: see the module.
                Self(unsafe { $intrinsic(self.0, other.0) })
            }
        }
    };
}

#[derive(Clone, Copy)]
#[repr(transparent)]
pub struct F32x8(__m256);

operator!(F32x8, Add, add, _mm256_add_ps);
operator!(F32x8, Sub, sub, _mm256_sub_ps);
operator!(F32x8, Mul, mul, _mm256_mul_ps);
operator!(F32x8, Div, div, _mm256_div_ps);

impl Vector for F32x8 {
    type Real = f32;
    const LANES: usize = 8;
    const TILE: usize = 4;

    #[inline(always)]
    fn splat(value: f32) -> Self {
        // SAFETY: see the module.
        Self(unsafe { _mm256_set1_ps(value) })
    }
    #[inline(always)]
    fn load(from: &[f32]) -> Self {
        let from = &from[..8];
        // SAFETY: eight elements.
        Self(unsafe { _mm256_loadu_ps(from.as_ptr()) })
    }
    #[inline(always)]
    fn store(self, to: &mut [f32]) {
        let to = &mut to[..8];
        // SAFETY: eight elements.
        unsafe { _mm256_storeu_ps(to.as_mut_ptr(), self.0) }
    }
    #[inline(always)]
    fn mul_add(self, b: Self, c: Self) -> Self {
        // SAFETY: see the module.
        Self(unsafe { _mm256_fmadd_ps(self.0, b.0, c.0) })
    }
    #[inline(always)]
    fn max(self, other: Self) -> Self {
        // SAFETY: see the module.
        Self(unsafe { _mm256_max_ps(self.0, other.0) })
    }
    #[inline(always)]
    fn zero_if_below(self, limit: Self, threshold: Self) -> Self {
        // SAFETY: see the module.
        Self(unsafe { _mm256_andnot_ps(_mm256_cmp_ps::<_CMP_LT_OQ>(limit.0, threshold.0), self.0) })
    }
    #[inline(always)]
    fn exp(self) -> Self {
        // max and min return their second operand where either is NaN, so NaN stays.
        // SAFETY: see the module.
        unsafe {
            let x = _mm256_max_ps(_mm256_set1_ps(EXP_LIMITS.0), self.0);
            let x = _mm256_min_ps(_mm256_set1_ps(EXP_LIMITS.1), x);
            let k = _mm256_round_ps::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>(
                _mm256_mul_ps(x, _mm256_set1_ps(LOG2_E)),
            );
            let r = _mm256_fnmadd_ps(k, _mm256_set1_ps(LN2_HIGH), x);
            let r = _mm256_fnmadd_ps(k, _mm256_set1_ps(LN2_LOW), r);
            let mut p = _mm256_set1_ps(TAYLOR[0]);
            for coefficient in &TAYLOR[1..] {
                p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(*coefficient));
            }
            // 2^k in two factors, since k itself can lie outside the exponents of normal numbers.
            let k = _mm256_cvtps_epi32(k);
            let half = _mm256_srai_epi32::<1>(k);
            let rest = _mm256_sub_epi32(k, half);
            let bias = _mm256_set1_epi32(127);
            let half = _mm256_slli_epi32::<23>(_mm256_add_epi32(half, bias));
            let rest = _mm256_slli_epi32::<23>(_mm256_add_epi32(rest, bias));
            let scaled = _mm256_mul_ps(
                _mm256_mul_ps(p, _mm256_castsi256_ps(half)),
                _mm256_castsi256_ps(rest),
            );
            let is_nan = _mm256_cmp_ps::<_CMP_UNORD_Q>(self.0, self.0);
            Self(_mm256_blendv_ps(scaled, self.0, is_nan))
        }
    }
    #[inline(always)]
    fn sum(self) -> f32 {
        // SAFETY: see the module.
        unsafe {
            let s = _mm_add_ps(
                _mm256_castps256_ps128(self.0),
                _mm256_extractf128_ps::<1>(self.0),
            );
            let s = _mm_add_ps(s, _mm_movehl_ps(s, s));
            _mm_cvtss_f32(_mm_add_ss(s, _mm_shuffle_ps::<1>(s, s)))
        }
    }
}

impl VectorF32 for F32x8 {
    #[inline(always)]
    fn load_bf16(from: &[bf16]) -> Self {
        let from = &from[..8];
        // SAFETY: eight elements.
        unsafe {
            let bits = _mm256_cvtepu16_epi32(_mm_loadu_si128(from.as_ptr().cast()));
            Self(_mm256_castsi256_ps(_mm256_slli_epi32::<16>(bits)))
        }
    }
    #[inline(always)]
    fn store_bf16(self, to: &mut [bf16]) {
        let to = &mut to[..8];
        // SAFETY: eight elements.
        unsafe {
            let bits = _mm256_castps_si256(self.0);
            let odd = _mm256_and_si256(_mm256_srli_epi32::<16>(bits), _mm256_set1_epi32(1));
            let rounded = _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd);
            // Rounding could carry a NaN into infinity: quiet it instead.
            let quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x0040_0000));
            let is_nan = _mm256_castps_si256(_mm256_cmp_ps::<_CMP_UNORD_Q>(self.0, self.0));
            let upper = _mm256_srli_epi32::<16>(_mm256_blendv_epi8(rounded, quiet, is_nan));
            let packed = _mm_packus_epi32(
                _mm256_castsi256_si128(upper),
                _mm256_extracti128_si256::<1>(upper),
            );
            _mm_storeu_si128(to.as_mut_ptr().cast(), packed);
        }
    }
    #[inline(always)]
    fn load_f16(from: &[f16]) -> Self {
        let from = &from[..8];
        // SAFETY: eight elements.
        Self(unsafe { _mm256_cvtph_ps(_mm_loadu_si128(from.as_ptr().cast())) })
    }
    #[inline(always)]
    fn store_f16(self, to: &mut [f16]) {
        let to = &mut to[..8];
        // SAFETY: eight elements.
        unsafe {
            let half = _mm256_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(self.0);
            _mm_storeu_si128(to.as_mut_ptr().cast(), half);
        }
    }
}

#[derive(Clone, Copy)]
#[repr(transparent)]
pub struct F32x16(__m512);

operator!(F32x16, Add, add, _mm512_add_ps);
operator!(F32x16, Sub, sub, _mm512_sub_ps);
operator!(F32x16, Mul, mul, _mm512_mul_ps);
operator!(F32x16, Div, div, _mm512_div_ps);

impl Vector for F32x16 {
    type Real = f32;
    const LANES: usize = 16;
    const TILE: usize = 8;

    #[inline(always)]
    fn splat(value: f32) -> Self {
        // SAFETY: see the module.
        Self(unsafe { _mm512_set1_ps(value) })
    }
    #[inline(always)]
    fn load(from: &[f32]) -> Self {
        let from = &from[..16];
        // SAFETY: sixteen elements.
        Self(unsafe { _mm512_loadu_ps(from.as_ptr()) })
    }
    #[inline(always)]
    fn store(self, to: &mut [f32]) {
        let to = &mut to[..16];
        // SAFETY: sixteen elements.
        unsafe { _mm512_storeu_ps(to.as_mut_ptr(), self.0) }
    }
    #[inline(always)]
    fn mul_add(self, b: Self, c: Self) -> Self {
        // SAFETY: see the module.
        Self(unsafe { _mm512_fmadd_ps(self.0, b.0, c.0) })
    }
    #[inline(always)]
    fn max(self, other: Self) -> Self {
        // SAFETY: see the module.
        Self(unsafe { _mm512_max_ps(self.0, other.0) })
    }
    #[inline(always)]
    fn zero_if_below(self, limit: Self, threshold: Self) -> Self {
        // SAFETY: see the module.
        unsafe {
            let keep = !_mm512_cmp_ps_mask::<_CMP_LT_OQ>(limit.0, threshold.0);
            Self(_mm512_maskz_mov_ps(keep, self.0))
        }
    }
    #[inline(always)]
    fn exp(self) -> Self {
        // max and min return their second operand where either is NaN, so NaN stays.
        // SAFETY: see the module.
        unsafe {
            let x = _mm512_max_ps(_mm512_set1_ps(EXP_LIMITS.0), self.0);
            let x = _mm512_min_ps(_mm512_set1_ps(EXP_LIMITS.1), x);
            let k = _mm512_roundscale_ps::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>(
                _mm512_mul_ps(x, _mm512_set1_ps(LOG2_E)),
            );
            let r = _mm512_fnmadd_ps(k, _mm512_set1_ps(LN2_HIGH), x);
            let r = _mm512_fnmadd_ps(k, _mm512_set1_ps(LN2_LOW), r);
            let mut p = _mm512_set1_ps(TAYLOR[0]);
            for coefficient in &TAYLOR[1..] {
                p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(*coefficient));
            }
            Self(_mm512_scalef_ps(p, k))
        }
    }
    #[inline(always)]
    fn sum(self) -> f32 {
        // SAFETY: see the module.
        unsafe {
            let upper = _mm512_extractf32x8_ps::<1>(self.0);
            F32x8(_mm256_add_ps(_mm512_castps512_ps256(self.0), upper)).sum()
        }
    }
}

impl VectorF32 for F32x16 {
    #[inline(always)]
    fn load_bf16(from: &[bf16]) -> Self {
        let from = &from[..16];
        // SAFETY: sixteen elements.
        unsafe {
            let bits = _mm512_cvtepu16_epi32(_mm256_loadu_si256(from.as_ptr().cast()));
            Self(_mm512_castsi512_ps(_mm512_slli_epi32::<16>(bits)))
        }
    }
    #[inline(always)]
    fn store_bf16(self, to: &mut [bf16]) {
        // Not vcvtneps2bf16, which flushes subnormal numbers to zero.
        let to = &mut to[..16];
        // SAFETY: sixteen elements.
        unsafe {
            let bits = _mm512_castps_si512(self.0);
            let odd = _mm512_and_si512(_mm512_srli_epi32::<16>(bits), _mm512_set1_epi32(1));
            let rounded = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd);
            // Rounding could carry a NaN into infinity: quiet it instead.
            let is_nan = _mm512_cmp_ps_mask::<_CMP_UNORD_Q>(self.0, self.0);
            let rounded =
                _mm512_mask_or_epi32(rounded, is_nan, bits, _mm512_set1_epi32(0x0040_0000));
            let upper = _mm512_cvtepi32_epi16(_mm512_srli_epi32::<16>(rounded));
            _mm256_storeu_si256(to.as_mut_ptr().cast(), upper);
        }
    }
    #[inline(always)]
    fn load_f16(from: &[f16]) -> Self {
        let from = &from[..16];
        // SAFETY: sixteen elements.
        Self(unsafe { _mm512_cvtph_ps(_mm256_loadu_si256(from.as_ptr().cast())) })
    }
    #[inline(always)]
    fn store_f16(self, to: &mut [f16]) {
        let to = &mut to[..16];
        // SAFETY: sixteen elements.
        unsafe {
            let half = _mm512_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(self.0);
            _mm256_storeu_si256(to.as_mut_ptr().cast(), half);
        }
    }
}

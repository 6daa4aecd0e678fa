//! Contents of memory: values of operands, and the pattern of results that nobody has written.

use fastrand::Rng;

use crate::call::dtype;
use crate::frame::Style;

const STYLES: [Style; 6] = [
    Style::Ordinary,
    Style::Large,
    Style::Subnormal,
    Style::Zero,
    Style::WithNan,
    Style::WithInf,
];

const DTYPES: [i32; 4] = [dtype::F32, dtype::F64, dtype::BF16, dtype::F16];

/// Values of one pool: operands are copied from anywhere in its first half.
const POOL: usize = 4096;

/// Numbers of every dtype and style, ready to be copied.
pub struct Values(Vec<Vec<u8>>);

impl Values {
    /// Always the same.
    pub fn new() -> Self {
        let mut rng = Rng::with_seed(0);
        let mut pools = Vec::new();
        for style in STYLES {
            for dtype in DTYPES {
                let mut pool = Vec::new();
                for _ in 0..POOL {
                    push(value(style, dtype, &mut rng), dtype, &mut pool);
                }
                pools.push(pool);
            }
        }
        Self(pools)
    }

    /// Fills an operand. One whose dtype is none of the four keeps what lies there.
    pub fn fill(&self, style: Style, dtype: i32, memory: &mut [u8], rng: &mut Rng) {
        let style = STYLES.iter().position(|other| *other == style);
        let dtype_index = DTYPES.iter().position(|other| *other == dtype);
        let (Some(style), Some(dtype_index)) = (style, dtype_index) else {
            return;
        };
        let pool = &self.0[style * DTYPES.len() + dtype_index];
        for piece in memory.chunks_mut(pool.len() / 2) {
            let first = rng.usize(..POOL / 2) * dtype::num_bytes(dtype);
            piece.copy_from_slice(&pool[first..][..piece.len()]);
        }
    }
}

fn value(style: Style, dtype: i32, rng: &mut Rng) -> f64 {
    let ordinary = 4.0 * rng.f64() - 2.0;
    match style {
        Style::WithNan if rng.u32(..50) == 0 => f64::NAN,
        Style::WithInf if rng.u32(..50) == 0 => f64::INFINITY.copysign(ordinary),
        Style::Ordinary | Style::WithNan | Style::WithInf => ordinary,
        Style::Large => match dtype {
            dtype::F64 => 1e300 * ordinary,
            dtype::F16 => 3e4 * ordinary,
            _ => 1e38 * ordinary,
        },
        Style::Subnormal => match dtype {
            dtype::F64 => 1e-310 * ordinary,
            dtype::F16 => 2e-5 * ordinary,
            _ => 1e-40 * ordinary,
        },
        Style::Zero => 0.0_f64.copysign(ordinary),
    }
}

/// Appends the bytes of a number, which is cut to the dtype.
fn push(value: f64, dtype: i32, pool: &mut Vec<u8>) {
    let single = value as f32;
    match dtype {
        dtype::F64 => pool.extend(value.to_ne_bytes()),
        dtype::F32 => pool.extend(single.to_ne_bytes()),
        dtype::BF16 if value.is_nan() => pool.extend(0x7fc0_u16.to_ne_bytes()),
        dtype::BF16 => pool.extend(((single.to_bits() >> 16) as u16).to_ne_bytes()),
        _ => pool.extend(half_bits(value).to_ne_bytes()),
    }
}

/// A float16, towards zero.
fn half_bits(value: f64) -> u16 {
    let sign = if value.is_sign_negative() { 0x8000 } else { 0 };
    let magnitude = value.abs();
    let bits = if magnitude.is_nan() {
        0x7e00
    } else if magnitude.is_infinite() {
        0x7c00
    } else if magnitude < 2.0_f64.powi(-14) {
        (magnitude * 2.0_f64.powi(24)) as u16
    } else {
        let exponent = magnitude.log2().floor().min(15.0);
        let mantissa = (magnitude / exponent.exp2() - 1.0).min(1023.0 / 1024.0);
        (((exponent as i32 + 15) as u16) << 10) + (mantissa * 1024.0) as u16
    };
    sign + bits
}

/// An element that no kernel can have computed: a signalling NaN, which any arithmetic makes quiet.
/// The bytes of it, repeated, for elements of 1, 2, 4 and 8 bytes.
fn pattern(dtype: i32) -> [u8; 8] {
    match dtype {
        dtype::F16 => 0xfca5_fca5_fca5_fca5_u64.to_ne_bytes(),
        dtype::BF16 => 0xffa5_ffa5_ffa5_ffa5_u64.to_ne_bytes(),
        dtype::F64 => 0xfff5_a5a5_a5a5_a5a5_u64.to_ne_bytes(),
        _ => 0xffa5_a5a5_ffa5_a5a5_u64.to_ne_bytes(),
    }
}

/// Fills a result before a call.
pub fn mark(dtype: i32, memory: &mut [u8]) {
    let pattern = pattern(dtype);
    let (words, rest) = memory.as_chunks_mut();
    words.fill(pattern);
    rest.copy_from_slice(&pattern[..rest.len()]);
}

/// Whether all of it is as [`mark`] left it.
pub fn is_untouched(dtype: i32, memory: &[u8]) -> bool {
    let pattern = pattern(dtype);
    let (words, rest) = memory.as_chunks();
    words.iter().all(|word| *word == pattern) && *rest == pattern[..rest.len()]
}

/// The first element of one of the four dtypes that is as [`mark`] left it.
pub fn first_unwritten(dtype: i32, memory: &[u8]) -> Option<usize> {
    fn first<const SIZE: usize>(pattern: [u8; 8], memory: &[u8]) -> Option<usize> {
        let pattern = *pattern.first_chunk::<SIZE>()?;
        memory
            .as_chunks()
            .0
            .iter()
            .position(|element| *element == pattern)
    }
    let pattern = pattern(dtype);
    match dtype::num_bytes(dtype) {
        2 => first::<2>(pattern, memory),
        4 => first::<4>(pattern, memory),
        _ => first::<8>(pattern, memory),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn float16_is_cut_as_it_should_be() {
        let known = [
            (0.0, 0),
            (1.0, 0x3c00),
            (-1.0, 0xbc00),
            (1.5, 0x3e00),
            (2.0, 0x4000),
            (65504.0, 0x7bff),
            (1e9, 0x7bff),
            (2.0_f64.powi(-24), 1),
            (2.0_f64.powi(-14), 0x400),
            (f64::INFINITY, 0x7c00),
        ];
        for (value, bits) in known {
            assert_eq!(half_bits(value), bits, "{value}");
        }
    }

    #[test]
    fn one_element_left_alone_is_found() {
        for dtype in DTYPES {
            let mut memory = [0; 64];
            mark(dtype, &mut memory);
            assert!(is_untouched(dtype, &memory));
            let size = dtype::num_bytes(dtype);
            memory[..3 * size].fill(7);
            assert!(!is_untouched(dtype, &memory));
            assert_eq!(first_unwritten(dtype, &memory), Some(3));
            memory.fill(7);
            assert_eq!(first_unwritten(dtype, &memory), None);
        }
    }
}

//! The sum over the streams alone, against its equations.

use half::{bf16, f16};

use super::{Random, Threads, from_f64, to_f64};
use crate::cpu::collapse;
use crate::cpu::parallel::{Pool, Serial};
use crate::cpu::simd::{dispatch_to, instruction_sets};
use crate::cpu::stream::{Rows, RowsMut, Stream};

/// Operands of both calls that every stream type holds exactly.
struct Data {
    x: Vec<f64>,
    h_pre: Vec<f64>,
    d_u: Vec<f64>,
}

impl Data {
    fn new<S: Stream>(tokens: usize, [n, c]: [usize; 2]) -> Self {
        let mut random = Random(7);
        let mut stream = |len| to_f64(&from_f64::<S>(&random.vec(len, 1.0)));
        let (x, d_u) = (stream(tokens * n * c), stream(tokens * c));
        let h_pre = to_f64(&from_f64::<f32>(&random.vec(tokens * n, 1.0)));
        Self { x, h_pre, d_u }
    }

    /// u and d_h_pre, a scalar at a time.
    fn scalar(&self, [n, c]: [usize; 2]) -> [Vec<f64>; 2] {
        let mut u = vec![0.0; self.d_u.len()];
        let mut d_h_pre = vec![0.0; self.h_pre.len()];
        for (at, x) in self.x.iter().enumerate() {
            let (stream, channel) = (at / c, at % c);
            u[stream / n * c + channel] += self.h_pre[stream] * x;
            d_h_pre[stream] += self.d_u[stream / n * c + channel] * x;
        }
        [u, d_h_pre]
    }

    /// u and d_h_pre from the kernels, for the first `tokens` tokens.
    fn run<S: Stream>(
        &self,
        isa: &str,
        tokens: usize,
        [n, c]: [usize; 2],
        pool: &dyn Pool,
    ) -> [Vec<f64>; 2] {
        let x = from_f64::<S>(&self.x[..tokens * n * c]);
        let d_u = from_f64::<S>(&self.d_u[..tokens * c]);
        let h_pre = from_f64::<S::Real>(&self.h_pre[..tokens * n]);
        // Not zeros: every element must be written.
        let mut u = from_f64::<S>(&vec![f64::NAN; d_u.len()]);
        let mut d_h_pre = from_f64::<S::Real>(&vec![f64::NAN; h_pre.len()]);
        let x = Rows::new(&x[..], n * c);
        let forward = collapse::Forward {
            x,
            h_pre: Rows::new(&h_pre[..], n),
            u: RowsMut::new(&mut u, c),
            tokens,
            pool,
        };
        dispatch_to(isa, forward).unwrap();
        let backward = collapse::Backward {
            x,
            d_u: Rows::new(&d_u[..], c),
            d_h_pre: RowsMut::new(&mut d_h_pre, n),
            tokens,
            pool,
        };
        dispatch_to(isa, backward).unwrap();
        [to_f64(&u), to_f64(&d_h_pre)]
    }
}

/// u is rounded once, by at most `unit` of its size; d_h_pre is of the accumulation type, whose unit is
/// `wide`.
fn agrees_with_scalar<S: Stream>(unit: f64, wide: f64) {
    let all = (1..=16).map(|n| (3, [n, 33]));
    let more = [(0, [4, 20]), (70, [4, 64]), (35, [2, 100]), (1, [1, 1])];
    let few = if cfg!(miri) { 4 } else { 16 };
    for (tokens, sizes) in all.take(few).chain(more) {
        let data = Data::new::<S>(tokens, sizes);
        let [n, c] = sizes.map(|size| size as f64);
        let limits = [unit * n + wide * n, wide * c];
        for isa in instruction_sets() {
            let got = data.run::<S>(isa, tokens, sizes, &Serial);
            for ((got, want), limit) in got.iter().zip(data.scalar(sizes)).zip(limits) {
                assert_eq!(got.len(), want.len());
                for (got, want) in got.iter().zip(want) {
                    assert!(
                        (got - want).abs() <= limit,
                        "{isa} {tokens} x {sizes:?}: {got}, not {want}"
                    );
                }
            }
        }
    }
}

#[test]
fn every_type_agrees_with_the_equations() {
    let single = f64::from(f32::EPSILON);
    agrees_with_scalar::<f64>(0.0, f64::EPSILON);
    agrees_with_scalar::<f32>(0.0, single);
    agrees_with_scalar::<bf16>(f64::from(bf16::EPSILON) / 2.0, single);
    agrees_with_scalar::<f16>(f64::from(f16::EPSILON) / 2.0, single);
}

#[test]
fn threads_and_neighbours_change_no_bits() {
    let (tokens, sizes) = (70, [4, 100]);
    let data = Data::new::<bf16>(tokens, sizes);
    for isa in instruction_sets() {
        let serial = data.run::<bf16>(isa, tokens, sizes, &Serial);
        let threaded = data.run::<bf16>(isa, tokens, sizes, &Threads);
        assert!(serial == threaded, "{isa}: threads change bits");
        let first = data.run::<bf16>(isa, 1, sizes, &Serial);
        for (first, serial) in first.iter().zip(&serial) {
            assert!(first[..] == serial[..first.len()], "{isa}");
        }
    }
}

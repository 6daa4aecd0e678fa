//! The projection alone.

use super::{Random, from_f64};
use crate::cpu::parallel::Serial;
use crate::cpu::simd::{Real, dispatch_to, instruction_sets};
use crate::cpu::sinkhorn;
use crate::cpu::stream::{Rows, RowsMut};
use crate::{Config, Order};

/// The projection of matrices, or where `d_h_res` is given their gradient.
fn run<R: Real>(isa: &str, config: &Config, n: usize, z: &[R], d_h_res: Option<&[R]>) -> Vec<R> {
    let mut result = vec![R::from_f64(f64::NAN); z.len()];
    dispatch_to(
        isa,
        sinkhorn::Sinkhorn {
            config,
            n,
            z: Rows::new(z, n * n),
            d_h_res: d_h_res.map(|d| Rows::new(d, n * n)),
            out: RowsMut::new(&mut result, n * n),
            matrices: z.len() / (n * n),
            pool: &Serial,
        },
    )
    .unwrap();
    result
}

#[test]
fn extreme_logits_stay_on_the_manifold() {
    let n = 4;
    let mut random = Random(3);
    for size in [1e2, 1e4, 1e30] {
        let z = from_f64::<f32>(&random.vec(19 * n * n, size));
        for isa in instruction_sets() {
            for row in run(isa, &Config::default(), n, &z, None).chunks(n) {
                let sum: f32 = row.iter().sum();
                assert!(
                    (sum - 1.0).abs() < 1e-6,
                    "{isa}: a row sums to {sum} at size {size}"
                );
                assert!(row.iter().all(|h| *h >= 0.0), "{isa}: {row:?}");
            }
        }
    }
}

/// The projection without eps, one scalar at a time: in logarithms, which lose nothing to the offsets.
fn in_logarithms(config: &Config, n: usize, z: &[f64]) -> Vec<f64> {
    let mut log = z.to_vec();
    for half in 0..2 * config.sinkhorn_iters {
        let over_columns = (half % 2 == 0) == (config.order == Order::ColumnRow);
        for group in 0..n {
            let at = |k| {
                if over_columns {
                    k * n + group
                } else {
                    group * n + k
                }
            };
            let largest = (0..n).map(|k| log[at(k)]).fold(f64::MIN, f64::max);
            let sum: f64 = (0..n).map(|k| (log[at(k)] - largest).exp()).sum();
            for k in 0..n {
                log[at(k)] -= largest + sum.ln();
            }
        }
    }
    log.iter().map(|log| log.exp()).collect()
}

/// Float32 holds whole numbers with these offsets exactly, so that float64 tells what is right. Differences
/// from the other logits are rounded.
#[test]
fn offsets_of_rows_and_columns_take_no_digits() {
    let mut random = Random(5);
    for (n, order) in [2, 3, 4, 7]
        .into_iter()
        .flat_map(|n| [(n, Order::ColumnRow), (n, Order::RowColumn)])
    {
        let config = Config {
            order,
            ..Config::default()
        };
        let small = from_f64::<f32>(&random.vec(n * n, 4.0));
        let d_h_res = random.vec(n * n, 1.0);
        for size in [0.0, -1e2, 1e4, -1e6, 4e6] {
            for (of_row, of_column) in [(size, 0.0), (0.0, size), (size, size / 2.0)] {
                let offset = |(at, z): (usize, &f32)| {
                    let row = if at / n == n - 1 { of_row } else { 0.0 };
                    let column = if at % n == 0 { of_column } else { 0.0 };
                    let offset = row + column;
                    f64::from(if offset == 0.0 { *z } else { z.round() }) + offset
                };
                let z: Vec<f64> = small.iter().enumerate().map(offset).collect();
                let expected = in_logarithms(&config, n, &z);
                let d_expected = run("portable", &config, n, &z, Some(&d_h_res[..]));
                let (z, d_h_res) = (from_f64::<f32>(&z), from_f64::<f32>(&d_h_res));
                for isa in instruction_sets() {
                    let h = run(isa, &config, n, &z, None);
                    let d = run(isa, &config, n, &z, Some(&d_h_res[..]));
                    for (got, expected) in h.iter().zip(&expected).chain(d.iter().zip(&d_expected))
                    {
                        assert!(
                            (f64::from(*got) - expected).abs() < 2e-6,
                            "{isa}: n = {n}, offset {size}: expected {expected}, got {got}"
                        );
                    }
                }
            }
        }
    }
}

/// Beyond all digits, too, results are finite: neighbouring numbers of such a size differ by more than
/// what is lost.
#[test]
fn offsets_of_any_size_stay_finite() {
    let n = 4;
    for size in [-1e9, -1e12, -1e30, 1e38] {
        for column in [0.0, 100.0, size / 3.0] {
            let z: Vec<f64> = (0..n * n)
                .map(|at| {
                    if at < n {
                        size
                    } else {
                        (at % n) as f64 * column
                    }
                })
                .collect();
            for isa in instruction_sets() {
                let h = run(isa, &Config::default(), n, &from_f64::<f32>(&z), None);
                let d_h_res = vec![1.0; n * n];
                let d = run(
                    isa,
                    &Config::default(),
                    n,
                    &from_f64(&z),
                    Some(&d_h_res[..]),
                );
                let sum: f32 = h.iter().sum();
                assert!((sum - 4.0).abs() < 1e-5, "{isa}: {h:?} at {size}, {column}");
                assert!(d.iter().all(|d: &f32| d.is_finite()), "{isa}: {d:?}");
            }
        }
    }
}

//! The projection alone.

use super::{Random, from_f64};
use crate::parallel::Serial;
use crate::simd::{dispatch_to, instruction_sets};
use crate::stream::{Rows, RowsMut};
use crate::{Config, sinkhorn};

#[test]
fn extreme_logits_stay_on_the_manifold() {
    let config = Config::default();
    let n = 4;
    let mut random = Random(3);
    for size in [1e2, 1e4, 1e30] {
        let z = from_f64::<f32>(&random.vec(19 * n * n, size));
        for isa in instruction_sets() {
            let mut h = vec![f32::NAN; z.len()];
            let out = RowsMut::new(&mut h, n * n);
            let z = Rows::new(&z[..], n * n);
            let config = &config;
            dispatch_to(
                isa,
                sinkhorn::Sinkhorn {
                    config,
                    n,
                    z,
                    d_h_res: None,
                    out,
                    matrices: 19,
                    pool: &Serial,
                },
            )
            .unwrap();
            for row in h.chunks(n) {
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

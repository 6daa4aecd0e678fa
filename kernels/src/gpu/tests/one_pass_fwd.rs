//! Which kernels the forward calls take that read the streams once.

use super::{H100, needed};
use crate::contract::check::Example;
use crate::contract::config::{Config, Constraint};
use crate::contract::table::Call;
use crate::contract::view::DType;
use crate::gpu::plan;

/// n and C, constraint, and the size with its dtype and the cluster of the kernel. `tests/test_one_pass_fwd.py` runs the
/// same cases.
const CASES: &[([usize; 2], Constraint, &str, u32)] = &[
    ([4, 512], Constraint::None, "w256_bf16", 2),
    ([4, 960], Constraint::Birkhoff, "w320_bf16", 3),
    ([4, 768], Constraint::Birkhoff, "w384_bf16", 2),
    ([4, 1000], Constraint::Birkhoff, "w256_bf16", 4),
    ([4, 4104], Constraint::None, "w320_bf16", 13),
    ([4, 520], Constraint::Permutations, "w256k32_bf16", 3),
    ([4, 1032], Constraint::Identity, "w384k8_bf16", 3),
    ([2, 1032], Constraint::Birkhoff, "n2w512_bf16", 3),
    ([4, 1000], Constraint::Birkhoff, "w256_f16", 4),
    ([4, 1000], Constraint::Birkhoff, "w256_f32", 4),
    ([4, 520], Constraint::Identity, "w256k8_f32", 3),
    ([4, 1600], Constraint::Birkhoff, "w448_bf16", 4),
    ([4, 2304], Constraint::Birkhoff, "w320_bf16", 8),
    ([4, 4608], Constraint::Birkhoff, "w320_bf16", 15),
    ([4, 8128], Constraint::Birkhoff, "w512_bf16", 16),
    ([4, 8192], Constraint::None, "w512_bf16", 16),
    ([4, 2496], Constraint::Identity, "w512k8_bf16", 5),
    ([4, 1408], Constraint::Permutations, "w256k32_bf16", 6),
    ([4, 3520], Constraint::Identity, "w512k8_bf16", 7),
    ([4, 4608], Constraint::Identity, "w512k8_bf16", 9),
    ([4, 5120], Constraint::Identity, "w384k8_bf16", 14),
    ([4, 7168], Constraint::Identity, "w512k8_bf16", 14),
    ([4, 704], Constraint::Permutations, "w256k32_bf16", 3),
    ([4, 2560], Constraint::Permutations, "w256k32_bf16", 10),
    ([4, 2816], Constraint::Permutations, "w256k32_bf16", 11),
    ([4, 4928], Constraint::Permutations, "w384k32_bf16", 13),
    ([4, 4544], Constraint::Permutations, "w384k32_bf16", 12),
    ([4, 6144], Constraint::Permutations, "w384k32_bf16", 16),
    ([4, 6208], Constraint::Permutations, "w512k32_bf16", 13),
    ([4, 7232], Constraint::Permutations, "w512k32_bf16", 15),
    ([4, 8192], Constraint::Permutations, "w512k32_bf16", 16),
    ([2, 576], Constraint::None, "n2w512_bf16", 2),
    ([2, 1472], Constraint::Birkhoff, "n2w512_bf16", 3),
    ([2, 2048], Constraint::Birkhoff, "n2w1024_bf16", 2),
    ([2, 6080], Constraint::None, "n2w1024_bf16", 6),
    ([2, 16384], Constraint::Birkhoff, "n2w1024_bf16", 16),
    ([4, 512], Constraint::Birkhoff, "w256_f16", 2),
    ([4, 2624], Constraint::None, "w384_f16", 7),
    ([4, 4096], Constraint::Birkhoff, "w256_f16", 16),
    ([4, 7168], Constraint::None, "w512_f16", 14),
    ([4, 8128], Constraint::Birkhoff, "w512_f16", 16),
    ([4, 1088], Constraint::Identity, "w512k8_f16", 3),
    ([4, 512], Constraint::Birkhoff, "w256_f32", 2),
    ([4, 1184], Constraint::None, "w256_f32", 5),
    ([4, 4096], Constraint::Birkhoff, "w256_f32", 16),
    ([4, 864], Constraint::Identity, "w256k8_f32", 4),
    ([4, 3456], Constraint::Identity, "w256k8_f32", 14),
];

#[test]
fn forward_calls_run_one_kernel_of_a_size_for_their_width() {
    for &(sizes, constraint, size, cluster) in CASES {
        let mut dtypes = DType::ALL.into_iter();
        let dtype = dtypes.find(|dtype| size.ends_with(&format!("_{}", dtype.short_name())));
        let dtype = dtype.unwrap();
        for (kind, has_norm, function) in [
            (Call::PreFwd, false, "pre_fwd_one_pass"),
            (Call::PreFwd, true, "pre_norm_fwd_one_pass"),
            (Call::PostPreFwd, false, "post_pre_fwd_one_pass"),
            (Call::PostPreFwd, true, "post_pre_norm_fwd_one_pass"),
        ] {
            let config = Config {
                constraint,
                ..Config::default()
            };
            let example = Example::new(kind, dtype, 17, sizes, config);
            let example = if has_norm {
                example.with_norm()
            } else {
                example
            };
            let needed = example.check(|call| needed(&call.unwrap()));
            let example = example.with_workspace(needed);
            let launches = example.check(|call| plan(&call.unwrap(), &H100).unwrap().launches);
            let found: Vec<_> = launches
                .iter()
                .map(|launch| (launch.kernel.symbol(), launch.cluster))
                .collect();
            let wanted = format!("mhc_{function}_{size}");
            assert_eq!(found, [(wanted, cluster)], "{sizes:?} {constraint:?}");
        }
    }
}

#[test]
fn every_cluster_from_2_to_16_has_a_case() {
    for size in 2..=16 {
        assert!(CASES.iter().any(|case| case.3 == size), "{size}");
    }
}

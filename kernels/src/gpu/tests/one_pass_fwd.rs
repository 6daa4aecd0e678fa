//! Which kernels the forward calls take that read the streams once.

use super::{H100, needed};
use crate::contract::check::Example;
use crate::contract::config::{Config, Constraint};
use crate::contract::table::Call;
use crate::contract::view::DType;
use crate::gpu::plan;

/// C, constraint, and the size and cluster of the kernel. `tests/test_one_pass_fwd.py` runs the same cases.
const CASES: &[(usize, Constraint, &str, u32)] = &[
    (512, Constraint::None, "w256", 2),
    (960, Constraint::Birkhoff, "w320", 3),
    (768, Constraint::Birkhoff, "w384", 2),
    (1600, Constraint::Birkhoff, "w448", 4),
    (2304, Constraint::Birkhoff, "w320", 8),
    (4608, Constraint::Birkhoff, "w320", 15),
    (8128, Constraint::Birkhoff, "w512", 16),
    (8192, Constraint::None, "w512", 16),
    (2496, Constraint::Identity, "w512k8", 5),
    (1408, Constraint::Permutations, "w256k32", 6),
    (3520, Constraint::Identity, "w512k8", 7),
    (4608, Constraint::Identity, "w512k8", 9),
    (5120, Constraint::Identity, "w384k8", 14),
    (7168, Constraint::Identity, "w512k8", 14),
    (704, Constraint::Permutations, "w256k32", 3),
    (2560, Constraint::Permutations, "w256k32", 10),
    (2816, Constraint::Permutations, "w256k32", 11),
    (4928, Constraint::Permutations, "w384k32", 13),
    (4544, Constraint::Permutations, "w384k32", 12),
    (6144, Constraint::Permutations, "w384k32", 16),
];

#[test]
fn forward_calls_run_one_kernel_of_a_size_for_their_width() {
    for &(c, constraint, size, cluster) in CASES {
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
            let example = Example::new(kind, DType::Bf16, 17, [4, c], config);
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
                .map(|launch| (launch.kernel.function, launch.kernel.size, launch.cluster))
                .collect();
            assert_eq!(found, [(function, size, cluster)], "{c} {constraint:?}");
        }
    }
}

#[test]
fn every_cluster_from_2_to_16_has_a_case() {
    for size in 2..=16 {
        assert!(CASES.iter().any(|case| case.3 == size), "{size}");
    }
}

//! Tests of the CUDA side that need no GPU.

mod one_pass_fwd;
mod random;
mod scratch;

use super::device::Device;
use super::images::{build, check_capability, has_symbol};
use super::launch::{Arg, Launch, Map, Tensor, line};
use super::{Problem, check_device_call, describe_plan, plan, status};
use crate::contract::check::{CheckedCall, Example};
use crate::contract::table::{Call, Group};
use crate::contract::view::DType;
use crate::{Config, Constraint};

const H100: Device = Device {
    ordinal: 0,
    capability: (9, 0),
    num_sms: 132,
    max_shared_bytes: 227 << 10,
    max_clusters: [132, 66, 39, 30, 22, 17, 15, 15, 9, 7, 7, 7, 7, 7, 7, 7],
};

const B200: Device = Device {
    capability: (10, 0),
    num_sms: 148,
    max_clusters: [148, 74, 45, 36, 26, 21, 18, 18, 12, 10, 8, 8, 8, 8, 8, 8],
    ..H100
};

/// Ada: the least shared memory of all that there are kernels for.
const L4: Device = Device {
    ordinal: 0,
    capability: (8, 9),
    num_sms: 58,
    max_shared_bytes: 99 << 10,
    max_clusters: [0; 16],
};

#[test]
fn tensors_have_the_layout_that_one_pass_kernels_read() {
    let layout = |map: Map| (map.start, map.sizes, map.strides, map.box_sizes);
    let start = 1 << 20;
    let wide = Tensor::new(start, DType::F32, [100, 4, 4096], [8, 256]);
    let wide_strides = [4 * 16384, 128, 16384];
    assert_eq!(
        layout(wide.boxes()),
        (start, [32, 100, 128, 4], wide_strides, [32, 8, 8, 4])
    );
    let tensor = Tensor::new(start, DType::Bf16, [100, 4, 4096], [8, 256]);
    let strides = |step: u64| [4 * 8192, 128, step * 8192];
    assert_eq!(
        layout(tensor.boxes()),
        (start, [64, 100, 64, 4], strides(1), [64, 8, 4, 4])
    );
    assert_eq!(tensor.last_block(), [None; 2]);
    for first_stream in [0, 1] {
        let half = tensor.every_second(first_stream).boxes();
        assert_eq!(half.start, start + 8192 * first_stream as u64);
        assert_eq!(half.sizes, [64, 100, 64, 2]);
        assert_eq!(half.strides, strides(2));
        assert_eq!(half.box_sizes, [64, 8, 4, 2]);
    }
}

#[test]
fn tensors_have_the_last_lines_of_streams_that_end_within_a_line() {
    let of = |c| {
        let tensor = Tensor::new(1 << 20, DType::Bf16, [100, 4, c], [8, 256]);
        (tensor.boxes(), tensor.last_block())
    };
    let (boxes, [lines, rest]) = of(1000);
    assert_eq!(boxes.sizes, [64, 100, 15, 4]);
    let box_sizes = [64, 8, 3, 1];
    assert_eq!(lines, Some(Map { box_sizes, ..boxes }));
    let expected = Map {
        start: boxes.start + 2 * 960,
        sizes: [40, 100, 1, 4],
        box_sizes: [64, 8, 1, 1],
        ..boxes
    };
    assert_eq!(rest, Some(expected));
    // A last block with less than a line.
    let (boxes, [lines, rest]) = of(1032);
    assert_eq!((boxes.sizes[2], lines), (16, None));
    let rest = rest.unwrap();
    assert_eq!(rest.start, boxes.start + 2 * 1024);
    assert_eq!((rest.sizes[0], rest.box_sizes), (8, [64, 8, 4, 1]));
}

#[test]
fn clusters_are_as_many_as_run_at_once() {
    assert_eq!(H100.num_clusters(16, 1000), Some(7));
    assert_eq!(H100.num_clusters(8, 3), Some(3));
    assert_eq!(H100.num_clusters(8, 0), Some(0));
    assert_eq!(H100.num_clusters(3, 1000), Some(39));
    assert_eq!(H100.num_clusters(17, 1000), None);
    assert_eq!(H100.num_clusters(0, 1000), None);
    assert_eq!(L4.num_clusters(16, 1000), None);
}

/// All ops in many sizes.
fn examples() -> Vec<(String, Example)> {
    let mut examples = Vec::new();
    for kind in Call::ALL {
        for dtype in [DType::F32, DType::Bf16, DType::F16] {
            if dtype != DType::F32 && matches!(kind, Call::SinkhornFwd | Call::SinkhornBwd) {
                continue;
            }
            for (tokens, sizes) in [
                (0, [4, 64]),
                (1, [1, 1]),
                (17, [2, 33]),
                (1000, [3, 7]),
                (8192, [4, 4096]),
                (1000, [4, 2560]),
                (100, [4, 1000]),
                (70, [4, 4104]),
                (50, [2, 520]),
                (1000, [2, 2048]),
                (1000, [1, 2048]),
                (16, [8, 100]),
                (300, [8, 4096]),
                (700, [5, 320]),
                (900, [16, 2048]),
                (5, [16, 8]),
            ] {
                // The divisors of many iterations lie in the workspace and not in shared memory.
                let many_iterations = (Constraint::Birkhoff, 200, false);
                let all = Constraint::ALL.iter();
                let all = all.map(|constraint| (*constraint, 20, *constraint != Constraint::None));
                for (constraint, sinkhorn_iters, deferred) in all.chain([many_iterations]) {
                    if sizes[0] > constraint.max_streams() {
                        continue;
                    }
                    let config = Config {
                        constraint,
                        sinkhorn_iters,
                        deferred,
                        ..Config::default()
                    };
                    let example = || Example::new(kind, dtype, tokens, sizes, config);
                    let name = format!(
                        "{kind:?} {dtype:?} {tokens} {sizes:?} {constraint:?} {sinkhorn_iters}"
                    );
                    examples.push((format!("{name} static"), example().into_static()));
                    if !kind.groups().is_empty() {
                        examples.push((format!("{name} norm"), example().with_norm()));
                    }
                    if kind.groups().contains(&Group::Given) {
                        let given = || example().with_given();
                        examples.push((format!("{name} given"), given()));
                        examples.push((format!("{name} given static"), given().into_static()));
                    }
                    examples.push((name, example()));
                }
            }
        }
    }
    examples
}

#[test]
fn a_described_plan_is_the_one_that_is_made() {
    let mut num = 0;
    for (name, example) in examples() {
        let needed = example.check(|call| needed(&call.unwrap()));
        let example = example.with_workspace(needed);
        for device in [H100, B200, L4] {
            example.check(|call| {
                let call = call.unwrap();
                let sizes = [call.tokens, call.n, call.c];
                let told =
                    describe_plan(call.kind, call.dtype, sizes, call.config, device.capability);
                if check_capability(device.capability).is_err() {
                    return assert!(told.is_err(), "{name}");
                }
                let (told, made) = (told.unwrap(), plan(&call, &device).unwrap());
                let symbols = made.launches.iter().map(|launch| launch.kernel.symbol());
                assert_eq!(told.schedule, made.schedule, "{name}");
                assert!(symbols.eq(told.kernels), "{name}");
                num += 1;
            });
        }
    }
    assert!(build().is_none() || num > 1000, "{num}");
}

#[test]
fn only_possible_calls_have_a_plan_to_describe() {
    let config = Config::default();
    let describe = |dtype, sizes, config: &Config, capability| {
        describe_plan(Call::PreFwd, dtype, sizes, config, capability)
    };
    let possible = [8192, 4, 4096];
    assert!(describe(DType::Bf16, possible, &config, (7, 5)).is_err());
    assert!(describe(DType::F64, possible, &config, (9, 0)).is_err());
    let permutations = Config {
        constraint: Constraint::Permutations,
        ..Config::default()
    };
    assert!(describe(DType::Bf16, [8192, 5, 64], &permutations, (9, 0)).is_err());
    for at in 0..3 {
        for absurd in [usize::MAX, 1 << 31, 1 << 62] {
            let mut sizes = possible;
            sizes[at] = absurd;
            assert!(describe(DType::Bf16, sizes, &config, (9, 0)).is_err());
        }
    }
    if build().is_some() {
        let told = describe(DType::Bf16, possible, &config, (9, 0)).unwrap();
        assert_eq!(told.kernels, ["mhc_pre_fwd_one_pass_w256_bf16"]);
    }
}

/// Floats that the workspace of a call has to have.
fn needed(call: &CheckedCall) -> usize {
    Problem::of(call).workspace().unwrap().len(call.tokens)
}

/// Checks the limits of the copy engine.
fn check_map(map: Map, launch: &Launch, name: &str) {
    let least = u64::from(!launch.grid.contains(&0));
    let possible = |size: &u64| (least..=1 << 32).contains(size);
    assert!(map.sizes.iter().all(possible), "{name}");
    assert!(map.start.is_multiple_of(16), "{name}");
    let possible = |stride: &u64| stride.is_multiple_of(16) && *stride < 1 << 40;
    assert!(map.strides.iter().all(possible), "{name}");
    let possible = |size: &u32| (1..=256).contains(size);
    assert!(map.box_sizes.iter().all(possible), "{name}");
}

/// Checks the limits of CUDA and of a GPU.
fn check_launch(launch: &Launch, device: &Device, name: &str) {
    let [x, y, z] = launch.grid;
    assert!(x < 1 << 31 && y < 1 << 16 && z < 1 << 16, "{name}");
    assert!(
        launch.block <= 1024 && launch.block.is_multiple_of(32),
        "{name}"
    );
    assert!(launch.block as usize <= launch.kernel.threads(), "{name}");
    assert!(launch.shared_bytes <= device.max_shared_bytes, "{name}");
    assert_eq!(x % launch.cluster, 0, "{name}");
    for arg in &launch.args {
        match arg {
            Arg::I32(number) => assert!(*number >= 0, "{name}"),
            Arg::I64(number) => assert!(*number >= 0, "{name}"),
            Arg::TensorMap(tensor) => {
                let line = line(tensor.dtype);
                assert!(tensor.hidden.is_multiple_of(line), "{name}");
                check_map(tensor.boxes(), launch, name);
            }
            Arg::BlockMaps(tensor) => {
                check_map(tensor.boxes(), launch, name);
                for map in tensor.last_block().into_iter().flatten() {
                    check_map(map, launch, name);
                }
            }
            _ => {}
        }
    }
}

#[test]
fn plans_name_kernels_that_exist_and_fit_the_gpu() {
    let mut seen = std::collections::HashSet::new();
    for (name, example) in examples() {
        let needed = example.check(|call| needed(&call.unwrap()));
        let example = example.with_workspace(needed);
        for device in [H100, B200, L4] {
            let launches = example.check(|call| plan(&call.unwrap(), &device).unwrap().launches);
            for launch in launches {
                check_launch(&launch, &device, &name);
                // So that a multiprocessor has one block, as Device::max_clusters says.
                let alone = launch.shared_bytes > device.max_shared_bytes / 2;
                assert!(launch.cluster == 1 || alone, "{name}");
                let runs = build().is_some_and(|build| {
                    let (major, minor) = device.capability;
                    build
                        .architectures
                        .contains(&&*format!("sm_{major}{minor}"))
                });
                if runs && seen.insert((launch.kernel, device.capability)) {
                    let symbol = launch.kernel.symbol();
                    assert!(has_symbol(&launch.kernel, device.capability), "{symbol}");
                }
            }
        }
    }
}

/// The kernels of a call of 17 tokens, in their order.
fn functions_of(example: Example, device: &Device) -> Vec<&'static str> {
    let needed = example.check(|call| needed(&call.unwrap()));
    let example = example.with_workspace(needed);
    let launches = example.check(|call| plan(&call.unwrap(), device).unwrap().launches);
    launches
        .iter()
        .map(|launch| launch.kernel.function)
        .collect()
}

#[test]
fn forward_calls_with_given_weights_read_the_streams_once() {
    let is_fast = |device: &Device, dtype, sizes, constraint| {
        let config = Config {
            constraint,
            ..Config::default()
        };
        let example = Example::new(Call::PostPreFwd, dtype, 17, sizes, config).with_given();
        functions_of(example, device) == ["post_given_fwd", "given_coefficients"]
    };
    for device in [H100, B200] {
        for dtype in [DType::Bf16, DType::F16] {
            for &constraint in Constraint::ALL {
                for c in [64, 256, 1000, 2560, 4096, 16384, 40000] {
                    assert!(is_fast(&device, dtype, [4, c], constraint), "{c}");
                }
                let has_eight_columns =
                    matches!(constraint, Constraint::Birkhoff | Constraint::None);
                assert_eq!(
                    is_fast(&device, dtype, [2, 2048], constraint),
                    has_eight_columns
                );
                assert!(!is_fast(&device, dtype, [4, 4100], constraint));
                assert!(!is_fast(&device, dtype, [4, 56], constraint));
                assert!(!is_fast(&device, dtype, [3, 4096], constraint));
            }
        }
        assert!(is_fast(
            &device,
            DType::F32,
            [4, 4096],
            Constraint::Birkhoff
        ));
        assert!(is_fast(&device, DType::F32, [4, 96], Constraint::Identity));
        assert!(!is_fast(
            &device,
            DType::F32,
            [4, 4096],
            Constraint::Permutations
        ));
    }
    assert!(!is_fast(&L4, DType::Bf16, [4, 4096], Constraint::Birkhoff));
}

#[test]
fn blocks_of_given_weights_divide_channels_and_tokens() {
    for (tokens, c, blocks, cluster) in [
        (8192, 4096, [16, 8], 2),
        (8192, 5120, [20, 6], 2),
        (8192, 1024, [4, 33], 2),
        (8192, 2304, [9, 14], 1),
        (17, 4096, [16, 3], 2),
        (8192, 40000, [157, 1], 1),
        (0, 4096, [16, 0], 2),
    ] {
        let example = Example::new(
            Call::PostPreFwd,
            DType::Bf16,
            tokens,
            [4, c],
            Config::default(),
        )
        .with_given();
        let needed = example.check(|call| needed(&call.unwrap()));
        let example = example.with_workspace(needed);
        let launches = example.check(|call| plan(&call.unwrap(), &H100).unwrap().launches);
        let [x, y, z] = launches[0].grid;
        assert_eq!(([x, y], z), (blocks, 1), "{tokens} {c}");
        assert_eq!(launches[0].cluster, cluster, "{c}");
    }
}

#[test]
fn deferred_cotangents_are_mixed_on_their_way_where_that_fits() {
    let mixes = |device: &Device, kind, dtype, sizes, deferred| {
        let config = Config {
            deferred,
            ..Config::default()
        };
        let example = Example::new(kind, dtype, 17, sizes, config);
        functions_of(example, device).contains(&"mix")
    };
    for kind in [Call::PreBwd, Call::PostPreBwd] {
        assert!(!mixes(&H100, kind, DType::Bf16, [4, 4096], true));
        assert!(!mixes(&L4, kind, DType::F32, [4, 4096], true));
        assert!(!mixes(&H100, kind, DType::Bf16, [8, 4096], true));
        assert!(!mixes(&H100, kind, DType::Bf16, [1, 4096], true));
        assert!(!mixes(&H100, kind, DType::F32, [7, 2050], true));
        assert!(!mixes(&L4, kind, DType::Bf16, [8, 4096], true));
        assert!(mixes(&L4, kind, DType::F16, [8, 4096], true));
        assert!(mixes(&H100, kind, DType::Bf16, [9, 4096], true));
        assert!(mixes(&H100, kind, DType::F32, [16, 64], true));
        assert!(!mixes(&H100, kind, DType::F32, [16, 64], false));
    }
}

#[test]
fn any_number_of_streams_has_kernels_for_about_as_many() {
    let sizes = |n, c| {
        let example = Example::new(Call::PreFwd, DType::Bf16, 17, [n, c], Config::default());
        let needed = example.check(|call| needed(&call.unwrap()));
        let example = example.with_workspace(needed);
        let launches = example.check(|call| plan(&call.unwrap(), &L4).unwrap().launches);
        let kernels = launches.iter().map(|launch| launch.kernel);
        kernels
            .map(|kernel| (kernel.function, kernel.size))
            .collect::<Vec<_>>()
    };
    for (n, c, columns, streams) in [
        (1, 64, "k8", "upto4"),
        // Kernels for 24 columns take 15, and rows of four streams that are not aligned alone.
        (3, 64, "k24", "upto4"),
        (4, 34, "k24", "upto4"),
        (4, 33, "any", "upto4"),
        (8, 64, "k80", "n8"),
        (7, 64, "any", "upto8"),
        (16, 64, "any", "any"),
    ] {
        let project = match (columns, c) {
            ("k8" | "k24", _) => vec![("project", columns)],
            (_, 33) => vec![
                ("phi_fragments", columns),
                ("project_tiled_unaligned", columns),
            ],
            _ => vec![("phi_fragments", columns), ("project_tiled", columns)],
        };
        let expected = [project, vec![("pre_fwd", streams)]].concat();
        assert_eq!(sizes(n, c), expected, "{n} {c}");
    }
}

#[test]
fn warpgroups_multiply_many_columns_where_there_are_lines() {
    let functions = |device: &Device, kind, dtype, [n, c]: [usize; 2]| {
        let example = Example::new(kind, dtype, 17, [n, c], Config::default());
        functions_of(example, device)
    };
    let multiply = |functions: &[&str]| functions.iter().any(|name| name.ends_with("_lines"));
    for sizes in [[8, 2048], [8, 72], [5, 64], [7, 4096], [16, 2048], [16, 4]] {
        let forward = functions(&H100, Call::PreFwd, DType::Bf16, sizes);
        assert_eq!(forward, ["phi_lines", "project_lines", "pre_fwd"]);
        let backward = functions(&H100, Call::PreBwd, DType::Bf16, sizes);
        let expected = ["r_dm_lines", "d_phi_lines"];
        assert!(backward.windows(2).any(|two| two == expected), "{sizes:?}");
        let back = backward.contains(&"project_back_lines");
        assert_eq!(back, sizes[0] > 8 && sizes[1] % 64 == 0, "{sizes:?}");
        for device in [B200, L4] {
            assert!(!multiply(&functions(
                &device,
                Call::PreFwd,
                DType::Bf16,
                sizes
            )));
        }
        for dtype in [DType::F16, DType::F32] {
            assert!(!multiply(&functions(&H100, Call::PreBwd, dtype, sizes)));
        }
    }
    // n C that are no whole lines, few columns, and the kernel that takes four streams back for all but d_phi.
    for sizes in [[7, 8], [8, 4], [3, 64], [4, 8192]] {
        assert!(!multiply(&functions(
            &H100,
            Call::PreBwd,
            DType::Bf16,
            sizes
        )));
    }
}

#[test]
fn post_leaves_pre_what_it_would_read_many_streams_for() {
    let first = |device: &Device, dtype, sizes, has_norm| {
        let example = Example::new(Call::PostPreBwd, dtype, 17, sizes, Config::default());
        let example = if has_norm {
            example.with_norm()
        } else {
            example
        };
        functions_of(example, device)[0]
    };
    for device in [H100, B200, L4] {
        for sizes in [[8, 2048], [5, 72], [16, 8]] {
            let first = |dtype, has_norm| first(&device, dtype, sizes, has_norm);
            assert_eq!(first(DType::Bf16, false), "post_dots_fwd");
            assert_eq!(first(DType::Bf16, true), "post_fwd");
            assert_eq!(first(DType::F16, false), "post_fwd");
        }
        assert_eq!(first(&device, DType::Bf16, [3, 2048], false), "post_fwd");
        let unaligned = first(&device, DType::Bf16, [8, 2049], false);
        assert_eq!(unaligned, "post_fwd_unaligned");
    }
}

#[test]
fn blocks_of_all_streams_have_stages_where_there_is_memory() {
    let has_stages = |device: &Device, dtype, n, c| {
        let config = Config {
            deferred: true,
            ..Config::default()
        };
        let example = Example::new(Call::PreBwd, dtype, 17, [n, c], config);
        functions_of(example, device).contains(&"project_back_stages")
    };
    for (n, c) in [(8, 2048), (8, 72), (5, 4096)] {
        assert!(has_stages(&H100, DType::Bf16, n, c));
        assert!(has_stages(&B200, DType::Bf16, n, c));
        assert!(!has_stages(&L4, DType::Bf16, n, c));
        assert!(!has_stages(&H100, DType::F16, n, c));
    }
    for (n, c) in [(8, 2050), (4, 16384), (9, 2048)] {
        assert!(!has_stages(&H100, DType::Bf16, n, c));
    }
}

#[test]
fn post_pre_reads_the_streams_once_where_a_kernel_does() {
    let functions = |device: &Device, dtype, c| {
        let example = Example::new(Call::PostPreBwd, dtype, 17, [4, c], Config::default());
        functions_of(example, device)
    };
    let once = ["logits_bwd", "post_pre_bwd_one_pass", "sum_gradients"];
    for c in [320, 640, 1000, 1024, 2304, 4096] {
        assert_eq!(functions(&H100, DType::Bf16, c), once);
        assert_eq!(functions(&H100, DType::F16, c), once);
    }
    let but_phi = [
        "logits_bwd",
        "post_pre_bwd_one_pass",
        "phi_bwd",
        "sum_gradients",
    ];
    for c in [4104, 4160, 6144, 7168] {
        assert_eq!(functions(&H100, DType::Bf16, c), but_phi);
        assert_eq!(functions(&H100, DType::F16, c), but_phi);
    }
    let pre_once = [
        "post_fwd",
        "logits_bwd",
        "pre_bwd_one_pass",
        "sum_gradients",
        "post_bwd",
    ];
    assert_eq!(functions(&B200, DType::Bf16, 4096), pre_once);
    assert_eq!(functions(&B200, DType::Bf16, 2560), pre_once);
    for c in [264, 2080, 4096] {
        assert_eq!(functions(&H100, DType::F32, c), once);
        assert_eq!(functions(&B200, DType::F32, c), pre_once);
    }
    for c in [512, 4096, 6144] {
        assert_eq!(functions(&B200, DType::F16, c), pre_once);
    }
    for (device, dtype, c) in [
        (L4, DType::Bf16, 4096),
        (L4, DType::F32, 4096),
        (H100, DType::F16, 4100),
        (H100, DType::F32, 4104),
        (H100, DType::F32, 2052),
        (H100, DType::Bf16, 4100),
    ] {
        let functions = functions(&device, dtype, c);
        assert!(!functions.iter().any(|name| name.ends_with("one_pass")));
    }
}

#[test]
fn post_pre_takes_two_streams_back_in_one_pass() {
    let functions = |device: &Device, constraint, c, with_norm| {
        let config = Config {
            constraint,
            ..Config::default()
        };
        let example = Example::new(Call::PostPreBwd, DType::Bf16, 17, [2, c], config);
        let example = if with_norm {
            example.with_norm()
        } else {
            example
        };
        functions_of(example, device)
    };
    let once = ["logits_bwd", "post_pre_bwd_one_pass", "sum_gradients"];
    let norm = ["post_pre_norm_bwd", "sum_norm_scale"];
    for c in [520, 2048, 8192] {
        for constraint in [Constraint::Birkhoff, Constraint::None] {
            assert_eq!(functions(&H100, constraint, c, false), once);
            let with_norm = functions(&H100, constraint, c, true);
            assert_eq!(with_norm[..2], norm);
            assert_eq!(with_norm[2..], once);
        }
    }
    for (device, constraint, c) in [
        (&B200, Constraint::Birkhoff, 2048),
        (&H100, Constraint::Birkhoff, 512),
        (&H100, Constraint::Birkhoff, 8200),
        (&H100, Constraint::Identity, 2048),
        (&H100, Constraint::Permutations, 2048),
    ] {
        let functions = functions(device, constraint, c, false);
        assert!(!functions.contains(&"post_pre_bwd_one_pass"));
    }
}

#[test]
fn static_coefficients_have_the_streams_read_once_on_every_gpu() {
    let sums = ["sum_static", "pre_bwd", "sum_gates"];
    for device in [H100, B200, L4] {
        for (constraint, dtype, [n, c]) in [
            (Constraint::Birkhoff, DType::Bf16, [4, 4096]),
            (Constraint::Permutations, DType::F32, [2, 8]),
            (Constraint::Identity, DType::F16, [8, 104]),
            (Constraint::None, DType::Bf16, [3, 64]),
            (Constraint::Birkhoff, DType::Bf16, [4, 100]),
        ] {
            let config = Config {
                constraint,
                ..Config::default()
            };
            let example = |kind| Example::new(kind, dtype, 17, [n, c], config).into_static();
            let functions = |kind| functions_of(example(kind), &device);
            assert_eq!(functions(Call::PreFwd), ["pre_fwd"]);
            assert_eq!(functions(Call::PreBwd)[0], "pre_static_bwd");
            assert_eq!(functions(Call::PreBwd)[1..], sums);
            assert_eq!(
                functions(Call::PostPreFwd),
                ["pre_fwd", "post_pre_static_fwd"]
            );
            let seam = functions(Call::PostPreBwd);
            if n == 3 || c == 100 {
                let post = ["post_fwd", "post_fwd_unaligned"];
                assert!(post.contains(&seam[0]), "{seam:?}");
                assert_eq!(seam[1], "pre_static_bwd");
            } else {
                assert_eq!(seam[0], "post_pre_static_bwd");
                assert_eq!(seam[1..], sums);
            }
        }
    }
}

#[test]
fn pre_takes_every_constraint_back_in_one_pass() {
    let functions = |constraint, sinkhorn_iters, c| {
        let config = Config {
            constraint,
            sinkhorn_iters,
            ..Config::default()
        };
        functions_of(
            Example::new(Call::PreBwd, DType::Bf16, 17, [4, c], config),
            &H100,
        )
    };
    let alone = ["pre_bwd_one_pass", "sum_gradients"];
    let once = ["logits_bwd", "pre_bwd_one_pass", "sum_gradients"];
    for iters in [20, 200] {
        assert_eq!(functions(Constraint::Identity, iters, 6144), alone);
        assert_eq!(functions(Constraint::Permutations, iters, 4096), once);
    }
    for c in [320, 1600, 7168] {
        assert_eq!(functions(Constraint::Birkhoff, 128, c), once);
        assert_eq!(functions(Constraint::None, 128, c), once);
    }
    let but_phi = ["logits_bwd", "pre_bwd_one_pass", "d_phi", "sum_gradients"];
    for c in [7232, 8192] {
        assert_eq!(functions(Constraint::Birkhoff, 128, c), but_phi);
        assert_eq!(functions(Constraint::None, 128, c), but_phi);
    }
    for c in [5184, 6144, 6208, 8192] {
        assert_eq!(functions(Constraint::Permutations, 200, c), but_phi);
    }
    let is_once = |constraint, iters, c| {
        let functions = functions(constraint, iters, c);
        functions.contains(&"pre_bwd_one_pass")
    };
    assert!(!is_once(Constraint::Birkhoff, 129, 4096));
    assert!(!is_once(Constraint::Birkhoff, 20, 4100));
    assert!(!is_once(Constraint::Birkhoff, 20, 8200));
    assert!(!is_once(Constraint::Permutations, 20, 8200));
}

#[test]
fn pre_takes_two_streams_and_float32_back_in_one_pass() {
    let functions = |dtype, n, constraint, with_norm| {
        let config = Config {
            constraint,
            ..Config::default()
        };
        let example = Example::new(Call::PreBwd, dtype, 17, [n, 2048], config);
        let example = if with_norm {
            example.with_norm()
        } else {
            example
        };
        functions_of(example, &H100)
    };
    let once = ["logits_bwd", "pre_bwd_one_pass", "sum_gradients"];
    let norm = ["norm_bwd_once", "sum_norm_scale"];
    for (dtype, n) in [(DType::Bf16, 2), (DType::F32, 4)] {
        for constraint in [Constraint::Birkhoff, Constraint::None] {
            assert_eq!(functions(dtype, n, constraint, false), once);
            let with_norm = functions(dtype, n, constraint, true);
            assert_eq!(with_norm[..2], norm);
            assert_eq!(with_norm[2..], once);
        }
    }
    let identity = functions(DType::F32, 4, Constraint::Identity, false);
    assert_eq!(identity, ["pre_bwd_one_pass", "sum_gradients"]);
    for (dtype, n, constraint) in [
        (DType::Bf16, 2, Constraint::Identity),
        (DType::Bf16, 2, Constraint::Permutations),
        (DType::F32, 4, Constraint::Permutations),
        (DType::F32, 2, Constraint::Birkhoff),
    ] {
        let functions = functions(dtype, n, constraint, false);
        assert!(!functions.contains(&"pre_bwd_one_pass"));
    }
}

#[test]
fn one_stream_is_read_once_by_blocks_that_have_whole_tokens() {
    let functions = |device: &Device, kind, dtype, sizes, constraint, with_norm| {
        let config = Config {
            constraint,
            sinkhorn_iters: 200,
            ..Config::default()
        };
        let example = Example::new(kind, dtype, 17, sizes, config);
        let example = if with_norm {
            example.with_norm()
        } else {
            example
        };
        functions_of(example, device)
    };
    for device in [H100, B200] {
        for (dtype, c) in [
            (DType::Bf16, 256),
            (DType::Bf16, 8192),
            (DType::F16, 1000),
            (DType::F32, 4092),
        ] {
            for &constraint in Constraint::ALL {
                let with_norm =
                    |kind, norm| functions(&device, kind, dtype, [1, c], constraint, norm);
                for norm in [false, true] {
                    assert_eq!(with_norm(Call::PreFwd, norm), ["pre_fwd_one_stream"]);
                    let seam = with_norm(Call::PostPreFwd, norm);
                    assert_eq!(seam, ["post_pre_fwd_one_stream"]);
                }
                let pre = ["pre_bwd_one_stream", "sum_one_stream"];
                assert_eq!(with_norm(Call::PreBwd, false), pre);
                let head = with_norm(Call::HeadFwd, false);
                assert_eq!(head, ["pre_fwd_one_stream"]);
                assert_eq!(with_norm(Call::HeadBwd, false), pre);
                let before = with_norm(Call::PreBwd, true);
                assert_eq!(before[..2], ["norm_bwd", "sum_norm_scale"]);
                assert_eq!(before[2..], pre);
                let seam = ["post_pre_bwd_one_stream", "sum_one_stream"];
                assert_eq!(with_norm(Call::PostPreBwd, false), seam);
                let around = with_norm(Call::PostPreBwd, true);
                assert!(around[0].starts_with("post_fwd") && around[3..5] == pre);
            }
        }
    }
    for (device, dtype, sizes) in [
        (L4, DType::Bf16, [1, 2048]),
        (H100, DType::Bf16, [1, 248]),
        (H100, DType::Bf16, [1, 1004]),
        (H100, DType::Bf16, [1, 8200]),
        (H100, DType::F32, [1, 4100]),
        (H100, DType::Bf16, [2, 2048]),
    ] {
        for kind in [Call::PreFwd, Call::PreBwd, Call::HeadFwd, Call::PostPreBwd] {
            let functions = functions(&device, kind, dtype, sizes, Constraint::Birkhoff, false);
            assert!(!functions.iter().any(|name| name.ends_with("one_stream")));
        }
    }
}

#[test]
fn the_norm_is_in_the_kernels_that_read_the_streams_once() {
    let functions = |device: &Device, kind, c| {
        let example = Example::new(kind, DType::Bf16, 17, [4, c], Config::default()).with_norm();
        functions_of(example, device)
    };
    let pre = ["project", "pre_fwd", "norm_fwd"];
    assert_eq!(functions(&L4, Call::PreFwd, 4096), pre);
    assert_eq!(functions(&L4, Call::PostPreFwd, 4096)[1..], pre);
    for (c, function) in [
        (4096, "norm_bwd_once"),
        (8200, "norm_bwd"),
        (4095, "norm_bwd"),
    ] {
        let before = [function, "sum_norm_scale"];
        assert_eq!(functions(&L4, Call::PreBwd, c)[..2], before);
    }
    for c in [576, 1024, 4096, 2560, 6144, 7168] {
        assert_eq!(functions(&H100, Call::PreFwd, c), ["pre_norm_fwd_one_pass"]);
        assert_eq!(
            functions(&H100, Call::PostPreFwd, c),
            ["post_pre_norm_fwd_one_pass"]
        );
        let pre = [
            "logits_bwd",
            "pre_norm_bwd_one_pass",
            "sum_gradients",
            "sum_norm_scale",
        ];
        assert_eq!(functions(&H100, Call::PreBwd, c), pre);
        let post_pre = [
            "post_pre_norm_bwd",
            "sum_norm_scale",
            "logits_bwd",
            "post_pre_bwd_one_pass",
        ];
        assert_eq!(functions(&H100, Call::PostPreBwd, c)[..4], post_pre);
    }
}

#[test]
fn given_weights_have_kernels_for_every_call() {
    let kernels = |example: Example| {
        let needed = example.check(|call| needed(&call.unwrap()));
        let example = example.with_given().with_workspace(needed);
        example.check(|call| {
            let launches = plan(&call.unwrap(), &L4).unwrap().launches;
            let names = launches.iter().map(|launch| launch.kernel.function);
            names.collect::<Vec<_>>()
        })
    };
    let example = |kind, sizes| Example::new(kind, DType::F32, 100, sizes, Config::default());
    let forward = kernels(example(Call::PostPreFwd, [4, 33]));
    assert_eq!(forward.first(), Some(&"post_fwd_unaligned"));
    assert_eq!(
        forward[forward.len() - 2..],
        ["pre_fwd", "collapse_fwd_unaligned"]
    );
    let backward = kernels(example(Call::PostPreBwd, [4, 64]));
    assert_eq!(backward[..3], ["post_fwd", "collapse_bwd", "pre_bwd"]);
    assert_eq!(backward.last(), Some(&"post_bwd"));
    let of_static = |kind| kernels(example(kind, [4, 64]).into_static());
    assert_eq!(
        of_static(Call::PostPreFwd),
        ["pre_fwd", "post_pre_static_fwd"]
    );
    assert_eq!(
        of_static(Call::PostPreBwd),
        ["post_pre_static_bwd", "sum_static", "pre_bwd", "sum_gates"]
    );
}

#[test]
fn streams_are_read_once_beside_given_weights() {
    let kernels = |dtype, sizes, config: Config, device: &Device| {
        let example = Example::new(Call::PostPreBwd, dtype, 1000, sizes, config).with_given();
        let needed = example.check(|call| needed(&call.unwrap()));
        example.with_workspace(needed).check(|call| {
            let launches = plan(&call.unwrap(), device).unwrap().launches;
            let symbols = launches.iter().map(|launch| launch.kernel.symbol());
            symbols.collect::<Vec<_>>()
        })
    };
    let of = |constraint| Config {
        constraint,
        ..Config::default()
    };
    let (birkhoff, identity) = (of(Constraint::Birkhoff), of(Constraint::Identity));
    for (dtype, sizes, config, size) in [
        (DType::Bf16, [4, 4096], birkhoff, "w256_bf16"),
        (DType::F16, [4, 5120], birkhoff, "w256_f16"),
        (DType::Bf16, [4, 4096], identity, "w512k8_bf16"),
        (
            DType::Bf16,
            [4, 2048],
            of(Constraint::Permutations),
            "w128k32_bf16",
        ),
        (DType::Bf16, [2, 2048], birkhoff, "n2w512_bf16"),
    ] {
        let expected = [
            format!("mhc_logits_bwd_n{}_f32", sizes[0]),
            format!("mhc_post_given_bwd_{size}"),
            format!("mhc_sum_given_{size}"),
        ];
        assert_eq!(kernels(dtype, sizes, config, &H100), expected, "{sizes:?}");
        let elsewhere = kernels(dtype, sizes, config, &B200);
        assert!(!elsewhere.contains(&expected[1]), "{sizes:?}");
    }
    let many_iterations = Config {
        sinkhorn_iters: 129,
        ..birkhoff
    };
    for (sizes, config) in [([4, 4100], birkhoff), ([4, 4096], many_iterations)] {
        let symbols = kernels(DType::Bf16, sizes, config, &H100);
        assert!(symbols.iter().all(|symbol| !symbol.contains("given")));
    }
}

#[test]
fn every_call_does_something() {
    for (name, example) in examples() {
        let needed = example.check(|call| needed(&call.unwrap()));
        example.with_workspace(needed).check(|call| {
            let call = call.unwrap();
            let writes = call.tokens > 0 || call.result("d_bias").is_some();
            let launches = plan(&call, &H100).unwrap().launches;
            let runs = launches.iter().any(|launch| !launch.grid.contains(&0));
            assert!(runs || !writes, "{name}");
        });
    }
}

#[test]
fn what_the_kernels_cannot_take_is_refused() {
    let refusal = |dtype, tokens, workspace| {
        let example = Example::new(Call::PreFwd, dtype, tokens, [1, 1], Config::default());
        let check = |example: &Example| {
            example.check(|call| {
                let call = call.unwrap();
                let plan = check_device_call(&call).and_then(|()| plan(&call, &L4));
                plan.map(|_| ()).map_err(|error| error.to_string())
            })
        };
        match workspace {
            Some(len) => check(&example.with_workspace(len)),
            None => check(&example),
        }
        .unwrap_err()
    };
    assert!(refusal(DType::F64, 1, None).contains("no CUDA kernels"));
    assert!(refusal(DType::Bf16, (1 << 30) + 1, None).contains("at most 1073741824 tokens"));
    assert!(refusal(DType::Bf16, 100, None).contains("`workspace`: expected float32["));
    assert!(refusal(DType::Bf16, 100, Some(5)).contains("got float32[5]"));
}

#[test]
fn the_status_is_there_on_every_machine() {
    let status = status();
    assert_eq!(status.compiler.is_some(), build().is_some());
    assert_eq!(
        status.devices.is_empty(),
        status.error.is_some() || status.driver.is_none()
    );
}

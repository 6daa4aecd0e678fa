//! Plans of random calls on random GPUs, the largest and the oddest among them.

use super::super::device::{CLUSTER_SHARED_BYTES, Device, SHARED_BYTES};
use super::super::launch::{Arg, Launch};
use super::super::workspace::MAX_COUNT;
use super::super::{Problem, check_device_call, plan};
use super::check_launch;
use super::scratch::{Span, spans};
use crate::contract::check::{CheckedCall, Example};
use crate::contract::config::{Config, Constraint};
use crate::contract::limits::MAX_SINKHORN_ITERS;
use crate::contract::table::{Call, Group};
use crate::contract::view::DType;

/// SplitMix64.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn below(&mut self, bound: usize) -> usize {
        (self.next() % bound as u64) as usize
    }

    fn of<T: Copy>(&mut self, values: &[T]) -> T {
        values[self.below(values.len())]
    }

    /// A number of any size up to 2^bits.
    fn up_to(&mut self, bits: usize) -> usize {
        let bits = self.below(bits + 1);
        (self.next() as usize) & ((1 << bits) - 1)
    }

    fn device(&mut self) -> Device {
        let most = i32::MAX as u32;
        let clusters = [0, 1, 7, 66, most];
        Device {
            ordinal: 0,
            capability: self.of(&[
                (8, 0),
                (9, 0),
                (9, 0),
                (10, 0),
                (12, 1),
                (99, 0),
                (most, most),
            ]),
            num_sms: self.of(&[0, 1, 58, 132, most]),
            max_shared_bytes: self.of(&[SHARED_BYTES as u32, CLUSTER_SHARED_BYTES, most]),
            max_clusters: [0; 16].map(|_: u32| self.of(&clusters)),
        }
    }

    fn example(&mut self) -> Example {
        let kind = self.of(&Call::ALL);
        // Sizes that kernels read the streams once for are rare among all.
        let is_once = self.below(3) == 0;
        let dtype = match kind {
            Call::SinkhornFwd | Call::SinkhornBwd => DType::F32,
            _ => self.of(&[DType::F32, DType::Bf16, DType::F16]),
        };
        let n = if is_once {
            self.of(&[1, 2, 4])
        } else {
            1 + self.below(16)
        };
        let c = match self.below(4) {
            _ if is_once => self.of(&[1024, 2560, 3072, 4096, 7168]),
            0 => 8 * (1 + self.up_to(27)),
            1 => self.of(&[1, MAX_COUNT / n, MAX_COUNT / n + 1, 1 << 50]),
            _ => 1 + self.up_to(30),
        };
        let tokens = match self.below(4) {
            0 => self.of(&[0, 1, 15, 17, MAX_COUNT, MAX_COUNT + 1, 1 << 58]),
            _ => self.up_to(30),
        };
        let mut constraints = Constraint::ALL.to_vec();
        constraints.retain(|constraint| n <= constraint.max_streams());
        // Twice as often as others, since the one-pass kernels are for it.
        constraints.insert(0, Constraint::Birkhoff);
        let config = Config {
            constraint: self.of(&constraints),
            sinkhorn_iters: self.of(&[0, 1, 20, 128, 129, 200, MAX_SINKHORN_ITERS]),
            deferred: self.below(2) == 0,
            ..Config::default()
        };
        let example = Example::new(kind, dtype, tokens, [n, c], config);
        match self.below(6) {
            0 if !kind.groups().is_empty() => example.with_norm(),
            1 => example.into_static(),
            2 if kind.groups().contains(&Group::Given) => example.with_given(),
            3 if kind.groups().contains(&Group::Given) => example.with_given().into_static(),
            _ => example,
        }
    }
}

/// Checks that pointers are those of the call, and that no two parts of the workspace overlap.
fn check_memory(call: &CheckedCall, launches: &[Launch], name: &str) {
    let (start, len) = call.workspace().expect("there is one");
    let end = start + 4 * len as u64;
    let operands = call
        .operands()
        .map(|value| call.operand_address(value.name));
    let results = call.results().map(|value| call.result_address(value.name));
    let given: Vec<u64> = operands.chain(results).chain([0]).collect();
    let mut parts: Vec<Span> = Vec::new();
    for launch in launches.iter().filter(|launch| !launch.grid.contains(&0)) {
        let symbol = launch.kernel.symbol();
        let touched = spans(call, launch, start);
        for arg in &launch.args {
            let address = match arg {
                Arg::Pointer(address) => *address,
                Arg::TensorMap(tensor) | Arg::BlockMaps(tensor) => tensor.address,
                _ => continue,
            };
            let is_part = touched.iter().any(|(of, _)| *of == address);
            assert!(
                given.contains(&address) || is_part,
                "{name} {symbol} {arg:?}"
            );
        }
        parts.extend(touched);
    }
    parts.retain(|(_, bytes)| *bytes > 0);
    parts.sort_by_key(|(address, bytes)| (*address, std::cmp::Reverse(*bytes)));
    parts.dedup_by_key(|(address, _)| *address);
    let starts = parts
        .iter()
        .skip(1)
        .map(|(address, _)| *address)
        .chain([end]);
    for ((address, bytes), next) in parts.iter().zip(starts) {
        assert!(
            address + *bytes as u64 <= next,
            "{name}: {bytes} bytes at {address}"
        );
    }
}

#[test]
fn plans_of_any_call_keep_to_its_memory_and_to_cudas_limits() {
    const CALLS: usize = 30_000;
    let mut random = Random(17);
    let (mut planned, mut refused) = (0, 0);
    for at in 0..CALLS {
        let (example, device) = (random.example(), random.device());
        let needed = example.check(|call| {
            let call = call.ok()?;
            Some(
                Problem::of(&call)
                    .workspace()?
                    .len(call.tokens.min(MAX_COUNT)),
            )
        });
        let Some(needed) = needed else {
            refused += 1;
            continue;
        };
        example.with_workspace(needed).check(|call| {
            let Ok(call) = call.and_then(|call| check_device_call(&call).map(|()| call)) else {
                refused += 1;
                return;
            };
            planned += 1;
            let name = format!("{at}: {:?} of {} tokens", Problem::of(&call), call.tokens);
            let launches = plan(&call, &device).expect("room").launches;
            for launch in &launches {
                check_launch(
                    launch,
                    &device,
                    &format!("{name} {}", launch.kernel.symbol()),
                );
            }
            check_memory(&call, &launches, &name);
        });
    }
    println!("{planned} calls planned, {refused} refused");
    assert!(planned > CALLS / 3 && refused > CALLS / 30);
}

#[test]
fn workspaces_of_any_sizes_are_told_or_none() {
    let mut random = Random(18);
    let odd = [0, 1, 4, 16, 24, 4096, MAX_COUNT, 1 << 62, usize::MAX];
    let mut number = || match random.below(3) {
        0 => random.of(&odd),
        1 => random.of(&[0, 4, 24]),
        _ => random.up_to(63),
    };
    let mut told = 0;
    for _ in 0..30_000 {
        for kind in Call::ALL {
            for dtype in [DType::F32, DType::Bf16] {
                let [n, c, columns, sinkhorn_iters, norm_width] = [0; 5].map(|_: usize| number());
                let problem = Problem {
                    kind,
                    dtype,
                    n,
                    c,
                    columns,
                    sinkhorn_iters,
                    norm_width,
                    given: sinkhorn_iters % 2 == 1,
                };
                let Some(workspace) = problem.workspace() else {
                    continue;
                };
                told += 1;
                assert!(
                    i64::try_from(workspace.len(MAX_COUNT)).is_ok(),
                    "{problem:?}"
                );
            }
        }
    }
    assert!(told > 1000, "{told}");
}

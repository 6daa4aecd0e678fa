//! Answers that a driver may give about itself and its GPUs.

use jax_mhc_kernels::gpu;

use crate::calls::calls;
use crate::driver::FakeDriver;

/// Names and numbers for libcuda.c, such as `count -5`.
pub fn cases() -> impl Iterator<Item = String> {
    let numbers = [
        "multiprocessors",
        "major",
        "minor",
        "shared_bytes",
        "clusters",
        "static_bytes",
    ];
    let cases = numbers.map(|name| (name, vec![-1, 0, 1, i32::MAX, i32::MIN]));
    let others = [
        ("major", vec![7, 99]),
        ("ordinal", vec![-1, i32::MAX]),
        ("name_without_end", vec![1]),
        ("count", vec![-5, 0, 3, i32::MAX]),
        ("version", vec![-1, 0, 11_080]),
    ];
    let cases = cases.into_iter().chain(others);
    cases.flat_map(|(name, values)| {
        values
            .into_iter()
            .map(move |value| format!("{name} {value}"))
    })
}

/// Runs everything while the driver tells something odd, which is refused by name or taken as it is. How many outcomes
/// there were.
pub fn check(what: &str) -> usize {
    let (name, value) = what.split_once(' ').unwrap();
    let value: i32 = value.parse().unwrap();
    let driver = FakeDriver::load();
    driver.set(name, value);
    let status = gpu::status();
    let is_negative = value < 0;
    let refused = match name {
        "version" => Some("expected a driver for CUDA 12.0 or newer, got one for CUDA"),
        "major" | "minor" if is_negative => {
            Some("cuDeviceGetAttribute(CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_M")
        }
        "major" if value < 8 => Some("expected a GPU of compute capability 8.0 (Ampere) or newer"),
        "multiprocessors" if is_negative => Some("COUNT): expected 0 to 2147483647, got -"),
        "shared_bytes" if is_negative => Some("OPTIN): expected 0 to 2147483647, got -"),
        "shared_bytes" if value < 100_000 => Some("bytes of shared memory for a block, got"),
        "clusters" if is_negative => {
            Some("cuOccupancyMaxActiveClusters: expected 0 to 2147483647, got -")
        }
        "static_bytes" if !(0..=232_448).contains(&value) => {
            Some("cuKernelGetAttribute: expected 0 to 232448, got")
        }
        _ => None,
    };
    let has_kernels = gpu::build().is_some();
    match name {
        "count" => {
            let possible = (0..=1024).contains(&value);
            assert_eq!(
                status.devices.len(),
                if possible { value as usize } else { 0 }
            );
            let error = status.error.unwrap_or_default();
            assert!(
                possible || !has_kernels || error.contains("cuDeviceGetCount: expected 0 to 1024"),
                "{error}"
            );
        }
        "name_without_end" => {
            assert_eq!(
                status.devices[0].name.as_deref(),
                Some("x".repeat(256).as_str())
            );
        }
        _ => {}
    }
    let mut outcomes = 1;
    for call in calls() {
        for outcome in call.run() {
            match (outcome, refused) {
                (Err(message), Some(refused)) if has_kernels || name == "version" => {
                    assert!(
                        message.starts_with(call.op.name()) && message.contains(refused),
                        "{message}"
                    );
                }
                (Ok(()), Some(refused)) => panic!("{what}: expected {refused}"),
                (outcome, _) if has_kernels => outcome.unwrap(),
                (outcome, _) => assert!(outcome.is_err()),
            }
            assert_eq!(driver.depth(), 0);
            outcomes += 1;
        }
    }
    outcomes
}

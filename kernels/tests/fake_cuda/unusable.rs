//! A driver that lacks a function, or a file that is none.

use jax_mhc_kernels::gpu;

use crate::calls::calls;

const REMEDY: &str = "install NVIDIA's driver, version 525 or newer";

/// Runs everything with a driver that lacks `missing`. How many outcomes there were.
pub fn check(missing: &str) -> usize {
    let status = gpu::status();
    assert!(status.driver.is_none() && status.devices.is_empty());
    let told = |message: &str| message.contains(missing) && message.ends_with(REMEDY);
    let error = status.error.expect("a reason");
    assert!(gpu::build().is_none() || told(&error), "{error}");
    let mut outcomes = 1;
    for call in calls() {
        for outcome in call.run() {
            let message = outcome.unwrap_err();
            assert!(
                message.starts_with(call.op.name()) && told(&message),
                "{message}"
            );
            outcomes += 1;
        }
    }
    outcomes
}

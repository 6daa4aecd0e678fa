//! Every function fails with every code, and then no more.

use jax_mhc_kernels::gpu;

use crate::calls::calls;
use crate::driver::FakeDriver;

/// Codes that a driver returns: of all ages of CUDA, of errors that stay, and one that no driver has.
const CODES: [i32; 5] = [1, 2, 700, 999, 12345];

/// The ones of (status, device, initialize, execute) that look at a function's result.
fn told_by(function: &str) -> [bool; 4] {
    let has_kernels = gpu::build().is_some();
    match function {
        "cuInit" | "cuDriverGetVersion" => [true, true, true, true],
        "cuDeviceGetCount" => [true, true, false, false],
        "cuDeviceGetAttribute" => [false, true, true, true],
        "cuStreamGetCtx" | "cuCtxPushCurrent_v2" | "cuCtxGetDevice" => [false, false, true, true],
        // Another error comes first where there are no kernels.
        "cuCtxPopCurrent_v2" => [false, false, has_kernels, has_kernels],
        "cuGetErrorName" | "cuGetErrorString" | "cuDeviceGetName" => [false; 4],
        "cuTensorMapEncodeTiled" | "cuLaunchKernelEx" => [false, false, false, has_kernels],
        _ => [false, false, has_kernels, has_kernels],
    }
}

/// Runs everything while a function returns each code, and again without. How many outcomes there were while it did.
pub fn check(function: &str) -> usize {
    let driver = FakeDriver::load();
    let has_kernels = gpu::build().is_some();
    let [by_status, by_device, initialize, execute] = told_by(function);
    let mut outcomes = 0;
    for code in CODES {
        let in_driver = |message: &str| {
            let known = format!("{function}: CUDA_ERROR_FAKE (a fake error)");
            let number = format!("{function}: error {code}");
            // A driver without a version is not asked for names.
            let is_named = code < 1000 && function != "cuDriverGetVersion";
            message.contains(if is_named { &known } else { &number })
        };
        driver.set(function, code);
        let status = gpu::status();
        let error = status.error.as_deref().filter(|_| has_kernels);
        assert_eq!(
            error.is_some_and(in_driver),
            by_status && has_kernels,
            "{status:?}"
        );
        let device = status.devices.first();
        let usable = device.is_some_and(|device| device.error.is_none());
        assert_eq!(usable, !by_device && has_kernels, "{status:?}");
        assert_eq!(
            device.is_some_and(|device| device.name.is_none()),
            function == "cuDeviceGetName"
        );
        for call in calls() {
            for (outcome, is_told) in call.run().into_iter().zip([initialize, execute]) {
                // A call without boxes of streams needs no maps of them.
                let is_told =
                    is_told && (function != "cuTensorMapEncodeTiled" || call.reads_once());
                match outcome {
                    Ok(()) => assert!(has_kernels && !is_told, "{code}"),
                    Err(message) => {
                        assert!(message.starts_with(call.op.name()), "{message}");
                        assert!(!has_kernels || is_told, "{message}");
                        assert_eq!(in_driver(&message), is_told, "{message}");
                    }
                }
                assert_eq!(driver.depth(), 0);
                outcomes += 1;
            }
        }
        outcomes += 1;
    }
    names_of_errors_may_fail(&driver, function);
    driver.set(function, 0);
    let status = gpu::status();
    assert_eq!(status.error.is_none(), has_kernels, "{status:?}");
    for call in calls() {
        for outcome in call.run() {
            check_healthy(outcome);
        }
    }
    assert_eq!(driver.num_launches() > 0, has_kernels);
    assert_eq!(driver.depth(), 0);
    outcomes
}

fn check_healthy(outcome: Result<(), String>) {
    match outcome {
        Ok(()) => assert!(gpu::build().is_some()),
        Err(message) => assert!(message.contains("no CUDA kernels"), "{message}"),
    }
}

/// Errors that the driver does not name are told by their number.
fn names_of_errors_may_fail(driver: &FakeDriver, function: &str) {
    let expected = match function {
        "cuGetErrorName" => "cuStreamGetCtx: error 700 (a fake error)",
        "cuGetErrorString" => "cuStreamGetCtx: CUDA_ERROR_FAKE (unknown to this driver)",
        _ => return,
    };
    driver.set("cuStreamGetCtx", 700);
    for call in calls() {
        let message = call.run()[0].clone().unwrap_err();
        assert_eq!(message, format!("{}: {expected}", call.op.name()));
    }
    driver.set("cuStreamGetCtx", 0);
}

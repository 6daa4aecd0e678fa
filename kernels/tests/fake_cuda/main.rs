//! Every function of NVIDIA's driver that is called may be missing or fail, and the driver may tell anything of a GPU:
//! nothing aborts or panics, no context stays on the stack, every error names its call and its function, and what the
//! driver can do again works again.
//!
//! A process loads one driver, so every case has a process of its own: this program, with the case in a variable. In a
//! build without CUDA kernels nothing is loaded or launched; the cases that need them say so.

#![cfg(target_os = "linux")]

mod calls;
mod driver;
mod events;

use std::path::Path;
use std::process::Command;
use std::sync::LazyLock;

use calls::calls;
use driver::{FUNCTIONS, FakeDriver, build, build_broken};
use jax_mhc_kernels::cuda;

/// Codes that a driver returns: of all ages of CUDA, of errors that stay, and one that no driver has.
const CODES: [i32; 5] = [1, 2, 700, 999, 12345];

const REMEDY: &str = "install NVIDIA's driver, version 525 or newer";

/// The driver that has all functions.
static HEALTHY: LazyLock<std::path::PathBuf> = LazyLock::new(|| build("healthy", None));

/// The variable with the case of a process.
const CASE: &str = "FAKE_CUDA_CASE";

/// Runs a case in a process of its own, with the driver of a folder. How many combinations it had.
fn run(folder: &Path, case: &str) -> usize {
    let output = Command::new(std::env::current_exe().unwrap())
        .args([
            "--exact",
            "case_of_this_process",
            "--ignored",
            "--nocapture",
        ])
        .env("LD_LIBRARY_PATH", folder)
        .env(CASE, case)
        .output()
        .unwrap();
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    let (said, complained) = (text(&output.stdout), text(&output.stderr));
    assert!(output.status.success(), "{case}: {said}{complained}");
    let mut lines = said.lines();
    let combinations = lines.find_map(|line| line.strip_prefix("combinations: "));
    combinations.expect("a number").parse().unwrap()
}

#[test]
#[ignore = "a case of the others, which run it"]
fn case_of_this_process() {
    let Ok(case) = std::env::var(CASE) else {
        return;
    };
    let (kind, what) = case.split_once(' ').unwrap();
    let combinations = match kind {
        "fails" => function_fails(what),
        "unusable" => driver_is_unusable(what),
        "tells" => driver_tells(what),
        "events" => events::are_told(what),
        _ => panic!("no such case: {case}"),
    };
    println!("\ncombinations: {combinations}");
}

#[test]
fn every_function_may_fail() {
    let cases = FUNCTIONS.map(|function| run(&HEALTHY, &format!("fails {function}")));
    let combinations: usize = cases.iter().sum();
    println!("{combinations} combinations of a function, a code and a call");
}

#[test]
fn every_function_may_be_missing() {
    for function in FUNCTIONS {
        run(
            &build(function, Some(function)),
            &format!("unusable {function}"),
        );
    }
    run(&build_broken("broken"), "unusable libcuda.so.1");
    println!("{} drivers", FUNCTIONS.len() + 1);
}

#[test]
fn a_driver_may_tell_anything_of_a_gpu() {
    let numbers = [-1, 0, 1, i32::MAX, i32::MIN];
    let names = [
        "multiprocessors",
        "major",
        "minor",
        "shared_bytes",
        "clusters",
        "static_bytes",
    ];
    let odd = names
        .iter()
        .flat_map(|name| numbers.map(|number| format!("{name} {number}")));
    let odd =
        odd.chain(["major 99", "major 7", "ordinal -1", "name_without_end 1"].map(String::from));
    let odd = odd.chain([-5, 0, 3, i32::MAX].map(|count| format!("count {count}")));
    let odd: Vec<_> = odd
        .chain([0, -1, 11_080].map(|version| format!("version {version}")))
        .collect();
    for case in &odd {
        run(&HEALTHY, &format!("tells {case}"));
    }
    println!("{} odd answers", odd.len());
}

#[test]
fn each_level_has_its_events() {
    for level in ["info", "debug", "trace", "unusable"] {
        run(&HEALTHY, &format!("events {level}"));
    }
}

/// In which of (status, device, initialize, execute) a call looks at a function's result.
fn told_by(function: &str) -> [bool; 4] {
    let has_kernels = cuda::build().is_some();
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

/// Runs everything while a function returns each code, and again without.
fn function_fails(function: &str) -> usize {
    let driver = FakeDriver::load();
    let has_kernels = cuda::build().is_some();
    let [by_status, by_device, initialize, execute] = told_by(function);
    let mut combinations = 0;
    for code in CODES {
        let in_driver = |message: &str| {
            let known = format!("{function}: CUDA_ERROR_FAKE (a fake error)");
            let number = format!("{function}: error {code}");
            message.contains(if code < 1000 && function != "cuDriverGetVersion" {
                &known
            } else {
                &number
            })
        };
        driver.set(function, code);
        let status = cuda::status();
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
            let outcomes = call.run();
            for (outcome, is_told) in outcomes.into_iter().zip([initialize, execute]) {
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
                combinations += 1;
            }
        }
        combinations += 1;
    }
    names_of_errors_may_fail(&driver, function);
    driver.set(function, 0);
    let status = cuda::status();
    assert_eq!(status.error.is_none(), has_kernels, "{status:?}");
    for call in calls() {
        for outcome in call.run() {
            check_healthy(outcome);
        }
    }
    assert_eq!(driver.num_launches() > 0, has_kernels);
    assert_eq!(driver.depth(), 0);
    combinations
}

fn check_healthy(outcome: Result<(), String>) {
    match outcome {
        Ok(()) => assert!(cuda::build().is_some()),
        Err(message) => assert!(message.contains("no CUDA kernels"), "{message}"),
    }
}

/// Where the driver does not name its error, its number is told.
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

/// All that a driver can say which lacks a function, or is none.
fn driver_is_unusable(missing: &str) -> usize {
    let status = cuda::status();
    assert!(status.driver.is_none() && status.devices.is_empty());
    let told = |message: &str| message.contains(missing) && message.ends_with(REMEDY);
    let error = status.error.expect("a reason");
    assert!(cuda::build().is_none() || told(&error), "{error}");
    for call in calls() {
        for outcome in call.run() {
            let message = outcome.unwrap_err();
            assert!(
                message.starts_with(call.op.name()) && told(&message),
                "{message}"
            );
        }
    }
    1
}

/// All that a driver can say which tells something odd: it is refused by name, or taken as it is.
fn driver_tells(what: &str) -> usize {
    let (name, value) = what.split_once(' ').unwrap();
    let value: i32 = value.parse().unwrap();
    let driver = FakeDriver::load();
    driver.set(name, value);
    let status = cuda::status();
    let is_negative = value < 0;
    let refused = match name {
        "version" => Some(if is_negative {
            "got one for CUDA"
        } else {
            "for CUDA 12.0 or newer, got one"
        }),
        "major" | "minor" if is_negative => {
            Some("cuDeviceGetAttribute(CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_M")
        }
        "major" if value < 8 => Some("expected a GPU of compute capability 8.0 (Ampere) or newer"),
        "multiprocessors" if is_negative => Some("COUNT): expected 0 to 2147483647, got -"),
        "shared_bytes" if is_negative => Some("OPTIN): expected 0 to 2147483647, got -"),
        "shared_bytes" if value < 100_000 => {
            Some("bytes of shared memory for a block or more, got")
        }
        "clusters" if is_negative => {
            Some("cuOccupancyMaxActiveClusters: expected 0 to 2147483647, got -")
        }
        "static_bytes" if !(0..=232_448).contains(&value) => {
            Some("cuKernelGetAttribute: expected 0 to 232448, got")
        }
        _ => None,
    };
    let has_kernels = cuda::build().is_some();
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
        }
    }
    1
}

//! Every function of NVIDIA's driver that is called may be missing or fail, and the driver may tell anything of a GPU:
//! nothing aborts or panics, no context stays on the stack, every error names its call and its function, and what the
//! driver can do again works again.
//!
//! A process loads one driver, so every case has a process of its own: this program, with the case in a variable. A
//! build without CUDA kernels loads and launches nothing: there a call ends with that reason where the driver gives
//! none before.

#![cfg(target_os = "linux")]

mod calls;
mod driver;
mod events;
mod failing;
mod odd;
mod unusable;

use std::path::Path;
use std::process::Command;
use std::sync::LazyLock;

use driver::{FUNCTIONS, build, build_broken};
use jax_mhc_kernels::gpu;

/// The driver that has all functions.
static HEALTHY: LazyLock<std::path::PathBuf> = LazyLock::new(|| build("healthy", None));

/// The variable with the case of a process.
const CASE: &str = "FAKE_CUDA_CASE";

/// Runs a case in a process of its own, with the driver of a folder. How many outcomes it looked at.
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
    let outcomes = said
        .lines()
        .find_map(|line| line.strip_prefix("outcomes: "));
    outcomes.expect("a number").parse().unwrap()
}

#[test]
#[ignore = "a case of the others, which run it"]
fn case_of_this_process() {
    let Ok(case) = std::env::var(CASE) else {
        return;
    };
    let (kind, what) = case.split_once(' ').unwrap();
    let outcomes = match kind {
        "fails" => failing::check(what),
        "unusable" => unusable::check(what),
        "tells" => odd::check(what),
        "events" => events::check(what),
        _ => panic!("no such case: {case}"),
    };
    println!("\noutcomes: {outcomes}");
}

/// Whether the kernels are for some architectures alone (JAX_MHC_CUDA_ARCHITECTURES): perhaps not for the fake GPUs.
fn is_partial() -> bool {
    let has_all = |build: gpu::Build| {
        let needed = ["sm_90", "compute_100"];
        needed.iter().all(|name| build.architectures.contains(name))
    };
    gpu::build().is_some_and(|build| !has_all(build))
}

/// Runs cases with the driver that has all functions, and tells what it ran.
fn run_healthy(what: &str, cases: impl Iterator<Item = String>) {
    if is_partial() {
        println!("{what}: left out");
        return;
    }
    let outcomes: Vec<_> = cases.map(|case| run(&HEALTHY, &case)).collect();
    let (cases, outcomes) = (outcomes.len(), outcomes.iter().sum::<usize>());
    println!("{what}: {cases} processes, {outcomes} outcomes");
}

#[test]
fn every_function_may_fail() {
    let cases = FUNCTIONS.map(|function| format!("fails {function}"));
    run_healthy("a function fails", cases.into_iter());
}

#[test]
fn every_function_may_be_missing() {
    let missing = FUNCTIONS.map(|function| (build(function, Some(function)), function));
    let drivers = missing
        .into_iter()
        .chain([(build_broken("broken"), driver::FILE)]);
    let outcomes = drivers.map(|(folder, missing)| run(&folder, &format!("unusable {missing}")));
    println!(
        "a function is missing: {} outcomes",
        outcomes.sum::<usize>()
    );
}

#[test]
fn a_driver_may_tell_anything_of_a_gpu() {
    run_healthy(
        "an odd answer",
        odd::cases().map(|case| format!("tells {case}")),
    );
}

#[test]
fn each_level_has_its_events() {
    let levels = ["info", "debug", "trace", "unusable"];
    run_healthy(
        "events",
        levels.iter().map(|level| format!("events {level}")),
    );
}

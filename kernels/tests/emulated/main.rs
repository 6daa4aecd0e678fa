//! The one-pass kernels without a GPU: their sources as they are, compiled for the CPU with other instructions
//! (base/ptx.cuh), run by an emulator of a cluster (emulator.h) and checked against float64.

#![cfg(all(target_os = "linux", target_arch = "x86_64"))]

#[path = "../../build/generated.rs"]
mod generated;
#[allow(dead_code, reason = "plans read the rest")]
#[path = "../../tuning.rs"]
mod tuning;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use tuning::FILES;

/// Compiles a check of a kernel of kernels/device in one size and dtype.
fn build(check: &str, file: &str, size_name: &str, dtype: &str) -> PathBuf {
    let mut files = FILES.iter();
    let file = files.find(|known| known.path == file && known.dtypes.contains(&dtype));
    let file = file.unwrap();
    let sizes = file.sizes();
    let size = sizes.iter().find(|size| size.name == size_name).unwrap();
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR"))
        .join("emulated")
        .join(format!("{check}_{size_name}_{dtype}"));
    fs::create_dir_all(&folder).unwrap();
    fs::write(folder.join("generated.cuh"), generated::header(file, size)).unwrap();
    let program = folder.join("check");
    let mut compiler = Command::new("c++");
    // Pragmas and attributes of CUDA C++ are unknown.
    compiler.args(["-std=c++20", "-O1", "-w", "-DSUFFIX=_emulated"]);
    compiler.arg(format!("-DSTREAM={dtype}"));
    compiler
        .args(["-Itests/emulated", "-Idevice", "-I"])
        .arg(&folder);
    compiler.arg(format!("tests/emulated/{check}.cc"));
    compiler.arg("-o").arg(&program);
    assert!(compiler.status().unwrap().success(), "{compiler:?}");
    program
}

/// Runs a check: C, tokens, clusters, and whether cotangents are deferred (forward: whether it is post_pre).
fn run(program: &Path, sizes: [usize; 4], seed: usize, is_spoiled: bool) -> Output {
    let mut check = Command::new(program);
    check.args(sizes.map(|number| number.to_string()));
    check.args([seed, usize::from(is_spoiled)].map(|number| number.to_string()));
    check.output().unwrap()
}

/// Checks a kernel in some sizes, each with clusters of many sizes whose last block is not full.
fn check(name: &str, file: &str, sizes: &[(&str, usize, &str)]) {
    for &(size, channels, dtype) in sizes {
        let program = build(name, file, size, dtype);
        for (seed, (blocks, tokens, clusters)) in
            [(2, 77, 2), (3, 61, 1), (5, 1, 2), (7, 33, 1), (16, 45, 1)]
                .into_iter()
                .enumerate()
        {
            let hidden = blocks * channels - (seed % 3) * 64;
            let call = [hidden, tokens, clusters, seed % 2];
            let output = run(&program, call, seed, false);
            assert!(
                output.status.success(),
                "{name} {size} {call:?}: {output:?}"
            );
        }
        let spoiled = run(&program, [2 * channels, 9, 1, 1], 0, true);
        let told = String::from_utf8_lossy(&spoiled.stdout);
        assert!(
            told.ends_with("too large an error\n"),
            "{name} {size}: {spoiled:?}"
        );
    }
}

#[test]
fn forward() {
    let sizes = [
        ("w256", 256, "bf16"),
        ("w512", 512, "bf16"),
        ("w384k8", 384, "bf16"),
        ("w256k32", 256, "bf16"),
    ];
    check("forward", "one_pass/one_pass_fwd", &sizes);
}

#[test]
fn pre_bwd() {
    let sizes = [
        ("w256", 256, "bf16"),
        ("w448", 448, "bf16"),
        ("w512k8", 512, "bf16"),
        ("w320k32", 320, "bf16"),
        ("n2w512", 512, "bf16"),
        ("w256", 256, "f32"),
        ("w256k8", 256, "f32"),
    ];
    check("pre_bwd", "one_pass/pre_bwd_one_pass", &sizes);
}

#[test]
fn post_pre_bwd() {
    let sizes = [
        ("w256", 256, "bf16"),
        ("w448", 448, "bf16"),
        ("w512k8", 512, "bf16"),
        ("w256k32", 256, "bf16"),
    ];
    check("post_pre_bwd", "one_pass/post_pre_bwd_one_pass", &sizes);
}

//! Kernels with tensor cores or clusters without a GPU: their sources as they are, compiled for the CPU with other instructions
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
use std::sync::LazyLock;

use tuning::FILES;

/// Options of all programs. Pragmas and attributes of CUDA C++ are unknown.
const OPTIONS: [&str; 4] = ["-std=c++20", "-O1", "-w", "-Wno-psabi"];

/// The folder of this test's files.
fn folder() -> PathBuf {
    Path::new(env!("CARGO_TARGET_TMPDIR")).join("emulated")
}

/// Has the compiler do its work.
fn compile(compiler: &mut Command) {
    assert!(compiler.status().unwrap().success(), "{compiler:?}");
}

/// A header that the compiler has read once, the emulator's, for all programs: to read the standard library takes half a
/// second.
static EMULATOR: LazyLock<PathBuf> = LazyLock::new(|| {
    fs::create_dir_all(folder()).unwrap();
    let header = folder().join("read_once.h");
    fs::write(&header, "#include \"emulator.h\"\n").unwrap();
    let mut compiler = Command::new("c++");
    compiler
        .args(OPTIONS)
        .args(["-Itests/emulated", "-x", "c++-header"]);
    compiler.arg(&header).arg("-o");
    compile(compiler.arg(folder().join("read_once.h.gch")));
    header
});

/// Compiles a check of a kernel of kernels/device in one size and dtype.
fn build(check: &str, file: &str, size_name: &str, dtype: &str) -> PathBuf {
    let rows = FILES
        .iter()
        .filter(|row| row.path == file && row.dtypes.contains(&dtype));
    let mut sizes = rows.flat_map(|row| row.sizes().into_iter().map(move |size| (row, size)));
    let (file, size) = sizes.find(|(_, size)| size.name == size_name).unwrap();
    let folder = folder().join(format!("{check}_{size_name}_{dtype}"));
    fs::create_dir_all(&folder).unwrap();
    fs::write(folder.join("generated.cuh"), generated::header(file, size)).unwrap();
    let program = folder.join("check");
    let mut compiler = Command::new("c++");
    compiler.args(OPTIONS).arg("-include").arg(&*EMULATOR);
    compiler.arg("-DSUFFIX=_emulated");
    compiler.arg(format!("-DSTREAM={dtype}"));
    compiler
        .args(["-Itests/emulated", "-Idevice", "-I"])
        .arg(&folder);
    compiler.arg(format!("tests/emulated/{check}.cc"));
    compile(compiler.arg("-o").arg(&program));
    program
}

/// Runs a check: C, tokens, clusters, and whether cotangents are deferred (forward: which of four kernels it is); then what it
/// wants besides.
fn run(program: &Path, sizes: [usize; 4], seed: usize, is_spoiled: bool, more: &[usize]) -> Output {
    let mut check = Command::new(program);
    check.args(sizes.map(|number| number.to_string()));
    check.args([seed, usize::from(is_spoiled)].map(|number| number.to_string()));
    check.args(more.iter().map(|number| number.to_string()));
    check.output().unwrap()
}

/// Whether an error is found.
fn assert_spoiled(output: &Output) {
    let told = String::from_utf8_lossy(&output.stdout);
    assert!(told.ends_with("too large an error\n"), "{output:?}");
}

/// Checks a kernel in some sizes with clusters of many sizes whose last block is not full, most of which have a line that
/// is not whole, and of so many kinds. Two clusters of two blocks have `most` tokens: of these every size, of the others the
/// first size all and each other half.
fn check(name: &str, file: &str, sizes: &[(&str, usize, &str)], [most, kinds]: [usize; 2]) {
    for (at, &(size, channels, dtype)) in sizes.iter().enumerate() {
        let program = build(name, file, size, dtype);
        let is_wanted = |seed| at == 0 || seed == 0 || seed % 2 == at % 2;
        for (seed, (blocks, missing, tokens, clusters)) in [
            (2, 0, most, 2),
            (3, 64, 61, 1),
            (5, 88, 1, 2),
            (7, 8, 33, 1),
            (16, 200, 27, 1),
            (1, 24, 29, 1),
        ]
        .into_iter()
        .enumerate()
        .filter(|(seed, _)| is_wanted(*seed))
        {
            let hidden = blocks * channels - missing;
            let call = [hidden, tokens, clusters, (seed + at / 2) % kinds];
            let output = run(&program, call, seed, false, &[]);
            assert!(
                output.status.success(),
                "{name} {size} {dtype} {call:?}: {output:?}"
            );
        }
        assert_spoiled(&run(&program, [2 * channels, 9, 1, 1], 0, true, &[]));
    }
}

#[test]
fn forward() {
    let sizes = [
        ("w256", 256, "bf16"),
        ("w512", 512, "bf16"),
        ("w384k8", 384, "bf16"),
        ("w256k32", 256, "bf16"),
        ("w512k32", 512, "bf16"),
        ("n2w512", 512, "bf16"),
        ("n2w1024", 1024, "bf16"),
        ("w256", 256, "f16"),
        ("w512", 512, "f16"),
        ("w512k8", 512, "f16"),
        ("w256", 256, "f32"),
        ("w256k8", 256, "f32"),
    ];
    // The third batch of tokens for `finish` lies where the first one did.
    check("forward", "one_pass/one_pass_fwd", &sizes, [301, 4]);
}

#[test]
fn pre_bwd() {
    let sizes = [
        ("w256", 256, "bf16"),
        ("w448", 448, "bf16"),
        ("w512", 512, "bf16"),
        ("w512k8", 512, "bf16"),
        ("w320k32", 320, "bf16"),
        ("w384k32", 384, "bf16"),
        ("n2w512", 512, "bf16"),
        ("w256", 256, "f16"),
        ("w512", 512, "f16"),
        ("w512k8", 512, "f16"),
        ("w256", 256, "f32"),
        ("w256k8", 256, "f32"),
    ];
    // Every second kind is with a norm.
    check("pre_bwd", "one_pass/pre_bwd_one_pass", &sizes, [77, 4]);
}

#[test]
fn post_pre_bwd() {
    let sizes = [
        ("w256", 256, "bf16"),
        ("w448", 448, "bf16"),
        ("w512k8", 512, "bf16"),
        ("w256k32", 256, "bf16"),
        ("w512k32", 512, "bf16"),
        ("n2w512", 512, "bf16"),
        ("w256", 256, "f32"),
        ("w256k8", 256, "f32"),
        ("w256", 256, "f16"),
        ("w320", 320, "f16"),
        ("w256k8", 256, "f16"),
    ];
    check(
        "post_pre_bwd",
        "one_pass/post_pre_bwd_one_pass",
        &sizes,
        [77, 2],
    );
}

#[test]
fn post_given_bwd() {
    // C, tokens, blocks that share them, whether cotangents are deferred. The last slice of channels is not full.
    type Calls = &'static [[usize; 4]];
    let all: [(&str, &str, Calls); 7] = [
        (
            "w256",
            "bf16",
            &[[448, 77, 2, 1], [104, 33, 3, 0], [1192, 1, 2, 1]],
        ),
        ("w512k8", "bf16", &[[576, 61, 1, 1], [600, 29, 1, 1]]),
        ("w384k8", "bf16", &[[384, 45, 2, 0]]),
        ("w128k32", "bf16", &[[192, 101, 1, 1]]),
        ("n2w512", "bf16", &[[536, 61, 1, 1]]),
        ("w256", "f16", &[[360, 45, 1, 1]]),
        ("w256k8", "f16", &[[320, 45, 1, 0]]),
    ];
    for (size, dtype, calls) in all {
        let program = build("post_given_bwd", "given/post_given_bwd", size, dtype);
        for (seed, call) in calls.iter().enumerate() {
            let output = run(&program, *call, seed, false, &[]);
            assert!(
                output.status.success(),
                "{size} {dtype} {call:?}: {output:?}"
            );
        }
        assert_spoiled(&run(&program, [64, 9, 1, 1], 0, true, &[]));
    }
}

/// Checks kernels of one stream: C, tokens, blocks, which of them it is; constraint, iterations and threads.
fn check_one_stream(name: &str, file: &str, calls: &[([usize; 4], [usize; 3])]) {
    for dtype in ["bf16", "f32"] {
        let program = build(name, file, "n1", dtype);
        for (seed, (call, settings)) in calls.iter().enumerate() {
            let output = run(&program, *call, seed, false, settings);
            assert!(
                output.status.success(),
                "{dtype} {call:?} {settings:?}: {output:?}"
            );
        }
        let (call, settings) = calls[0];
        assert_spoiled(&run(&program, call, 0, true, &settings));
    }
}

#[test]
fn one_stream_fwd() {
    // Of a constraint's numbers, 0 is Birkhoff, 1 none, 2 identity and 3 permutations.
    let calls = [
        ([1000, 77, 2, 0], [0, 3, 256]),
        ([264, 53, 1, 1], [0, 3, 96]),
        ([2056, 31, 2, 1], [1, 3, 544]),
        ([2056, 1, 1, 2], [2, 3, 544]),
        ([520, 11, 3, 3], [3, 3, 160]),
        ([264, 25, 2, 0], [0, 0, 96]),
        ([4096, 9, 1, 3], [0, 3, 1024]),
        // A head.
        ([264, 31, 2, 4], [0, 3, 96]),
    ];
    check_one_stream("one_stream_fwd", "one_stream/one_stream_fwd", &calls);
}

#[test]
fn one_stream_bwd() {
    let calls = [
        ([520, 77, 2, 1], [0, 3, 160]),
        ([1000, 53, 2, 3], [1, 3, 256]),
        ([264, 31, 2, 0], [2, 3, 96]),
        ([520, 45, 1, 2], [3, 3, 160]),
        ([264, 45, 2, 3], [0, 0, 96]),
        // Two sets of channels a thread.
        ([2056, 31, 2, 1], [1, 3, 288]),
        ([2056, 31, 3, 3], [0, 3, 288]),
        // A head, with one set and with two.
        ([264, 31, 2, 4], [0, 3, 96]),
        ([2056, 9, 1, 4], [0, 3, 288]),
    ];
    check_one_stream("one_stream_bwd", "one_stream/one_stream_bwd", &calls);
}

#[test]
fn pre() {
    // Streams, C, tokens. One warp has all matrices, two have them, and four.
    for (size, calls) in [
        ("upto4", &[(4, 130, 33), (3, 41, 19)][..]),
        ("upto8", &[(5, 72, 17), (7, 61, 9)]),
        ("any", &[(16, 72, 17), (9, 61, 9)]),
    ] {
        let program = build("pre", "two_pass/pre", size, "bf16");
        for (seed, &(n, hidden, tokens)) in calls.iter().enumerate() {
            let output = run(&program, [hidden, tokens, 0, seed], seed, false, &[n]);
            assert!(output.status.success(), "{n} {hidden}: {output:?}");
        }
        assert_spoiled(&run(&program, [64, 9, 0, 0], 0, true, &[calls[0].0]));
    }
}

#[test]
fn phi_bwd() {
    for dtype in ["bf16", "f16"] {
        let program = build("phi_bwd", "one_pass/phi_bwd", "w128", dtype);
        // C, tokens, blocks that divide them.
        for (seed, call) in [
            [256, 77, 2, 0],
            [320, 61, 1, 0],
            [64, 29, 2, 0],
            [296, 29, 2, 0],
            [24, 9, 1, 0],
            [512, 1, 2, 0],
        ]
        .into_iter()
        .enumerate()
        {
            let output = run(&program, call, seed, false, &[]);
            assert!(output.status.success(), "{dtype} {call:?}: {output:?}");
        }
        assert_spoiled(&run(&program, [256, 9, 1, 0], 0, true, &[]));
    }
}

#[test]
fn post_given_fwd() {
    for (size, channels, dtype) in [
        ("w256", 256, "bf16"),
        ("w256k8", 256, "bf16"),
        ("w256k32", 256, "f16"),
        ("n2w512", 512, "bf16"),
        ("w256", 256, "f32"),
    ] {
        let program = build("post_given_fwd", "given/post_given_fwd", size, dtype);
        // C, tokens, blocks that divide them. Stages are filled again, the last slice is not full, nor the last tile.
        for (seed, call) in [
            [channels + 192, 203, 2, 0],
            [channels + 168, 61, 2, 0],
            [2 * channels, 29, 1, 0],
            [72, 61, 1, 0],
        ]
        .into_iter()
        .enumerate()
        {
            let output = run(&program, call, seed, false, &[]);
            assert!(
                output.status.success(),
                "{size} {dtype} {call:?}: {output:?}"
            );
        }
        assert_spoiled(&run(&program, [channels, 9, 1, 0], 0, true, &[]));
    }
}

#[test]
fn given_coefficients() {
    // C, tokens, slices, the number of the constraint; columns.
    for (size, calls) in [
        (
            "n4",
            &[
                ([1024, 77, 17, 0], 24),
                ([256, 1, 1, 1], 24),
                ([512, 29, 2, 2], 8),
                ([512, 29, 3, 3], 32),
            ][..],
        ),
        ("n2", &[([512, 29, 2, 0], 8)]),
    ] {
        let file = "given/given_coefficients";
        let program = build("given_coefficients", file, size, "f32");
        for (seed, &(call, columns)) in calls.iter().enumerate() {
            let output = run(&program, call, seed, false, &[columns]);
            assert!(output.status.success(), "{size} {call:?}: {output:?}");
        }
        let (call, columns) = calls[0];
        assert_spoiled(&run(&program, call, 0, true, &[columns]));
    }
}

#[test]
fn post_pre_norm_bwd() {
    for dtype in ["bf16", "f16", "f32"] {
        let file = "one_pass/post_pre_norm_bwd";
        let program = build("post_pre_norm_bwd", file, "n4", dtype);
        // C, tokens, blocks; whether w has zeros. Blocks have up to ten tokens.
        for (seed, call) in [[520, 77, 8, 0], [2056, 9, 2, 1], [64, 1, 1, 0]]
            .into_iter()
            .enumerate()
        {
            let output = run(&program, call, seed, false, &[]);
            assert!(output.status.success(), "{dtype} {call:?}: {output:?}");
        }
        assert_spoiled(&run(&program, [64, 9, 1, 0], 0, true, &[]));
    }
}

#[test]
fn back_streams() {
    // Streams and columns, C, tokens, blocks for a group of channels.
    type Calls = &'static [(usize, usize, usize, usize, usize)];
    let all: [(&str, &str, Calls); 8] = [
        ("streams", "n2", &[(2, 8, 320, 77, 2), (2, 4, 8, 1, 1)]),
        ("streams", "n4", &[(4, 24, 200, 77, 2), (4, 32, 128, 33, 1)]),
        ("streams", "n8", &[(8, 80, 72, 77, 2), (8, 16, 64, 17, 1)]),
        (
            "streams",
            "upto4",
            &[(3, 15, 200, 50, 2), (1, 3, 41, 19, 1), (4, 24, 130, 33, 1)],
        ),
        (
            "streams",
            "upto8",
            &[(5, 35, 136, 50, 2), (7, 63, 61, 19, 1), (8, 80, 65, 33, 1)],
        ),
        (
            "stages",
            "n8",
            &[(8, 80, 72, 77, 2), (8, 16, 64, 17, 1), (8, 80, 200, 133, 1)],
        ),
        (
            "stages",
            "upto8",
            &[(5, 35, 136, 50, 2), (7, 63, 200, 120, 1), (6, 48, 64, 1, 1)],
        ),
        (
            "lines",
            "k288",
            &[
                (16, 288, 64, 77, 1),
                (9, 99, 64, 300, 2),
                (12, 168, 128, 1, 1),
            ],
        ),
    ];
    for (kind, size, calls) in all {
        let check = format!("back_{kind}");
        let program = build(&check, &format!("two_pass/{check}"), size, "bf16");
        for (seed, &(n, columns, hidden, tokens, blocks)) in calls.iter().enumerate() {
            let call = [hidden, tokens, blocks, seed % 2];
            let output = run(&program, call, seed, false, &[n, columns]);
            assert!(
                output.status.success(),
                "{kind} {size} {n} {call:?}: {output:?}"
            );
        }
        let (n, columns, ..) = calls[0];
        assert_spoiled(&run(&program, [64, 9, 1, 0], 0, true, &[n, columns]));
    }
}

#[test]
fn projection() {
    // n C, tokens, splits of them, chunks of the columns; columns, and whether rows are aligned.
    for (size, calls) in [
        ("k80", &[(584, 300, 2, 1, 80, 1)][..]),
        (
            "any",
            &[
                (200, 77, 2, 1, 35, 1),
                (72, 17, 1, 3, 288, 1),
                (90, 33, 1, 1, 15, 0),
                (90, 77, 1, 1, 8, 0),
                (61, 270, 2, 1, 63, 0),
            ],
        ),
    ] {
        let program = build("projection", "two_pass/projection", size, "bf16");
        for (seed, &(width, tokens, splits, chunks, columns, is_aligned)) in
            calls.iter().enumerate()
        {
            let call = [width, tokens, splits, chunks];
            let output = run(&program, call, seed, false, &[columns, is_aligned]);
            assert!(
                output.status.success(),
                "{size} {columns} {call:?}: {output:?}"
            );
        }
        let (.., columns, is_aligned) = calls[0];
        assert_spoiled(&run(
            &program,
            [64, 9, 1, 1],
            0,
            true,
            &[columns, is_aligned],
        ));
    }
}

#[test]
fn warpgroups() {
    // n C, tokens, splits of them, clusters; columns.
    for (size, calls) in [
        (
            "k80",
            &[(640, 600, 2, 5, 80), (320, 77, 4, 1, 35), (64, 1, 1, 2, 63)][..],
        ),
        (
            "k144",
            &[
                (640, 300, 1, 3, 288),
                (320, 130, 4, 2, 143),
                (64, 1, 1, 1, 99),
            ],
        ),
    ] {
        let program = build("warpgroups", "two_pass/warpgroups", size, "bf16");
        for (seed, &(width, tokens, splits, clusters, columns)) in calls.iter().enumerate() {
            let call = [width, tokens, splits, clusters];
            let output = run(&program, call, seed, false, &[columns]);
            assert!(
                output.status.success(),
                "{size} {columns} {call:?}: {output:?}"
            );
        }
        let columns = calls[0].4;
        assert_spoiled(&run(&program, [64, 9, 1, 1], 0, true, &[columns]));
    }
}

#[test]
fn post_dots() {
    // n, C, tokens; then how many sums the dots are, and whether Sinkhorn's record is in memory.
    for (size, calls) in [
        ("n8", &[(8, 200, 9, 2, 0), (8, 1024, 17, 8, 1)][..]),
        ("upto8", &[(5, 72, 17, 1, 1)]),
        ("any", &[(16, 200, 9, 2, 0), (9, 136, 19, 2, 1)]),
    ] {
        for (check, file) in [("post_dots", "post_dots"), ("pre_dots", "two_pass/pre")] {
            let program = build(check, file, size, "bf16");
            for &(n, hidden, tokens, num, is_in_memory) in calls {
                let call = [hidden, tokens, num, is_in_memory];
                let output = run(&program, call, 0, false, &[n]);
                assert!(output.status.success(), "{check} {n} {hidden}: {output:?}");
            }
            let (n, ..) = calls[0];
            assert_spoiled(&run(&program, [64, 3, 1, 0], 0, true, &[n]));
        }
    }
}

#[test]
fn post() {
    for (size, calls) in [
        ("n8", &[(8, 200, 9)][..]),
        ("upto8", &[(5, 72, 17), (7, 130, 9)]),
        ("any", &[(16, 200, 9), (9, 72, 17), (13, 130, 9)]),
        (
            "upto4",
            &[
                (4, 610, 9),
                (3, 65, 33),
                (1, 11, 200),
                (2, 524, 5),
                (3, 72, 9),
            ],
        ),
    ] {
        let program = build("post", "post", size, "bf16");
        for is_mix in [0, 1] {
            for &(n, hidden, tokens) in calls {
                let output = run(&program, [hidden, tokens, 1, is_mix], 0, false, &[n]);
                assert!(output.status.success(), "{n} {hidden}: {output:?}");
            }
            assert_spoiled(&run(&program, [64, 3, 1, is_mix], 0, true, &[calls[0].0]));
        }
    }
}

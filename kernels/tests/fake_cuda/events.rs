//! Events that the library tells at each level.

use std::io;
use std::sync::{Arc, Mutex};

use jax_mhc_kernels::gpu;
use tracing_subscriber::filter::LevelFilter;

use crate::calls::calls;
use crate::driver::FakeDriver;

/// Lines that are kept.
#[derive(Clone, Default)]
struct Lines(Arc<Mutex<Vec<u8>>>);

impl io::Write for Lines {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.lock().unwrap().write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// All that is told at a level and above while everything runs.
fn told(level: LevelFilter) -> Vec<String> {
    let lines = Lines::default();
    let writer = lines.clone();
    let subscriber = tracing_subscriber::fmt()
        .with_max_level(level)
        .without_time()
        .with_ansi(false)
        .with_writer(move || writer.clone())
        .finish();
    tracing::subscriber::with_default(subscriber, || {
        gpu::status();
        for call in calls() {
            let _ = call.run();
        }
    });
    let bytes = lines.0.lock().unwrap().clone();
    let text = String::from_utf8(bytes).unwrap();
    text.lines()
        .map(|line| line.trim_start().to_owned())
        .collect()
}

/// Checks the events of a level, or of `info` where there is nothing that can be used. One outcome.
pub fn check(level: &str) -> usize {
    let has_kernels = gpu::build().is_some();
    let driver = FakeDriver::load();
    if level == "unusable" {
        driver.set("cuInit", 999);
        let lines = told(LevelFilter::INFO);
        let reason = "INFO jax_mhc: the CUDA driver cannot be used reason=cuInit: CUDA_ERROR_FAKE (a fake error)";
        assert!(
            lines.iter().all(|line| line == reason) && !lines.is_empty(),
            "{lines:#?}"
        );
        return 1;
    }
    let lines = told(level.parse().unwrap());
    let expect = |expected: &str, at_level: &str| {
        let is_told = lines.iter().any(|line| line.starts_with(expected));
        assert_eq!(is_told, at_level.contains(level), "{expected}\n{lines:#?}");
    };
    expect(
        "INFO jax_mhc: CUDA driver loaded version=\"13.0\"",
        "info debug trace",
    );
    if !has_kernels {
        let refused = "INFO jax_mhc: the GPU cannot be used device=0 reason=this build of jax-mhc has no CUDA kernels";
        expect(refused, "info debug trace");
        return 1;
    }
    let found = "INFO jax_mhc: GPU found device=0 name=\"Fake GPU\" capability=(9, 0) multiprocessors=132 \
                 shared_bytes=232448 clusters=[132, 16, 16,";
    expect(found, "info debug trace");
    let loaded = "INFO jax_mhc: image loaded image=one_pass_fwd (w320, bf16, sm_90a) bytes=";
    expect(loaded, "info debug trace");
    let plan = "DEBUG jax_mhc: plan op=\"pre_fwd\" stage=Execute schedule=\"one pass\" device=0 dtype=\"bfloat16\" \
                shapes=[[64, 4, 2560], [4, 2560, 24], [3], [24]] kernels=[\"mhc_pre_fwd_one_pass_w320_bf16\"] \
                workspace=";
    expect(plan, "debug trace");
    let launch = "TRACE jax_mhc: launch kernel=\"mhc_pre_fwd_one_pass_w320_bf16\" device=0 grid=[64, 1, 1] block=512 \
                  cluster=8 shared_bytes=";
    expect(launch, "trace");
    let images = lines
        .iter()
        .filter(|line| line.contains("image loaded image=one_pass_fwd (w320"))
        .count();
    assert_eq!(images, 1, "loaded once");
    1
}

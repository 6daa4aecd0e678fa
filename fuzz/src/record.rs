//! The record of a run, for people and as JSON.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Duration;

use serde::Serialize;

use crate::board::Board;
use crate::options::Options;
use crate::worker::Line;

/// A frame that shows something that must not be.
#[derive(Debug, Serialize)]
pub struct Found {
    /// Kind of the finding, equal for all frames that show it.
    pub kind: String,
    /// The frame.
    pub seed: u64,
    /// Details of this one frame.
    pub detail: String,
}

/// The record of a run.
#[derive(Debug, Default, Serialize)]
pub struct Record {
    /// The library's version, commit and instruction set.
    version: String,
    commit: Option<String>,
    instruction_set: String,
    /// The processor's name.
    processor: String,
    jobs: u64,
    /// Whether memory errors are found that leave the pages around a buffer alone.
    address_sanitizer: bool,
    /// Whether the library was built with debug assertions, and so with checks of overflow.
    debug_assertions: bool,
    first_seed: u64,
    frames: u64,
    seconds: f64,
    frames_per_second: f64,
    calls: u64,
    accepted: u64,
    refused: u64,
    /// Frames of memory that is not there, which nobody called.
    skipped: u64,
    /// Frames that nobody came to after crashes.
    left: u64,
    refused_by_rule: BTreeMap<String, u64>,
    num_findings: u64,
    num_crashes: u64,
    /// A few findings of each kind.
    findings: Vec<Found>,
}

impl Record {
    /// The record of a run that begins.
    pub fn new(options: &Options) -> Self {
        Self {
            processor: processor(),
            jobs: options.jobs,
            address_sanitizer: has_address_sanitizer(),
            first_seed: options.seed,
            ..Self::default()
        }
    }

    /// Takes what a worker says.
    pub fn take(&mut self, line: Line) {
        match line {
            Line::Library {
                instruction_set,
                version,
                commit,
                debug_assertions,
            } => {
                self.instruction_set = instruction_set;
                self.version = version;
                self.commit = commit;
                self.debug_assertions = debug_assertions;
            }
            Line::Finding { seed, kind, detail } => {
                self.findings.push(Found { kind, seed, detail });
            }
            Line::Rules(rules) => {
                for (rule, count) in rules {
                    *self.refused_by_rule.entry(rule).or_default() += count;
                }
            }
        }
    }

    /// Takes a frame that ended its process.
    pub fn add(&mut self, crash: Found) {
        self.num_crashes += 1;
        self.findings.push(crash);
    }

    /// Frames told so far.
    pub fn num_found(&self) -> usize {
        self.findings.len()
    }

    /// Takes the sums of all workers.
    pub fn finish(&mut self, total: &Board, left: u64, time: Duration) {
        self.frames = total.frames.load(Relaxed) + self.num_crashes;
        self.calls = total.calls.load(Relaxed);
        self.accepted = total.accepted.load(Relaxed);
        self.refused = total.refused.load(Relaxed);
        self.skipped = total.skipped.load(Relaxed);
        self.num_findings = total.findings.load(Relaxed) + self.num_crashes;
        self.left = left;
        self.seconds = (time.as_secs_f64() * 1e3).round() / 1e3;
        self.frames_per_second = (self.frames as f64 / time.as_secs_f64()).round();
    }

    /// Whether nothing was found.
    pub fn is_clean(&self) -> bool {
        self.num_findings == 0
    }
}

impl fmt::Display for Record {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut shown: BTreeMap<&str, Vec<&Found>> = BTreeMap::new();
        for found in &self.findings {
            shown.entry(&found.kind).or_default().push(found);
        }
        for (kind, found) in shown {
            let seeds: Vec<u64> = found.iter().map(|found| found.seed).take(5).collect();
            writeln!(f, "FOUND {kind}; seeds {seeds:?}")?;
            let detail: String = found[0].detail.chars().take(300).collect();
            if !detail.is_empty() {
                writeln!(f, "      {detail}")?;
            }
        }
        write!(
            f,
            "{} frames in {:.1} s ({} a second, {} processes, {}): {} answered, {} refused, {} not called; \
             {} findings, {} of them crashes",
            self.frames,
            self.seconds,
            self.frames_per_second,
            self.jobs,
            self.instruction_set,
            self.accepted,
            self.refused,
            self.skipped,
            self.num_findings,
            self.num_crashes,
        )
    }
}

/// The processor's name, where the system tells it.
fn processor() -> String {
    let text = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let name = text
        .lines()
        .find_map(|line| line.strip_prefix("model name")?.split_once(": "));
    name.map_or_else(String::new, |(_, name)| name.into())
}

/// Whether the program holds AddressSanitizer.
fn has_address_sanitizer() -> bool {
    // SAFETY: looks for a name, and calls nothing.
    unsafe { !libc::dlsym(libc::RTLD_DEFAULT, c"__asan_init".as_ptr()).is_null() }
}

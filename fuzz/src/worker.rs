//! A process that calls frames, so that a crash ends nothing but it.

use std::collections::{BTreeMap, HashMap};
use std::io::Write;
use std::path::Path;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Instant;

use serde::{Deserialize, Serialize};

use crate::board::Board;
use crate::check::{Checker, Finding, Outcome};
use crate::frame::Printed;
use crate::library;
use crate::options::Options;

/// Frames of one kind of finding that are told in full.
const TOLD: u64 = 3;

/// Messages of a worker on its standard output, a line each.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Line {
    /// At the start: the library's instruction set, version and commit.
    Library {
        /// Instruction set of the kernels for CPUs.
        instruction_set: String,
        /// Version of the package.
        version: String,
        /// Commit of the library's sources.
        commit: Option<String>,
        /// Whether the library checks itself.
        debug_assertions: bool,
    },
    /// Something that must not be.
    Finding {
        /// The frame.
        seed: u64,
        /// Kind of the finding, equal for all frames that show it.
        kind: String,
        /// Details of this one frame.
        detail: String,
    },
    /// At the end: how many frames were refused by each rule.
    Rules(BTreeMap<String, u64>),
}

/// Calls all frames.
///
/// # Errors
/// A library or memory that is missing.
pub fn run(options: &Options, board: &Path) -> Result<(), String> {
    // Its end is this one's, too.
    // SAFETY: numbers alone.
    unsafe { libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) };
    let board = Board::open(board).map_err(|error| error.to_string())?;
    let (description, ops) = library::load(&options.library)?;
    say(&Line::Library {
        instruction_set: description.instruction_set,
        version: description.version,
        commit: description.commit,
        debug_assertions: description.debug_assertions,
    });
    let mut checker = Checker::new(ops).map_err(|error| format!("no memory: {error}"))?;
    let mut told: HashMap<String, u64> = HashMap::new();
    let mut rules: BTreeMap<&'static str, u64> = BTreeMap::new();
    let start = Instant::now();
    for seed in options.seed..options.seed + options.frames {
        if seed % 64 == 0
            && (options.seconds).is_some_and(|end| start.elapsed().as_secs_f64() > end)
        {
            break;
        }
        board.seed.store(seed, Relaxed);
        let frame = checker.frame(seed);
        if options.verbose {
            eprint!("seed {seed}: {}", Printed(&frame, checker.ops()));
        }
        let outcome = checker.check(&frame, seed);
        if options.verbose {
            eprintln!("  {outcome:?}");
        }
        board.frames.fetch_add(1, Relaxed);
        match outcome {
            Ok(Outcome::Skipped) => _ = board.skipped.fetch_add(1, Relaxed),
            Ok(Outcome::Accepted { calls }) => {
                board.accepted.fetch_add(1, Relaxed);
                board.calls.fetch_add(calls, Relaxed);
            }
            Ok(Outcome::Refused { rule }) => {
                board.refused.fetch_add(1, Relaxed);
                board.calls.fetch_add(1, Relaxed);
                *rules.entry(rule).or_default() += 1;
            }
            Err(Finding { kind, detail }) => {
                board.findings.fetch_add(1, Relaxed);
                let told = told.entry(kind.clone()).or_default();
                *told += 1;
                if *told <= TOLD {
                    say(&Line::Finding { seed, kind, detail });
                }
            }
        }
    }
    let rules = rules
        .into_iter()
        .map(|(rule, count)| (rule.to_owned(), count));
    say(&Line::Rules(rules.collect()));
    Ok(())
}

fn say(line: &Line) {
    let text = serde_json::to_string(line).unwrap_or_default();
    let mut out = std::io::stdout().lock();
    // Nobody listens where the process that started this one is gone.
    let _ = writeln!(out, "{text}").and_then(|()| out.flush());
}

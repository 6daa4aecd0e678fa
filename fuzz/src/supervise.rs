//! The process that a person starts: workers, a progress bar, a summary.

use std::io::{BufRead, BufReader, IsTerminal};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::process::ExitStatusExt;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicI32, AtomicU64, Ordering::Relaxed};
use std::sync::{Mutex, MutexGuard};
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

use crate::board::Board;
use crate::options::Options;
use crate::record::{Found, Record};

/// A frame that takes longer never ends.
const HANG: Duration = Duration::from_secs(120);

/// Crashes of one worker that tell enough.
const CRASHES: usize = 50;

/// A part of the seeds, and the worker that is at it.
struct Job {
    board: &'static Board,
    path: PathBuf,
    _file: OwnedFd,
    /// Process of the worker; 0 where there is none.
    process: AtomicI32,
    seed: u64,
    frames: u64,
    /// Frames that no worker came to, after too many crashes.
    left: AtomicU64,
}

impl Job {
    fn new(seed: u64, frames: u64) -> std::io::Result<Self> {
        // SAFETY: a new file without a name.
        let file = unsafe { libc::memfd_create(c"board".as_ptr(), libc::MFD_CLOEXEC) };
        if file < 0 {
            return Err(std::io::Error::last_os_error());
        }
        // SAFETY: just made, and nobody else's.
        let file = unsafe { OwnedFd::from_raw_fd(file) };
        let path = PathBuf::from(format!(
            "/proc/{}/fd/{}",
            std::process::id(),
            file.as_raw_fd()
        ));
        Ok(Self {
            board: Board::open(&path)?,
            path,
            _file: file,
            process: AtomicI32::new(0),
            seed,
            frames,
            left: AtomicU64::new(0),
        })
    }

    /// Runs workers until all frames are done: the next one goes on behind the frame that ended the last.
    fn run(&self, options: &Options, record: &Mutex<Record>, start: Instant) -> Result<(), String> {
        let end = self.seed + self.frames;
        let mut first = self.seed;
        let mut crashes = 0;
        while first < end {
            let mut command = Command::new(std::env::current_exe().map_err(|e| e.to_string())?);
            command
                .arg("--library")
                .arg(&options.library)
                .arg("--board")
                .arg(&self.path);
            command.args([
                "--seed",
                &first.to_string(),
                "--frames",
                &(end - first).to_string(),
            ]);
            command.args(options.verbose.then_some("--verbose"));
            if let Some(seconds) = options.seconds {
                let left = (seconds - start.elapsed().as_secs_f64()).max(0.0);
                command.args(["--seconds", &left.to_string()]);
            }
            // The seed tells more than a stack would, and in less time.
            command.env("RUST_BACKTRACE", "0");
            self.board.seed.store(first, Relaxed);
            let mut worker = command
                .stdout(Stdio::piped())
                .spawn()
                .map_err(|e| e.to_string())?;
            self.process.store(worker.id() as i32, Relaxed);
            for line in worker
                .stdout
                .take()
                .into_iter()
                .flat_map(|out| BufReader::new(out).lines())
            {
                let line = line.map_err(|e| e.to_string())?;
                // A sanitizer may have its say there, too.
                if let Ok(line) = serde_json::from_str(&line) {
                    lock(record).take(line);
                }
            }
            let status = worker.wait().map_err(|e| e.to_string())?;
            self.process.store(0, Relaxed);
            if status.success() {
                return Ok(());
            }
            if status.code() == Some(2) {
                return Err("a worker could not run; its reason is above".into());
            }
            let seed = self.board.seed.load(Relaxed);
            let ended = match (status.signal(), status.code()) {
                (Some(signal), _) => format!("signal {signal}"),
                (None, code) => format!("exit code {}", code.unwrap_or(-1)),
            };
            let kind = format!("process ended: {ended}");
            lock(record).add(Found {
                kind,
                seed,
                detail: String::new(),
            });
            first = seed + 1;
            crashes += 1;
            if crashes == CRASHES {
                self.left.store(end - first, Relaxed);
                return Ok(());
            }
        }
        Ok(())
    }
}

/// Calls all frames and tells what came out: true where nothing was found.
///
/// # Errors
/// A library that is missing, or a worker that cannot be started.
pub fn run(options: &Options) -> Result<bool, String> {
    let start = Instant::now();
    let jobs = (0..options.jobs).map(|job| {
        let from = options.frames * job / options.jobs;
        let to = options.frames * (job + 1) / options.jobs;
        Job::new(options.seed + from, to - from)
    });
    let jobs = jobs
        .collect::<Result<Vec<_>, _>>()
        .map_err(|error| error.to_string())?;
    let record = Mutex::new(Record::new(options));
    let progress = progress(options.frames);
    let result = std::thread::scope(|scope| {
        let runs: Vec<_> = (jobs.iter())
            .map(|job| scope.spawn(|| job.run(options, &record, start)))
            .collect();
        let mut seen: Vec<(u64, Instant)> = jobs.iter().map(|_| (0, start)).collect();
        while runs.iter().any(|run| !run.is_finished()) {
            std::thread::sleep(Duration::from_millis(50));
            let done: u64 = jobs.iter().map(|job| job.board.frames.load(Relaxed)).sum();
            progress.set_position(done);
            let found = lock(&record).num_found();
            progress.set_message(format!("{found} findings"));
            jobs.iter()
                .zip(&mut seen)
                .for_each(|(job, seen)| end_hanging(job, seen));
        }
        runs.into_iter().try_for_each(|run| {
            run.join()
                .unwrap_or_else(|_| Err("a thread of the fuzzer panicked".into()))
        })
    });
    progress.finish_and_clear();
    result?;
    let mut record = record
        .into_inner()
        .unwrap_or_else(|error| error.into_inner());
    let total = Board::default();
    jobs.iter().for_each(|job| total.add(job.board));
    let left = jobs.iter().map(|job| job.left.load(Relaxed)).sum();
    record.finish(&total, left, start.elapsed());
    println!("{record}");
    if let Some(path) = &options.record {
        let text = serde_json::to_string_pretty(&record).map_err(|error| error.to_string())?;
        std::fs::write(path, text + "\n")
            .map_err(|error| format!("--record: {}: {error}", path.display()))?;
    }
    Ok(record.is_clean())
}

/// A bar on a terminal; elsewhere a line now and then would only be in the way of the summary.
fn progress(frames: u64) -> ProgressBar {
    let bar = ProgressBar::with_draw_target(Some(frames), ProgressDrawTarget::stderr());
    if !std::io::stderr().is_terminal() {
        bar.set_draw_target(ProgressDrawTarget::hidden());
    }
    let style =
        "{elapsed_precise} {wide_bar} {human_pos}/{human_len} frames, {per_sec}, {eta} left, {msg}";
    bar.with_style(
        ProgressStyle::with_template(style).unwrap_or_else(|_| ProgressStyle::default_bar()),
    )
}

/// Ends a worker whose frame does not; its job takes that for a crash.
fn end_hanging(job: &Job, seen: &mut (u64, Instant)) {
    let (seed, process) = (job.board.seed.load(Relaxed), job.process.load(Relaxed));
    if seed != seen.0 {
        *seen = (seed, Instant::now());
    } else if process > 0 && seen.1.elapsed() > HANG {
        // SAFETY: a process that this one started and has not waited for.
        unsafe { libc::kill(process, libc::SIGKILL) };
        *seen = (seed, Instant::now());
    }
}

fn lock(record: &Mutex<Record>) -> MutexGuard<'_, Record> {
    record.lock().unwrap_or_else(|error| error.into_inner())
}

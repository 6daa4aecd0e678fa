//! `parallel.rs` in every order in which threads can run, by loom: the same source, with loom's locks and
//! counters in place of the standard library's.

use loom::sync::Arc;
use loom::sync::atomic::{AtomicUsize, Ordering};

use self::parallel::{Pool, Task, for_each};
use crate::cpu::scratch::Exhausted;

/// Stand-ins for `crate::sync`.
mod sync {
    pub use loom::sync::atomic::{AtomicUsize, Ordering};
    pub use loom::sync::{Arc, Condvar, Mutex};
}

#[path = "../parallel.rs"]
#[allow(clippy::duplicate_mod)] // the purpose of this module
#[allow(dead_code)] // what the models do not use
mod parallel;

/// Starts a thread for each task.
struct Threads(usize);

impl Pool for Threads {
    fn num_threads(&self) -> usize {
        self.0
    }
    fn schedule(&self, task: Task) {
        loom::thread::spawn(task);
    }
}

/// A check of a call in one order: by its outcome, and by how often each item ran.
type Check = fn(Result<(), Exhausted>, &[usize]);

/// Runs a call in every order with at most two preemptions; the item `fails` finds no memory.
///
/// No pool panics here: loom's threads share the stack of one, which cannot unwind in the middle of
/// another. What a panic does, close the claims and wait, is what a failure does, too.
fn model(num_threads: usize, num_items: usize, fails: Option<usize>, check: Check) {
    let mut builder = loom::model::Builder::new();
    builder.preemption_bound = Some(2);
    builder.check(move || {
        // Relaxed: it is the call alone that orders what its items do before its end.
        let is_over = Arc::new(AtomicUsize::new(0));
        let runs: Vec<_> = (0..num_items).map(|_| AtomicUsize::new(0)).collect();
        let run = |(): &mut (), index: usize, item: usize| {
            assert_eq!(index, item);
            runs[item].fetch_add(1, Ordering::Relaxed);
            assert_eq!(is_over.load(Ordering::Relaxed), 0);
            if fails == Some(item) {
                return Err(Exhausted { bytes: item });
            }
            Ok(())
        };
        let items = (0..num_items).collect();
        let outcome = for_each("items", &Threads(num_threads), items, || Ok(()), run);
        is_over.store(1, Ordering::Relaxed);
        let runs: Vec<_> = (runs.iter().map(|runs| runs.load(Ordering::Relaxed))).collect();
        check(outcome, &runs);
    });
}

#[test]
fn each_item_runs_once_before_the_call_returns() {
    for (num_threads, num_items) in [(2, 2), (2, 3), (3, 3)] {
        model(num_threads, num_items, None, |outcome, runs| {
            assert_eq!(outcome, Ok(()));
            assert!(runs.iter().all(|runs| *runs == 1), "{runs:?}");
        });
    }
}

#[test]
fn a_failure_is_told_and_no_item_outlives_the_call() {
    for num_threads in [2, 3] {
        model(num_threads, 3, Some(0), |outcome, runs| {
            assert_eq!(outcome, Err(Exhausted { bytes: 0 }));
            assert!(
                runs[0] == 1 && runs.iter().all(|runs| *runs <= 1),
                "{runs:?}"
            );
        });
    }
}

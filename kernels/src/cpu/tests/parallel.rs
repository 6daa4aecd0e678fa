//! Work shared between threads: pools that are slow, dead, or that panic.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Mutex, mpsc};
use std::time::Duration;

use super::Threads;
use crate::cpu::parallel::{Pool, Serial, Task, for_each};
use crate::cpu::scratch::Exhausted;

/// A pool that never runs anything.
#[derive(Default)]
struct Dead(Mutex<Vec<Task>>);

impl Pool for Dead {
    fn num_threads(&self) -> usize {
        8
    }
    fn schedule(&self, task: Task) {
        self.0.lock().unwrap().push(task);
    }
}

/// A pool that panics at a call after it has passed earlier tasks, and that one, to threads.
struct Panicking {
    scheduled: AtomicUsize,
    queue: mpsc::Sender<Task>,
}

impl Pool for Panicking {
    fn num_threads(&self) -> usize {
        3
    }
    fn schedule(&self, task: Task) {
        self.queue.send(task).unwrap();
        let scheduled = self.scheduled.fetch_add(1, Ordering::Relaxed);
        assert!(scheduled == 0, "the pool is closed");
    }
}

fn message(panic: Box<dyn std::any::Any + Send>) -> String {
    let text = panic.downcast_ref::<&str>().map(ToString::to_string);
    text.or_else(|| panic.downcast_ref().cloned()).unwrap()
}

#[test]
fn each_item_runs_once() {
    for pool in [&Threads as &dyn Pool, &Serial, &Dead::default()] {
        let counts: Vec<AtomicUsize> = (0..100).map(|_| AtomicUsize::new(0)).collect();
        let run = |(): &mut (), index, item: usize| {
            assert_eq!(index, item);
            counts[item].fetch_add(1, Ordering::Relaxed);
            Ok(())
        };
        for_each("items", pool, (0..100).collect(), || Ok(()), run).unwrap();
        assert!(counts.iter().all(|c| c.load(Ordering::Relaxed) == 1));
    }
}

#[test]
fn a_panic_reaches_the_caller_after_all_items_that_were_begun() {
    for pool in [&Threads as &dyn Pool, &Serial] {
        let (begun, done) = (AtomicUsize::new(0), AtomicUsize::new(0));
        let run = |(): &mut (), index, ()| {
            begun.fetch_add(1, Ordering::Relaxed);
            if index == 7 {
                done.fetch_add(1, Ordering::Relaxed);
                panic!("item seven");
            }
            std::thread::sleep(Duration::from_millis(1));
            done.fetch_add(1, Ordering::Relaxed);
            Ok(())
        };
        let call = AssertUnwindSafe(|| for_each("items", pool, vec![(); 20], || Ok(()), run));
        let panic = catch_unwind(call).unwrap_err();
        assert_eq!(message(panic), "item seven");
        let (begun, done) = (begun.into_inner(), done.into_inner());
        assert_eq!(begun, done);
        assert!(done >= 8);
    }
}

#[test]
fn missing_memory_reaches_the_caller_and_ends_the_call() {
    let exhausted = Exhausted { bytes: 7 };
    for pool in [&Threads as &dyn Pool, &Serial] {
        let no_state = || Err::<(), _>(exhausted);
        let outcome = for_each("items", pool, vec![(); 20], no_state, |(), _, ()| {
            unreachable!("nothing runs without its state")
        });
        assert_eq!(outcome, Err(exhausted));
        let run = |(): &mut (), index, ()| if index < 5 { Ok(()) } else { Err(exhausted) };
        let outcome = for_each("items", pool, vec![(); 20], || Ok(()), run);
        assert_eq!(outcome, Err(exhausted));
    }
    let done = AtomicUsize::new(0);
    let run = |(): &mut (), index, ()| {
        done.fetch_add(1, Ordering::Relaxed);
        if index < 5 { Ok(()) } else { Err(exhausted) }
    };
    for_each("items", &Serial, vec![(); 20], || Ok(()), run).unwrap_err();
    assert_eq!(done.into_inner(), 6);
}

#[test]
fn no_items_is_no_work() {
    let no_state = || -> Result<(), Exhausted> { unreachable!() };
    for_each(
        "items",
        &Threads,
        Vec::<u8>::new(),
        no_state,
        |(), _, _| unreachable!(),
    )
    .unwrap();
}

/// The state of the call, which lives as long as the call: a helper that still works when it is gone
/// reads freed memory, which Miri and AddressSanitizer see, and this flag.
struct OfTheCall(Box<AtomicBool>);

impl Drop for OfTheCall {
    fn drop(&mut self) {
        self.0.store(true, Ordering::SeqCst);
    }
}

/// Runs a call on [`Panicking`]; `helper` does what becomes of the queued tasks.
fn run_with_panicking_pool(helper: impl FnOnce(mpsc::Receiver<Task>) + Send) -> usize {
    let (queue, tasks) = mpsc::channel();
    let pool = Panicking {
        scheduled: AtomicUsize::new(0),
        queue,
    };
    let done = AtomicUsize::new(0);
    std::thread::scope(|scope| {
        scope.spawn(|| helper(tasks));
        let state = OfTheCall(Box::new(AtomicBool::new(false)));
        let run = |(): &mut (), _, ()| {
            assert!(!state.0.load(Ordering::SeqCst), "the call is over");
            std::thread::sleep(Duration::from_millis(5));
            assert!(!state.0.load(Ordering::SeqCst), "the call is over");
            done.fetch_add(1, Ordering::Relaxed);
            Ok(())
        };
        let call = || for_each("items", &pool, vec![(); 4], || Ok(()), run);
        let panic = catch_unwind(AssertUnwindSafe(call)).unwrap_err();
        assert_eq!(message(panic), "the pool is closed");
        drop(state);
        drop(pool); // ends the queue
    });
    done.into_inner()
}

#[test]
fn a_pool_that_panics_after_queueing_leaves_no_worker_behind() {
    // Helpers that start at once: the items that they have begun are waited for.
    run_with_panicking_pool(|tasks| tasks.into_iter().for_each(|task| task()));
    // Helpers that start when the call is over: there is nothing left for them.
    let done = run_with_panicking_pool(|tasks| {
        let mut queued: Vec<Task> = tasks.into_iter().collect();
        queued.drain(..).for_each(|task| task());
    });
    assert_eq!(done, 0);
}

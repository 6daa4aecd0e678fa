//! Memory that cannot be had: every allocation of every call fails once, and the call says so.
//!
//! An allocation that `scratch` does not make ends the process when it fails, and so this test.

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::sync::Mutex;

use crate::contract::check::Example;
use crate::contract::view::DType;
use crate::cpu::parallel::{Pool, Serial, Task};
use crate::cpu::scratch::{Exhausted, filled};
use crate::{Call, Config, Constraint, Error};

/// The system's memory, of which one allocation of a thread can be refused.
struct Refusing;

#[global_allocator]
static ALLOCATOR: Refusing = Refusing;

/// Less than this no size of a call needs: tasks, locks, the text of an error.
const LEAST_BYTES: usize = 512;

thread_local! {
    /// How many larger allocations of this thread succeed before one fails; none fails where it is None.
    static LEFT: Cell<Option<usize>> = const { Cell::new(None) };
}

fn is_refused(bytes: usize) -> bool {
    if bytes < LEAST_BYTES {
        return false;
    }
    LEFT.try_with(|left| match left.get() {
        None => false,
        Some(0) => {
            left.set(None);
            true
        }
        Some(more) => {
            left.set(Some(more - 1));
            false
        }
    })
    .unwrap_or(false)
}

// SAFETY: the system's allocator, or null, which is an answer too.
unsafe impl GlobalAlloc for Refusing {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        if is_refused(layout.size()) {
            return std::ptr::null_mut();
        }
        // SAFETY: promised by the caller.
        unsafe { System.alloc(layout) }
    }
    unsafe fn dealloc(&self, memory: *mut u8, layout: Layout) {
        // SAFETY: promised by the caller.
        unsafe { System.dealloc(memory, layout) }
    }
}

/// Another thread, which is refused what the caller would be refused.
#[derive(Default)]
struct Helper(Mutex<Vec<std::thread::JoinHandle<()>>>);

impl Pool for Helper {
    fn num_threads(&self) -> usize {
        2
    }
    fn schedule(&self, task: Task) {
        let left = LEFT.replace(None);
        let thread = std::thread::spawn(move || {
            LEFT.set(left);
            task();
            LEFT.set(None);
        });
        self.0.lock().unwrap().push(thread);
        LEFT.set(left);
    }
}

/// A call with two groups of tokens, and a width that takes more than [`LEAST_BYTES`].
fn example(kind: Call, constraint: Constraint) -> Example {
    let config = Config {
        constraint,
        sinkhorn_iters: 2,
        ..Config::default()
    };
    // Miri would take an hour for these sizes.
    let (tokens, sizes) = if cfg!(miri) {
        (3, [2, 9])
    } else {
        (130, [4, 140])
    };
    Example::new(kind, DType::F32, tokens, sizes, config)
}

/// Refuses every allocation of a call, one after the other, until there is none left: how many there are.
fn refuse_each(example: &Example, pool: &dyn Pool) -> usize {
    example.with_memory(|kind, args, rets, config| {
        // SAFETY: the memory is there.
        let call = || unsafe { crate::cpu::run(kind, args, rets, config, pool) };
        for num_left in 0.. {
            LEFT.set(Some(num_left));
            let outcome = call();
            let was_refused = LEFT.replace(None).is_none();
            match outcome {
                Ok(()) => {
                    // So the calls after a failed one work, too.
                    assert!(!was_refused, "{}: a refusal got lost", kind.name());
                    return num_left;
                }
                Err(Error::Exhausted(message)) => {
                    let start = format!("{}: scratch memory: expected ", kind.name());
                    assert!(message.starts_with(&start), "{message}");
                    assert!(message.contains(" bytes more, got none"), "{message}");
                }
                Err(error) => panic!("{error}"),
            }
        }
        unreachable!()
    })
}

#[test]
fn every_allocation_may_fail() {
    let mut num = 0;
    for kind in Call::ALL {
        num += refuse_each(&example(kind, Constraint::Birkhoff), &Serial);
        if !kind.groups().is_empty() {
            num += refuse_each(
                &example(kind, Constraint::Permutations).with_norm(),
                &Serial,
            );
        }
    }
    assert!(num > 10, "{num}");
}

#[test]
fn every_allocation_may_fail_on_any_thread() {
    for kind in [Call::PreFwd, Call::PostPreBwd, Call::SinkhornBwd] {
        let pool = Helper::default();
        refuse_each(&example(kind, Constraint::Birkhoff), &pool);
        for thread in pool.0.into_inner().unwrap() {
            thread.join().unwrap();
        }
    }
}

#[test]
#[cfg_attr(miri, ignore = "Miri has no answer for so much memory")]
fn more_than_any_memory_is_an_error() {
    for len in [usize::MAX, isize::MAX as usize, isize::MAX as usize / 8] {
        let bytes = len.saturating_mul(8);
        assert_eq!(filled(1.0_f64, len), Err(Exhausted { bytes }));
    }
}

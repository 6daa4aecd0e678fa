//! Work shared between threads of a pool that belongs to somebody else.

use std::any::Any;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};

// Those of loom where a test runs this file through all interleavings (tests/interleavings.rs).
use super::sync::{Arc, AtomicUsize, Condvar, Mutex, Ordering};
use crate::cpu::scratch::{Exhausted, collected};

/// A piece of work for another thread.
pub type Task = Box<dyn FnOnce() + Send + 'static>;

/// Threads lent by the caller.
pub trait Pool {
    /// How many threads may work, besides none at all (0 or 1: the caller works alone).
    fn num_threads(&self) -> usize;
    /// Runs `task` on some thread at some time, perhaps late, perhaps on this one, perhaps never.
    fn schedule(&self, task: Task);
}

/// No threads: the caller does all the work.
pub struct Serial;

impl Pool for Serial {
    fn num_threads(&self) -> usize {
        1
    }
    fn schedule(&self, task: Task) {
        task();
    }
}

/// The counter from which threads take their work. Helpers may outlive the call that made it.
struct Claims {
    num_items: usize,
    next: AtomicUsize,
    finished: Mutex<Finished>,
    all_finished: Condvar,
}

/// Progress of all threads.
#[derive(Default)]
struct Finished {
    num_items: usize,
    failure: Option<Failure>,
}

/// Reason to end a call early: the first of them counts.
enum Failure {
    Panic(Box<dyn Any + Send>),
    Exhausted(Exhausted),
}

impl Claims {
    fn new(num_items: usize) -> Self {
        Self {
            num_items,
            next: AtomicUsize::new(0),
            finished: Mutex::new(Finished::default()),
            all_finished: Condvar::new(),
        }
    }

    fn take(&self) -> Option<usize> {
        let item = self.next.fetch_add(1, Ordering::Relaxed);
        (item < self.num_items).then_some(item)
    }

    /// Takes all items that are left, so that nobody begins another one.
    fn close(&self) {
        let taken = self.next.swap(self.num_items, Ordering::Relaxed);
        self.report(self.num_items.saturating_sub(taken), None);
    }

    fn report(&self, num_items: usize, mut failure: Option<Failure>) {
        let mut finished = self.finished.lock().unwrap_or_else(|e| e.into_inner());
        if finished.failure.is_none() {
            finished.failure = failure.take();
        }
        finished.num_items += num_items;
        if finished.num_items == self.num_items {
            self.all_finished.notify_all();
        }
    }

    /// Waits until every item is reported.
    fn wait(&self) {
        let mut finished = self.finished.lock().unwrap_or_else(|e| e.into_inner());
        while finished.num_items < self.num_items {
            finished = self
                .all_finished
                .wait(finished)
                .unwrap_or_else(|e| e.into_inner());
        }
    }

    fn failure(&self) -> Option<Failure> {
        let mut finished = self.finished.lock().unwrap_or_else(|e| e.into_inner());
        finished.failure.take()
    }
}

/// The items that one thread has taken. They are reported when it is dropped, so whatever unwinds there,
/// nobody waits for them in vain.
struct Share<'a> {
    claims: &'a Claims,
    num_items: usize,
    failure: Option<Failure>,
}

impl<'a> Share<'a> {
    fn new(claims: &'a Claims) -> Self {
        Self {
            claims,
            num_items: 0,
            failure: None,
        }
    }

    fn take(&mut self) -> Option<usize> {
        let item = self.claims.take()?;
        self.num_items += 1;
        Some(item)
    }

    /// Gives up: items that nobody has begun stay undone.
    fn fail(&mut self, failure: Failure) {
        self.failure = Some(failure);
        self.claims.close();
    }
}

impl Drop for Share<'_> {
    fn drop(&mut self) {
        self.claims.report(self.num_items, self.failure.take());
    }
}

/// The end of a call, however it comes: when it is dropped nobody begins another item, and those that
/// somebody has begun are waited for. A helper that comes later finds nothing to do.
struct End<'a>(&'a Claims);

impl Drop for End<'_> {
    fn drop(&mut self) {
        self.0.close();
        self.0.wait();
    }
}

/// The work of a thread that has taken its first item: all items it can get.
type Worker<'a> = dyn Fn(&mut Share, usize) + Sync + 'a;

/// A worker with its lifetime hidden, so that a task may hold it.
struct Hidden(*const Worker<'static>);

// SAFETY: the worker behind the pointer is Sync.
unsafe impl Send for Hidden {}

impl Hidden {
    /// # Safety
    /// The worker lives until the [`End`] of these claims has been dropped.
    unsafe fn help(&self, claims: &Claims) {
        let mut share = Share::new(claims);
        if let Some(first) = share.take() {
            // SAFETY: `End` waits for what `share` has taken and has not yet reported, so the worker is
            // still there.
            unsafe { (*self.0)(&mut share, first) };
        }
    }
}

/// Hands every item to exactly one call of `run`, on this thread and on the pool's; each thread that
/// gets work makes one state with `init`. Returns when all calls have returned. `pass` is its name in
/// the log.
///
/// Threads take items from a counter, so a slow or missing helper never holds up the rest: the
/// caller waits only for items that somebody has begun. After an error or a panic nobody begins
/// another item. A panic goes on here, that of the pool itself too.
///
/// # Errors
/// The first that `init` or `run` meets, or no memory for the list of items.
pub fn for_each<T: Send, W>(
    pass: &'static str,
    pool: &dyn Pool,
    items: Vec<T>,
    init: impl Fn() -> Result<W, Exhausted> + Sync,
    run: impl Fn(&mut W, usize, T) -> Result<(), Exhausted> + Sync,
) -> Result<(), Exhausted> {
    let num_items = items.len();
    let num_threads = pool.num_threads().min(num_items);
    tracing::trace!(target: "jax_mhc", pass, chunks = num_items, threads = num_threads.max(1));
    let items: Vec<Mutex<Option<T>>> =
        collected(num_items, items.into_iter().map(|t| Mutex::new(Some(t))))?;
    let worker = |share: &mut Share, first: usize| {
        let mut state = None;
        let mut next = Some(first);
        while let Some(index) = next {
            let result = catch_unwind(AssertUnwindSafe(|| {
                let mut slot = items[index].lock().unwrap_or_else(|e| e.into_inner());
                let Some(item) = slot.take() else {
                    return Ok(());
                };
                drop(slot);
                let state = match &mut state {
                    Some(state) => state,
                    None => state.insert(init()?),
                };
                run(state, index, item)
            }));
            match result {
                Ok(Ok(())) => {}
                Ok(Err(exhausted)) => share.fail(Failure::Exhausted(exhausted)),
                Err(panic) => share.fail(Failure::Panic(panic)),
            }
            next = share.take();
        }
    };
    let claims = Arc::new(Claims::new(num_items));
    {
        // Dropped before what the worker refers to, whatever unwinds here.
        let _end = End(&claims);
        for _ in 1..num_threads {
            let claims = Arc::clone(&claims);
            let worker: *const Worker<'_> = &worker;
            // SAFETY: only the lifetime changes.
            let hidden = Hidden(unsafe {
                std::mem::transmute::<*const Worker<'_>, *const Worker<'static>>(worker)
            });
            pool.schedule(Box::new(move || {
                let hidden = hidden;
                // SAFETY: `_end` is dropped before the worker.
                unsafe { hidden.help(&claims) }
            }));
        }
        let mut share = Share::new(&claims);
        if let Some(first) = share.take() {
            worker(&mut share, first);
        }
    }
    match claims.failure() {
        None => Ok(()),
        Some(Failure::Exhausted(exhausted)) => Err(exhausted),
        Some(Failure::Panic(panic)) => resume_unwind(panic),
    }
}

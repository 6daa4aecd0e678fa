//! The threads that calls are lent: tasks run at once, at the same time, or after the call.

use std::collections::VecDeque;
use std::ffi::c_void;
use std::sync::{Arc, Condvar, Mutex, MutexGuard};

use crate::call::{FramePool, FrameTask};
use crate::frame::{Schedule, When};

/// Threads that really run.
const NUM_THREADS: usize = 2;

struct Task {
    run: FrameTask,
    data: *mut c_void,
}

// SAFETY: XLA's tasks may run on any thread.
unsafe impl Send for Task {}

impl Task {
    fn run(self) {
        (self.run)(self.data);
    }
}

#[derive(Default)]
struct Queue {
    tasks: VecDeque<Task>,
    num_running: usize,
}

#[derive(Default)]
struct Shared {
    queue: Mutex<Queue>,
    changed: Condvar,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Queue> {
        self.queue.lock().unwrap_or_else(|error| error.into_inner())
    }
}

/// Threads, and the tasks that wait for them.
pub struct Pool {
    threads: Arc<Shared>,
    afterwards: Arc<Shared>,
}

impl Pool {
    /// Starts the threads; they end with the process.
    pub fn new() -> Self {
        let threads = Arc::<Shared>::default();
        for _ in 0..NUM_THREADS {
            let shared = Arc::clone(&threads);
            std::thread::spawn(move || run_tasks(&shared));
        }
        Self {
            threads,
            afterwards: Arc::default(),
        }
    }

    /// The pool of a call's frame.
    pub fn lend(&self, schedule: Schedule) -> FramePool {
        let shared = match schedule.when {
            When::Concurrently => Some(&self.threads),
            When::Afterwards => Some(&self.afterwards),
            When::AtOnce => None,
        };
        FramePool {
            num_threads: schedule.num_threads,
            schedule: shared.map(|_| put as _),
            context: shared.map_or(std::ptr::null_mut(), |shared| {
                Arc::as_ptr(shared).cast_mut().cast()
            }),
        }
    }

    /// Runs what the calls so far have left, and waits until all of it has run. Returns the number of
    /// tasks that ran here.
    pub fn finish(&self) -> usize {
        let left = std::mem::take(&mut self.afterwards.lock().tasks);
        let num_left = left.len();
        left.into_iter().for_each(Task::run);
        let mut queue = self.threads.lock();
        while !queue.tasks.is_empty() || queue.num_running > 0 {
            queue = (self.threads.changed.wait(queue)).unwrap_or_else(|error| error.into_inner());
        }
        num_left
    }
}

extern "C" fn put(context: *mut c_void, run: FrameTask, data: *mut c_void) {
    // SAFETY: what `lend` put there, which the pool keeps.
    let shared = unsafe { &*context.cast::<Shared>() };
    let mut queue = shared.lock();
    queue.tasks.push_back(Task { run, data });
    drop(queue);
    shared.changed.notify_all();
}

fn run_tasks(shared: &Shared) {
    let mut queue = shared.lock();
    loop {
        let Some(task) = queue.tasks.pop_front() else {
            queue = (shared.changed.wait(queue)).unwrap_or_else(|error| error.into_inner());
            continue;
        };
        queue.num_running += 1;
        drop(queue);
        task.run();
        queue = shared.lock();
        queue.num_running -= 1;
        shared.changed.notify_all();
    }
}

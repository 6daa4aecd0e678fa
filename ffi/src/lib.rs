//! XLA's side of a call: decodes call frames for the kernels and turns what comes back into XLA
//! errors.
//!
//! No other place knows XLA's FFI. Nothing here depends on what an op computes: every handler
//! is the same code with another [`Call`].

use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind};

use jax_mhc_kernels::{
    Attribute, AttributeValue, Call, Config, DType, Error, Setting, TARGET_VERSION, View, cpu, gpu,
};

#[cxx::bridge(namespace = "jax_mhc")]
mod bridge {
    /// The handlers of a call, by platform and stage.
    #[derive(Debug, Clone, Copy)]
    enum Entry {
        /// The only stage on a CPU.
        Cpu,
        /// The stage before every execution, on a GPU.
        CudaInitialize,
        /// Execution on a GPU, or its recording for later.
        CudaExecute,
    }

    enum DType {
        F32,
        F64,
        Bf16,
        F16,
    }

    /// An operand or a result.
    struct Buffer<'a> {
        data: *mut u8,
        dims: &'a [i64],
        dtype: DType,
    }

    #[derive(Clone, Copy)]
    enum Code {
        Ok,
        InvalidArgument,
        ResourceExhausted,
        Internal,
    }

    /// The outcome of a call.
    struct Outcome {
        code: Code,
        message: String,
    }

    unsafe extern "C++" {
        include!("jax-mhc-ffi/src/handler.h");

        type Frame;
        fn num_args(&self) -> usize;
        fn num_rets(&self) -> usize;
        fn num_attributes(&self) -> usize;
        fn arg(&self, index: usize) -> Result<Buffer<'_>>;
        fn ret(&self, index: usize) -> Result<Buffer<'_>>;
        fn string_attribute<'a>(self: &'a Frame, name: &str) -> Result<&'a str>;
        fn int64_attribute(&self, name: &str) -> Result<i64>;
        fn float64_attribute(&self, name: &str) -> Result<f64>;
        fn num_threads(&self) -> i64;
        fn schedule(&self, task: Box<Task>) -> Result<()>;
        fn stream(&self) -> usize;

        fn handler_address(entry: Entry, call: usize) -> Result<usize>;
        fn retired_handler_address() -> usize;
        fn api_major() -> i32;
        fn api_minor() -> i32;
    }

    extern "Rust" {
        type Task;
        fn run_task(task: Box<Task>);
        fn run_call(entry: Entry, call: usize, frame: &Frame) -> Outcome;
        fn retired_message() -> String;
    }
}

pub use bridge::Entry;

/// The address of an XLA FFI handler of a call.
///
/// # Panics
/// Fewer handlers are compiled in than there are calls: raise `kNumHandlers` in handler.cc.
pub fn handler_address(entry: Entry, call: Call) -> usize {
    bridge::handler_address(entry, call as usize).expect("every call has a handler")
}

/// The address of the handler of calls that are no more, on every platform.
pub fn retired_handler_address() -> usize {
    bridge::retired_handler_address()
}

/// The error of calls that are no more.
fn retired_message() -> String {
    format!(
        "jax_mhc: program: expected calls of version {TARGET_VERSION}, got those of an earlier version; \
         export or compile the program again with this version of jax-mhc"
    )
}

/// The version of XLA's FFI (major, minor) that the handlers are compiled against.
pub fn api_version() -> (i32, i32) {
    (bridge::api_major(), bridge::api_minor())
}

/// Runs one call; the C++ handlers end here.
fn run_call(entry: Entry, call: usize, frame: &bridge::Frame) -> bridge::Outcome {
    let call = Call::ALL[call];
    outcome(call, || decode_and_run(entry, call, frame))
}

/// The outcome of `run`; a panic must not unwind into C++.
fn outcome(call: Call, run: impl FnOnce() -> Result<(), Error>) -> bridge::Outcome {
    let (code, message) = match catch_unwind(AssertUnwindSafe(run)) {
        Ok(Ok(())) => (bridge::Code::Ok, String::new()),
        Ok(Err(Error::Refused(message))) => (bridge::Code::InvalidArgument, message),
        Ok(Err(Error::Device(message))) => (bridge::Code::Internal, message),
        Ok(Err(Error::Exhausted(message))) => (bridge::Code::ResourceExhausted, message),
        Err(panic) => {
            let message = (panic.downcast_ref().map(String::as_str))
                .or_else(|| panic.downcast_ref().copied())
                .unwrap_or("no message");
            let message = format!("{}: panicked: {message}", call.name());
            (bridge::Code::Internal, message)
        }
    };
    if code != bridge::Code::Ok {
        tracing::error!(target: "jax_mhc", "{message}");
    }
    bridge::Outcome { code, message }
}

fn decode_and_run(entry: Entry, call: Call, frame: &bridge::Frame) -> Result<(), Error> {
    let in_op = |reason| Error::Refused(format!("{}: {reason}", call.name()));
    let args = views("operand", frame.num_args(), |index| frame.arg(index)).map_err(in_op)?;
    let rets = views("result", frame.num_rets(), |index| frame.ret(index)).map_err(in_op)?;
    refuse_overlap(call, &args, &rets).map_err(in_op)?;
    let config = config(call, frame).map_err(in_op)?;
    let stream = frame.stream() as *mut std::ffi::c_void;
    // SAFETY: XLA's buffers hold the elements that their dimensions tell, on the GPU where XLA lends a
    // stream. They live until the handler returns, or until the work on the stream is done; no result
    // overlaps another view.
    unsafe {
        match entry {
            Entry::Cpu => cpu::run(call, &args, &rets, &config, &LentPool(frame)),
            Entry::CudaInitialize => gpu::initialize(call, &args, &rets, &config, stream),
            _ => gpu::execute(call, &args, &rets, &config, stream),
        }
    }
}

fn views<'a>(
    role: &str,
    num: usize,
    get: impl Fn(usize) -> Result<bridge::Buffer<'a>, cxx::Exception>,
) -> Result<Vec<View<'a>>, String> {
    let view = |index| {
        let buffer = get(index).map_err(|reason| format!("{role} {index}: {reason}"))?;
        let dtype = match buffer.dtype {
            bridge::DType::F32 => DType::F32,
            bridge::DType::F64 => DType::F64,
            bridge::DType::Bf16 => DType::Bf16,
            _ => DType::F16,
        };
        Ok(View {
            data: buffer.data,
            dims: buffer.dims,
            dtype,
        })
    };
    (0..num).map(view).collect()
}

/// Kernels rely on results that share memory with nothing else. XLA sees to it unless the program asks
/// for `input_output_aliases`; the one that kernels know is that of [`Call::adds_in_place`].
///
/// A view too large for any memory overlaps nothing: the kernels' own check refuses it by name.
fn refuse_overlap(call: Call, args: &[View], rets: &[View]) -> Result<(), String> {
    for (index, ret) in rets.iter().map(span).enumerate() {
        let is_sum = |arg| call.adds_in_place() && index == 0 && arg + 1 == args.len();
        let mut others = args.iter().map(span).enumerate();
        let mut earlier = rets[..index].iter().map(span);
        if others.any(|(arg, other)| overlap(&ret, &other) && !(is_sum(arg) && ret == other))
            || earlier.any(|other| overlap(&ret, &other))
        {
            return Err(format!(
                "result {index}: expected memory of its own, got that of another buffer; \
                 remove `input_output_aliases`"
            ));
        }
    }
    Ok(())
}

/// The addresses of a view; none where it has no elements, or more than there is memory.
fn span(view: &View) -> Range<usize> {
    let start = view.data as usize;
    let end = view.num_bytes().and_then(|bytes| start.checked_add(bytes));
    start..end.unwrap_or(start)
}

fn overlap(a: &Range<usize>, b: &Range<usize>) -> bool {
    !a.is_empty() && !b.is_empty() && a.start < b.end && b.start < a.end
}

/// The settings of a call, from the attributes that the table of calls has for it and no others.
fn config(call: Call, frame: &bridge::Frame) -> Result<Config, String> {
    let mut config = Config::default();
    let mut num = 0;
    for Attribute { name, setting, .. } in call.attributes() {
        let value = match setting {
            Setting::String { .. } => frame.string_attribute(name).map(AttributeValue::String),
            Setting::Int64 { .. } => frame.int64_attribute(name).map(AttributeValue::Int64),
            Setting::Float64 => frame.float64_attribute(name).map(AttributeValue::Float64),
        };
        let value = value.map_err(|reason| format!("attribute `{name}`: {reason}"))?;
        config.set(name, value)?;
        num += 1;
    }
    match frame.num_attributes() {
        got if got == num => Ok(config),
        got => Err(format!("expected {num} attributes, got {got}")),
    }
}

/// XLA's threads, for the time of one call.
struct LentPool<'a>(&'a bridge::Frame);

impl cpu::Pool for LentPool<'_> {
    fn num_threads(&self) -> usize {
        usize::try_from(self.0.num_threads()).unwrap_or(0)
    }

    fn schedule(&self, task: cpu::Task) {
        // Without memory to schedule it there is a thread less, and the others do its work.
        let _ = self.0.schedule(Box::new(Task(task)));
    }
}

/// A task in C++'s hands.
struct Task(cpu::Task);

/// Runs on one of XLA's threads, perhaps after the call has returned: there is nobody left to
/// tell of a panic, and kernels hand those of their own work to the caller themselves.
#[expect(
    clippy::boxed_local,
    reason = "C++ can hold a Rust value in a box alone"
)]
fn run_task(task: Box<Task>) {
    let _ = catch_unwind(AssertUnwindSafe(task.0));
}

#[cfg(test)]
mod tests;

//! The calls on NVIDIA GPUs.
//!
//! A call is checked as on the CPU, a pure `plan` makes a list of launches of it, and these go to XLA's
//! stream. Nothing is allocated on the device and nothing waits for it.

mod collapse;
mod driver;
mod head;
mod images;
mod launch;
mod memory;
mod modules;
mod norm;
mod one_pass;
mod post;
mod pre;
mod projection;
mod seam;
mod sinkhorn;
mod sizes;
#[cfg(test)]
mod tests;

use std::ffi::c_void;

use serde::Serialize;

use crate::signature::{Call, Op};
use crate::view::{DType, View};
use crate::{Config, Error};
use launch::{Device, Launch};
use modules::Context;

pub use images::{Build, build};
pub use launch::{Problem, Workspace};

/// The launches of a call, in their order.
fn plan(call: &Call, device: &Device) -> Vec<Launch> {
    match call.op {
        Op::PreFwd | Op::PreBwd => pre::plan(call, device),
        Op::PostFwd | Op::PostBwd => post::plan(call, device),
        Op::SeamFwd | Op::SeamBwd => seam::plan(call, device),
        Op::SinkhornFwd | Op::SinkhornBwd => sinkhorn::plan(call, device),
        Op::HeadFwd | Op::HeadBwd => head::plan(call, device),
        Op::CollapseFwd | Op::CollapseBwd => collapse::plan(call, device),
    }
}

/// The workspace that a call needs.
pub fn workspace(problem: &Problem) -> Workspace {
    match problem.op {
        Op::PreFwd | Op::PreBwd => pre::workspace(problem),
        Op::PostFwd | Op::PostBwd => post::workspace(problem),
        Op::SeamFwd | Op::SeamBwd => seam::workspace(problem),
        Op::SinkhornFwd | Op::SinkhornBwd => sinkhorn::workspace(problem),
        Op::HeadFwd | Op::HeadBwd => head::workspace(problem),
        Op::CollapseFwd | Op::CollapseBwd => collapse::workspace(problem),
    }
}

/// Loads the kernels of a call, so that [`execute`] may be recorded into a CUDA graph. Cheap where they
/// are loaded.
///
/// # Errors
/// Those of [`execute`].
///
/// # Safety
/// As for [`execute`].
pub unsafe fn initialize(
    op: Op,
    args: &[View],
    rets: &[View],
    config: &Config,
    stream: *mut c_void,
) -> Result<(), Error> {
    // SAFETY: promised by the caller.
    unsafe {
        run(op, args, rets, config, stream, |context, launch| {
            context.load(&launch.kernel)
        })
    }
}

/// Launches the kernels of a call on `stream`: operands and results as in the table of
/// docs/architecture.md, with the workspace as the last result where the call needs one.
///
/// # Errors
/// As [`crate::call`], or a dtype without kernels, or a workspace that is too small; what the driver
/// says, errors of earlier work on the device among it.
///
/// # Safety
/// `stream` must be a stream of the driver. Every view must be device memory that is valid for reads
/// (operands) or writes (results) of all its elements until the work is done, and no result may overlap
/// any other view, but where [`Op::adds_in_place`].
pub unsafe fn execute(
    op: Op,
    args: &[View],
    rets: &[View],
    config: &Config,
    stream: *mut c_void,
) -> Result<(), Error> {
    // SAFETY: promised by the caller; plans launch what the kernels declare.
    unsafe {
        run(op, args, rets, config, stream, |context, launch| {
            context.launch(launch)
        })
    }
}

/// Does something with every launch of a call.
///
/// # Safety
/// `stream` must be a stream of the driver.
unsafe fn run(
    op: Op,
    args: &[View],
    rets: &[View],
    config: &Config,
    stream: *mut c_void,
    each: impl Fn(&Context, &Launch) -> Result<(), String>,
) -> Result<(), Error> {
    let call = Call::check(op, args, rets, config)?;
    check_device_call(&call)?;
    // SAFETY: promised by the caller.
    let context = unsafe { Context::enter(stream) }
        .map_err(|reason| Error::Device(format!("{}: {reason}", op.name())))?;
    for launch in plan(&call, context.device()) {
        if !launch.grid.contains(&0) {
            each(&context, &launch).map_err(|reason| failure(&call, &launch, &context, &reason))?;
        }
    }
    Ok(())
}

/// What the driver said, with what it was about.
fn failure(call: &Call, launch: &Launch, context: &Context, reason: &str) -> Error {
    let names = call.op.operands().iter();
    let operands: Vec<String> = names
        .map(|name| {
            let view = call.operand(name);
            format!("{name} {}{:?}", view.dtype.name(), view.dims)
        })
        .collect();
    Error::Device(format!(
        "{}: {} on cuda:{}: {reason}; operands: {}",
        call.op.name(),
        launch.kernel.symbol(),
        context.device().ordinal,
        operands.join(", ")
    ))
}

/// Kernels count in 32 bits, and look ahead by less than the rest.
const MAX_COUNT: usize = 1 << 30;

/// What the CPU does not ask for.
fn check_device_call(call: &Call) -> Result<(), Error> {
    let op = call.op;
    if call.dtype == DType::F64 {
        let expected = "float32, bfloat16 or float16 (no CUDA kernels for others)";
        return Err(op.error(op.operands()[0], expected, call.dtype.name()));
    }
    let (tokens, width) = (call.tokens, call.n * call.c);
    if tokens > MAX_COUNT || width > MAX_COUNT {
        let expected = format!("at most {MAX_COUNT} tokens and as many values a token");
        let got = format!("{tokens} and {width}");
        return Err(op.error(op.operands()[0], &expected, &got));
    }
    let needed = workspace(&call.problem()).len(call.tokens);
    let got = call.workspace().map_or(0, |(_, len)| len);
    if got < needed {
        let (expected, got) = (format!("float32[{needed}]"), format!("float32[{got}]"));
        return Err(op.error("workspace", &expected, &got));
    }
    Ok(())
}

/// What there is of CUDA here.
#[derive(Debug, Clone, Serialize)]
pub struct Status {
    /// That the kernels were compiled for.
    pub architectures: &'static [&'static str],
    /// What compiled them.
    pub compiler: Option<&'static str>,
    /// The CUDA version of the driver.
    pub driver: Option<String>,
    /// Why no GPU can be used, and what to do.
    pub error: Option<String>,
    /// All that the driver shows.
    pub devices: Vec<DeviceStatus>,
}

/// What there is of one GPU.
#[derive(Debug, Clone, Serialize)]
pub struct DeviceStatus {
    /// As NVIDIA calls it.
    pub name: Option<String>,
    /// Compute capability.
    pub capability: Option<String>,
    /// Why it cannot be used.
    pub error: Option<String>,
}

/// Looks for the driver and its GPUs. Makes no context.
pub fn status() -> Status {
    let build = build();
    let found = driver::num_devices();
    let error = match (build, &found) {
        (None, _) => Some(images::NO_KERNELS.to_owned()),
        (_, Err(reason)) => Some(reason.clone()),
        (_, Ok(0)) => Some("the CUDA driver shows no GPU".to_owned()),
        _ => None,
    };
    Status {
        architectures: build.map_or(&[], |build| build.architectures),
        compiler: build.map(|build| build.compiler),
        driver: driver::driver().ok().map(driver::version_name),
        error,
        devices: (0..found.unwrap_or(0)).map(device_status).collect(),
    }
}

fn device_status(ordinal: i32) -> DeviceStatus {
    let device = driver::device(ordinal);
    let capability = device.as_ref().ok().map(|device| device.capability);
    let usable = device.and_then(|device| images::check_capability(device.capability));
    DeviceStatus {
        name: driver::device_name(ordinal).ok(),
        capability: capability.map(|(major, minor)| format!("{major}.{minor}")),
        error: usable.err(),
    }
}

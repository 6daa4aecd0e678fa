//! The calls on NVIDIA GPUs.
//!
//! A call is checked as on the CPU, a pure `plan` makes a list of launches of it, and these go to XLA's
//! stream. Nothing is allocated on the device and nothing waits for it.

mod api;
mod described;
mod device;
mod driver;
mod images;
mod kernel;
mod launch;
mod modules;
mod schedules;
#[cfg(test)]
mod tests;
#[allow(dead_code, reason = "the build reads the rest")]
#[path = "../tuning.rs"]
mod tuning;
mod workspace;

use std::ffi::c_void;

use serde::Serialize;

use crate::contract::check::CheckedCall;
use crate::contract::table::Call;
use crate::contract::view::{DType, View};
use crate::{Config, Error};
use device::Device;
use driver::{Driver, check_device, driver};
use launch::Launch;
use modules::Context;
use schedules::schedules;
use workspace::{Lent, MAX_COUNT};

pub use described::{DescribedPlan, describe_plan};
pub use images::{Build, build};
pub use workspace::{Problem, WorkspaceSize};

/// The target of the library's events.
const TARGET: &str = "jax_mhc";

/// Dtypes of streams that there are kernels for.
pub const DTYPES: [DType; 3] = [DType::F32, DType::Bf16, DType::F16];

/// How a call is launched.
struct Plan {
    /// Name of the schedule.
    schedule: &'static str,
    /// Launches in their order.
    launches: Vec<Launch>,
}

/// The plan of a call by the first schedule that takes it.
///
/// # Errors
/// A workspace that is too small.
fn plan(call: &CheckedCall, device: &Device) -> Result<Plan, Error> {
    for schedule in schedules(call) {
        let mut workspace = Lent::of(call);
        let Some(launches) = (schedule.plan)(call, device, &mut workspace) else {
            continue;
        };
        if !workspace.is_enough() {
            let size = Problem::of(call).workspace();
            let needed = size.map_or(0, |size| size.len(call.tokens));
            let got = call.workspace().map_or(0, |(_, len)| len);
            let (expected, got) = (format!("float32[{needed}]"), format!("float32[{got}]"));
            return Err(call.kind.error("workspace", &expected, &got));
        }
        return Ok(Plan {
            schedule: schedule.name,
            launches,
        });
    }
    unreachable!("the last schedule takes every call")
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
    kind: Call,
    args: &[View],
    rets: &[View],
    config: &Config,
    stream: *mut c_void,
) -> Result<(), Error> {
    // SAFETY: promised by the caller.
    unsafe { run(kind, args, rets, config, stream, Stage::Initialize) }
}

/// Launches the kernels of a call on `stream`: operands and results as in the table of
/// docs/calls.md, with the workspace as the last result where the call needs one.
///
/// # Errors
/// As [`crate::call`], or a dtype without kernels, or a workspace that is too small; what the driver
/// says, errors of earlier work on the device among it.
///
/// # Safety
/// `stream` must be a stream of the driver. Every view must be device memory that is valid for reads
/// (operands) or writes (results) of all its elements until the work is done, and no result may overlap
/// any other view, but where [`Call::adds_in_place`].
pub unsafe fn execute(
    kind: Call,
    args: &[View],
    rets: &[View],
    config: &Config,
    stream: *mut c_void,
) -> Result<(), Error> {
    // SAFETY: promised by the caller; plans launch what the kernels declare.
    unsafe { run(kind, args, rets, config, stream, Stage::Execute) }
}

/// A stage of a call, as XLA runs them.
#[derive(Debug, Clone, Copy)]
enum Stage {
    Initialize,
    Execute,
}

/// Loads or launches the kernels of a call, as the stage wants.
///
/// # Safety
/// As for [`execute`].
unsafe fn run(
    kind: Call,
    args: &[View],
    rets: &[View],
    config: &Config,
    stream: *mut c_void,
    stage: Stage,
) -> Result<(), Error> {
    let call = CheckedCall::check(kind, args, rets, config)?;
    check_device_call(&call)?;
    let in_op = |reason| Error::Device(format!("{}: {reason}", kind.name()));
    // SAFETY: promised by the caller.
    let context = unsafe { Context::enter(stream) }.map_err(in_op)?;
    let Plan {
        schedule,
        mut launches,
    } = plan(&call, context.device())?;
    launches.retain(|launch| !launch.grid.contains(&0));
    tracing::debug!(
        target: TARGET,
        op = kind.name(),
        stage = ?stage,
        schedule,
        device = context.device().ordinal,
        dtype = call.dtype.name(),
        shapes = ?args.iter().map(|view| view.dims).collect::<Vec<_>>(),
        kernels = ?launches.iter().map(|launch| launch.kernel.symbol()).collect::<Vec<_>>(),
        workspace = call.workspace().map_or(0, |(_, len)| len),
        "plan"
    );
    for launch in &launches {
        match stage {
            Stage::Initialize => context.load(&launch.kernel),
            // SAFETY: promised by the caller; plans launch what the kernels declare.
            Stage::Execute => unsafe { context.launch(launch) },
        }
        .map_err(|reason| failure(&call, launch, &context, &reason))?;
    }
    context.leave().map_err(in_op)
}

/// The driver's error, with the call that it was about.
fn failure(call: &CheckedCall, launch: &Launch, context: &Context, reason: &str) -> Error {
    let operands: Vec<String> = call
        .operands()
        .filter_map(|value| {
            let view = call.operand(value.name)?;
            Some(format!(
                "{} {}{:?}",
                value.name,
                view.dtype.name(),
                view.dims
            ))
        })
        .collect();
    Error::Device(format!(
        "{}: {} on cuda:{}: {reason}; operands: {}",
        call.kind.name(),
        launch.kernel.symbol(),
        context.device().ordinal,
        operands.join(", ")
    ))
}

/// More than the memory of any GPU: the streams of a call whose launches no grid has room for are larger.
const MAX_BYTES: usize = 1 << 46;

/// The checks of a call that CPUs do not need.
fn check_device_call(call: &CheckedCall) -> Result<(), Error> {
    let kind = call.kind;
    let refuse = |expected: &str, got: &str| Err(kind.error(kind.first_operand(), expected, got));
    if !DTYPES.contains(&call.dtype) {
        let expected = "float32, bfloat16 or float16 (no CUDA kernels for others)";
        return refuse(expected, call.dtype.name());
    }
    let (tokens, width) = (call.tokens, call.n * call.c);
    if tokens > MAX_COUNT || width > MAX_COUNT {
        let expected = format!("at most {MAX_COUNT} tokens and as many values a token");
        return refuse(&expected, &format!("{tokens} and {width}"));
    }
    let bytes = tokens * width * call.dtype.num_bytes();
    if bytes > MAX_BYTES {
        return refuse(&format!("at most {MAX_BYTES} bytes"), &bytes.to_string());
    }
    Ok(())
}

/// The state of CUDA here.
#[derive(Debug, Clone, Serialize)]
pub struct Status {
    /// Architectures that the kernels were compiled for.
    pub architectures: &'static [&'static str],
    /// Compiler of the kernels.
    pub compiler: Option<&'static str>,
    /// The CUDA version of the driver.
    pub driver: Option<String>,
    /// Why no GPU can be used, and what to do.
    pub error: Option<String>,
    /// All that the driver shows.
    pub devices: Vec<DeviceStatus>,
}

/// The state of one GPU.
#[derive(Debug, Clone, Serialize)]
pub struct DeviceStatus {
    /// Name that NVIDIA gives it.
    pub name: Option<String>,
    /// Compute capability.
    pub capability: Option<String>,
    /// Why it cannot be used.
    pub error: Option<String>,
}

/// Looks for the driver and its GPUs. Makes no context.
pub fn status() -> Status {
    let build = build();
    let driver = driver();
    let num_devices = driver.clone().and_then(Driver::num_devices);
    let error = match (build, &num_devices) {
        (None, _) => Some(images::NO_KERNELS.to_owned()),
        (_, Err(reason)) => Some(reason.clone()),
        (_, Ok(0)) => Some("the CUDA driver shows no GPU".to_owned()),
        _ => None,
    };
    let devices = driver.clone().ok().into_iter().flat_map(|driver| {
        let ordinals = 0..num_devices.clone().unwrap_or(0) as i32;
        ordinals.map(|ordinal| device_status(driver, ordinal))
    });
    Status {
        architectures: build.map_or(&[], |build| build.architectures),
        compiler: build.map(|build| build.compiler),
        driver: driver.clone().ok().map(Driver::version),
        error,
        devices: devices.collect(),
    }
}

fn device_status(driver: &Driver, ordinal: i32) -> DeviceStatus {
    let device = driver.device(ordinal);
    let capability = device.as_ref().ok().map(|device| device.capability);
    let usable = device.and_then(|device| check_device(&device));
    DeviceStatus {
        name: driver.device_name(ordinal).ok(),
        capability: capability.map(|(major, minor)| format!("{major}.{minor}")),
        error: usable.err(),
    }
}

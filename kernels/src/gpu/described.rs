//! The plan of a call that nobody has made, for those who ask which kernels a configuration gets.

use serde::Serialize;

use super::DTYPES;
use super::device::Device;
use super::driver::check_device;
use super::schedules::schedules;
use super::workspace::{Counted, MAX_COUNT, Problem};
use crate::Config;
use crate::contract::table::{Call, Group};
use crate::contract::view::DType;

/// The plan of a call.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct DescribedPlan {
    /// Name of the schedule.
    pub schedule: &'static str,
    /// Symbols of the kernels, in the order of their launches.
    pub kernels: Vec<String>,
}

/// The plan of a call with aligned operands, on a GPU of a compute capability. `sizes` are tokens, n and C. Needs no
/// GPU.
///
/// # Errors
/// No kernels for such GPUs in this build, or no call of such sizes.
pub fn describe_plan(
    kind: Call,
    dtype: DType,
    sizes: [usize; 3],
    config: &Config,
    capability: (u32, u32),
) -> Result<DescribedPlan, String> {
    let [tokens, n, c] = sizes;
    let device = Device::of_capability(capability);
    check_device(&device)?;
    let none = || format!("there is no {} of such sizes", kind.name());
    // What follows from more streams than there may be cannot be counted.
    if n > config.constraint.max_streams() && !kind.is_head() {
        return Err(none());
    }
    let has_phi = (kind.operands(|group| config.has(group))).any(|value| value.name == "phi");
    let has = |group| kind.groups().contains(&group) && config.has(group);
    let problem = Problem {
        kind,
        dtype,
        n,
        c,
        columns: if has_phi {
            kind.layout(n, config).num()
        } else {
            0
        },
        sinkhorn_iters: config.sinkhorn_iters,
        norm_width: if has(Group::Norm) { c } else { 0 },
        given: has(Group::Given),
    };
    if !DTYPES.contains(&dtype) || tokens > MAX_COUNT || !problem.is_possible() {
        return Err(none());
    }
    let mut call = problem.call(config);
    call.tokens = tokens;
    let plan = schedules(&call).iter().find_map(|schedule| {
        let launches = (schedule.plan)(&call, &device, &mut Counted::default())?;
        let kernels = launches
            .iter()
            .map(|launch| launch.kernel.symbol())
            .collect();
        Some(DescribedPlan {
            schedule: schedule.name,
            kernels,
        })
    });
    Ok(plan.expect("the last schedule takes every call"))
}

//! The schedule of `pre_fwd` and `post_pre_fwd` in one launch (one_pass_fwd.cu).

use super::Geometry;
use crate::contract::check::CheckedCall;
use crate::contract::table::Call;
use crate::gpu::device::Device;
use crate::gpu::kernel::Kernel;
use crate::gpu::launch::{Arg, Launch};
use crate::gpu::schedules::Schedule;

/// One launch that reads the streams and y once.
pub const FORWARD: Schedule = Schedule {
    name: "one pass",
    plan: |call, device, _| launch(call, device).map(|launch| vec![launch]),
};

/// The launch whose u has the weights of its own sublayer.
pub fn launch(call: &CheckedCall, device: &Device) -> Option<Launch> {
    let is_post_pre = call.kind == Call::PostPreFwd;
    let has_norm = call.norm_width > 0;
    let function = match (is_post_pre, has_norm) {
        (false, false) => "pre_fwd_one_pass",
        (false, true) => "pre_norm_fwd_one_pass",
        (true, false) => "post_pre_fwd_one_pass",
        (true, true) => "post_pre_norm_fwd_one_pass",
    };
    let geometry = Geometry::of(function, call, device)?;
    let kernel = Kernel::find(function, geometry.size, call.dtype)?;
    let tensor = |name, num_streams| {
        let address = call.operand_address(name);
        Arg::BlockMaps(geometry.tensor(call, kernel, address, num_streams))
    };
    let operand = |name| Arg::Pointer(call.operand_address(name));
    let result = |name| Arg::Pointer(call.result_address(name));
    let mut args = vec![tensor("x", call.n)];
    if is_post_pre {
        args.extend([tensor("y", 1), operand("h_post"), operand("h_res")]);
    }
    args.extend(["phi", "alpha", "bias"].map(operand));
    if has_norm {
        args.push(operand("norm_scale"));
    }
    if is_post_pre {
        args.push(result("x_new"));
    }
    args.extend(["u", "h_pre", "h_post", "h_res", "m", "r"].map(result));
    if has_norm {
        let eps = call.config.norm_scale_eps as f32;
        args.extend([result("rho"), Arg::F32(eps)]);
    }
    args.extend([
        Arg::I32(call.tokens as i32),
        Arg::I32(call.c as i32),
        Arg::Settings(call.config.into()),
    ]);
    Some(geometry.launch(call, device, kernel, args))
}

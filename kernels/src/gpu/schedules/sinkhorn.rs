//! Launches of `sinkhorn_fwd` and `sinkhorn_bwd`.

use super::sizes::{streams_bound, streams_size};
use crate::contract::check::CheckedCall;
use crate::contract::table::Call;
use crate::contract::view::DType;
use crate::gpu::launch::{Arg, Device, Kernel, Launch, Problem, Workspace};
use crate::gpu::workspace::{Memory, Part, room};

/// Threads of a block (`kThreads` of sinkhorn.cu).
const THREADS: usize = 128;
/// The most shared memory for what the backward pass records; the workspace has it otherwise.
const HISTORY_BYTES: usize = 48 << 10;

/// The launches of a call, in their order.
pub fn plan(call: &CheckedCall, _device: &Device) -> Vec<Launch> {
    let problem = call.problem();
    let shared_bytes = shared_history(&problem);
    let kernel = |function| Kernel {
        file: "sinkhorn",
        function,
        size: streams_size(call.n, true),
        dtype: DType::F32,
    };
    let sizes = [
        Arg::I64(call.tokens as i64),
        Arg::I32(call.n as i32),
        Arg::Settings(call.config.into()),
    ];
    let mut args = vec![Arg::Pointer(call.operand_address("z"))];
    let (kernel, shared_bytes) = if call.kind == Call::SinkhornFwd {
        args.push(Arg::Pointer(call.result_address("h_res")));
        (kernel("sinkhorn_fwd"), 0)
    } else {
        let history = match shared_bytes {
            Some(_) => 0,
            None => Memory::of(call).take(history(&problem)),
        };
        args.push(Arg::Pointer(call.operand_address("d_h_res")));
        args.push(Arg::Pointer(call.result_address("d_z")));
        args.push(Arg::Pointer(history));
        (kernel("sinkhorn_bwd"), shared_bytes.unwrap_or(0))
    };
    args.extend(sizes);
    let threads = call.tokens * streams_bound(call.n, true);
    vec![Launch {
        kernel,
        grid: [threads.div_ceil(THREADS) as u32, 1, 1],
        block: THREADS as u32,
        cluster: 1,
        shared_bytes: shared_bytes as u32,
        args,
    }]
}

/// What the call needs.
pub fn workspace(problem: &Problem) -> Workspace {
    match shared_history(problem) {
        None if problem.kind == Call::SinkhornBwd => room(&[history(problem)]),
        _ => Workspace::default(),
    }
}

/// The bytes of shared memory for what the backward pass records, where they fit.
fn shared_history(problem: &Problem) -> Option<usize> {
    let bytes = 2 * problem.sinkhorn_iters * THREADS * size_of::<f32>();
    (bytes <= HISTORY_BYTES).then_some(bytes)
}

/// The same in the workspace, for whole blocks.
fn history(problem: &Problem) -> Part {
    let half_steps = 2 * problem.sinkhorn_iters;
    Part {
        per_token: half_steps * streams_bound(problem.n, true),
        fixed: half_steps * THREADS,
    }
}

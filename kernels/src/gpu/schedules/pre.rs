//! Launches of `pre_fwd` and `pre_bwd`, and of what post_pre and the head share with them.

use super::projection::{self, DxIn, Factors, Shape};
use super::sizes::{is_aligned, streams_size};
use super::{norm, one_pass};
use crate::contract::check::CheckedCall;
use crate::contract::layout::CoefficientLayout;
use crate::contract::table::Call;
use crate::gpu::launch::{Arg, Device, Kernel, Launch, Problem, Workspace};
use crate::gpu::workspace::{Memory, Part, room};

/// Tokens and threads of a block (`kTokens`, `kThreads` of pre.cu).
const TOKENS: usize = 8;
const THREADS: u32 = 32 * (TOKENS as u32 + 1);
/// The most shared memory for what Sinkhorn's backward pass records; the workspace has it otherwise.
const HISTORY_BYTES: usize = 32 << 10;

/// The launches of a call, in their order.
pub fn plan(call: &CheckedCall, device: &Device) -> Vec<Launch> {
    if call.kind == Call::PreFwd
        && let Some(launch) = one_pass::forward(call, device)
    {
        return vec![launch];
    }
    let memory = &mut Memory::of(call);
    let x = call.operand_address("x");
    match call.kind {
        Call::PreBwd => {
            let d_x_in = d_x_in(call, "d_x_in", "h_res");
            backward(call, device, memory, x, d_x_in)
        }
        _ => forward(call, device, memory, x),
    }
}

/// What the call needs.
pub fn workspace(problem: &Problem) -> Workspace {
    match problem.kind {
        Call::PreBwd => backward_workspace(problem),
        _ => room(&[Shape::of(problem).partial()]),
    }
}

/// What the backward pass needs. Which of both it is depends on the GPU.
pub fn backward_workspace(problem: &Problem) -> Workspace {
    norm::workspace(problem)
        .and(room(&Parts::of(problem).all()))
        .max(one_pass::pre_bwd::workspace(problem))
}

/// The cotangent of the streams at the operand `d_x_in`, deferred or not.
pub fn d_x_in(call: &CheckedCall, d_x_in: &str, h_res: &str) -> DxIn {
    DxIn {
        address: call.operand_address(d_x_in),
        h_res: (call.config.deferred).then(|| call.operand_address(h_res)),
    }
}

fn kernel(call: &CheckedCall, function: &'static str) -> Kernel {
    Kernel {
        file: "pre",
        function,
        size: streams_size(call.n, is_aligned(call.c)),
        dtype: call.dtype,
    }
}

/// The forward pass from the streams at `x`.
pub fn forward(call: &CheckedCall, device: &Device, memory: &mut Memory, x: u64) -> Vec<Launch> {
    let shape = Shape::of(&call.problem());
    let partial = memory.take(shape.partial());
    let collapse = Launch {
        kernel: kernel(call, "pre_fwd"),
        grid: [call.tokens.div_ceil(TOKENS) as u32, 1, 1],
        block: THREADS,
        cluster: 1,
        shared_bytes: 0,
        args: vec![
            Arg::Pointer(x),
            Arg::Pointer(partial),
            Arg::I32(shape.slices() as i32),
            Arg::Pointer(call.operand_address("alpha")),
            Arg::Pointer(call.operand_address("bias")),
            Arg::Pointer(call.result_address("u")),
            Arg::Pointer(call.result_address("h_pre")),
            Arg::Pointer(call.result_address("h_post")),
            Arg::Pointer(call.result_address("h_res")),
            Arg::Pointer(call.result_address("m")),
            Arg::Pointer(call.result_address("r")),
            Arg::I32(call.tokens as i32),
            Arg::I32(call.c as i32),
            Arg::I32(call.columns as i32),
            Arg::Layout(call.layout.into()),
            Arg::Settings(call.config.into()),
        ],
    };
    projection::project(call, device, shape, x, partial)
        .into_iter()
        .chain([collapse])
        .chain(norm::forward(call, x))
        .collect()
}

/// What the backward pass keeps in the workspace.
pub struct Parts {
    dm: [Part; 2],
    h_pre: Part,
    r_factor: Part,
    gate_sums: Part,
    history: Part,
    d_phi: Part,
}

impl Parts {
    /// Those of a call.
    pub fn of(problem: &Problem) -> Self {
        let shape = Shape::of(problem);
        let n = problem.n;
        // Blocks come in pairs, for a tile of tokens.
        let history = if shared_history(problem.sinkhorn_iters).is_some() {
            0
        } else {
            history_len(problem.sinkhorn_iters).div_ceil(TOKENS)
        };
        Self {
            dm: shape.fragments(),
            h_pre: Part::per_token(n),
            r_factor: Part::per_token(1),
            gate_sums: Part::per_token((CoefficientLayout::max_num(n) + 3).div_ceil(TOKENS)),
            history: Part::per_token(history),
            d_phi: shape.d_phi_partial(),
        }
    }

    /// All of them.
    pub fn all(&self) -> [Part; 7] {
        [
            self.dm[0],
            self.dm[1],
            self.h_pre,
            self.r_factor,
            self.gate_sums,
            self.history,
            self.d_phi,
        ]
    }
}

/// Floats that a block records for Sinkhorn's backward pass.
fn history_len(sinkhorn_iters: usize) -> usize {
    2 * sinkhorn_iters * 32
}

/// The bytes of shared memory for it, where they fit.
fn shared_history(sinkhorn_iters: usize) -> Option<usize> {
    let bytes = history_len(sinkhorn_iters) * size_of::<f32>();
    (bytes <= HISTORY_BYTES).then_some(bytes)
}

/// The backward pass to d_x and the parameters from the streams at `x`.
pub fn backward(
    call: &CheckedCall,
    device: &Device,
    memory: &mut Memory,
    x: u64,
    d_x_in: DxIn,
) -> Vec<Launch> {
    if let Some(launches) = one_pass::pre_bwd::plan(call, device, memory, x, d_x_in) {
        return launches;
    }
    let ([d_u, d_h_pre], mut launches) = norm::backward(call, memory, x);
    let problem = call.problem();
    let shape = Shape::of(&problem);
    let parts = Parts::of(&problem).all().map(|part| memory.take(part));
    let [
        dm_rows,
        dm_columns,
        h_pre,
        r_factor,
        gate_sums,
        history,
        d_phi,
    ] = parts;
    let shared_bytes = shared_history(problem.sinkhorn_iters);
    let history = if shared_bytes.is_some() { 0 } else { history };
    let blocks = 2 * call.tokens.div_ceil(2 * TOKENS) as u32;
    let (num, num_alpha) = (call.layout.num(), call.width("alpha"));
    let coefficients = Launch {
        kernel: kernel(call, "pre_bwd"),
        grid: [blocks, 1, 1],
        block: THREADS,
        cluster: 1,
        shared_bytes: shared_bytes.unwrap_or(0) as u32,
        args: vec![
            Arg::Pointer(x),
            Arg::Pointer(call.operand_address("alpha")),
            Arg::Pointer(call.operand_address("bias")),
            Arg::Pointer(call.operand_address("m")),
            Arg::Pointer(call.operand_address("r")),
            Arg::Pointer(d_u),
            Arg::Pointer(d_h_pre),
            Arg::Pointer(call.operand_address("d_h_post")),
            Arg::Pointer(call.operand_address("d_h_res")),
            Arg::Pointer(dm_rows),
            Arg::Pointer(dm_columns),
            Arg::Pointer(h_pre),
            Arg::Pointer(r_factor),
            Arg::Pointer(gate_sums),
            Arg::Pointer(history),
            Arg::I32(call.tokens as i32),
            Arg::I32(call.c as i32),
            Arg::I32(call.columns as i32),
            Arg::Layout(call.layout.into()),
            Arg::Settings(call.config.into()),
        ],
    };
    let sum_gates = Launch {
        kernel: kernel(call, "sum_gates"),
        grid: [(num + 3) as u32, 1, 1],
        block: 32,
        cluster: 1,
        shared_bytes: 0,
        args: vec![
            Arg::Pointer(gate_sums),
            Arg::Pointer(call.result_address("d_bias")),
            Arg::Pointer(call.result_address("d_alpha")),
            Arg::I32(blocks as i32),
            Arg::I32(num as i32),
            Arg::I32(num_alpha as i32),
        ],
    };
    let dm = [dm_rows, dm_columns];
    // d_x_in may lie where d_x does, and x never does: the products are free to run in this order.
    let factors = Factors {
        dm,
        h_pre,
        r_factor,
        d_u,
    };
    launches.push(coefficients);
    launches.extend(projection::project_back(
        call, device, shape, x, &factors, d_x_in,
    ));
    launches.extend(projection::d_phi(call, shape, x, dm, d_phi));
    launches.push(sum_gates);
    launches
}

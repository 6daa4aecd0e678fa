//! Runs a call on the CPU: hands typed slices to the kernels.

use std::time::Instant;

use half::{bf16, f16};

use crate::contract::check::CheckedCall;
use crate::contract::table::Call;
use crate::contract::view::{DType, View};
use crate::cpu::coefficients::{CoefficientsMut, Cotangents, Gates};
use crate::cpu::memory::Memory;
use crate::cpu::plan::plan;
use crate::cpu::pre::{DxIn, Params};
use crate::cpu::scratch::Exhausted;
use crate::cpu::simd::Real;
use crate::cpu::sinkhorn::Sinkhorn;
use crate::cpu::stream::Stream;
use crate::cpu::{Pool, collapse, head, post, post_pre, pre, sinkhorn};
use crate::{Config, Error};

/// Runs one call: operands and results as in the table of docs/calls.md. A workspace is left
/// alone.
///
/// # Errors
/// A wrong number of operands or results, or one of the wrong shape, dtype or alignment, or a setting out
/// of its bounds: nothing has been written then. No memory for what the call needs for itself: the results
/// hold anything then, and a later call may have it.
///
/// # Safety
/// Every view must be valid for reads (operands) or writes (results) of all its elements until the
/// call returns, and no result may overlap any other view, but where [`Call::adds_in_place`].
pub unsafe fn run(
    kind: Call,
    args: &[View],
    rets: &[View],
    config: &Config,
    pool: &dyn Pool,
) -> Result<(), Error> {
    let call = CheckedCall::check(kind, args, rets, config)?;
    let config = &config.rounded(call.dtype);
    let call = call.with_config(config);
    let start = tracing::enabled!(target: "jax_mhc", tracing::Level::DEBUG).then(Instant::now);
    let _passes = tracing::trace_span!(target: "jax_mhc", "call", op = kind.name()).entered();
    // SAFETY: promised by the caller.
    let memory = unsafe { Memory::new(call) };
    let outcome = match call.dtype {
        DType::F32 => run_typed::<f32>(memory, pool),
        DType::F64 => run_typed::<f64>(memory, pool),
        DType::Bf16 => run_typed::<bf16>(memory, pool),
        DType::F16 => run_typed::<f16>(memory, pool),
    };
    outcome.map_err(|error| exhausted(kind, error))?;
    if let Some(start) = start {
        tracing::debug!(
            target: "jax_mhc",
            op = kind.name(),
            dtype = call.dtype.name(),
            shapes = ?args.iter().map(|view| view.dims).collect::<Vec<_>>(),
            plan = plan(&call, pool),
            time_us = start.elapsed().as_micros() as u64,
        );
    }
    Ok(())
}

fn run_typed<S: Stream>(mut memory: Memory, pool: &dyn Pool) -> Result<(), Exhausted> {
    let memory = &mut memory;
    let CheckedCall { kind, tokens, .. } = memory.call();
    let is_given = memory.call().is_given();
    match kind {
        Call::PreFwd => pre::forward(pre::Forward::<S> {
            params: params(memory),
            x: memory.rows("x"),
            out: outputs(memory),
            tokens,
            pool,
        }),
        Call::PreBwd => pre::backward(pre::Backward::<S> {
            params: params(memory),
            x: memory.rows("x"),
            inputs: backward_inputs(memory),
            d_x: memory.rows_mut("d_x"),
            d_x_in: d_x_in(memory, "h_res"),
            d_params: param_gradients(memory),
            tokens,
            pool,
        }),
        Call::PostFwd => post::forward(post::Forward::<S> {
            inputs: post_inputs(memory),
            x_new: memory.rows_mut("x_new"),
            tokens,
            pool,
        }),
        Call::PostBwd => post::backward(post::Backward::<S> {
            inputs: post_inputs(memory),
            d_x_new: memory.rows("d_x_new"),
            out: post_gradients(memory),
            tokens,
            pool,
        }),
        Call::PostPreFwd => post_pre::forward(post_pre::Forward::<S> {
            inputs: post_inputs(memory),
            params: params(memory),
            h_given: is_given.then(|| memory.rows("h_given")),
            x_new: memory.rows_mut("x_new"),
            out: outputs(memory),
            tokens,
            pool,
        }),
        Call::PostPreBwd => post_pre::backward(post_pre::Backward::<S> {
            inputs: post_inputs(memory),
            params: params(memory),
            pre_inputs: backward_inputs(memory),
            given: is_given.then(|| given(memory)),
            d_x_new: memory.rows_mut("d_x_new"),
            d_x_in: d_x_in(memory, "h_res_new"),
            out: post_gradients(memory),
            d_params: param_gradients(memory),
            tokens,
            pool,
        }),
        Call::SinkhornFwd => sinkhorn::<S::Real>(memory, pool),
        Call::SinkhornBwd => sinkhorn::<S::Real>(memory, pool),
        Call::HeadFwd => head::forward(head::Forward::<S> {
            params: params(memory),
            x: memory.rows("x"),
            u: memory.rows_mut("u"),
            m: memory.rows_mut("m"),
            r: memory.rows_mut("r"),
            tokens,
            pool,
        }),
        Call::HeadBwd => head::backward(head::Backward::<S> {
            params: params(memory),
            x: memory.rows("x"),
            m: memory.rows("m"),
            r: memory.rows("r"),
            d_u: memory.rows("d_u"),
            d_x: memory.rows_mut("d_x"),
            d_params: param_gradients(memory),
            tokens,
            pool,
        }),
        Call::CollapseFwd => collapse::forward(collapse::Forward::<S> {
            x: memory.rows("x"),
            h_pre: memory.rows("h_pre"),
            u: memory.rows_mut("u"),
            tokens,
            pool,
        }),
        Call::CollapseBwd => collapse::backward(collapse::Backward::<S> {
            x: memory.rows("x"),
            d_u: memory.rows("d_u"),
            d_h_pre: memory.rows_mut("d_h_pre"),
            tokens,
            pool,
        }),
    }
}

fn params<'a, R: Real>(memory: &Memory<'a>) -> Params<'a, R> {
    let CheckedCall {
        config, layout, c, ..
    } = memory.call();
    Params {
        c,
        phi: memory.slice("phi"),
        gates: Gates {
            config,
            layout,
            alpha: memory.slice("alpha"),
            bias: memory.slice("bias"),
        },
        norm_scale: memory.slice("norm_scale"),
    }
}

fn outputs<'a, S: Stream>(memory: &mut Memory<'a>) -> pre::Outputs<'a, S> {
    pre::Outputs {
        u: memory.rows_mut("u"),
        h: CoefficientsMut {
            h_pre: memory.rows_mut("h_pre"),
            h_post: memory.rows_mut("h_post"),
            h_res: memory.rows_mut("h_res"),
        },
        m: memory.rows_mut("m"),
        r: memory.rows_mut("r"),
        rho: memory.rows_mut("rho"),
    }
}

fn backward_inputs<'a, S: Stream>(memory: &Memory<'a>) -> pre::BackwardInputs<'a, S> {
    pre::BackwardInputs {
        m: memory.rows("m"),
        r: memory.rows("r"),
        rho: memory.rows("rho"),
        d_u: memory.rows("d_u"),
        d_h: Cotangents {
            h_pre: memory.rows("d_h_pre"),
            h_post: memory.rows("d_h_post"),
            h_res: memory.rows("d_h_res"),
        },
    }
}

fn given<'a, R: Real>(memory: &mut Memory<'a>) -> pre::Given<'a, R> {
    pre::Given {
        h: memory.rows("h_given"),
        d_h: memory.rows_mut("d_h_given"),
    }
}

fn d_x_in<'a, R: Real>(memory: &Memory<'a>, h_res: &str) -> DxIn<'a, R> {
    if memory.call().config.deferred {
        let h_res = memory.rows(h_res);
        DxIn::Deferred { h_res }
    } else {
        DxIn::OfX
    }
}

fn param_gradients<'a, R: Real>(memory: &mut Memory<'a>) -> pre::ParamGradients<'a, R> {
    pre::ParamGradients {
        d_phi: memory.slice_mut("d_phi"),
        d_alpha: memory.slice_mut("d_alpha"),
        d_bias: memory.slice_mut("d_bias"),
        d_norm_scale: memory.slice_mut("d_norm_scale"),
    }
}

fn post_inputs<'a, S: Stream>(memory: &Memory<'a>) -> post::Inputs<'a, S> {
    post::Inputs {
        x: memory.rows("x"),
        y: memory.rows("y"),
        h_post: memory.rows("h_post"),
        h_res: memory.rows("h_res"),
    }
}

fn post_gradients<'a, S: Stream>(memory: &mut Memory<'a>) -> post::Gradients<'a, S> {
    post::Gradients {
        d_y: memory.rows_mut("d_y"),
        d_h_post: memory.rows_mut("d_h_post"),
        d_h_res: memory.rows_mut("d_h_res"),
    }
}

fn sinkhorn<R: Real>(memory: &mut Memory, pool: &dyn Pool) -> Result<(), Exhausted> {
    let CheckedCall {
        kind,
        config,
        n,
        tokens,
        ..
    } = memory.call();
    let (d_h_res, out) = match kind {
        Call::SinkhornFwd => (None, "h_res"),
        _ => (Some(memory.rows("d_h_res")), "d_z"),
    };
    sinkhorn::run(Sinkhorn::<R> {
        config,
        n,
        z: memory.rows("z"),
        d_h_res,
        out: memory.rows_mut(out),
        matrices: tokens,
        pool,
    })
}

/// The error of a call that did not get the memory that it needs for itself.
fn exhausted(call: Call, exhausted: Exhausted) -> Error {
    let (op, bytes) = (call.name(), exhausted.bytes);
    Error::Exhausted(format!(
        "{op}: scratch memory: expected {bytes} bytes more, got none from the system; free memory, or \
         run fewer tokens at a time, fewer Sinkhorn iterations or fewer threads"
    ))
}

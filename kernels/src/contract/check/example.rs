//! Calls of given sizes for tests.

use super::CheckedCall;
use crate::contract::table::{Call, Value};
use crate::contract::view::{DType, View};
use crate::{Config, Error};

/// A call of given sizes without its memory.
pub struct Example {
    pub(super) kind: Call,
    config: Config,
    /// Dtype, tokens, and n and C.
    sizes: (DType, usize, [usize; 2]),
    /// Dtypes and dimensions of operands and results.
    pub(super) args: Vec<(DType, Vec<i64>)>,
    pub(super) rets: Vec<(DType, Vec<i64>)>,
}

impl Example {
    /// The operands and results that the table asks for.
    pub fn new(
        kind: Call,
        dtype: DType,
        tokens: usize,
        [n, c]: [usize; 2],
        config: Config,
    ) -> Self {
        let c = if kind.first_operand() == "z" { n } else { c };
        let lead = [tokens as i64];
        let call = CheckedCall::without_memory(kind, &config, dtype, [n, c, 0, 0]);
        let of = |value: Value| {
            let shape = call.shape(&value);
            let lead = if value.has_tokens { &lead[..] } else { &[] };
            let row = shape.row().iter().map(|dim| *dim as i64);
            (shape.dtype, lead.iter().copied().chain(row).collect())
        };
        Self {
            args: call.operands().map(of).collect(),
            rets: call.results().map(of).collect(),
            sizes: (dtype, tokens, [n, c]),
            kind,
            config,
        }
    }

    /// A copy of the call with other settings.
    fn with_config(&self, config: Config) -> Self {
        let (dtype, tokens, sizes) = self.sizes;
        Self::new(self.kind, dtype, tokens, sizes, config)
    }

    /// A copy of the call with static coefficients, where there can be.
    pub fn into_static(self) -> Self {
        self.with_config(Config {
            dynamic: false,
            ..self.config
        })
    }

    /// A copy of the call with a norm of the layer's input, where there can be.
    pub fn with_norm(self) -> Self {
        self.with_config(Config {
            norm: true,
            ..self.config
        })
    }

    /// A copy of the call with given weights of u, where there can be.
    pub fn with_given(self) -> Self {
        self.with_config(Config {
            given: true,
            ..self.config
        })
    }

    /// The call's operands and results with other settings, which they need not fit.
    pub fn with_settings(self, config: Config) -> Self {
        Self { config, ..self }
    }

    /// The call with a workspace of `len` floats.
    pub fn with_workspace(mut self, len: usize) -> Self {
        self.rets.push((DType::F32, vec![len as i64]));
        self
    }

    /// Hands out op, operands, results and settings, in memory of their own.
    pub fn with_memory<T>(&self, then: impl FnOnce(Call, &[View], &[View], &Config) -> T) -> T {
        type Room = Vec<Vec<f64>>;
        fn room(types: &[(DType, Vec<i64>)]) -> Room {
            let len = |dims: &[i64]| dims.iter().product::<i64>() as usize;
            types.iter().map(|(_, dims)| vec![0.0; len(dims)]).collect()
        }
        fn views<'a>(types: &'a [(DType, Vec<i64>)], room: &mut Room) -> Vec<View<'a>> {
            let views = types.iter().zip(room).map(|((dtype, dims), room)| View {
                data: room.as_mut_ptr().cast(),
                dims,
                dtype: *dtype,
            });
            views.collect()
        }
        let (mut args, mut rets) = (room(&self.args), room(&self.rets));
        let (args, rets) = (views(&self.args, &mut args), views(&self.rets, &mut rets));
        then(self.kind, &args, &rets, &self.config)
    }

    /// Hands out the call, if it passes. Nothing lies at its addresses.
    pub fn check<T>(&self, then: impl FnOnce(Result<CheckedCall, Error>) -> T) -> T {
        fn views(types: &[(DType, Vec<i64>)], first: usize) -> Vec<View<'_>> {
            let views = types.iter().zip(first..).map(|((dtype, dims), at)| View {
                data: std::ptr::without_provenance_mut(at << 40),
                dims,
                dtype: *dtype,
            });
            views.collect()
        }
        let args = views(&self.args, 1);
        let rets = views(&self.rets, 1 + args.len());
        then(CheckedCall::check(self.kind, &args, &rets, &self.config))
    }
}

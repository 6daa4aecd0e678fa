//! The calls that are made of the fake driver.

use std::ptr;

use jax_mhc_kernels::{Call, Config, DType, Error, View, gpu};

/// One call.
pub struct Case {
    pub op: Call,
    dtype: DType,
    tokens: usize,
    n: usize,
    c: usize,
    config: Config,
}

/// Kernels that read the streams once and that read them twice, one without a projection, and one that has a workspace
/// alone.
pub fn calls() -> [Case; 6] {
    let call = |op, dtype, [tokens, n, c]: [usize; 3]| Case {
        op,
        dtype,
        tokens,
        n,
        c,
        config: Config::default(),
    };
    [
        call(Call::PreFwd, DType::Bf16, [64, 4, 2560]),
        call(Call::PreFwd, DType::F32, [17, 2, 33]),
        call(Call::PostFwd, DType::F16, [64, 4, 256]),
        call(Call::CollapseFwd, DType::Bf16, [5, 3, 7]),
        call(Call::SinkhornFwd, DType::F32, [100, 4, 4]),
        Case {
            config: Config {
                sinkhorn_iters: 200,
                ..Config::default()
            },
            ..call(Call::SinkhornBwd, DType::F32, [100, 4, 4])
        },
    ]
}

type Type = (DType, Vec<i64>);

impl Case {
    /// The operands and the results.
    fn types(&self) -> [Vec<Type>; 2] {
        let [t, n, c] = [self.tokens, self.n, self.c].map(|size| size as i64);
        let k = n * (n + 2);
        let streams = |dims: &[i64]| (self.dtype, dims.to_vec());
        let wide = |dims: &[i64]| (DType::F32, dims.to_vec());
        let (x, u, matrix) = (streams(&[t, n, c]), streams(&[t, c]), wide(&[t, n, n]));
        let row = |len: i64| wide(&[t, len]);
        let mut types = match self.op {
            Call::PreFwd => [
                vec![x, wide(&[n, c, k]), wide(&[3]), wide(&[k])],
                vec![u, row(n), row(n), matrix, row(k), wide(&[t])],
            ],
            Call::PostFwd => [vec![x.clone(), u, row(n), matrix], vec![x]],
            Call::CollapseFwd => [vec![x, row(n)], vec![u]],
            Call::SinkhornFwd => [vec![matrix.clone()], vec![matrix]],
            Call::SinkhornBwd => [vec![matrix.clone(), matrix.clone()], vec![matrix]],
            _ => unreachable!("no such call here"),
        };
        let problem = gpu::Problem {
            kind: self.op,
            dtype: self.dtype,
            n: self.n,
            c: self.c,
            columns: if self.op == Call::PreFwd {
                k as usize
            } else {
                0
            },
            sinkhorn_iters: self.config.sinkhorn_iters,
            norm_width: 0,
            given: false,
        };
        let len = problem.workspace().unwrap().len(self.tokens);
        types[1].push(wide(&[len as i64]));
        types
    }

    /// Whether the call's kernel takes boxes of the streams, where clusters run.
    pub fn reads_once(&self) -> bool {
        self.op == Call::PreFwd && self.dtype == DType::Bf16
    }

    /// Both stages of an execution by XLA, and what became of them.
    pub fn run(&self) -> [Result<(), String>; 2] {
        let types = self.types();
        let (args, rets) = (views(&types[0], 1), views(&types[1], 100));
        let stream = ptr::null_mut();
        // SAFETY: the fake driver looks at no memory, and any address is a stream to it.
        let outcomes = unsafe {
            [
                gpu::initialize(self.op, &args, &rets, &self.config, stream),
                gpu::execute(self.op, &args, &rets, &self.config, stream),
            ]
        };
        outcomes.map(|outcome| {
            outcome.map_err(|error| match error {
                Error::Device(message) => message,
                other => panic!("not the device's: {other}"),
            })
        })
    }
}

/// Views at addresses that nothing lies at, from `first` TiB on.
fn views(types: &[Type], first: usize) -> Vec<View<'_>> {
    let views = types.iter().zip(first..).map(|((dtype, dims), at)| View {
        data: ptr::without_provenance_mut(at << 40),
        dims,
        dtype: *dtype,
    });
    views.collect()
}

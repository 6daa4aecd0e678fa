//! Every kernel in every instruction set of this machine.
//!
//! The chain of evidence: a scalar float64 version of the equations, as they stand in
//! docs/mathematics.md (`scalar`); the float64 kernels against its values and its central differences; the
//! kernels of all other types and instruction sets against the float64 kernels.

mod collapse;
mod exhausted;
mod interleavings;
mod parallel;
mod post_pre;
mod scalar;
mod simd;
mod sinkhorn;
mod sublayer;

use crate::contract::layout::CoefficientLayout;
use crate::cpu::coefficients::CoefficientsMut;
use crate::cpu::parallel::{Pool, Task};
use crate::cpu::post;
use crate::cpu::pre::{DxIn, Outputs};
use crate::cpu::simd::Real;
use crate::cpu::stream::{Rows, RowsMut, Stream};
use crate::{Config, Constraint, EpsMode, NormEpsMode, Order};

/// Uniform in [-1, 1): a linear congruential generator, the same everywhere.
struct Random(u64);

impl Random {
    fn next(&mut self) -> f64 {
        self.0 = self
            .0
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 11) as f64 / (1_u64 << 52) as f64 - 1.0
    }
    fn vec(&mut self, len: usize, scale: f64) -> Vec<f64> {
        (0..len).map(|_| scale * self.next()).collect()
    }
}

/// Three threads that start whenever they like.
struct Threads;

impl Pool for Threads {
    fn num_threads(&self) -> usize {
        3
    }
    fn schedule(&self, task: Task) {
        std::thread::spawn(task);
    }
}

#[derive(Clone, Copy, Debug)]
struct Case {
    tokens: usize,
    n: usize,
    c: usize,
    config: Config,
    is_static: bool,
    /// Whether the layer's input is normalised.
    has_norm: bool,
    /// Size of the logits.
    peak: f64,
    /// Whether pre's backward gets the cotangent of x from post deferred.
    deferred: bool,
}

impl Case {
    fn layout(&self) -> CoefficientLayout {
        CoefficientLayout::pre(self.n, self.config.constraint)
    }
    fn columns(&self) -> usize {
        if self.is_static {
            0
        } else {
            self.layout().num()
        }
    }
    /// C, or 0 without a norm of the layer's input.
    fn norm_width(&self) -> usize {
        if self.has_norm { self.c } else { 0 }
    }
    /// `d_x_in` as pre's backward reads it.
    fn d_x_in<'a, R>(&self, h_res: &'a [R]) -> DxIn<'a, R> {
        if self.deferred {
            DxIn::Deferred {
                h_res: Rows::new(h_res, self.n * self.n),
            }
        } else {
            DxIn::OfX
        }
    }
    /// With the cotangent of x deferred, and without.
    fn both_ways(self) -> [Self; 2] {
        [true, false].map(|deferred| Self { deferred, ..self })
    }
}

fn cases() -> Vec<Case> {
    let paper = Config::default();
    let deepseek = Config {
        sinkhorn_eps: 1e-6,
        pre_eps: 1e-6,
        ..paper
    };
    let megatron = Config {
        sinkhorn_eps: 1e-6,
        sinkhorn_eps_mode: EpsMode::Clamp,
        order: Order::RowColumn,
        norm_eps_mode: NormEpsMode::Outside,
        ..paper
    };
    let with = |tokens, n, c, config, peak| Case {
        tokens,
        n,
        c,
        config,
        is_static: false,
        has_norm: false,
        peak,
        deferred: true,
    };
    // An eps that matters.
    let with_norm = |case: Case| Case {
        has_norm: true,
        config: Config {
            norm_scale_eps: 0.25,
            ..case.config
        },
        ..case
    };
    let permutations = Config {
        constraint: Constraint::Permutations,
        ..paper
    };
    let few = Config {
        sinkhorn_iters: 2,
        ..paper
    };
    if cfg!(miri) {
        vec![
            with(3, 2, 9, few, 1.0),
            with(2, 3, 5, few, 1.0),
            with_norm(with(2, 2, 9, few, 1.0)),
            with(2, 3, 5, permutations, 1.0),
        ]
    } else {
        vec![
            with(35, 4, 100, paper, 1.0),
            with(150, 2, 33, paper, 1.0),
            with(5, 1, 7, paper, 1.0),
            with(3, 3, 1, paper, 1.0),
            with(17, 8, 24, paper, 3.0),
            with(2, 16, 5, deepseek, 3.0),
            with(7, 4, 450, deepseek, 6.0),
            with(7, 4, 33, megatron, 6.0),
            with(7, 4, 16, paper, 10.0),
            with(
                7,
                4,
                16,
                Config {
                    sinkhorn_iters: 0,
                    ..paper
                },
                1.0,
            ),
            with(
                7,
                4,
                16,
                Config {
                    sinkhorn_iters: 1,
                    ..megatron
                },
                1.0,
            ),
            with(
                4,
                4,
                20,
                Config {
                    constraint: Constraint::None,
                    ..paper
                },
                1.0,
            ),
            with(
                4,
                5,
                20,
                Config {
                    constraint: Constraint::Identity,
                    norm_eps: 1e-5,
                    pre_eps: 1e-6,
                    post_eps: 0.25,
                    ..paper
                },
                1.0,
            ),
            with(35, 4, 100, permutations, 1.0),
            with(7, 4, 16, permutations, 10.0),
            with(5, 3, 20, permutations, 3.0),
            with(9, 2, 33, permutations, 1.0),
            with(3, 1, 7, permutations, 1.0),
            Case {
                is_static: true,
                ..with(4, 4, 20, permutations, 3.0)
            },
            Case {
                is_static: true,
                ..with(4, 4, 20, paper, 3.0)
            },
            with(0, 4, 20, paper, 1.0),
            with_norm(with(35, 4, 100, paper, 1.0)),
            with_norm(with(150, 2, 33, paper, 1.0)),
            with_norm(with(3, 3, 1, paper, 1.0)),
            with_norm(with(2, 16, 5, deepseek, 3.0)),
            with_norm(with(7, 4, 450, deepseek, 6.0)),
            with_norm(Case {
                is_static: true,
                ..with(4, 4, 20, paper, 3.0)
            }),
            with_norm(with(0, 4, 20, paper, 1.0)),
        ]
    }
}

/// One sublayer's operands and cotangents, in float64.
#[derive(Clone)]
struct Data {
    x: Vec<f64>,
    y: Vec<f64>,
    phi: Vec<f64>,
    alpha: Vec<f64>,
    bias: Vec<f64>,
    norm_scale: Vec<f64>,
    d_u: Vec<f64>,
    d_h: [Vec<f64>; 3],
    d_x_new: Vec<f64>,
}

impl Data {
    /// Values that every stream type holds exactly.
    fn new<S: Stream>(case: &Case) -> Self {
        let Case { tokens, n, c, .. } = *case;
        let mut random = Random(7);
        let mut stream = |len| to_f64(&from_f64::<S>(&random.vec(len, 1.5)));
        let (x, y) = (stream(tokens * n * c), stream(tokens * c));
        let (d_u, d_x_new) = (stream(tokens * c), stream(tokens * n * c));
        let scale = case.peak / ((n * c) as f64).sqrt();
        let mut real = |len, scale| to_f64(&from_f64::<f32>(&random.vec(len, scale)));
        Self {
            x,
            y,
            phi: real(n * c * case.columns(), scale),
            alpha: [1.0, 0.75, 1.25][..case.layout().num_gates()].to_vec(),
            bias: real(case.layout().num(), case.peak),
            norm_scale: real(case.norm_width(), 1.5),
            d_u,
            d_h: [
                real(tokens * n, 1.0),
                real(tokens * n, 1.0),
                real(tokens * n * n, 1.0),
            ],
            d_x_new,
        }
    }
    fn operands(&mut self) -> [&mut Vec<f64>; 6] {
        [
            &mut self.x,
            &mut self.y,
            &mut self.phi,
            &mut self.alpha,
            &mut self.bias,
            &mut self.norm_scale,
        ]
    }
}

fn from_f64<S: Stream>(values: &[f64]) -> Vec<S> {
    values
        .iter()
        .map(|v| S::from_real(S::Real::from_f64(*v)))
        .collect()
}

fn to_f64<S: Stream>(values: &[S]) -> Vec<f64> {
    values.iter().map(|v| v.to_real().to_f64()).collect()
}

/// Room for what pre writes.
struct Room<S: Stream> {
    u: Vec<S>,
    h: [Vec<S::Real>; 3],
    m: Vec<S::Real>,
    r: Vec<S::Real>,
    rho: Vec<S::Real>,
}

impl<S: Stream> Room<S> {
    fn new(case: &Case) -> Self {
        let Case { tokens, n, c, .. } = *case;
        // Not zeros: every element must be written.
        let nan = |len: usize| vec![S::Real::from_f64(f64::NAN); len];
        Self {
            u: from_f64(&vec![f64::NAN; tokens * c]),
            h: [nan(tokens * n), nan(tokens * n), nan(tokens * n * n)],
            m: nan(tokens * case.columns()),
            r: nan(tokens),
            rho: nan(tokens * case.norm_width().min(1)),
        }
    }
    fn outputs(&mut self, case: &Case) -> Outputs<'_, S> {
        let [h_pre, h_post, h_res] = &mut self.h;
        Outputs {
            u: RowsMut::new(&mut self.u, case.c),
            h: CoefficientsMut {
                h_pre: RowsMut::new(h_pre, case.n),
                h_post: RowsMut::new(h_post, case.n),
                h_res: RowsMut::new(h_res, case.n * case.n),
            },
            m: RowsMut::new(&mut self.m, case.columns()),
            r: RowsMut::new(&mut self.r, 1),
            rho: RowsMut::new(&mut self.rho, case.norm_width().min(1)),
        }
    }
    fn post_inputs<'a>(&'a self, case: &Case, x: &'a [S], y: &'a [S]) -> post::Inputs<'a, S> {
        post::Inputs {
            x: Rows::new(x, case.n * case.c),
            y: Rows::new(y, case.c),
            h_post: Rows::new(&self.h[1], case.n),
            h_res: Rows::new(&self.h[2], case.n * case.n),
        }
    }
}

//! Every kernel in every instruction set of this machine.
//!
//! The chain of evidence: a scalar float64 version of the equations, written here as they stand in
//! docs/mathematics.md; the float64 kernels against its values and its central differences; the
//! kernels of all other types and instruction sets against the float64 kernels.

use half::{bf16, f16};

use crate::coefficients::{CoefficientsMut, Cotangents, Gates, Layout};
use crate::parallel::{Pool, Serial, Task};
use crate::pre::{self, BackwardInputs, HandedOn, Outputs, ParamGradients, Params};
use crate::simd::{Real, dispatch_to, instruction_sets};
use crate::stream::{Rows, RowsMut, Stream};
use crate::{Config, Constraint, EpsMode, NormEpsMode, Order, post, seam, sinkhorn};

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

#[derive(Clone, Copy, Debug)]
struct Case {
    tokens: usize,
    n: usize,
    c: usize,
    config: Config,
    is_static: bool,
    /// Size of the logits.
    peak: f64,
    /// Whether pre's backward gets the cotangent of x from post deferred.
    deferred: bool,
}

impl Case {
    fn layout(&self) -> Layout {
        Layout::pre(self.n, self.config.constraint)
    }
    fn columns(&self) -> usize {
        if self.is_static {
            0
        } else {
            self.layout().num()
        }
    }
    /// How pre's backward reads the cotangent of the x that was handed on.
    fn handed_on<'a, R>(&self, h_res: &'a [R]) -> HandedOn<'a, R> {
        if self.deferred {
            HandedOn::Deferred {
                h_res: Rows::new(h_res, self.n * self.n),
            }
        } else {
            HandedOn::Whole
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
        peak,
        deferred: true,
    };
    let few = Config {
        sinkhorn_iters: 2,
        ..paper
    };
    if cfg!(miri) {
        vec![with(3, 2, 9, few, 1.0), with(2, 3, 5, few, 1.0)]
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
                    ..paper
                },
                1.0,
            ),
            Case {
                is_static: true,
                ..with(4, 4, 20, paper, 3.0)
            },
            with(0, 4, 20, paper, 1.0),
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
            alpha: vec![1.0, 0.75, 1.25],
            bias: real(case.layout().num(), case.peak),
            d_u,
            d_h: [
                real(tokens * n, 1.0),
                real(tokens * n, 1.0),
                real(tokens * n * n, 1.0),
            ],
            d_x_new,
        }
    }
    fn operands(&mut self) -> [&mut Vec<f64>; 5] {
        [
            &mut self.x,
            &mut self.y,
            &mut self.phi,
            &mut self.alpha,
            &mut self.bias,
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

// ---- the equations, one scalar at a time ----------------------------------------------------------

fn scalar_sinkhorn(config: &Config, n: usize, z: &[f64]) -> Vec<f64> {
    let eps = config.sinkhorn_eps;
    let sums = |m: &[f64], first: bool| -> Vec<f64> {
        let columns = first == (config.order == Order::ColumnRow);
        let mut sums = vec![0.0; n];
        for i in 0..n {
            for j in 0..n {
                sums[if columns { j } else { i }] += m[i * n + j];
            }
        }
        (0..n * n)
            .map(|at| sums[if columns { at % n } else { at / n }])
            .collect()
    };
    let mut m: Vec<f64> = z.iter().map(|z| z.exp()).collect();
    for iteration in 0..config.sinkhorn_iters {
        for first in [true, false] {
            let sums = sums(&m, first);
            let softmax = iteration == 0 && first;
            for (m, sum) in m.iter_mut().zip(sums) {
                *m = match config.sinkhorn_eps_mode {
                    _ if softmax && config.sinkhorn_eps_mode == EpsMode::Add => *m / sum + eps,
                    _ if softmax => *m / sum,
                    EpsMode::Add => *m / (sum + eps),
                    EpsMode::Clamp => *m / sum.max(eps),
                };
            }
        }
    }
    m
}

/// u, h_pre, h_post, h_res and x_new of all tokens, one after the other.
fn scalar_sublayer(case: &Case, data: &Data) -> [Vec<f64>; 5] {
    let Case {
        tokens,
        n,
        c,
        config,
        ..
    } = *case;
    let sigmoid = |z: f64| 1.0 / (1.0 + (-z).exp());
    let mut out: [Vec<f64>; 5] = Default::default();
    for token in 0..tokens {
        let x = &data.x[token * n * c..][..n * c];
        let mean = x.iter().map(|x| x * x).sum::<f64>() / (n * c) as f64;
        let r = match config.norm_eps_mode {
            NormEpsMode::Inside => 1.0 / (mean + config.norm_eps).sqrt(),
            NormEpsMode::Outside => 1.0 / (mean.sqrt() + config.norm_eps),
        };
        let columns = case.columns();
        let z: Vec<f64> = (0..data.bias.len())
            .map(|k| {
                let gate = if k < n {
                    0
                } else if k < 2 * n {
                    1
                } else {
                    2
                };
                let m = |k| {
                    (0..n * c)
                        .map(|at| x[at] * data.phi[at * columns + k])
                        .sum::<f64>()
                };
                let projected = if case.is_static {
                    0.0
                } else {
                    data.alpha[gate] * r * m(k)
                };
                projected + data.bias[k]
            })
            .collect();
        let h_pre: Vec<f64> = z[..n]
            .iter()
            .map(|z| sigmoid(*z) + config.pre_eps)
            .collect();
        let h_post: Vec<f64> = z[n..2 * n]
            .iter()
            .map(|z| config.post_scale * sigmoid(*z))
            .collect();
        let h_res = match config.constraint {
            Constraint::Birkhoff => scalar_sinkhorn(&config, n, &z[2 * n..]),
            Constraint::None => z[2 * n..].to_vec(),
            Constraint::Identity => (0..n * n)
                .map(|at| f64::from(u8::from(at / n == at % n)))
                .collect(),
        };
        let y = &data.y[token * c..][..c];
        out[0].extend((0..c).map(|k| (0..n).map(|i| h_pre[i] * x[i * c + k]).sum::<f64>()));
        for i in 0..n {
            out[4].extend((0..c).map(|k| {
                (0..n).map(|j| h_res[i * n + j] * x[j * c + k]).sum::<f64>() + h_post[i] * y[k]
            }));
        }
        out[1].extend(h_pre);
        out[2].extend(h_post);
        out[3].extend(h_res);
    }
    out
}

/// H_resᵀ G of all tokens.
fn scalar_mix_back(case: &Case, h_res: &[f64], g: &[f64]) -> Vec<f64> {
    let Case { tokens, n, c, .. } = *case;
    let mut mixed = vec![0.0; tokens * n * c];
    for (at, mixed) in mixed.iter_mut().enumerate() {
        let (token, j, channel) = (at / (n * c), at / c % n, at % c);
        let term = |i| h_res[(token * n + i) * n + j] * g[(token * n + i) * c + channel];
        *mixed = (0..n).map(term).sum();
    }
    mixed
}

fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

/// The number whose gradients the backward kernels compute.
fn scalar_loss(case: &Case, data: &Data) -> f64 {
    let [u, h_pre, h_post, h_res, x_new] = scalar_sublayer(case, data);
    let [d_h_pre, d_h_post, d_h_res] = &data.d_h;
    dot(&u, &data.d_u)
        + dot(&h_pre, d_h_pre)
        + dot(&h_post, d_h_post)
        + dot(&h_res, d_h_res)
        + dot(&x_new, &data.d_x_new)
}

// ---- the kernels ------------------------------------------------------------------------------------

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

/// Results of one sublayer: as `scalar_sublayer`, then the gradients of x, y, phi, alpha and bias.
type Results = Vec<Vec<f64>>;

/// Room for what pre writes.
struct Room<S: Stream> {
    u: Vec<S>,
    h: [Vec<S::Real>; 3],
    m: Vec<S::Real>,
    r: Vec<S::Real>,
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

/// pre, post and their backward passes.
fn sublayer<S: Stream>(isa: &str, case: &Case, data: &Data, pool: &dyn Pool) -> Results {
    let Case {
        tokens,
        n,
        c,
        ref config,
        ..
    } = *case;
    let (x, y) = (from_f64::<S>(&data.x), from_f64::<S>(&data.y));
    let real = |values: &[f64]| from_f64::<S::Real>(values);
    let (phi, alpha, bias) = (real(&data.phi), real(&data.alpha), real(&data.bias));
    let gates = Gates {
        config,
        layout: case.layout(),
        alpha: &alpha,
        bias: &bias,
    };
    let params = Params {
        c,
        phi: &phi,
        gates,
    };
    let mut room = Room::<S>::new(case);
    let x_rows = Rows::new(&x[..], n * c);
    let out = room.outputs(case);
    dispatch_to(
        isa,
        pre::Forward {
            params,
            x: x_rows,
            out,
            tokens,
            pool,
        },
    );

    let inputs = room.post_inputs(case, &x, &y);
    let mut x_new = from_f64::<S>(&vec![f64::NAN; tokens * n * c]);
    let x_new_rows = RowsMut::new(&mut x_new, n * c);
    dispatch_to(
        isa,
        post::Forward {
            inputs,
            x_new: x_new_rows,
            tokens,
            pool,
        },
    );

    let d_x_new = from_f64::<S>(&data.d_x_new);
    let mut d_y = y.clone();
    let mut d_h = room.h.clone();
    let [_, d_h_post, d_h_res] = &mut d_h;
    let out = post::Gradients {
        d_y: RowsMut::new(&mut d_y, c),
        d_h_post: RowsMut::new(d_h_post, n),
        d_h_res: RowsMut::new(d_h_res, n * n),
    };
    dispatch_to(
        isa,
        post::Backward {
            inputs,
            d_x_new: Rows::new(&d_x_new, n * c),
            out,
            tokens,
            pool,
        },
    );

    let mut d_x = if case.deferred {
        d_x_new
    } else {
        from_f64(&scalar_mix_back(case, &to_f64(&room.h[2]), &data.d_x_new))
    };
    d_h[0] = real(&data.d_h[0]);
    for (d_h, more) in d_h.iter_mut().zip(&data.d_h).skip(1) {
        for (d_h, more) in d_h.iter_mut().zip(more) {
            *d_h = *d_h + S::Real::from_f64(*more);
        }
    }
    let d_u = from_f64::<S>(&data.d_u);
    let [mut d_phi, mut d_alpha, mut d_bias] = [phi.clone(), alpha.clone(), bias.clone()];
    dispatch_to(
        isa,
        pre::Backward {
            params,
            x: x_rows,
            inputs: BackwardInputs {
                m: Rows::new(&room.m, case.columns()),
                r: Rows::new(&room.r, 1),
                d_u: Rows::new(&d_u, c),
                d_h: Cotangents {
                    h_pre: Rows::new(&d_h[0], n),
                    h_post: Rows::new(&d_h[1], n),
                    h_res: Rows::new(&d_h[2], n * n),
                },
            },
            d_x: RowsMut::new(&mut d_x, n * c),
            handed_on: case.handed_on(&room.h[2]),
            d_params: ParamGradients {
                d_phi: &mut d_phi,
                d_alpha: &mut d_alpha,
                d_bias: &mut d_bias,
            },
            tokens,
            pool,
        },
    );
    let [h_pre, h_post, h_res] = &room.h;
    let reals = [h_pre, h_post, h_res].map(|h| to_f64(h));
    let mut results = vec![to_f64(&room.u)];
    results.extend(reals);
    results.extend([&x_new, &d_x, &d_y].map(|a| to_f64(a)));
    results.extend([&d_phi, &d_alpha, &d_bias].map(|a| to_f64(a)));
    results
}

/// Largest difference over the largest value.
fn error(got: &[f64], want: &[f64]) -> f64 {
    assert_eq!(got.len(), want.len());
    let largest = want.iter().fold(f64::MIN_POSITIVE, |a, b| a.max(b.abs()));
    let difference = |(a, b): (&f64, &f64)| {
        let difference = (a - b).abs();
        if difference.is_nan() {
            f64::INFINITY
        } else {
            difference
        }
    };
    got.iter().zip(want).map(difference).fold(0.0, f64::max) / largest
}

const NAMES: [&str; 10] = [
    "u", "h_pre", "h_post", "h_res", "x_new", "d_x", "d_y", "d_phi", "d_alpha", "d_bias",
];

#[test]
fn float64_values_are_those_of_the_equations() {
    for case in cases() {
        let data = Data::new::<f64>(&case);
        let got = sublayer::<f64>("portable", &case, &data, &Serial);
        for (at, want) in scalar_sublayer(&case, &data).iter().enumerate() {
            // Sums of n·C terms, and twenty divisions of what may be nearly equal.
            let error = error(&got[at], want);
            assert!(error < 1e-12, "{}: {error:e} in {case:?}", NAMES[at]);
        }
    }
}

#[test]
fn float64_gradients_are_central_differences() {
    let step = 1e-5;
    let cases = cases().into_iter().filter(|case| case.tokens > 0);
    for case in cases.flat_map(Case::both_ways) {
        let data = Data::new::<f64>(&case);
        let results = sublayer::<f64>("portable", &case, &data, &Serial);
        for operand in 0..5 {
            let mut random = Random(operand as u64);
            let len = data.clone().operands()[operand].len();
            let direction = random.vec(len, 1.0);
            let loss_at = |step: f64| {
                let mut moved = data.clone();
                for (value, d) in moved.operands()[operand].iter_mut().zip(&direction) {
                    *value += step * d;
                }
                scalar_loss(&case, &moved)
            };
            if case.is_static && operand == 3 {
                continue; // alpha is not read
            }
            let difference = (loss_at(step) - loss_at(-step)) / (2.0 * step);
            let gradient = dot(&results[5 + operand], &direction);
            let scale = difference.abs().max(1.0);
            let error = (gradient - difference).abs() / scale;
            let name = NAMES[5 + operand];
            assert!(
                error < 2e-6,
                "{name}: {gradient:e} against {difference:e} in {case:?}"
            );
        }
    }
}

/// Against the float64 kernels on the same values. Bounds: rounding of the stream, or a few times
/// that of float32 sums; gradients of peaked logits are small differences of large numbers.
fn compare_to_float64<S: Stream>(rounding: f64) {
    for case in cases() {
        let data = Data::new::<S>(&case);
        let want = sublayer::<f64>("portable", &case, &data, &Serial);
        for isa in instruction_sets() {
            let got = sublayer::<S>(isa, &case, &data, &Serial);
            for at in 0..NAMES.len() {
                let error = error(&got[at], &want[at]);
                let bound = match at {
                    0 | 4 => rounding,
                    1..=3 => 3e-6 * case.peak,
                    5 | 6 => 3.0 * rounding + 3e-5 * case.peak,
                    _ => 3.0 * rounding + 1e-4 * case.peak,
                };
                if case.is_static && (at == 7 || at == 8) {
                    continue; // no phi, and alpha is not read
                }
                assert!(
                    error <= bound,
                    "{isa} {}: {error:e} > {bound:e} in {case:?}",
                    NAMES[at]
                );
            }
        }
    }
}

#[test]
fn float32_agrees_with_float64() {
    compare_to_float64::<f32>(1e-5);
}

#[test]
fn bfloat16_agrees_with_float64() {
    compare_to_float64::<bf16>(4.5e-3);
}

#[test]
fn float16_agrees_with_float64() {
    compare_to_float64::<f16>(6e-4);
}

#[test]
fn threads_and_neighbours_change_no_bits() {
    let case = cases()[0];
    let data = Data::new::<bf16>(&case);
    let alone = Case { tokens: 1, ..case };
    let Case { n, c, .. } = case;
    let mut first_data = data.clone();
    let Data {
        x,
        y,
        d_u,
        d_h: [d_h_pre, d_h_post, d_h_res],
        d_x_new,
        ..
    } = &mut first_data;
    for (values, row) in [
        (x, n * c),
        (y, c),
        (d_u, c),
        (d_h_pre, n),
        (d_h_post, n),
        (d_h_res, n * n),
        (d_x_new, n * c),
    ] {
        values.truncate(row);
    }
    for isa in instruction_sets() {
        let serial = sublayer::<bf16>(isa, &case, &data, &Serial);
        let threaded = sublayer::<bf16>(isa, &case, &data, &Threads);
        assert!(serial == threaded, "{isa}: threads change bits");
        let first = sublayer::<bf16>(isa, &alone, &first_data, &Serial);
        for at in 0..7 {
            assert!(
                first[at] == serial[at][..first[at].len()],
                "{isa} {}",
                NAMES[at]
            );
        }
    }
}

#[test]
fn not_a_number_stays_in_its_token() {
    let case = cases()[0];
    let clean = Data::new::<f32>(&case);
    for bad in [f64::NAN, f64::INFINITY] {
        let mut data = clean.clone();
        data.x[5] = bad;
        for isa in instruction_sets() {
            let want = sublayer::<f32>(isa, &case, &clean, &Serial);
            let got = sublayer::<f32>(isa, &case, &data, &Serial);
            for at in 0..7 {
                let row = want[at].len() / case.tokens;
                assert!(
                    got[at][..row].iter().any(|v| !v.is_finite()),
                    "{isa} {}",
                    NAMES[at]
                );
                assert!(got[at][row..] == want[at][row..], "{isa} {}", NAMES[at]);
            }
        }
    }
}

#[test]
fn the_seam_is_post_then_pre() {
    for case in cases().into_iter().flat_map(Case::both_ways) {
        for isa in instruction_sets() {
            seam_is_post_then_pre::<bf16>(isa, &case);
            seam_is_post_then_pre::<f32>(isa, &case);
        }
    }
}

fn seam_is_post_then_pre<S: Stream>(isa: &str, case: &Case) {
    let Case {
        tokens,
        n,
        c,
        ref config,
        ..
    } = *case;
    let data = Data::new::<S>(case);
    let (x, y) = (from_f64::<S>(&data.x), from_f64::<S>(&data.y));
    let real = |values: &[f64]| from_f64::<S::Real>(values);
    let (phi, alpha, bias) = (real(&data.phi), real(&data.alpha), real(&data.bias));
    let gates = Gates {
        config,
        layout: case.layout(),
        alpha: &alpha,
        bias: &bias,
    };
    let params = Params {
        c,
        phi: &phi,
        gates,
    };
    let mut before = Room::<S>::new(case);
    before.h = [0, 1, 2].map(|at| real(&data.d_h[at]));
    let inputs = before.post_inputs(case, &x, &y);
    let pool = &Serial;

    let mut x_new = x.clone();
    let x_new_rows = RowsMut::new(&mut x_new, n * c);
    dispatch_to(
        isa,
        post::Forward {
            inputs,
            x_new: x_new_rows,
            tokens,
            pool,
        },
    );
    let mut want = Room::<S>::new(case);
    let x_new_rows = Rows::new(&x_new[..], n * c);
    dispatch_to(
        isa,
        pre::Forward {
            params,
            x: x_new_rows,
            out: want.outputs(case),
            tokens,
            pool,
        },
    );

    let mut seam_x_new = x.clone();
    let mut got = Room::<S>::new(case);
    let out = got.outputs(case);
    let seam_rows = RowsMut::new(&mut seam_x_new, n * c);
    dispatch_to(
        isa,
        seam::Forward {
            inputs,
            params,
            x_new: seam_rows,
            out,
            tokens,
            pool,
        },
    );
    assert!(
        to_f64(&seam_x_new) == to_f64(&x_new),
        "{isa} x_new in {case:?}"
    );
    assert!(to_f64(&got.u) == to_f64(&want.u), "{isa} u in {case:?}");
    for (got, want) in got.h.iter().zip(&want.h) {
        assert!(
            to_f64(got) == to_f64(want),
            "{isa} coefficients in {case:?}"
        );
    }

    let d_u = from_f64::<S>(&data.d_u);
    let d_h = [0, 1, 2].map(|at| real(&data.d_h[at]));
    let pre_inputs = BackwardInputs {
        m: Rows::new(&want.m, case.columns()),
        r: Rows::new(&want.r, 1),
        d_u: Rows::new(&d_u, c),
        d_h: Cotangents {
            h_pre: Rows::new(&d_h[0], n),
            h_post: Rows::new(&d_h[1], n),
            h_res: Rows::new(&d_h[2], n * n),
        },
    };
    let gradients = |seam: bool| -> Vec<Vec<f64>> {
        let mut d_x_new = from_f64::<S>(&data.d_x_new);
        let handed_on = case.handed_on(&want.h[2]);
        let (mut d_y, mut d_h) = (y.clone(), before.h.clone());
        let [mut d_phi, mut d_alpha, mut d_bias] = [phi.clone(), alpha.clone(), bias.clone()];
        let d_params = ParamGradients {
            d_phi: &mut d_phi,
            d_alpha: &mut d_alpha,
            d_bias: &mut d_bias,
        };
        let [_, d_h_post, d_h_res] = &mut d_h;
        let out = post::Gradients {
            d_y: RowsMut::new(&mut d_y, c),
            d_h_post: RowsMut::new(d_h_post, n),
            d_h_res: RowsMut::new(d_h_res, n * n),
        };
        if seam {
            let call = seam::Backward {
                inputs,
                params,
                pre_inputs,
                d_x_new: RowsMut::new(&mut d_x_new, n * c),
                handed_on,
                out,
                d_params,
                tokens,
                pool,
            };
            dispatch_to(isa, call);
        } else {
            let call = pre::Backward {
                params,
                x: x_new_rows,
                inputs: pre_inputs,
                d_x: RowsMut::new(&mut d_x_new, n * c),
                handed_on,
                d_params,
                tokens,
                pool,
            };
            dispatch_to(isa, call);
            let call = post::Backward {
                inputs,
                d_x_new: Rows::new(&d_x_new, n * c),
                out,
                tokens,
                pool,
            };
            dispatch_to(isa, call);
        }
        let reals = [&d_h[1], &d_h[2], &d_phi, &d_alpha, &d_bias].map(|a| to_f64(a));
        [to_f64(&d_x_new), to_f64(&d_y)]
            .into_iter()
            .chain(reals)
            .collect()
    };
    for (at, (got, want)) in gradients(true).iter().zip(gradients(false)).enumerate() {
        assert!(*got == want, "{isa} gradient {at} in {case:?}");
    }
}

#[test]
fn extreme_logits_stay_on_the_manifold() {
    let config = Config::default();
    let n = 4;
    let mut random = Random(3);
    for size in [1e2, 1e4, 1e30] {
        let z = from_f64::<f32>(&random.vec(19 * n * n, size));
        for isa in instruction_sets() {
            let mut h = vec![f32::NAN; z.len()];
            let out = RowsMut::new(&mut h, n * n);
            let z = Rows::new(&z[..], n * n);
            let config = &config;
            dispatch_to(
                isa,
                sinkhorn::Sinkhorn {
                    config,
                    n,
                    z,
                    d_h_res: None,
                    out,
                    matrices: 19,
                    pool: &Serial,
                },
            );
            for row in h.chunks(n) {
                let sum: f32 = row.iter().sum();
                assert!(
                    (sum - 1.0).abs() < 1e-6,
                    "{isa}: a row sums to {sum} at size {size}"
                );
                assert!(row.iter().all(|h| *h >= 0.0), "{isa}: {row:?}");
            }
        }
    }
}

#[test]
fn exp_is_right_to_two_units() {
    use crate::simd::{Call, Isa, Kernel, Vector};

    struct Exp<'a>(&'a mut [f32]);
    impl<I: Isa> Kernel<I> for Exp<'_> {
        #[inline(always)]
        fn run(self) {
            for block in self.0.chunks_exact_mut(I::F32::LANES) {
                I::F32::load(block).exp().store(block);
            }
        }
    }
    impl Call for Exp<'_> {
        fn run<I: Isa>(self) {
            I::enter(self);
        }
    }
    let special = [
        f32::NAN,
        f32::INFINITY,
        f32::NEG_INFINITY,
        0.0,
        -0.0,
        88.7,
        88.8,
        -87.4,
        -103.9,
    ];
    let mut inputs = special.to_vec();
    inputs.extend((0..4087).map(|i| -110.0 + 0.0492 * i as f32));
    for isa in instruction_sets() {
        let mut outputs = inputs.clone();
        dispatch_to(isa, Exp(&mut outputs));
        for (x, got) in inputs.iter().zip(outputs) {
            let want = f64::from(*x).exp();
            let unit = (want * f64::from(f32::EPSILON)).max(f64::from(f32::from_bits(1)));
            let close = (f64::from(got) - want).abs() <= 2.0 * unit;
            let overflow = want > f64::from(f32::MAX) && got == f32::INFINITY;
            assert!(
                close || overflow || (x.is_nan() && got.is_nan()),
                "{isa}: exp({x}) = {got}"
            );
        }
    }
}

//! pre, post and their backward passes.

use half::{bf16, f16};

use super::scalar;
use super::{Case, Data, Random, Room, Threads, cases, from_f64, to_f64};
use crate::cpu::coefficients::{Cotangents, Gates};
use crate::cpu::parallel::{Pool, Serial};
use crate::cpu::post;
use crate::cpu::pre::{self, BackwardInputs, ParamGradients, Params};
use crate::cpu::simd::{Real, dispatch_to, instruction_sets};
use crate::cpu::stream::{Rows, RowsMut, Stream};

/// Results of one sublayer: as `scalar::sublayer`, then the gradients of x, y, phi, alpha,
/// bias and norm_scale.
type Results = Vec<Vec<f64>>;

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
    let norm_scale = real(&data.norm_scale);
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
        norm_scale: &norm_scale,
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
    )
    .unwrap();

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
    )
    .unwrap();

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
    )
    .unwrap();

    let mut d_x = if case.deferred {
        d_x_new
    } else {
        from_f64(&scalar::mix_back(case, &to_f64(&room.h[2]), &data.d_x_new))
    };
    d_h[0] = real(&data.d_h[0]);
    for (d_h, more) in d_h.iter_mut().zip(&data.d_h).skip(1) {
        for (d_h, more) in d_h.iter_mut().zip(more) {
            *d_h = *d_h + S::Real::from_f64(*more);
        }
    }
    let d_u = from_f64::<S>(&data.d_u);
    let [mut d_phi, mut d_alpha, mut d_bias] = [phi.clone(), alpha.clone(), bias.clone()];
    let mut d_norm_scale = norm_scale.clone();
    dispatch_to(
        isa,
        pre::Backward {
            params,
            x: x_rows,
            inputs: BackwardInputs {
                m: Rows::new(&room.m, case.columns()),
                r: Rows::new(&room.r, 1),
                rho: Rows::new(&room.rho, case.norm_width().min(1)),
                d_u: Rows::new(&d_u, c),
                d_h: Cotangents {
                    h_pre: Rows::new(&d_h[0], n),
                    h_post: Rows::new(&d_h[1], n),
                    h_res: Rows::new(&d_h[2], n * n),
                },
            },
            d_x: RowsMut::new(&mut d_x, n * c),
            d_x_in: case.d_x_in(&room.h[2]),
            d_params: ParamGradients {
                d_phi: &mut d_phi,
                d_alpha: &mut d_alpha,
                d_bias: &mut d_bias,
                d_norm_scale: &mut d_norm_scale,
            },
            tokens,
            pool,
        },
    )
    .unwrap();
    let [h_pre, h_post, h_res] = &room.h;
    let reals = [h_pre, h_post, h_res].map(|h| to_f64(h));
    let mut results = vec![to_f64(&room.u)];
    results.extend(reals);
    results.extend([&x_new, &d_x, &d_y].map(|a| to_f64(a)));
    results.extend([&d_phi, &d_alpha, &d_bias, &d_norm_scale].map(|a| to_f64(a)));
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

const NAMES: [&str; 11] = [
    "u",
    "h_pre",
    "h_post",
    "h_res",
    "x_new",
    "d_x",
    "d_y",
    "d_phi",
    "d_alpha",
    "d_bias",
    "d_norm_scale",
];

#[test]
fn float64_values_are_those_of_the_equations() {
    for case in cases() {
        let data = Data::new::<f64>(&case);
        let got = sublayer::<f64>("portable", &case, &data, &Serial);
        for (at, want) in scalar::sublayer(&case, &data).iter().enumerate() {
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
        for operand in 0..6 {
            let mut random = Random(operand as u64);
            let len = data.clone().operands()[operand].len();
            let direction = random.vec(len, 1.0);
            let loss_at = |step: f64| {
                let mut moved = data.clone();
                for (value, d) in moved.operands()[operand].iter_mut().zip(&direction) {
                    *value += step * d;
                }
                scalar::loss(&case, &moved)
            };
            if case.is_static && operand == 3 {
                continue; // alpha is not read
            }
            let difference = (loss_at(step) - loss_at(-step)) / (2.0 * step);
            let gradient = scalar::dot(&results[5 + operand], &direction);
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
    for has_norm in [false, true] {
        threads_and_neighbours_change_no_bits_of(Case {
            has_norm,
            ..cases()[0]
        });
    }
}

fn threads_and_neighbours_change_no_bits_of(case: Case) {
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
    let first = cases()[0];
    for (bad, has_norm) in [(f64::NAN, false), (f64::INFINITY, false), (f64::NAN, true)] {
        let case = Case { has_norm, ..first };
        let clean = Data::new::<f32>(&case);
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

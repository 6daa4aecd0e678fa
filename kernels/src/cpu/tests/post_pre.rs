//! The seam against post and pre, one after the other: all bits.

use half::bf16;

use super::{Case, Data, Room, cases, from_f64, to_f64};
use crate::cpu::coefficients::{Cotangents, Gates};
use crate::cpu::parallel::Serial;
use crate::cpu::pre::{self, BackwardInputs, Given, ParamGradients, Params};
use crate::cpu::simd::{dispatch_to, instruction_sets};
use crate::cpu::stream::{Rows, RowsMut, Stream};
use crate::cpu::{collapse, post, post_pre};

#[test]
fn post_pre_is_post_then_pre() {
    for case in cases().into_iter().flat_map(Case::both_ways) {
        for isa in instruction_sets() {
            seam_is_post_then_pre::<bf16>(isa, &case);
            seam_is_post_then_pre::<f32>(isa, &case);
            if !case.has_norm {
                given_weights_are_those_of_collapse::<bf16>(isa, &case);
                given_weights_are_those_of_collapse::<f32>(isa, &case);
            }
        }
    }
}

/// The seam with given weights of the streams in u, against collapse, and against pre's gradients without a
/// cotangent of u: all bits but those of the cotangent of the streams, which is one rounded sum of both.
fn given_weights_are_those_of_collapse<S: Stream>(isa: &str, case: &Case) {
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
    let [phi, alpha, bias] = [&data.phi, &data.alpha, &data.bias].map(|values| real(values));
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
        norm_scale: &[],
    };
    let mut before = Room::<S>::new(case);
    before.h = [0, 1, 2].map(|at| real(&data.d_h[at]));
    let inputs = before.post_inputs(case, &x, &y);
    let h_given = Rows::new(&before.h[0], n);
    let pool = &Serial;

    let mut x_new = x.clone();
    let mut got = Room::<S>::new(case);
    let call = post_pre::Forward {
        inputs,
        params,
        h_given: Some(h_given),
        x_new: RowsMut::new(&mut x_new, n * c),
        out: got.outputs(case),
        tokens,
        pool,
    };
    dispatch_to(isa, call).unwrap();
    let x_new = Rows::new(&x_new[..], n * c);
    let mut u = y.clone();
    let call = collapse::Forward {
        x: x_new,
        h_pre: h_given,
        u: RowsMut::new(&mut u, c),
        tokens,
        pool,
    };
    dispatch_to(isa, call).unwrap();
    assert!(to_f64(&got.u) == to_f64(&u), "{isa} u in {case:?}");
    let mut own = Room::<S>::new(case);
    let out = own.outputs(case);
    dispatch_to(
        isa,
        pre::Forward {
            params,
            x: x_new,
            out,
            tokens,
            pool,
        },
    )
    .unwrap();
    for (got, want) in got.h.iter().zip(&own.h) {
        assert!(
            to_f64(got) == to_f64(want),
            "{isa} coefficients in {case:?}"
        );
    }

    let d_u = from_f64::<S>(&data.d_u);
    let zeros = vec![S::default(); d_u.len()];
    let d_h = [0, 1, 2].map(|at| real(&data.d_h[at]));
    let mut d_h_given = real(&vec![f64::NAN; tokens * n]);
    let mut gradients = |has_u: bool| {
        let pre_inputs = BackwardInputs {
            m: Rows::new(&own.m, case.columns()),
            r: Rows::new(&own.r, 1),
            rho: Rows::new(&[], 0),
            d_u: Rows::new(if has_u { &d_u } else { &zeros }, c),
            d_h: Cotangents {
                h_pre: Rows::new(&d_h[0], n),
                h_post: Rows::new(&d_h[1], n),
                h_res: Rows::new(&d_h[2], n * n),
            },
        };
        let mut d_x_new = from_f64::<S>(&data.d_x_new);
        let d_x_in = case.d_x_in(&own.h[2]);
        let (mut d_y, [mut d_h_post, mut d_h_res]) = (y.clone(), [1, 2].map(|at| d_h[at].clone()));
        let [mut d_phi, mut d_alpha, mut d_bias] = [phi.clone(), alpha.clone(), bias.clone()];
        let d_params = ParamGradients {
            d_phi: &mut d_phi,
            d_alpha: &mut d_alpha,
            d_bias: &mut d_bias,
            d_norm_scale: &mut [],
        };
        if has_u {
            let call = post_pre::Backward {
                inputs,
                params,
                pre_inputs,
                given: Some(Given {
                    h: h_given,
                    d_h: RowsMut::new(&mut d_h_given, n),
                }),
                d_x_new: RowsMut::new(&mut d_x_new, n * c),
                d_x_in,
                out: post::Gradients {
                    d_y: RowsMut::new(&mut d_y, c),
                    d_h_post: RowsMut::new(&mut d_h_post, n),
                    d_h_res: RowsMut::new(&mut d_h_res, n * n),
                },
                d_params,
                tokens,
                pool,
            };
            dispatch_to(isa, call).unwrap();
        } else {
            let call = pre::Backward {
                params,
                x: x_new,
                inputs: pre_inputs,
                d_x: RowsMut::new(&mut d_x_new, n * c),
                d_x_in,
                d_params,
                tokens,
                pool,
            };
            dispatch_to(isa, call).unwrap();
        }
        [&d_phi, &d_alpha, &d_bias].map(|values| to_f64(values))
    };
    assert!(
        gradients(true) == gradients(false),
        "{isa} parameters in {case:?}"
    );
    let mut want = d_h_given.clone();
    let call = collapse::Backward {
        x: x_new,
        d_u: Rows::new(&d_u, c),
        d_h_pre: RowsMut::new(&mut want, n),
        tokens,
        pool,
    };
    dispatch_to(isa, call).unwrap();
    assert!(
        to_f64(&d_h_given) == to_f64(&want),
        "{isa} d_h_given in {case:?}"
    );
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
    )
    .unwrap();
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
    )
    .unwrap();

    let mut seam_x_new = x.clone();
    let mut got = Room::<S>::new(case);
    let out = got.outputs(case);
    let seam_rows = RowsMut::new(&mut seam_x_new, n * c);
    dispatch_to(
        isa,
        post_pre::Forward {
            inputs,
            params,
            h_given: None,
            x_new: seam_rows,
            out,
            tokens,
            pool,
        },
    )
    .unwrap();
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
        rho: Rows::new(&want.rho, case.norm_width().min(1)),
        d_u: Rows::new(&d_u, c),
        d_h: Cotangents {
            h_pre: Rows::new(&d_h[0], n),
            h_post: Rows::new(&d_h[1], n),
            h_res: Rows::new(&d_h[2], n * n),
        },
    };
    let gradients = |seam: bool| -> Vec<Vec<f64>> {
        let mut d_x_new = from_f64::<S>(&data.d_x_new);
        let d_x_in = case.d_x_in(&want.h[2]);
        let (mut d_y, mut d_h) = (y.clone(), before.h.clone());
        let [mut d_phi, mut d_alpha, mut d_bias] = [phi.clone(), alpha.clone(), bias.clone()];
        let mut d_norm_scale = norm_scale.clone();
        let d_params = ParamGradients {
            d_phi: &mut d_phi,
            d_alpha: &mut d_alpha,
            d_bias: &mut d_bias,
            d_norm_scale: &mut d_norm_scale,
        };
        let [_, d_h_post, d_h_res] = &mut d_h;
        let out = post::Gradients {
            d_y: RowsMut::new(&mut d_y, c),
            d_h_post: RowsMut::new(d_h_post, n),
            d_h_res: RowsMut::new(d_h_res, n * n),
        };
        if seam {
            let call = post_pre::Backward {
                inputs,
                params,
                pre_inputs,
                given: None,
                d_x_new: RowsMut::new(&mut d_x_new, n * c),
                d_x_in,
                out,
                d_params,
                tokens,
                pool,
            };
            dispatch_to(isa, call).unwrap();
        } else {
            let call = pre::Backward {
                params,
                x: x_new_rows,
                inputs: pre_inputs,
                d_x: RowsMut::new(&mut d_x_new, n * c),
                d_x_in,
                d_params,
                tokens,
                pool,
            };
            dispatch_to(isa, call).unwrap();
            let call = post::Backward {
                inputs,
                d_x_new: Rows::new(&d_x_new, n * c),
                out,
                tokens,
                pool,
            };
            dispatch_to(isa, call).unwrap();
        }
        let params = [&d_phi, &d_alpha, &d_bias, &d_norm_scale];
        let reals = [&d_h[1], &d_h[2]]
            .into_iter()
            .chain(params)
            .map(|a| to_f64(a));
        [to_f64(&d_x_new), to_f64(&d_y)]
            .into_iter()
            .chain(reals)
            .collect()
    };
    for (at, (got, want)) in gradients(true).iter().zip(gradients(false)).enumerate() {
        assert!(*got == want, "{isa} gradient {at} in {case:?}");
    }
}

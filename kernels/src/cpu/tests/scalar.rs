//! The equations, one scalar at a time.

use super::{Case, Data};
use crate::{Config, Constraint, EpsMode, NormEpsMode, Order};

fn sinkhorn(config: &Config, n: usize, z: &[f64]) -> Vec<f64> {
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

fn mixed_permutations(n: usize, z: &[f64]) -> Vec<f64> {
    let words = (0..n.pow(n as u32)).map(|word| -> Vec<usize> {
        let digit = |i| word / n.pow((n - 1 - i) as u32) % n;
        (0..n).map(digit).collect()
    });
    let permutations = words.filter(|word| (0..n).all(|stream| word.contains(&stream)));
    let total: f64 = z.iter().map(|z| z.exp()).sum();
    let mut h_res = vec![0.0; n * n];
    let mut num = 0;
    for (p, z) in permutations.zip(z) {
        for (i, j) in p.into_iter().enumerate() {
            h_res[i * n + j] += z.exp() / total;
        }
        num += 1;
    }
    assert_eq!(num, z.len());
    h_res
}

/// u, h_pre, h_post, h_res and x_new of all tokens, one after the other.
pub fn sublayer(case: &Case, data: &Data) -> [Vec<f64>; 5] {
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
            .map(|z| config.post_scale * sigmoid(*z) + config.post_eps)
            .collect();
        let h_res = match config.constraint {
            Constraint::Birkhoff => sinkhorn(&config, n, &z[2 * n..]),
            Constraint::None => z[2 * n..].to_vec(),
            Constraint::Identity => (0..n * n)
                .map(|at| f64::from(u8::from(at / n == at % n)))
                .collect(),
            Constraint::Permutations => mixed_permutations(n, &z[2 * n..]),
        };
        let y = &data.y[token * c..][..c];
        let mut u: Vec<f64> = (0..c)
            .map(|k| (0..n).map(|i| h_pre[i] * x[i * c + k]).sum())
            .collect();
        if case.has_norm {
            let mean = dot(&u, &u) / c as f64;
            for (u, w) in u.iter_mut().zip(&data.norm_scale) {
                *u *= w / (mean + config.norm_scale_eps).sqrt();
            }
        }
        out[0].extend(u);
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
pub fn mix_back(case: &Case, h_res: &[f64], g: &[f64]) -> Vec<f64> {
    let Case { tokens, n, c, .. } = *case;
    let mut mixed = vec![0.0; tokens * n * c];
    for (at, mixed) in mixed.iter_mut().enumerate() {
        let (token, j, channel) = (at / (n * c), at / c % n, at % c);
        let term = |i| h_res[(token * n + i) * n + j] * g[(token * n + i) * c + channel];
        *mixed = (0..n).map(term).sum();
    }
    mixed
}

pub fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

/// The number whose gradients the backward kernels compute.
pub fn loss(case: &Case, data: &Data) -> f64 {
    let [u, h_pre, h_post, h_res, x_new] = sublayer(case, data);
    let [d_h_pre, d_h_post, d_h_res] = &data.d_h;
    dot(&u, &data.d_u)
        + dot(&h_pre, d_h_pre)
        + dot(&h_post, d_h_post)
        + dot(&h_res, d_h_res)
        + dot(&x_new, &data.d_x_new)
}

//! Weighted means of the permutation matrices of few streams, for as many matrices at once as a vector
//! has lanes: H_res = sum over p of softmax(z)_p P_p, with P_p[i, p[i]] = 1.
//!
//! Permutations are in lexicographic order, the identity first: mHC-lite.

use crate::contract::layout::factorial;
use crate::contract::limits::{MAX_PERMUTED, MAX_STREAMS};
use crate::cpu::simd::Vector;

/// Those of the largest number of streams. The first n! of them move the last n alone, in the order of the
/// permutations of n.
const IMAGES: [[usize; MAX_PERMUTED]; factorial(MAX_PERMUTED)] = {
    let mut images = [[0; MAX_PERMUTED]; factorial(MAX_PERMUTED)];
    let mut p = 0;
    while p < images.len() {
        // Of those that are left, in ascending order, the one that p says.
        let mut left = [0, 1, 2, 3];
        let mut i = 0;
        while i < MAX_PERMUTED {
            let rest = MAX_PERMUTED - 1 - i;
            let mut at = p / factorial(rest) % (rest + 1);
            images[p][i] = left[at];
            while at < rest {
                left[at] = left[at + 1];
                at += 1;
            }
            i += 1;
        }
        p += 1;
    }
    images
};

/// Calls `each` with every permutation p of n streams and every p[i]: `(p, i, p[i])`.
#[inline(always)]
fn for_each(n: usize, mut each: impl FnMut(usize, usize, usize)) {
    let first = MAX_PERMUTED - n;
    for (p, images) in IMAGES.iter().enumerate().take(factorial(n)) {
        for (i, image) in images[first..].iter().enumerate() {
            each(p, i, image - first);
        }
    }
}

/// z <- softmax(z)
#[inline(always)]
fn softmax<V: Vector>(z: &mut [V]) {
    let largest = z[1..].iter().fold(z[0], |largest, z| largest.max(*z));
    let mut total = V::zero();
    for z in z.iter_mut() {
        *z = (*z - largest).exp();
        total = total + *z;
    }
    for z in z {
        *z = *z / total;
    }
}

/// h <- H_res from the logits z, which become the weights.
///
/// `N` is n where the compiler should know it, and [`MAX_STREAMS`] otherwise.
#[inline(always)]
pub fn forward<V: Vector, const N: usize>(n: usize, z: &mut [V], h: &mut [V]) {
    let n = if N == MAX_STREAMS { n } else { N };
    softmax(z);
    h.fill(V::zero());
    for_each(n, |p, i, j| h[i * n + j] = h[i * n + j] + z[p]);
}

/// g <- dL/dz from the logits z, which become the weights w, and d_h = dL/dH_res.
///
/// dL/dw_p is the sum over i of d_h[i, p[i]], and dL/dz = w (dL/dw - <w, dL/dw>).
#[inline(always)]
pub fn backward<V: Vector, const N: usize>(n: usize, z: &mut [V], d_h: &[V], g: &mut [V]) {
    let n = if N == MAX_STREAMS { n } else { N };
    softmax(z);
    g.fill(V::zero());
    for_each(n, |p, i, j| g[p] = g[p] + d_h[i * n + j]);
    let mut dot = V::zero();
    for (g, w) in g.iter().zip(&*z) {
        dot = w.mul_add(*g, dot);
    }
    for (g, w) in g.iter_mut().zip(z) {
        *g = *w * (*g - dot);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn permutations_are_in_lexicographic_order() {
        for n in 1..=MAX_PERMUTED {
            let mut images = vec![vec![]; factorial(n)];
            for_each(n, |p, i, j| {
                assert_eq!(images[p].len(), i);
                images[p].push(j);
            });
            assert!(images.is_sorted_by(|a, b| a < b), "{images:?}");
            for mut image in images {
                image.sort_unstable();
                assert!(image.into_iter().eq(0..n));
            }
        }
    }
}

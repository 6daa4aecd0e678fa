//! The vectors' own functions.

use crate::cpu::scratch::Exhausted;
use crate::cpu::simd::{Isa, Job, Kernel, Vector, dispatch_to, instruction_sets};

#[test]
fn exp_is_right_to_two_units() {
    struct Exp<'a>(&'a mut [f32]);
    impl<I: Isa> Kernel<I> for Exp<'_> {
        #[inline(always)]
        fn run(self) {
            for block in self.0.chunks_exact_mut(I::F32::LANES) {
                I::F32::load(block).exp().store(block);
            }
        }
    }
    impl Job for Exp<'_> {
        fn run<I: Isa>(self) -> Result<(), Exhausted> {
            I::enter(self);
            Ok(())
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
        dispatch_to(isa, Exp(&mut outputs)).unwrap();
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

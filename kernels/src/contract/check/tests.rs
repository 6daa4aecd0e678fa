//! Tests of the check of calls.

use super::Example;
use crate::contract::table::{Call, Group};
use crate::contract::view::DType;
use crate::{Config, Constraint};

/// Examples of every call, in small.
fn examples() -> impl Iterator<Item = Example> {
    let example = |kind| Example::new(kind, DType::F32, 3, [2, 5], Config::default());
    Call::ALL.into_iter().map(example)
}

fn refusal(example: &Example) -> String {
    example.check(|call| call.expect_err("a refusal").to_string())
}

#[test]
fn calls_of_the_table_pass() {
    for example in examples() {
        example.check(|call| assert_eq!(call.unwrap().tokens, 3));
        let example = example.with_workspace(7);
        example.check(|call| assert_eq!(call.unwrap().workspace().unwrap().1, 7));
    }
    for example in examples() {
        example.with_norm().check(|call| {
            let call = call.unwrap();
            let width = if call.kind.groups().is_empty() {
                0
            } else {
                call.c
            };
            assert_eq!(call.norm_width, width);
        });
    }
    for example in examples() {
        example.with_given().check(|call| {
            let call = call.unwrap();
            let can_be = matches!(call.kind, Call::PostPreFwd | Call::PostPreBwd);
            assert_eq!(call.is_given(), can_be);
            assert_eq!(call.width("h_given"), if can_be { 2 } else { 0 });
        });
    }
    for example in examples() {
        example.into_static().check(|call| {
            let call = call.unwrap();
            assert!(call.kind.is_head() || call.columns == 0);
            assert!(call.kind.is_head() || call.operand_address("alpha") == 0);
        });
    }
}

#[test]
fn given_weights_and_a_norm_are_not_in_one_call() {
    let both = examples().map(|example| example.with_norm().with_given());
    let refused = both.filter(|example| example.check(|call| call.is_err()));
    let refusals: Vec<_> = refused.map(|example| refusal(&example)).collect();
    let of = |op| format!("{op}: `given`: expected 0 with `norm` 1, got 1");
    assert_eq!(refusals, ["post_pre_fwd", "post_pre_bwd"].map(of));
}

#[test]
fn only_few_streams_are_permuted() {
    let config = Config {
        constraint: Constraint::Permutations,
        ..Config::default()
    };
    for kind in [
        Call::PreFwd,
        Call::PreBwd,
        Call::PostPreFwd,
        Call::PostPreBwd,
    ] {
        let example = |n| Example::new(kind, DType::F32, 3, [n, 5], config);
        example(4).check(|call| assert_eq!(call.unwrap().columns, 32));
        let refusal = refusal(&example(5));
        assert!(
            refusal.contains("`constraint`: expected one for 5"),
            "{refusal}"
        );
    }
    // The head has no H_res.
    let head = Example::new(Call::HeadFwd, DType::F32, 3, [5, 5], config);
    head.check(|call| assert_eq!(call.unwrap().columns, 5));
}

#[test]
fn every_operand_and_result_is_looked_at() {
    type Types = Vec<(DType, Vec<i64>)>;
    let parts: [fn(&mut Example) -> &mut Types; 2] =
        [|example| &mut example.args, |example| &mut example.rets];
    for (part, missing) in parts.into_iter().zip(["an operand", "a result"]) {
        for kind in Call::ALL {
            for absent in [Group::Given, Group::Norm] {
                let good = || {
                    let example = Example::new(kind, DType::Bf16, 3, [2, 5], Config::default());
                    match absent {
                        Group::Given => example.with_norm(),
                        _ => example.with_given(),
                    }
                };
                let has = |group| group != absent;
                let names: Vec<_> = if missing == "a result" {
                    kind.results(has).map(|value| value.name).collect()
                } else {
                    kind.operands(has).map(|value| value.name).collect()
                };
                for (at, name) in names.iter().enumerate() {
                    let first = at == 0 && missing == "an operand";
                    let mut example = good();
                    part(&mut example)[at].0 = DType::F64;
                    if !first {
                        let refusal = refusal(&example);
                        assert!(refusal.contains(&format!("`{name}`")), "{refusal}");
                    }
                    let mut example = good();
                    part(&mut example)[at].1.push(2);
                    assert!(refusal(&example).starts_with(kind.name()));
                    let mut example = good();
                    part(&mut example).truncate(at);
                    let wanted = if first { "at least one" } else { missing };
                    let refusal = refusal(&example);
                    assert!(refusal.contains(&format!("expected {wanted}")), "{refusal}");
                }
                let mut example = good();
                part(&mut example).push((DType::F32, vec![3, 4]));
                assert!(refusal(&example).contains("no more"));
            }
        }
    }
}

#[test]
fn a_group_is_there_or_not() {
    for kind in Call::ALL
        .into_iter()
        .filter(|kind| !kind.groups().is_empty())
    {
        let without = Config::default();
        let with = |group: &Group| Config {
            norm: *group == Group::Norm,
            given: *group == Group::Given,
            dynamic: *group != Group::Dynamic,
            ..without
        };
        let settings = kind.groups().iter().map(with);
        for (config, other) in settings.flat_map(|with| [(with, without), (without, with)]) {
            let example = Example::new(kind, DType::F32, 3, [2, 5], config);
            let refusal = example
                .with_settings(other)
                .check(|call| call.unwrap_err().to_string());
            assert!(refusal.starts_with(kind.name()), "{refusal}");
        }
    }
}

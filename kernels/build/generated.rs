//! The header of a compiled file: what Rust and CUDA C++ both know, from its one place in Rust.

use crate::tuning::{File, Size, Tuning};

/// Lists the constraints of constraints.rs as enumerators.
macro_rules! constraints {
    ($($(#[$doc:meta])* $name:ident = $number:literal, $word:literal, $columns:expr, $max:expr;)+) => {
        const CONSTRAINTS: &[(&str, i32)] = &[$((stringify!($name), $number)),+];
    };
}
include!("../src/contract/constraints.rs");

/// Writes a struct of structs.rs in C++.
macro_rules! device_struct {
    ($(#[$doc:meta])* $name:ident { $($(#[$field_doc:meta])* $field:ident: $type:ident,)+ }) => {
        #[allow(non_upper_case_globals, reason = "the name of the struct")]
        const $name: (&str, &[(&str, &str)]) = (
            stringify!($name),
            &[$((stringify!($field), stringify!($type))),+],
        );
    };
}
include!("../src/gpu/structs.rs");

/// The text of the header for a file in one size.
pub fn header(file: &File, size: &Size) -> String {
    let constraints = CONSTRAINTS.iter();
    let constraints: Vec<_> = constraints
        .map(|(name, number)| format!("k{name} = {number}"))
        .collect();
    let mut text = format!(
        "#pragma once\n\
         #define SIZE {}\n\
         #define EXACT {}\n\
         #define NUM_STREAMS {}\n\
         #define COLUMNS {}\n\
         enum class Constraint : int {{ {} }};\n",
        size.number,
        u8::from(size.is_exact),
        size.streams,
        size.columns,
        constraints.join(", ")
    );
    for (name, fields) in [Settings, Layout] {
        let declared = fields.iter().map(|(field, type_)| {
            let type_ = match *type_ {
                "i32" => "int",
                "f32" => "float",
                "Constraint" => "Constraint",
                other => panic!("{name}: {other} has no name in C++"),
            };
            format!("  {type_} {field};\n")
        });
        text += &format!(
            "struct {name}Fields {{\n{}}};\nstatic_assert(sizeof({name}Fields) == {});\n",
            declared.collect::<String>(),
            size_of::<i32>() * fields.len()
        );
    }
    let has_size = |kernel: &&Tuning| kernel.sizes.contains(size);
    for kernel in file.kernels.iter().filter(has_size) {
        let function = kernel.function;
        assert_eq!(kernel.more.len(), file.more.len(), "{function}");
        let numbers = [
            ("tokens", kernel.tokens),
            ("stages", kernel.stages),
            ("threads", kernel.threads),
            ("shared_bytes", kernel.shared_bytes),
        ];
        let more = file.more.iter().copied().zip(kernel.more.iter().copied());
        let members = numbers.into_iter().chain(more);
        let members = members.map(|(name, number)| format!("  {name} = {number},\n"));
        text += &format!(
            "#define HAS_{function}\nstruct tuning_{function} {{ enum : int {{\n{}}}; }};\n",
            members.collect::<String>()
        );
    }
    text
}

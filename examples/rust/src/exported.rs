//! The folder that `export.py` writes: a program, its arguments, and the results that JAX computed.

use std::fs;
use std::path::Path;

use serde::Deserialize;

use crate::pjrt::Tensor;

/// A program and its values.
#[derive(Debug)]
pub struct Exported {
    /// Platform that the program was lowered for, `cpu` or `cuda`.
    pub platform: String,
    /// StableHLO's bytecode.
    pub code: Vec<u8>,
    /// Arguments by name, in the program's order.
    pub arguments: Vec<(String, Tensor)>,
    /// Results of JAX by name, in the program's order.
    pub results: Vec<(String, Tensor)>,
}

#[derive(Deserialize)]
struct Index {
    platform: String,
    arguments: Vec<Value>,
    results: Vec<Value>,
}

#[derive(Deserialize)]
struct Value {
    name: String,
    dims: Vec<i64>,
}

/// Reads the folder.
///
/// # Errors
/// A file is missing, or not what `export.py` writes.
pub fn read(folder: &Path) -> Result<Exported, String> {
    let read = |name| {
        let path = folder.join(name);
        fs::read(&path).map_err(|error| format!("program {}: {error}", path.display()))
    };
    let wrong = |reason: String| {
        format!(
            "program {}: {reason}; export it again with export.py",
            folder.display()
        )
    };
    let index: Index = serde_json::from_slice(&read("values.json")?)
        .map_err(|error| wrong(format!("values.json: {error}")))?;
    let bytes = read("values.bin")?;
    let (numbers, rest) = bytes.as_chunks();
    let mut numbers = numbers.iter().copied().map(f32::from_le_bytes);
    let mut take = |values: Vec<Value>| {
        let tensor = |value: Value| {
            let size = (value.dims.iter()).try_fold(1, |size: usize, &dim| {
                size.checked_mul(usize::try_from(dim).ok()?)
            })?;
            let numbers: Vec<_> = numbers.by_ref().take(size).collect();
            let dims = value.dims;
            (numbers.len() == size).then_some((value.name, Tensor { dims, numbers }))
        };
        values.into_iter().map(tensor).collect::<Option<_>>()
    };
    let values = take(index.arguments).zip(take(index.results));
    match (values, rest, numbers.next()) {
        (Some((arguments, results)), [], None) => Ok(Exported {
            platform: index.platform,
            code: read("program.mlirbc")?,
            arguments,
            results,
        }),
        _ => Err(wrong(
            "values.bin: expected the float32 numbers that values.json lists, got more or fewer"
                .into(),
        )),
    }
}

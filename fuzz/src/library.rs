//! The shared library: loaded as Python loads it, and its own description of its calls.

use std::collections::HashMap;
use std::ffi::{CStr, c_char};
use std::path::Path;

use libloading::{Library, Symbol};
use serde::Deserialize;

use crate::frame::{self, Attr};

/// The library's description of itself.
#[derive(Debug, Deserialize)]
pub struct Description {
    /// Version of the package.
    pub version: String,
    /// Commit of its sources.
    pub commit: Option<String>,
    /// Instruction set of the kernels for CPUs on this machine.
    pub instruction_set: String,
    /// Whether the library was built with debug assertions, and so with checks of overflow.
    pub debug_assertions: bool,
    handlers: Vec<Handler>,
    calls: Vec<Op>,
}

#[derive(Debug, Deserialize)]
struct Handler {
    name: String,
    platform: String,
    address: Option<usize>,
}

/// One call of the table.
#[derive(Debug, Deserialize)]
pub struct Op {
    /// Name, such as `pre_fwd`.
    pub name: String,
    /// Operands of all groups, in order.
    pub operands: Vec<Value>,
    /// Results of all groups, in order.
    pub results: Vec<Value>,
    /// Whether the first result may lie where the last operand lies.
    pub adds_in_place: bool,
    /// Attributes, in any order.
    pub attributes: Vec<Attribute>,
    /// Address of the handler for CPUs.
    #[serde(skip)]
    pub handler: usize,
}

/// An operand or a result.
#[derive(Debug, Deserialize)]
pub struct Value {
    /// Name, such as `d_x`.
    pub name: String,
    /// Kind of dtype.
    pub precision: Precision,
    /// Whether the dimensions of tokens come first.
    pub has_tokens: bool,
    /// The dimensions of one token, as letters.
    pub dims: Vec<String>,
    /// The attribute that is 0 where the value is absent, if it ever is.
    #[serde(default)]
    pub group: Option<String>,
}

/// The kind of dtype that a value has.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Precision {
    /// Dtype of the streams.
    Streams,
    /// float32, or float64 for streams of float64.
    Accumulation,
}

/// An attribute.
#[derive(Debug, Deserialize)]
pub struct Attribute {
    /// Name, such as `norm_eps`.
    pub name: String,
    /// Type and values.
    #[serde(flatten)]
    pub setting: Setting,
}

/// The type of an attribute, and the values that it may have.
#[derive(Debug, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum Setting {
    /// A word out of `choices`.
    String {
        /// The words.
        choices: Vec<String>,
    },
    /// 0 to `max`.
    Int64 {
        /// The largest.
        max: i64,
    },
    /// A number.
    Float64,
}

impl Op {
    /// Whether the call is about logits alone.
    pub fn takes_logits(&self) -> bool {
        self.operands[0].name == "z"
    }

    /// Whether the call has the coefficients of the learned exit: those of h_pre alone.
    pub fn is_head(&self) -> bool {
        self.name.starts_with("head")
    }

    /// The operands of a frame with these attributes, in order.
    pub fn operands_with(&self, attributes: &[frame::Attribute]) -> Vec<&Value> {
        present(&self.operands, attributes)
    }

    /// The results of a frame with these attributes, in order.
    pub fn results_with(&self, attributes: &[frame::Attribute]) -> Vec<&Value> {
        present(&self.results, attributes)
    }

    /// Whether the call has an operand of this name.
    pub fn takes(&self, name: &str) -> bool {
        self.operands.iter().any(|value| value.name == name)
    }
}

/// The values of groups that the attributes say are there.
fn present<'a>(values: &'a [Value], attributes: &[frame::Attribute]) -> Vec<&'a Value> {
    let is_there = |group: &String| {
        let mut found = attributes
            .iter()
            .filter(|attribute| attribute.name == *group);
        !matches!(
            found.next().map(|attribute| &attribute.value),
            Some(Attr::Int(0))
        )
    };
    let values = values.iter();
    values
        .filter(|value| value.group.as_ref().is_none_or(is_there))
        .collect()
}

/// Loads the library. It stays loaded: its handlers may be called until the process ends.
///
/// # Errors
/// A library that is missing, or that does not describe its calls.
pub fn load(path: &Path) -> Result<(Description, Vec<Op>), String> {
    let failed = |error: &dyn std::fmt::Display| {
        format!(
            "--library: expected the shared library of jax-mhc, got {}: {error}",
            path.display()
        )
    };
    // SAFETY: the library's initialisers are those of Rust and C++ alone.
    let library = unsafe { Library::new(path) }.map_err(|error| failed(&error))?;
    let text = {
        // SAFETY: the type that xla_plugin gives it.
        let describe: Symbol<extern "C" fn() -> *const c_char> =
            unsafe { library.get(b"jax_mhc_describe\0") }.map_err(|error| failed(&error))?;
        let text = describe();
        if text.is_null() {
            return Err(failed(&"it has no description"));
        }
        // SAFETY: a text with a final zero that is never freed.
        unsafe { CStr::from_ptr(text) }
    };
    std::mem::forget(library);
    let mut description: Description =
        serde_json::from_slice(text.to_bytes()).map_err(|error| failed(&error))?;
    let addresses: HashMap<&str, usize> = (description.handlers.iter())
        .filter(|handler| handler.platform == "cpu")
        .filter_map(|handler| {
            let name = handler.name.strip_prefix("jax_mhc_")?;
            Some((name.rsplit_once("_v")?.0, handler.address?))
        })
        .collect();
    let mut ops = std::mem::take(&mut description.calls);
    for op in &mut ops {
        op.handler = *(addresses.get(op.name.as_str()))
            .ok_or_else(|| failed(&format!("no handler of {}", op.name)))?;
    }
    Ok((description, ops))
}

//! jax-mhc's shared library and the registration of its handlers.
//!
//! The library describes itself in JSON, with the address of every handler. Handlers for CPUs are one function,
//! and those for GPUs one for each stage of a call.

use std::ffi::{CStr, c_char, c_void};
use std::path::Path;
use std::ptr;

use serde::Deserialize;

use crate::pjrt::{self, Plugin};

/// The library's description of itself, as far as it is read here.
#[derive(Debug, Deserialize)]
pub struct Description {
    /// Version of jax-mhc.
    pub version: String,
    handlers: Vec<Handler>,
    /// Handlers of calls that are no more, which are errors that say so.
    retired: Vec<Handler>,
}

#[derive(Debug, Deserialize)]
struct Handler {
    name: String,
    platform: String,
    /// The function that is all stages.
    address: Option<usize>,
    initialize: Option<usize>,
    execute: Option<usize>,
}

/// Loads jax-mhc's shared library until the process ends.
///
/// # Errors
/// The library cannot be loaded, or is another one.
///
/// # Safety
/// The library of jax-mhc is the one that exports `jax_mhc_describe`.
pub unsafe fn load(path: &Path) -> Result<Description, String> {
    let fail = |reason: String| format!("library {}: {reason}", path.display());
    // SAFETY: promised by the caller.
    let library = unsafe { pjrt::open(path) }.map_err(fail)?;
    let other = || fail("expected jax-mhc's libjax_mhc_xla.so, got another library".into());
    // SAFETY: promised by the caller; the text lives as long as the library.
    let description = unsafe {
        let describe = library
            .get::<unsafe extern "C" fn() -> *const c_char>(c"jax_mhc_describe")
            .map_err(|_| other())?;
        describe().as_ref().map(|text| CStr::from_ptr(text))
    };
    let description = description.ok_or_else(|| fail("cannot describe itself".into()))?;
    serde_json::from_slice(description.to_bytes()).map_err(|_| other())
}

impl Description {
    /// The number of calls with handlers for a platform, `cpu` or `cuda`.
    pub fn count(&self, platform: &str) -> usize {
        let handlers = self.handlers.iter();
        handlers.filter(|handler| handler.is_for(platform)).count()
    }

    /// Registers the handlers for a platform.
    ///
    /// # Errors
    /// The plugin cannot take them, or refuses one.
    pub fn register(&self, plugin: Plugin, platform: &str) -> Result<(), String> {
        let handlers = self.handlers.iter().chain(&self.retired);
        for handler in handlers.filter(|handler| handler.is_for(platform)) {
            let stage = |address: Option<usize>| {
                address.map_or(ptr::null(), ptr::with_exposed_provenance::<c_void>)
            };
            let execute = stage(handler.execute.or(handler.address));
            let name = &handler.name;
            // SAFETY: the library of jax-mhc describes handlers of XLA's FFI.
            let outcome = unsafe {
                if platform == "cuda" {
                    plugin.register_on_gpus(name, stage(handler.initialize), execute)
                } else {
                    plugin.register(name, platform, execute)
                }
            };
            outcome.map_err(|reason| format!("handler {name}: {reason}"))?;
        }
        Ok(())
    }
}

impl Handler {
    /// Whether the handler is for a platform; the library writes `CUDA`, as XLA does.
    fn is_for(&self, platform: &str) -> bool {
        self.platform.eq_ignore_ascii_case(platform)
    }
}

//! The fake driver of libcuda.c: how it is built, and how a process that has loaded it sets it.

use std::ffi::{CString, OsStr, c_char, c_int};
use std::path::{Path, PathBuf};
use std::process::Command;

use libloading::Library;

/// The functions that are called.
pub const FUNCTIONS: [&str; 19] = [
    "cuInit",
    "cuDriverGetVersion",
    "cuGetErrorName",
    "cuGetErrorString",
    "cuDeviceGetCount",
    "cuDeviceGetName",
    "cuDeviceGetAttribute",
    "cuStreamGetCtx",
    "cuCtxPushCurrent_v2",
    "cuCtxPopCurrent_v2",
    "cuCtxGetDevice",
    "cuLibraryLoadData",
    "cuLibraryGetKernel",
    "cuKernelGetAttribute",
    "cuKernelSetAttribute",
    "cuKernelGetFunction",
    "cuOccupancyMaxActiveClusters",
    "cuTensorMapEncodeTiled",
    "cuLaunchKernelEx",
];

/// The driver's file.
pub const FILE: &str = "libcuda.so.1";

/// An empty folder for a driver.
fn folder(name: &str) -> PathBuf {
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR"))
        .join("fake_cuda")
        .join(name);
    let _ = std::fs::remove_dir_all(&folder);
    std::fs::create_dir_all(&folder).unwrap();
    folder
}

/// The folder of a driver, without one of its functions.
pub fn build(name: &str, missing: Option<&str>) -> PathBuf {
    let folder = folder(name);
    // What rustc links with.
    let mut compiler = Command::new("cc");
    compiler.args([
        "-std=c11", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC", "-o",
    ]);
    compiler.args([
        folder.join(FILE).as_os_str(),
        OsStr::new("tests/fake_cuda/libcuda.c"),
    ]);
    compiler.args(missing.map(|function| format!("-D{function}=another_function")));
    assert!(compiler.status().unwrap().success(), "{compiler:?}");
    folder
}

/// The folder of a driver that is none.
pub fn build_broken(name: &str) -> PathBuf {
    let folder = folder(name);
    std::fs::write(folder.join(FILE), "no library").unwrap();
    folder
}

/// The driver of this process.
pub struct FakeDriver(Library);

impl FakeDriver {
    /// The one that LD_LIBRARY_PATH names.
    pub fn load() -> Self {
        // SAFETY: it has no initializers.
        Self(unsafe { Library::new(FILE) }.unwrap())
    }

    /// Sets the code that a function returns, or an answer of libcuda.c.
    pub fn set(&self, name: &str, value: i32) {
        let name = CString::new(name).unwrap().into_raw();
        // SAFETY: the type is that of libcuda.c; the text is never freed.
        unsafe {
            let set = self
                .0
                .get::<unsafe extern "C" fn(*const c_char, c_int)>(b"fake_set\0");
            set.unwrap()(name, value);
        }
    }

    /// How many contexts are on the stack.
    pub fn depth(&self) -> i32 {
        self.number(b"fake_depth\0")
    }

    /// How many kernels were launched.
    pub fn num_launches(&self) -> i32 {
        self.number(b"fake_num_launches\0")
    }

    fn number(&self, name: &[u8]) -> i32 {
        // SAFETY: the type is that of libcuda.c.
        unsafe { self.0.get::<unsafe extern "C" fn() -> c_int>(name).unwrap()() }
    }
}

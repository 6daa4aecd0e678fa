//! The functions of NVIDIA's driver that are called here, found at run time, so that the library loads where there
//! is no driver.
//!
//! cudarc has the types that they take. What they return is an integer and not its enum: a driver newer than that
//! has codes which the enum has not, and such a value of an enum is undefined behaviour.

use std::error::Error;
use std::ffi::{CStr, c_char, c_int, c_uint, c_void};
use std::mem::ManuallyDrop;
use std::ptr;

use cudarc::driver::sys::{
    CUcontext, CUdevice, CUdevice_attribute, CUfunction, CUfunction_attribute, CUkernel,
    CUlaunchConfig, CUlibrary, CUstream, CUtensorMap, CUtensorMapDataType, CUtensorMapFloatOOBfill,
    CUtensorMapInterleave, CUtensorMapL2promotion, CUtensorMapSwizzle,
};
use libloading::Library;

/// The driver's file on Linux; no other system has kernels.
const FILE: &str = "libcuda.so.1";

/// The oldest driver, as the driver numbers itself: the first that loads modules without a context. It has all of
/// the functions.
const OLDEST: c_int = 12_000;

/// The remedy for a driver that is missing or too old.
const INSTALL: &str = "install NVIDIA's driver, version 525 or newer";

/// The result of a function: 0, or the number of an error.
type Code = c_int;

/// Makes a pointer of each function, and a method that turns its code into an error that names it.
macro_rules! functions {
    ($($name:ident($($arg:ident: $type:ty),* $(,)?);)*) => {
        /// A loaded driver.
        #[expect(non_snake_case, reason = "CUDA's names")]
        pub struct Api {
            $($name: unsafe extern "C" fn($($type),*) -> Code,)*
        }

        #[allow(non_snake_case, reason = "CUDA's names")]
        #[allow(clippy::too_many_arguments, reason = "CUDA's functions")]
        #[allow(dead_code, reason = "errors are named by functions that are called without a check")]
        impl Api {
            /// All functions, or the first that is missing.
            fn find(library: &Library) -> Result<Self, String> {
                Ok(Self {
                    // SAFETY: the type is that of the function in NVIDIA's headers.
                    $($name: unsafe { find(library, stringify!($name)) }?,)*
                })
            }

            $(
                /// # Safety
                /// As CUDA's documentation of the function of this name says.
                pub unsafe fn $name(&self, $($arg: $type),*) -> Result<(), String> {
                    // SAFETY: promised by the caller.
                    let code = unsafe { (self.$name)($($arg),*) };
                    self.check(stringify!($name), code)
                }
            )*
        }
    };
}

functions! {
    cuDriverGetVersion(version: *mut c_int);
    cuInit(flags: c_uint);
    cuGetErrorName(code: Code, text: *mut *const c_char);
    cuGetErrorString(code: Code, text: *mut *const c_char);
    cuDeviceGetCount(count: *mut c_int);
    cuDeviceGetName(name: *mut c_char, len: c_int, device: CUdevice);
    cuDeviceGetAttribute(value: *mut c_int, attribute: CUdevice_attribute, device: CUdevice);
    cuStreamGetCtx(stream: CUstream, context: *mut CUcontext);
    cuCtxPushCurrent_v2(context: CUcontext);
    cuCtxPopCurrent_v2(context: *mut CUcontext);
    cuCtxGetDevice(device: *mut CUdevice);
    cuLibraryLoadData(
        library: *mut CUlibrary,
        code: *const c_void,
        jit_options: *mut c_void,
        jit_values: *mut *mut c_void,
        num_jit_options: c_uint,
        options: *mut c_void,
        values: *mut *mut c_void,
        num_options: c_uint,
    );
    cuLibraryGetKernel(kernel: *mut CUkernel, library: CUlibrary, name: *const c_char);
    cuKernelGetAttribute(
        value: *mut c_int,
        attribute: CUfunction_attribute,
        kernel: CUkernel,
        device: CUdevice,
    );
    cuKernelSetAttribute(
        attribute: CUfunction_attribute,
        value: c_int,
        kernel: CUkernel,
        device: CUdevice,
    );
    cuKernelGetFunction(function: *mut CUfunction, kernel: CUkernel);
    cuOccupancyMaxActiveClusters(
        count: *mut c_int,
        function: CUfunction,
        config: *const CUlaunchConfig,
    );
    cuTensorMapEncodeTiled(
        map: *mut CUtensorMap,
        dtype: CUtensorMapDataType,
        rank: c_uint,
        address: *mut c_void,
        sizes: *const u64,
        strides: *const u64,
        box_sizes: *const u32,
        steps: *const u32,
        interleave: CUtensorMapInterleave,
        swizzle: CUtensorMapSwizzle,
        promotion: CUtensorMapL2promotion,
        fill: CUtensorMapFloatOOBfill,
    );
    cuLaunchKernelEx(
        config: *const CUlaunchConfig,
        function: CUfunction,
        args: *mut *mut c_void,
        extra: *mut *mut c_void,
    );
}

/// A function of the driver.
///
/// # Safety
/// `F` is a pointer to a function of the type that the one of this name has.
unsafe fn find<F: Copy>(library: &Library, name: &str) -> Result<F, String> {
    // SAFETY: promised by the caller; the option has room for null.
    let found = unsafe { library.get::<Option<F>>(name) };
    found.ok().and_then(|symbol| *symbol).ok_or_else(|| {
        format!("expected a driver for CUDA 12.0 or newer, got one without {name}; {INSTALL}")
    })
}

impl Api {
    /// Loads the driver and initializes it. Its version: 13000 for CUDA 13.0.
    ///
    /// # Errors
    /// Why it cannot be used.
    pub fn load() -> Result<(Self, c_int), String> {
        // SAFETY: initializers of NVIDIA's driver. Nobody unloads it, as it may have threads.
        let library = unsafe { Library::new(FILE) }.map(ManuallyDrop::new);
        let library = library.map_err(|error| {
            let loader = error.source().map_or(String::new(), ToString::to_string);
            format!("no CUDA driver ({FILE}) on this machine ({loader}); {INSTALL}")
        })?;
        let version = version(&library)?;
        let api = Self::find(&library)?;
        // SAFETY: the driver's initializer, which may be called again and at any time.
        unsafe { api.cuInit(0) }?;
        Ok((api, version))
    }

    /// The result of a function as an error that names it.
    fn check(&self, function: &str, code: Code) -> Result<(), String> {
        if code == 0 {
            return Ok(());
        }
        let [name, text] = [self.cuGetErrorName, self.cuGetErrorString].map(|get| {
            let mut text = ptr::null();
            // SAFETY: the driver writes the address of a text that is never freed, or null.
            let is_known = unsafe { get(code, &raw mut text) } == 0 && !text.is_null();
            // SAFETY: as above.
            is_known.then(|| unsafe { CStr::from_ptr(text) }.to_string_lossy())
        });
        let name = name.unwrap_or_else(|| format!("error {code}").into());
        let text = text.unwrap_or("unknown to this driver".into());
        Err(format!("{function}: {name} ({text})"))
    }
}

/// The version of a driver that may lack other functions.
fn version(library: &Library) -> Result<c_int, String> {
    let name = "cuDriverGetVersion";
    // SAFETY: the type is that of the function in NVIDIA's headers.
    let get = unsafe { find::<unsafe extern "C" fn(*mut c_int) -> Code>(library, name) }?;
    let mut version = 0;
    // SAFETY: the function needs no initialized driver.
    match unsafe { get(&raw mut version) } {
        0 if version >= OLDEST => Ok(version),
        0 => Err(format!(
            "expected a driver for CUDA 12.0 or newer, got one for CUDA {}; {INSTALL}",
            version_name(version)
        )),
        code => Err(format!("{name}: error {code}; {INSTALL}")),
    }
}

/// A version as people write it: 13.0 for 13000.
pub fn version_name(version: c_int) -> String {
    format!("{}.{}", version / 1000, version % 1000 / 10)
}

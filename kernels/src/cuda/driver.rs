//! NVIDIA's driver, found at run time, so that the library loads where there is none; and its GPUs.

use std::ffi::{CStr, c_int};
use std::ptr;
use std::sync::OnceLock;

use cudarc::driver::sys;

use super::launch::{CLUSTER_SIZES, Device};

/// The oldest driver, as the driver numbers itself: the first that loads modules without a context.
const OLDEST_DRIVER: c_int = 12_000;

/// The result of a driver call as an error that names both.
pub fn check(what: &str, result: sys::CUresult) -> Result<(), String> {
    if result == sys::CUresult::CUDA_SUCCESS {
        return Ok(());
    }
    let (mut name, mut text) = (ptr::null(), ptr::null());
    // SAFETY: the driver writes a text that is never freed, or null.
    let [name, text] = unsafe {
        sys::cuGetErrorName(result, &raw mut name);
        sys::cuGetErrorString(result, &raw mut text);
        [name, text].map(|text| {
            if text.is_null() {
                "an unknown error".into()
            } else {
                CStr::from_ptr(text).to_string_lossy()
            }
        })
    };
    Err(format!("{what}: {name} ({text})"))
}

/// The version of the driver, once it is initialized: 13000 for CUDA 13.0.
///
/// # Errors
/// Why it cannot be used.
pub fn driver() -> Result<c_int, String> {
    static DRIVER: OnceLock<Result<c_int, String>> = OnceLock::new();
    let start = || {
        // SAFETY: initializers of NVIDIA's driver.
        if !unsafe { sys::is_culib_present() } {
            return Err(
                "no CUDA driver (libcuda.so.1) on this machine; install NVIDIA's driver, version \
                 525 or newer"
                    .to_owned(),
            );
        }
        let mut version = 0;
        // SAFETY: there is a driver, and every version has these two functions.
        unsafe {
            check(
                "cuDriverGetVersion",
                sys::cuDriverGetVersion(&raw mut version),
            )?;
            if version < OLDEST_DRIVER {
                return Err(format!(
                    "expected a driver for CUDA 12.0 or newer, got one for CUDA {}; install NVIDIA's \
                     driver, version 525 or newer",
                    version_name(version)
                ));
            }
            check("cuInit", sys::cuInit(0))?;
        }
        Ok(version)
    };
    DRIVER.get_or_init(start).clone()
}

/// As people write it.
pub fn version_name(version: c_int) -> String {
    format!("{}.{}", version / 1000, version % 1000 / 10)
}

/// How many GPUs the driver shows.
pub fn num_devices() -> Result<c_int, String> {
    driver()?;
    let mut num = 0;
    // SAFETY: the driver is initialized.
    check("cuDeviceGetCount", unsafe {
        sys::cuDeviceGetCount(&raw mut num)
    })?;
    Ok(num)
}

/// What CUDA calls a GPU.
pub fn device_name(ordinal: c_int) -> Result<String, String> {
    let mut name = [0; 256];
    // SAFETY: the driver is initialized, or it says so; `name` has the length told, with the final zero.
    unsafe {
        let result = sys::cuDeviceGetName(name.as_mut_ptr(), name.len() as c_int, ordinal);
        check("cuDeviceGetName", result)?;
        Ok(CStr::from_ptr(name.as_ptr()).to_string_lossy().into_owned())
    }
}

/// What plans need to know of a GPU, but for its clusters: they take a kernel and a context to ask.
pub fn device(ordinal: c_int) -> Result<Device, String> {
    use sys::CUdevice_attribute as Attribute;
    let attribute = |attribute| -> Result<u32, String> {
        let mut value = 0;
        // SAFETY: the driver is initialized, or it says so.
        let result = unsafe { sys::cuDeviceGetAttribute(&raw mut value, attribute, ordinal) };
        check("cuDeviceGetAttribute", result)?;
        Ok(value as u32)
    };
    Ok(Device {
        ordinal,
        capability: (
            attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?,
            attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?,
        ),
        num_sms: attribute(Attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)?,
        max_shared_bytes: attribute(
            Attribute::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN,
        )?,
        max_clusters: [0; CLUSTER_SIZES.len()],
    })
}

//! NVIDIA's driver, once it is initialized, and its GPUs. What it tells of them is looked at before it is used.

use std::ffi::{c_char, c_int};
use std::ops::{Deref, RangeInclusive};
use std::sync::OnceLock;

use cudarc::driver::sys::CUdevice_attribute;

use super::TARGET;
use super::api::{Api, version_name};
use super::device::{Device, MAX_CLUSTER, SHARED_BYTES};
use super::images::check_capability;

/// More GPUs than any machine has.
const MAX_DEVICES: c_int = 1024;

/// The driver.
pub struct Driver {
    /// 13000 for CUDA 13.0.
    version: c_int,
    api: Api,
}

impl Deref for Driver {
    type Target = Api;

    fn deref(&self) -> &Api {
        &self.api
    }
}

/// The driver. One that could not be used is tried again with the next call.
///
/// # Errors
/// Why it cannot be used.
pub fn driver() -> Result<&'static Driver, String> {
    static DRIVER: OnceLock<Driver> = OnceLock::new();
    if let Some(driver) = DRIVER.get() {
        return Ok(driver);
    }
    let (api, version) = Api::load().inspect_err(
        |reason| tracing::info!(target: TARGET, %reason, "the CUDA driver cannot be used"),
    )?;
    Ok(DRIVER.get_or_init(|| {
        let version_name = version_name(version);
        tracing::info!(target: TARGET, version = version_name, "CUDA driver loaded");
        Driver { version, api }
    }))
}

/// A number that the driver told, where it is one that can be.
pub fn checked(what: &str, value: c_int, possible: RangeInclusive<c_int>) -> Result<u32, String> {
    match u32::try_from(value) {
        Ok(number) if possible.contains(&value) => Ok(number),
        _ => Err(format!(
            "{what}: expected {} to {}, got {value}; reinstall NVIDIA's driver",
            possible.start(),
            possible.end()
        )),
    }
}

impl Driver {
    /// The version of CUDA that it is for, as people write it.
    pub fn version(&self) -> String {
        version_name(self.version)
    }

    /// How many GPUs there are.
    pub fn num_devices(&self) -> Result<u32, String> {
        let mut num = 0;
        // SAFETY: the driver is initialized.
        unsafe { self.cuDeviceGetCount(&raw mut num) }?;
        checked("cuDeviceGetCount", num, 0..=MAX_DEVICES)
    }

    /// CUDA's handle of a GPU.
    pub fn device_name(&self, ordinal: c_int) -> Result<String, String> {
        let mut name = [0_u8; 256];
        let start = name.as_mut_ptr().cast::<c_char>();
        // SAFETY: the driver is initialized; `name` has the length told.
        unsafe { self.cuDeviceGetName(start, name.len() as c_int, ordinal) }?;
        let end = name.iter().position(|byte| *byte == 0);
        let name = &name[..end.unwrap_or(name.len())];
        Ok(String::from_utf8_lossy(name).into_owned())
    }

    /// The numbers of a GPU that plans depend on, but for its clusters: they take a kernel and a context to ask.
    pub fn device(&self, ordinal: c_int) -> Result<Device, String> {
        use CUdevice_attribute as Attribute;
        let attribute = |attribute: Attribute| {
            let mut value = 0;
            // SAFETY: the driver is initialized.
            unsafe { self.cuDeviceGetAttribute(&raw mut value, attribute, ordinal) }?;
            let what = format!("cuDeviceGetAttribute({attribute:?})");
            checked(&what, value, 0..=c_int::MAX)
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
            max_clusters: [0; MAX_CLUSTER],
        })
    }
}

/// Whether the kernels run on a GPU.
pub fn check_device(device: &Device) -> Result<(), String> {
    check_capability(device.capability)?;
    let got = device.max_shared_bytes;
    if (got as usize) < SHARED_BYTES {
        return Err(format!(
            "expected a GPU with at least {SHARED_BYTES} bytes of shared memory for a block, got {got}; \
             use another GPU, or reinstall NVIDIA's driver"
        ));
    }
    Ok(())
}

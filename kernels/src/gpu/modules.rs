//! The kernels that every GPU has loaded: they are loaded when they are first wanted, and stay.

use std::collections::HashMap;
use std::ffi::{CString, c_int, c_void};
use std::marker::PhantomData;
use std::mem::ManuallyDrop;
use std::ptr;
use std::sync::{Arc, LazyLock, Mutex, PoisonError, RwLock};

use cudarc::driver::sys;

use super::TARGET;
use super::device::{Device, MAX_CLUSTER};
use super::driver::{Driver, check_device, checked, driver};
use super::images::{image, probe};
use super::kernel::Kernel;
use super::launch::{Arg, Launch, Map};
use crate::contract::view::DType;

/// A GPU with the kernels that it has loaded.
pub struct Gpu {
    /// Numbers that plans depend on.
    pub device: Device,
    functions: RwLock<HashMap<Kernel, Function>>,
}

/// A kernel that is loaded in a GPU's context.
#[derive(Clone, Copy)]
struct Function(sys::CUfunction);

// SAFETY: handles of the driver, which any thread may use at any time.
unsafe impl Send for Function {}
// SAFETY: as above.
unsafe impl Sync for Function {}

/// An image that is loaded; it belongs to no context.
struct Library(sys::CUlibrary);

// SAFETY: as above.
unsafe impl Send for Library {}

/// Loaded libraries of the images, by their index.
static LIBRARIES: LazyLock<Mutex<HashMap<usize, Library>>> = LazyLock::new(Mutex::default);

static GPUS: LazyLock<RwLock<HashMap<c_int, Arc<Gpu>>>> = LazyLock::new(RwLock::default);

/// A context that is the current one of this thread for as long as this value lives.
struct Current {
    driver: &'static Driver,
    /// Marker that keeps the context on its thread.
    not_send: PhantomData<*const ()>,
}

impl Current {
    /// # Safety
    /// `context` is a context of the driver.
    unsafe fn push(driver: &'static Driver, context: sys::CUcontext) -> Result<Self, String> {
        // SAFETY: promised by the caller.
        unsafe { driver.cuCtxPushCurrent_v2(context) }?;
        Ok(Self {
            driver,
            not_send: PhantomData,
        })
    }

    /// Ends it where its error can be told.
    fn pop(self) -> Result<(), String> {
        ManuallyDrop::new(self).pop_once()
    }

    fn pop_once(&self) -> Result<(), String> {
        let mut context = ptr::null_mut();
        // SAFETY: `push` was on this thread, since a Current is not Send.
        unsafe { self.driver.cuCtxPopCurrent_v2(&raw mut context) }
    }
}

impl Drop for Current {
    fn drop(&mut self) {
        // Another error, or a panic, is on its way already.
        let _ = self.pop_once();
    }
}

/// The context of XLA's stream on this thread, for a while.
pub struct Context {
    current: Current,
    stream: sys::CUstream,
    gpu: Arc<Gpu>,
}

impl Context {
    /// # Errors
    /// The driver's.
    ///
    /// # Safety
    /// `stream` is a stream of the driver.
    pub unsafe fn enter(stream: *mut c_void) -> Result<Self, String> {
        let driver = driver()?;
        let stream: sys::CUstream = stream.cast();
        let (mut context, mut ordinal) = (ptr::null_mut(), 0);
        // SAFETY: the driver is initialized, and the stream is one.
        unsafe { driver.cuStreamGetCtx(stream, &raw mut context) }?;
        // SAFETY: the driver made the context.
        let current = unsafe { Current::push(driver, context) }?;
        // SAFETY: there is a current context.
        unsafe { driver.cuCtxGetDevice(&raw mut ordinal) }?;
        let gpu = gpu(driver, ordinal)?;
        Ok(Self {
            current,
            stream,
            gpu,
        })
    }

    /// Ends it where its error can be told: the driver may tell one of earlier work.
    pub fn leave(self) -> Result<(), String> {
        self.current.pop()
    }

    /// The GPU that the stream belongs to.
    pub fn device(&self) -> &Device {
        &self.gpu.device
    }

    /// Loads a kernel, unless it is loaded.
    pub fn load(&self, kernel: &Kernel) -> Result<(), String> {
        self.function(kernel).map(|_| ())
    }

    fn function(&self, kernel: &Kernel) -> Result<Function, String> {
        let functions = self.gpu.functions.read();
        let loaded = functions
            .unwrap_or_else(PoisonError::into_inner)
            .get(kernel)
            .copied();
        if let Some(function) = loaded {
            return Ok(function);
        }
        let function = load(self.current.driver, kernel, &self.gpu.device)?;
        let functions = self.gpu.functions.write();
        let mut functions = functions.unwrap_or_else(PoisonError::into_inner);
        functions.insert(*kernel, function);
        Ok(function)
    }

    /// Hands a kernel to the stream.
    ///
    /// # Safety
    /// The arguments are those that the kernel declares, and it touches no other memory than the call may.
    pub unsafe fn launch(&self, launch: &Launch) -> Result<(), String> {
        let driver = self.current.driver;
        let function = self.function(&launch.kernel)?.0;
        let maps = launch.args.iter().filter_map(|arg| match arg {
            Arg::TensorMap(tensor) => Some([Some(tensor.boxes()), None, None]),
            Arg::BlockMaps(tensor) => {
                let [lines, rest] = tensor.last_block();
                Some([Some(tensor.boxes()), lines, rest])
            }
            _ => None,
        });
        let maps = maps.map(|maps| tensor_maps(driver, maps));
        let maps = maps.collect::<Result<Vec<_>, _>>()?;
        let mut maps = maps.iter().map(|map| ptr::from_ref(map).cast());
        let mut args: Vec<*mut c_void> = (launch.args.iter())
            .map(|arg| arg.value().or_else(|| maps.next()))
            .map(|value| value.expect("a map for every tensor").cast_mut())
            .collect();
        let mut cluster = cluster_of(launch.cluster);
        let config = config(launch, self.stream, &mut cluster);
        tracing::trace!(
            target: TARGET,
            kernel = launch.kernel.symbol(),
            device = self.gpu.device.ordinal,
            grid = ?launch.grid,
            block = launch.block,
            cluster = launch.cluster,
            shared_bytes = launch.shared_bytes,
            "launch"
        );
        // SAFETY: the driver copies the arguments before it returns, and writes none; the rest is the
        // caller's.
        unsafe {
            driver.cuLaunchKernelEx(
                &raw const config,
                function,
                args.as_mut_ptr(),
                ptr::null_mut(),
            )
        }
    }
}

/// How blocks make up clusters.
fn cluster_of(size: u32) -> sys::CUlaunchAttribute {
    sys::CUlaunchAttribute {
        id: sys::CUlaunchAttributeID::CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION,
        pad: [0; 4],
        value: sys::CUlaunchAttributeValue {
            clusterDim: sys::CUlaunchAttributeValue_union__bindgen_ty_1 {
                x: size,
                y: 1,
                z: 1,
            },
        },
    }
}

/// The driver's description of a launch. Without clusters it has no attribute, which GPUs without them
/// would refuse.
fn config(
    launch: &Launch,
    stream: sys::CUstream,
    cluster: &mut sys::CUlaunchAttribute,
) -> sys::CUlaunchConfig {
    let [x, y, z] = launch.grid;
    sys::CUlaunchConfig {
        gridDimX: x,
        gridDimY: y,
        gridDimZ: z,
        blockDimX: launch.block,
        blockDimY: 1,
        blockDimZ: 1,
        sharedMemBytes: launch.shared_bytes,
        hStream: stream,
        attrs: cluster,
        numAttrs: u32::from(launch.cluster > 1),
    }
}

/// Maps that a kernel takes as one argument. Those that it does not use stay zero.
fn tensor_maps(driver: &Driver, maps: [Option<Map>; 3]) -> Result<[sys::CUtensorMap; 3], String> {
    let mut all = [sys::CUtensorMap { opaque: [0; 16] }; 3];
    for (to, map) in all.iter_mut().zip(&maps) {
        if let Some(map) = map {
            encode(driver, to, map)?;
        }
    }
    Ok(all)
}

/// The copy engine's form of a map, which the host makes at once.
fn encode(driver: &Driver, to: &mut sys::CUtensorMap, map: &Map) -> Result<(), String> {
    let dtype = match map.dtype {
        DType::Bf16 => sys::CUtensorMapDataType::CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
        DType::F16 => sys::CUtensorMapDataType::CU_TENSOR_MAP_DATA_TYPE_FLOAT16,
        DType::F32 => sys::CUtensorMapDataType::CU_TENSOR_MAP_DATA_TYPE_FLOAT32,
        DType::F64 => sys::CUtensorMapDataType::CU_TENSOR_MAP_DATA_TYPE_FLOAT64,
    };
    // SAFETY: all pointers are to arrays of the length that 4 dimensions ask for; the tensor's memory is
    // not touched.
    let result = unsafe {
        driver.cuTensorMapEncodeTiled(
            to,
            dtype,
            map.sizes.len() as u32,
            map.start as *mut c_void,
            map.sizes.as_ptr(),
            map.strides.as_ptr(),
            map.box_sizes.as_ptr(),
            [1; 4].as_ptr(),
            sys::CUtensorMapInterleave::CU_TENSOR_MAP_INTERLEAVE_NONE,
            sys::CUtensorMapSwizzle::CU_TENSOR_MAP_SWIZZLE_128B,
            // 256 would be slower.
            sys::CUtensorMapL2promotion::CU_TENSOR_MAP_L2_PROMOTION_L2_128B,
            sys::CUtensorMapFloatOOBfill::CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
        )
    };
    result.map_err(|reason| format!("{reason}: {map:?}"))
}

/// The GPU of this number, whose context is the current one.
fn gpu(driver: &Driver, ordinal: c_int) -> Result<Arc<Gpu>, String> {
    let gpus = GPUS.read().unwrap_or_else(PoisonError::into_inner);
    if let Some(gpu) = gpus.get(&ordinal) {
        return Ok(gpu.clone());
    }
    drop(gpus);
    let device = find_device(driver, ordinal).inspect_err(
        |reason| tracing::info!(target: TARGET, device = ordinal, %reason, "the GPU cannot be used"),
    )?;
    tracing::info!(
        target: TARGET,
        device = ordinal,
        name = driver.device_name(ordinal).unwrap_or_default(),
        capability = ?device.capability,
        multiprocessors = device.num_sms,
        shared_bytes = device.max_shared_bytes,
        clusters = ?device.max_clusters,
        "GPU found"
    );
    let mut gpus = GPUS.write().unwrap_or_else(PoisonError::into_inner);
    let gpu = gpus.entry(ordinal).or_insert_with(|| {
        Arc::new(Gpu {
            device,
            functions: RwLock::default(),
        })
    });
    Ok(gpu.clone())
}

/// The numbers that plans depend on of the GPU whose context is the current one, if the kernels run there.
fn find_device(driver: &Driver, ordinal: c_int) -> Result<Device, String> {
    let mut device = driver.device(ordinal)?;
    check_device(&device)?;
    device.max_clusters = max_clusters(driver, &device)?;
    Ok(device)
}

/// How many clusters run at once. Every kernel for clusters has a multiprocessor for each block, so that
/// this depends on the size of the clusters alone, and [`probe`] can tell for all.
fn max_clusters(driver: &Driver, device: &Device) -> Result<[u32; MAX_CLUSTER], String> {
    let mut most = [0; MAX_CLUSTER];
    let kernel = probe();
    if image(&kernel, device.capability).is_none() {
        return Ok(most);
    }
    let in_probe = |reason| format!("{}: {reason}", kernel.symbol());
    let function = load(driver, &kernel, device).map_err(in_probe)?.0;
    most[0] = device.num_sms;
    for (most, size) in most.iter_mut().zip(1..).skip(1) {
        let probe = Launch {
            block: 128,
            cluster: size,
            // More than half of what a multiprocessor has.
            shared_bytes: device.max_shared_bytes / 4 * 3,
            ..kernel.launch([size as usize, 1, 1], Vec::new())
        };
        let (mut cluster, mut num) = (cluster_of(size), 0);
        let config = config(&probe, ptr::null_mut(), &mut cluster);
        // SAFETY: the function is loaded in the current context; nothing is launched.
        unsafe { driver.cuOccupancyMaxActiveClusters(&raw mut num, function, &raw const config) }
            .map_err(in_probe)?;
        *most = checked("cuOccupancyMaxActiveClusters", num, 0..=c_int::MAX)?;
    }
    Ok(most)
}

/// Loads a kernel into the current context, which is that of `device`.
fn load(driver: &Driver, kernel: &Kernel, device: &Device) -> Result<Function, String> {
    use sys::CUfunction_attribute as Attribute;
    let symbol = kernel.symbol();
    let (index, image) = image(kernel, device.capability)
        .ok_or_else(|| format!("{symbol} is not in this build of jax-mhc"))?;
    let mut libraries = LIBRARIES.lock().unwrap_or_else(PoisonError::into_inner);
    let library = match libraries.get(&index) {
        Some(library) => library.0,
        None => {
            let mut library = ptr::null_mut();
            let code = image.decompress();
            // SAFETY: the code is what a CUDA compiler wrote, and there are no options. The driver copies
            // it unless asked not to (CU_LIBRARY_BINARY_IS_PRESERVED).
            let result = unsafe {
                driver.cuLibraryLoadData(
                    &raw mut library,
                    code.as_ptr().cast(),
                    ptr::null_mut(),
                    ptr::null_mut(),
                    0,
                    ptr::null_mut(),
                    ptr::null_mut(),
                    0,
                )
            };
            result.inspect_err(
                |reason| tracing::info!(target: TARGET, %image, %reason, "image not loaded"),
            )?;
            tracing::info!(target: TARGET, %image, bytes = code.len(), "image loaded");
            libraries.insert(index, Library(library));
            library
        }
    };
    drop(libraries);
    let name = CString::new(symbol.as_str()).map_err(|error| error.to_string())?;
    let (mut loaded, mut function, mut static_bytes) = (ptr::null_mut(), ptr::null_mut(), 0);
    let (ordinal, most) = (device.ordinal, device.max_shared_bytes as c_int);
    // SAFETY: the library is loaded and stays, and the kernel belongs to it.
    unsafe {
        driver.cuLibraryGetKernel(&raw mut loaded, library, name.as_ptr())?;
        // All that the GPU has: what a launch gets is its own choice.
        let attribute = Attribute::CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES;
        driver.cuKernelGetAttribute(&raw mut static_bytes, attribute, loaded, ordinal)?;
        checked("cuKernelGetAttribute", static_bytes, 0..=most)?;
        let attribute = Attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
        driver.cuKernelSetAttribute(attribute, most - static_bytes, loaded, ordinal)?;
        if image.has_clusters() {
            // More than 8 blocks.
            let attribute = Attribute::CU_FUNC_ATTRIBUTE_NON_PORTABLE_CLUSTER_SIZE_ALLOWED;
            driver.cuKernelSetAttribute(attribute, 1, loaded, ordinal)?;
        }
        driver.cuKernelGetFunction(&raw mut function, loaded)?;
    }
    Ok(Function(function))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn without_a_driver_there_is_a_reason() {
        // Nothing can be told where there is one.
        let Some(reason) = driver().err() else { return };
        assert!(
            reason.contains("driver") || reason.contains("cuInit"),
            "{reason}"
        );
        // SAFETY: without a driver no stream is looked at.
        let entered = unsafe { Context::enter(ptr::null_mut()) };
        assert_eq!(entered.err(), Some(reason));
    }
}

//! The compiled kernels, the driver, and what every GPU has loaded of them.
//!
//! The driver is found at run time, so that the library loads where there is none. Kernels are loaded
//! when they are first wanted, and stay.

use std::collections::HashMap;
use std::ffi::{CStr, CString, c_int, c_uint, c_void};
use std::ptr;
use std::sync::{Arc, LazyLock, Mutex, OnceLock, PoisonError, RwLock};

use cudarc::driver::sys;
use miniz_oxide::inflate::decompress_to_vec;

use super::launch::{Arg, Device, Kernel, Launch};

include!(concat!(env!("OUT_DIR"), "/cubins.rs"));

/// The oldest driver, as the driver numbers itself: the first that loads modules without a context.
const OLDEST_DRIVER: c_int = 12_000;

/// The oldest GPU: the kernels use its instructions.
const OLDEST_CAPABILITY: (u32, u32) = (8, 0);

/// A file of kernels, compiled for a size, a dtype and an architecture.
struct Image {
    file: &'static str,
    size: &'static str,
    dtype: &'static str,
    architecture: &'static str,
    /// Main kernels that keep in memory what belongs into registers; a test refuses them.
    #[cfg_attr(not(test), expect(dead_code))]
    spills: &'static [&'static str],
    /// A cubin, or PTX with a final zero; compressed.
    code: &'static [u8],
}

impl Image {
    fn decompress(&self) -> Vec<u8> {
        decompress_to_vec(self.code).expect("build.rs compressed it")
    }
}

/// The compiler, and the architectures that it compiled for.
#[derive(Debug, Clone, Copy, serde::Serialize)]
pub struct Build {
    /// Name and version.
    pub compiler: &'static str,
    /// `sm_<n>` is machine code, `compute_<n>` what the driver compiles for later GPUs.
    pub architectures: &'static [&'static str],
}

/// None where the library was built without a CUDA compiler.
pub fn build() -> Option<Build> {
    COMPILER.map(|compiler| Build {
        compiler,
        architectures: ARCHITECTURES,
    })
}

/// How well code for an architecture does on a GPU of this capability, if it runs there: machine code of
/// the same major version first, the latest first.
fn fitness(architecture: &str, (major, minor): (u32, u32)) -> Option<(bool, u32)> {
    let (kind, number) = architecture.split_once('_')?;
    let number: u32 = number.parse().ok()?;
    let of = (number / 10, number % 10);
    let runs = match kind {
        "sm" => of.0 == major && of.1 <= minor,
        _ => of <= (major, minor),
    };
    runs.then_some((kind == "sm", number))
}

/// The best image of a kernel for a GPU of this capability, by its index.
fn image(kernel: &Kernel, capability: (u32, u32)) -> Option<usize> {
    let dtype = kernel.dtype.short_name();
    let images = IMAGES.iter().enumerate().filter(|(_, image)| {
        (image.file, image.size, image.dtype) == (kernel.file, kernel.size, dtype)
    });
    let ranked =
        images.filter_map(|(index, image)| Some((fitness(image.architecture, capability)?, index)));
    ranked.max().map(|(_, index)| index)
}

/// What to say in a build without a compiler.
pub const NO_KERNELS: &str = "this build of jax-mhc has no CUDA kernels; reinstall it on Linux with \
     the Python package nvidia-cuda-nvrtc-cu12 at hand, as pip install does by itself";

/// The result of a driver call as an error that names both.
fn check(what: &str, result: sys::CUresult) -> Result<(), String> {
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

/// What plans need to know of a GPU.
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
    })
}

/// Whether the kernels run on a GPU of this capability.
pub fn check_capability(capability: (u32, u32)) -> Result<(), String> {
    let (major, minor) = capability;
    if COMPILER.is_none() {
        Err(NO_KERNELS.to_owned())
    } else if capability < OLDEST_CAPABILITY {
        Err(format!(
            "expected a GPU of compute capability 8.0 (Ampere) or newer, got {major}.{minor}"
        ))
    } else if (ARCHITECTURES.iter()).all(|name| fitness(name, capability).is_none()) {
        Err(format!(
            "this build of jax-mhc is for {}, none of which runs on compute capability \
             {major}.{minor}; reinstall it with JAX_MHC_CUDA_ARCHITECTURES unset",
            ARCHITECTURES.join(", ")
        ))
    } else {
        Ok(())
    }
}

/// A GPU with the kernels that it has loaded.
pub struct Gpu {
    /// What plans need to know of it.
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

/// Those of the images, by their index.
static LIBRARIES: LazyLock<Mutex<HashMap<usize, Library>>> = LazyLock::new(Mutex::default);

static GPUS: LazyLock<RwLock<HashMap<c_int, Arc<Gpu>>>> = LazyLock::new(RwLock::default);

/// The context of XLA's stream on this thread, for a while.
pub struct Context {
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
        driver()?;
        let stream: sys::CUstream = stream.cast();
        let (mut context, mut ordinal) = (ptr::null_mut(), 0);
        // SAFETY: the driver is initialized, and the stream is one.
        unsafe {
            check(
                "cuStreamGetCtx",
                sys::cuStreamGetCtx(stream, &raw mut context),
            )?;
            check("cuCtxPushCurrent", sys::cuCtxPushCurrent_v2(context))?;
            let result = sys::cuCtxGetDevice(&raw mut ordinal);
            let gpu = check("cuCtxGetDevice", result).and_then(|()| gpu(ordinal));
            if gpu.is_err() {
                sys::cuCtxPopCurrent_v2(&raw mut context);
            }
            Ok(Self { stream, gpu: gpu? })
        }
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
        let function = load(kernel, &self.gpu.device)?;
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
        let Launch {
            grid: [x, y, z],
            block,
            shared_bytes,
            ..
        } = *launch;
        let function = self.function(&launch.kernel)?.0;
        let mut args: Vec<*mut c_void> = launch
            .args
            .iter()
            .map(|arg: &Arg| arg.value().cast_mut())
            .collect();
        // SAFETY: the driver copies the arguments before it returns, and writes none; the rest is the
        // caller's.
        let result = unsafe {
            sys::cuLaunchKernel(
                function,
                x,
                y,
                z,
                block,
                1,
                1,
                shared_bytes as c_uint,
                self.stream,
                args.as_mut_ptr(),
                ptr::null_mut(),
            )
        };
        check("cuLaunchKernel", result)
    }
}

impl Drop for Context {
    fn drop(&mut self) {
        let mut context = ptr::null_mut();
        // SAFETY: `enter` pushed it on this thread; a Context is not Send.
        unsafe { sys::cuCtxPopCurrent_v2(&raw mut context) };
    }
}

/// The GPU of this number.
fn gpu(ordinal: c_int) -> Result<Arc<Gpu>, String> {
    let gpus = GPUS.read().unwrap_or_else(PoisonError::into_inner);
    if let Some(gpu) = gpus.get(&ordinal) {
        return Ok(gpu.clone());
    }
    drop(gpus);
    let device = device(ordinal)?;
    check_capability(device.capability)?;
    let mut gpus = GPUS.write().unwrap_or_else(PoisonError::into_inner);
    let gpu = gpus.entry(ordinal).or_insert_with(|| {
        Arc::new(Gpu {
            device,
            functions: RwLock::default(),
        })
    });
    Ok(gpu.clone())
}

/// Loads a kernel into the current context, which is that of `device`.
fn load(kernel: &Kernel, device: &Device) -> Result<Function, String> {
    use sys::CUfunction_attribute as Attribute;
    let symbol = kernel.symbol();
    let in_kernel = |what: &str| format!("{what}({symbol})");
    let index = image(kernel, device.capability)
        .ok_or_else(|| format!("{symbol} is not in this build of jax-mhc"))?;
    let mut libraries = LIBRARIES.lock().unwrap_or_else(PoisonError::into_inner);
    let library = match libraries.get(&index) {
        Some(library) => library.0,
        None => {
            let mut library = ptr::null_mut();
            let code = IMAGES[index].decompress();
            // SAFETY: the code is what a CUDA compiler wrote, and there are no options. The driver copies
            // it unless asked not to (CU_LIBRARY_BINARY_IS_PRESERVED).
            let result = unsafe {
                sys::cuLibraryLoadData(
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
            check(&in_kernel("cuLibraryLoadData"), result)?;
            libraries.insert(index, Library(library));
            library
        }
    };
    drop(libraries);
    let name = CString::new(symbol.as_str()).map_err(|error| error.to_string())?;
    let (mut loaded, mut function, mut static_bytes) = (ptr::null_mut(), ptr::null_mut(), 0);
    // SAFETY: the library is loaded and stays, and the kernel belongs to it.
    unsafe {
        let result = sys::cuLibraryGetKernel(&raw mut loaded, library, name.as_ptr());
        check(&in_kernel("cuLibraryGetKernel"), result)?;
        // All that the GPU has: what a launch gets is its own choice.
        let attribute = Attribute::CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES;
        let ordinal = device.ordinal;
        let result = sys::cuKernelGetAttribute(&raw mut static_bytes, attribute, loaded, ordinal);
        check(&in_kernel("cuKernelGetAttribute"), result)?;
        let attribute = Attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
        let most = device.max_shared_bytes as c_int - static_bytes;
        let result = sys::cuKernelSetAttribute(attribute, most, loaded, ordinal);
        check(&in_kernel("cuKernelSetAttribute"), result)?;
        let result = sys::cuKernelGetFunction(&raw mut function, loaded);
        check(&in_kernel("cuKernelGetFunction"), result)?;
    }
    Ok(Function(function))
}

/// Whether the code of a kernel for a GPU of this capability has its symbol.
#[cfg(test)]
pub fn has_symbol(kernel: &Kernel, capability: (u32, u32)) -> bool {
    let index = image(kernel, capability).expect("an image for every kernel");
    let (code, symbol) = (IMAGES[index].decompress(), kernel.symbol().into_bytes());
    // In machine code the name of its section; in PTX the declaration.
    let named = [
        [b".text.", &symbol[..], b"\0"].concat(),
        [b".entry ", &symbol[..], b"("].concat(),
    ];
    named
        .iter()
        .any(|name| code.windows(name.len()).any(|bytes| bytes == name))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::view::DType;

    #[test]
    fn every_gpu_runs_the_code_that_fits_it_best() {
        let best = |capability| {
            let named = [
                "sm_80",
                "sm_86",
                "sm_89",
                "sm_90",
                "sm_100",
                "sm_120",
                "compute_100",
            ]
            .map(|name| (fitness(name, capability), name));
            named
                .into_iter()
                .filter(|(fitness, _)| fitness.is_some())
                .max()
                .map(|best| best.1)
        };
        for (capability, name) in [
            ((7, 5), None),
            ((8, 0), Some("sm_80")),
            ((8, 7), Some("sm_86")),
            ((8, 9), Some("sm_89")),
            ((9, 0), Some("sm_90")),
            ((10, 0), Some("sm_100")),
            ((10, 3), Some("sm_100")),
            ((11, 0), Some("compute_100")),
            ((12, 1), Some("sm_120")),
            ((13, 0), Some("compute_100")),
        ] {
            assert_eq!(best(capability), name, "{capability:?}");
        }
        assert!(check_capability((7, 5)).unwrap_err().contains("7.5"));
    }

    /// Sizes and dtypes that the plans name, for all that [`Kernel`] can name.
    #[test]
    fn every_architecture_has_every_kernel() {
        if !cfg!(target_os = "linux") {
            assert!(build().is_none());
            return;
        }
        let build = build().expect("NVRTC to build with");
        let all = [DType::Bf16, DType::F16, DType::F32];
        let files: [(_, [_; 4], &[DType]); 4] = [
            ("sinkhorn", ["n2", "n4", "n8", "any"], &all[2..]),
            ("pre", ["n2", "n4", "n8", "any"], &all),
            ("post", ["n2", "n4", "n8", "any"], &all),
            ("projection", ["k8", "k24", "k80", "any"], &all),
        ];
        for architecture in build.architectures {
            let (_, number) = architecture.split_once('_').unwrap();
            let number: u32 = number.parse().unwrap();
            for (file, sizes, dtypes) in files {
                for size in sizes {
                    for &dtype in dtypes {
                        let kernel = Kernel {
                            file,
                            function: "",
                            size,
                            dtype,
                        };
                        let capability = (number / 10, number % 10);
                        assert!(
                            image(&kernel, capability).is_some(),
                            "{kernel:?} {architecture}"
                        );
                    }
                }
            }
        }
    }

    #[test]
    fn main_kernels_keep_to_their_registers() {
        let spills: Vec<_> = IMAGES.iter().flat_map(|image| image.spills).collect();
        assert!(spills.is_empty(), "{spills:#?}");
    }

    #[test]
    fn without_a_driver_there_is_a_reason() {
        // Nothing can be told where there is one.
        let Err(reason) = driver() else { return };
        assert!(
            reason.contains("driver") || reason.contains("cuInit"),
            "{reason}"
        );
        // SAFETY: without a driver no stream is looked at.
        let entered = unsafe { Context::enter(ptr::null_mut()) };
        assert_eq!(entered.err(), Some(reason));
    }
}

//! NVRTC, the compiler: where it is, and its functions.

use std::env;
use std::error::Error;
use std::ffi::{CStr, CString, c_char, c_int, c_void};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::ptr;

/// Prints the folder of the NVRTC that `python3` finds, without importing it.
const ASK_PYTHON: &str = "import importlib.util as u; \
     print(*u.find_spec('nvidia.cuda_nvrtc').submodule_search_locations)";

/// The first that knows all architectures.
const OLDEST_NVRTC: (c_int, c_int) = (12, 9);

/// The name of the header that the build writes for each file (`generated::header`).
pub const HEADER: &str = "generated.cuh";

/// The path of NVRTC, or why there is none.
pub fn find() -> Result<PathBuf, String> {
    if env::var("CARGO_CFG_TARGET_OS").as_deref() != Ok("linux") {
        return Err("CUDA is there on Linux alone".into());
    }
    if let Some(path) = env::var_os("JAX_MHC_NVRTC") {
        return Ok(path.into());
    }
    let output = Command::new("python3").args(["-c", ASK_PYTHON]).output();
    let output = output.ok().filter(|output| output.status.success());
    let folder = output.ok_or(
        "JAX_MHC_NVRTC is not set and python3 has no NVRTC; install the Python package \
         nvidia-cuda-nvrtc-cu12, or point the variable at its libnvrtc.so.12",
    )?;
    let folder = PathBuf::from(String::from_utf8_lossy(&folder.stdout).trim());
    Ok(folder.join("lib/libnvrtc.so.12"))
}

/// The compiler.
pub struct Nvrtc {
    library: libloading::Library,
    path: PathBuf,
}

type Program = *mut c_void;

impl Nvrtc {
    /// The library at `path`.
    pub fn load(path: &Path) -> Result<Self, String> {
        // SAFETY: initializers of NVIDIA's library, if it is one; the user named it.
        let library = unsafe { libloading::Library::new(path) }.map_err(|error| {
            let path = path.display();
            let reason = error.source().map_or(String::new(), ToString::to_string);
            format!("NVRTC cannot be loaded from {path}: {error} {reason}")
        })?;
        Ok(Self {
            library,
            path: path.to_owned(),
        })
    }

    /// A function of nvrtc.h.
    ///
    /// # Safety
    /// `F` is its type.
    unsafe fn function<F: Copy>(&self, name: &str) -> Result<F, String> {
        // SAFETY: promised by the caller; the library is never unloaded while the function is used.
        let symbol = unsafe { self.library.get::<F>(name) };
        symbol
            .map(|symbol| *symbol)
            .map_err(|error| format!("{}: {error}", self.path.display()))
    }

    /// Name and version, at least [`OLDEST_NVRTC`].
    pub fn version(&self) -> Result<String, String> {
        let (mut major, mut minor) = (0, 0);
        // SAFETY: the type of nvrtcVersion.
        let version: unsafe extern "C" fn(*mut c_int, *mut c_int) -> c_int =
            unsafe { self.function("nvrtcVersion") }?;
        // SAFETY: both numbers are there to be written.
        unsafe { version(&raw mut major, &raw mut minor) };
        if (major, minor) < OLDEST_NVRTC {
            let path = self.path.display();
            return Err(format!(
                "expected NVRTC 12.9 or newer, got {major}.{minor}: {path}"
            ));
        }
        Ok(format!("NVRTC {major}.{minor}"))
    }

    /// Compiled code and the compiler's log. `header` is what `#include` finds under the name [`HEADER`].
    pub fn compile(
        &self,
        source: &str,
        name: &str,
        header: &str,
        options: &[String],
        is_ptx: bool,
    ) -> Result<(Vec<u8>, String), String> {
        type Create = unsafe extern "C" fn(
            *mut Program,
            *const c_char,
            *const c_char,
            c_int,
            *const *const c_char,
            *const *const c_char,
        ) -> c_int;
        type Compile = unsafe extern "C" fn(Program, c_int, *const *const c_char) -> c_int;
        let text = |text: &str| CString::new(text).map_err(|error| error.to_string());
        let (source, name) = (text(source)?, text(name)?);
        let (header, header_name) = (text(header)?, text(HEADER)?);
        let options = options.iter().map(|option| text(option));
        let options: Vec<CString> = options.collect::<Result<_, _>>()?;
        let options: Vec<_> = options.iter().map(|option| option.as_ptr()).collect();
        let mut program = ptr::null_mut();
        // SAFETY: the types of nvrtc.h; all texts end with a zero and outlive the calls, and the program is
        // not used after it is destroyed.
        unsafe {
            let create: Create = self.function("nvrtcCreateProgram")?;
            let compile: Compile = self.function("nvrtcCompileProgram")?;
            let destroy: unsafe extern "C" fn(*mut Program) -> c_int =
                self.function("nvrtcDestroyProgram")?;
            let (source, name) = (source.as_ptr(), name.as_ptr());
            let (header, header_name) = (header.as_ptr(), header_name.as_ptr());
            self.check(create(
                &raw mut program,
                source,
                name,
                1,
                &raw const header,
                &raw const header_name,
            ))?;
            let compiled = self.check(compile(program, options.len() as c_int, options.as_ptr()));
            let log = self.output(program, "nvrtcGetProgramLog")?;
            let log = String::from_utf8_lossy(log.strip_suffix(&[0]).unwrap_or(&log)).into_owned();
            let what = if is_ptx {
                "nvrtcGetPTX"
            } else {
                "nvrtcGetCUBIN"
            };
            let code = compiled
                .map_err(|error| format!("{error}\n{log}"))
                .and_then(|()| self.output(program, what));
            destroy(&raw mut program);
            Ok((code?, log))
        }
    }

    /// Text or code that `<what>` gives, of the size that `<what>Size` gives.
    ///
    /// # Safety
    /// Both are functions of nvrtc.h, and `program` is one.
    unsafe fn output(&self, program: Program, what: &str) -> Result<Vec<u8>, String> {
        let mut len = 0_usize;
        // SAFETY: all such functions of nvrtc.h have these types; `bytes` has the length that they ask for.
        unsafe {
            let size: unsafe extern "C" fn(Program, *mut usize) -> c_int =
                self.function(&format!("{what}Size"))?;
            let get: unsafe extern "C" fn(Program, *mut u8) -> c_int = self.function(what)?;
            self.check(size(program, &raw mut len))?;
            let mut bytes = vec![0; len];
            self.check(get(program, bytes.as_mut_ptr()))?;
            Ok(bytes)
        }
    }

    fn check(&self, result: c_int) -> Result<(), String> {
        if result == 0 {
            return Ok(());
        }
        // SAFETY: the type of nvrtcGetErrorString, which gives a text that is never freed.
        unsafe {
            let text: unsafe extern "C" fn(c_int) -> *const c_char =
                self.function("nvrtcGetErrorString")?;
            Err(CStr::from_ptr(text(result)).to_string_lossy().into_owned())
        }
    }
}

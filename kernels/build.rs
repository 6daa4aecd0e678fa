//! Compiles kernels/cuda with NVRTC for every architecture, and lists the results in cubins.rs.
//!
//! Without NVRTC the list is empty, and the library has no CUDA kernels.

use std::collections::hash_map::DefaultHasher;
use std::env;
use std::error::Error;
use std::ffi::{CStr, CString, c_char, c_int, c_void};
use std::fs;
use std::hash::{Hash, Hasher};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::ptr;
use std::sync::atomic::{AtomicUsize, Ordering};

use miniz_oxide::deflate::compress_to_vec;

/// Every file with the sizes and dtypes that have code of their own, and what it is compiled for.
const FILES: [(&str, &[Size], &[&str], Target); 13] = [
    ("sinkhorn", &STREAMS, &["f32"], Target::Every),
    ("pre", &STREAMS, &["bf16", "f16", "f32"], Target::Every),
    ("norm", &STREAMS, &["bf16", "f16", "f32"], Target::Every),
    ("post", &STREAMS, &["bf16", "f16", "f32"], Target::Every),
    ("collapse", &STREAMS, &["bf16", "f16", "f32"], Target::Every),
    (
        "projection",
        &COLUMNS,
        &["bf16", "f16", "f32"],
        Target::Every,
    ),
    ("one_pass_fwd", &CHANNELS, &["bf16"], Target::Clusters),
    ("pre_bwd_one_pass", &CHANNELS, &["bf16"], Target::Clusters),
    ("seam_bwd_one_pass", &CHANNELS, &["bf16"], Target::Hopper),
    ("phi_bwd", &[W128], &["bf16"], Target::Hopper),
    ("seam_norm_bwd", &[N4], &["bf16"], Target::Hopper),
    ("gates_bwd", &[N4], &["f32"], Target::Clusters),
    ("sum_gradients", &[N4], &["f32"], Target::Clusters),
];

/// Of the architectures that a build is for.
enum Target {
    /// All of them.
    Every,
    /// Those with clusters of blocks and registers that warps hand to each other, see [`CLUSTERS`].
    Clusters,
    /// The first of these: on the other the kernel would spill registers.
    Hopper,
}

/// Its name in symbols, its number, and whether that is the number itself and not its bound.
type Size = (&'static str, u32, bool);

/// The paper's number of streams.
const N4: Size = ("n4", 4, true);

/// Streams.
const STREAMS: [Size; 4] = [("n2", 2, true), N4, ("n8", 8, true), ("any", 16, false)];

/// Columns of phi, in groups of 8.
const COLUMNS: [Size; 5] = [
    ("k8", 1, true),
    ("k24", 3, true),
    ("k32", 4, true),
    ("k80", 10, true),
    ("any", 12, false),
];

/// Channels of a stream that a block owns by itself, and those in a cluster.
const W128: Size = ("w128", 128, true);
const CHANNELS: [Size; 4] = [
    ("w256", 256, true),
    ("w320", 320, true),
    ("w384", 384, true),
    ("w448", 448, true),
];

/// A cubin runs on its chip and on those of the same major version that follow; PTX on all that follow.
/// Kernels for a bound are there once for each major version: they are large, and not the fast ones.
const ARCHITECTURES: [&str; 7] = [
    "sm_80",
    "sm_86",
    "sm_89",
    "sm_90",
    "sm_100",
    "sm_120",
    "compute_100",
];

/// What [`Target::Clusters`] is compiled for where a build is for the other: with the suffix `a` a cubin
/// runs on its very chip alone, with `f` on this family of chips.
const CLUSTERS: [(&str, &str); 2] = [("sm_90", "sm_90a"), ("sm_100", "sm_100f")];

/// Prints the folder of the NVRTC that `python3` finds, without importing it.
const ASK_PYTHON: &str = "import importlib.util as u; \
     print(*u.find_spec('nvidia.cuda_nvrtc').submodule_search_locations)";

/// The first that knows all architectures.
const OLDEST_NVRTC: (c_int, c_int) = (12, 9);

fn main() {
    println!("cargo::rerun-if-changed=cuda");
    println!("cargo::rerun-if-changed=build.rs");
    println!("cargo::rerun-if-env-changed=JAX_MHC_NVRTC");
    println!("cargo::rerun-if-env-changed=JAX_MHC_CUDA_ARCHITECTURES");
    let out_dir = PathBuf::from(env::var_os("OUT_DIR").expect("cargo sets it"));
    let list = match find_nvrtc() {
        Ok(path) => compile_all(&path, &out_dir),
        Err(reason) => {
            println!("cargo::warning=no CUDA kernels: {reason}");
            Ok(list(None, &[], ""))
        }
    };
    match list {
        Ok(list) => fs::write(out_dir.join("cubins.rs"), list).expect("OUT_DIR can be written"),
        Err(errors) => {
            for line in errors.lines() {
                println!("cargo::error={line}");
            }
        }
    }
}

fn find_nvrtc() -> Result<PathBuf, String> {
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

/// One file for one size, dtype and architecture.
struct Unit {
    file: &'static str,
    size: Size,
    dtype: &'static str,
    architecture: &'static str,
}

/// Those named in JAX_MHC_CUDA_ARCHITECTURES, or all.
fn architectures() -> Result<Vec<&'static str>, String> {
    let Ok(text) = env::var("JAX_MHC_CUDA_ARCHITECTURES") else {
        return Ok(ARCHITECTURES.to_vec());
    };
    let wanted: Vec<_> = text.split_whitespace().collect();
    if wanted.is_empty() || !wanted.iter().all(|name| ARCHITECTURES.contains(name)) {
        let known = ARCHITECTURES.join(" ");
        return Err(format!(
            "JAX_MHC_CUDA_ARCHITECTURES: expected some of {known}, got {text:?}"
        ));
    }
    let named = ARCHITECTURES
        .into_iter()
        .filter(|name| wanted.contains(name));
    Ok(named.collect())
}

fn with_suffix(names: &[(&str, &'static str)], architecture: &'static str) -> Option<&'static str> {
    let mut names = names.iter().filter(|(of, _)| *of == architecture);
    names.next().map(|(_, with_suffix)| *with_suffix)
}

fn units(architectures: &[&'static str]) -> Vec<Unit> {
    let mut units = Vec::new();
    for (at, &architecture) in architectures.iter().enumerate() {
        let major = |name: &str| name[..name.len() - 1].to_owned();
        let earlier = architectures[..at].iter();
        let is_first = earlier
            .copied()
            .all(|other| major(other) != major(architecture));
        for (file, sizes, dtypes, target) in FILES {
            let architecture = match target {
                Target::Every => Some(architecture),
                Target::Clusters => with_suffix(&CLUSTERS, architecture),
                Target::Hopper => with_suffix(&CLUSTERS[..1], architecture),
            };
            let Some(architecture) = architecture else {
                continue;
            };
            for &size in sizes
                .iter()
                .filter(|(_, _, is_exact)| *is_exact || is_first)
            {
                for &dtype in dtypes {
                    units.push(Unit {
                        file,
                        size,
                        dtype,
                        architecture,
                    });
                }
            }
        }
    }
    units
}

/// The text of cubins.rs, or all errors.
fn compile_all(path: &Path, out_dir: &Path) -> Result<String, String> {
    let nvrtc = &Nvrtc::load(path)?;
    let version = nvrtc.version()?;
    let architectures = architectures()?;
    // Compiled code is the same in every profile: it lies beside their folders.
    let cache = out_dir.ancestors().nth(4).unwrap_or(out_dir).join("cuda");
    fs::create_dir_all(&cache).map_err(|error| format!("{}: {error}", cache.display()))?;
    let units = units(&architectures);
    let next = AtomicUsize::new(0);
    let work = || -> Vec<(usize, Result<Compiled, String>)> {
        let mut done = Vec::new();
        loop {
            let index = next.fetch_add(1, Ordering::Relaxed);
            let Some(unit) = units.get(index) else {
                return done;
            };
            done.push((index, unit.compile(nvrtc, &version, &cache)));
        }
    };
    let num_threads = env::var("NUM_JOBS").map_or(1, |jobs| jobs.parse().unwrap_or(1));
    let mut done: Vec<_> = std::thread::scope(|scope| {
        let threads: Vec<_> = (0..num_threads).map(|_| scope.spawn(work)).collect();
        let results = threads.into_iter().map(|thread| thread.join());
        results
            .flat_map(|done| done.expect("no panic in a thread"))
            .collect()
    });
    done.sort_by_key(|(index, _)| *index);
    let (mut images, mut errors) = (String::new(), String::new());
    for (index, result) in done {
        let Unit {
            file,
            size: (size, ..),
            dtype,
            architecture,
        } = units[index];
        match result {
            Ok(Compiled { path, spills }) => {
                for spill in &spills {
                    println!("cargo::warning={spill} ({architecture})");
                }
                images += &format!(
                    "    Image {{ file: {file:?}, size: {size:?}, dtype: {dtype:?}, \
                     architecture: {architecture:?}, spills: &{spills:?}, \
                     code: include_bytes!({path:?}) }},\n"
                );
            }
            Err(error) => errors += &error,
        }
    }
    if errors.is_empty() {
        Ok(list(Some(&version), &architectures, &images))
    } else {
        Err(errors)
    }
}

fn list(compiler: Option<&str>, architectures: &[&str], images: &str) -> String {
    format!(
        "const COMPILER: Option<&str> = {compiler:?};\n\
         const ARCHITECTURES: &[&str] = &{architectures:?};\n\
         static IMAGES: &[Image] = &[\n{images}];\n"
    )
}

/// What becomes of a unit.
struct Compiled {
    /// The file with the code, compressed: that is a quarter of it.
    path: PathBuf,
    /// See [`spills`].
    spills: Vec<String>,
}

impl Unit {
    fn compile(&self, nvrtc: &Nvrtc, version: &str, cache: &Path) -> Result<Compiled, String> {
        let Self {
            file,
            size: (size, number, is_exact),
            dtype,
            architecture,
        } = self;
        let name = format!("{file}.cu");
        let sources = with_includes(&name, &mut Vec::new())?;
        let options = [
            "--std=c++17".to_owned(),
            format!("--gpu-architecture={architecture}"),
            "-Icuda".to_owned(),
            format!("-DSTREAM={dtype}"),
            format!("-DSIZE={number}"),
            format!("-DEXACT={}", u8::from(*is_exact)),
            format!("-DSUFFIX=_{size}_{dtype}"),
            "--ptxas-options=-v".to_owned(),
        ];
        let mut hasher = DefaultHasher::new();
        (&sources, &options, version).hash(&mut hasher);
        let stem = format!(
            "{file}_{size}_{dtype}_{architecture}_{:016x}",
            hasher.finish()
        );
        let (path, log_path) = (cache.join(&stem), cache.join(format!("{stem}.log")));
        let in_unit = |text: String| format!("{name} ({size}, {dtype}, {architecture}): {text}\n");
        let is_ptx = architecture.starts_with("compute_");
        if !path.exists() {
            let (code, log) = nvrtc
                .compile(&sources[0], &name, &options, is_ptx)
                .map_err(in_unit)?;
            write(&log_path, log.as_bytes())
                .and_then(|()| write(&path, &compress_to_vec(&code, 9)))
                .map_err(|error| in_unit(error.to_string()))?;
        }
        let log = fs::read_to_string(&log_path).map_err(|error| in_unit(error.to_string()))?;
        let spills = if *is_exact && !is_ptx {
            spills(&log).map_err(in_unit)?
        } else {
            Vec::new()
        };
        Ok(Compiled { path, spills })
    }
}

/// Whoever reads the file while it is written must not see a part.
fn write(path: &Path, contents: &[u8]) -> std::io::Result<()> {
    let partial = path.with_extension(format!("{}.partial", std::process::id()));
    fs::write(&partial, contents)?;
    fs::rename(&partial, path)
}

/// The text of a file of kernels/cuda, and of what it includes.
fn with_includes(name: &str, seen: &mut Vec<String>) -> Result<Vec<String>, String> {
    if seen.iter().any(|other| other == name) {
        return Ok(Vec::new());
    }
    seen.push(name.to_owned());
    let text = fs::read_to_string(Path::new("cuda").join(name))
        .map_err(|error| format!("kernels/cuda/{name}: {error}\n"))?;
    let mut texts = vec![text.clone()];
    for line in text.lines() {
        if let Some(name) = line.strip_prefix("#include \"") {
            texts.extend(with_includes(name.trim_end_matches('"'), seen)?);
        }
    }
    Ok(texts)
}

/// The main kernels that keep something in memory that belongs into registers: nothing else would tell
/// that one has become slow. A test refuses them.
fn spills(log: &str) -> Result<Vec<String>, String> {
    let (mut kernel, mut num_kernels, mut spills) = ("?", 0, Vec::new());
    for line in log.lines() {
        if let Some((_, name)) = line.split_once("Function properties for ") {
            kernel = name;
        }
        if line.contains("bytes stack frame") {
            num_kernels += 1;
            let words = line.split_whitespace();
            let numbers = words.filter_map(|word| word.parse::<u64>().ok());
            if numbers.sum::<u64>() > 0 {
                let line = line.trim_start_matches("ptxas").trim_matches([' ', '.']);
                spills.push(format!("{kernel} has {line}"));
            }
        }
    }
    if num_kernels == 0 {
        return Err(format!("the compiler does not tell of spills: {log}"));
    }
    Ok(spills)
}

/// The compiler.
struct Nvrtc {
    library: libloading::Library,
    path: PathBuf,
}

type Program = *mut c_void;

impl Nvrtc {
    fn load(path: &Path) -> Result<Self, String> {
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

    fn version(&self) -> Result<String, String> {
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

    /// Compiled code and the compiler's log.
    fn compile(
        &self,
        source: &str,
        name: &str,
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
            self.check(create(
                &raw mut program,
                source,
                name,
                0,
                ptr::null(),
                ptr::null(),
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

    /// What `<what>Size` and `<what>` give.
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

//! Compiles kernels/device with NVRTC for every architecture, and lists the results in cubins.rs.
//!
//! Without NVRTC the list is empty, and the library has no CUDA kernels.

use std::collections::hash_map::DefaultHasher;
use std::env;
use std::fs;
use std::hash::{Hash, Hasher};
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

use miniz_oxide::deflate::compress_to_vec;
use nvrtc::Nvrtc;
use spills::spills;
use tuning::{FILES, File, Size, Target};

mod generated;
mod nvrtc;
mod spills;
#[allow(dead_code, reason = "plans read the rest")]
#[path = "../tuning.rs"]
mod tuning;

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

/// Architectures that [`Target::Clusters`] is compiled for where a build is for the other, [`Target::Hopper`] for the
/// first: with the suffix `a` a cubin runs on its very chip alone, with `f` on this family of chips.
const CLUSTERS: [(&str, &str); 2] = [("sm_90", "sm_90a"), ("sm_100", "sm_100f")];

fn main() {
    println!("cargo::rerun-if-changed=device");
    println!("cargo::rerun-if-changed=build");
    println!("cargo::rerun-if-changed=tuning.rs");
    println!("cargo::rerun-if-changed=src/contract/constraints.rs");
    println!("cargo::rerun-if-changed=src/gpu/structs.rs");
    println!("cargo::rerun-if-env-changed=JAX_MHC_NVRTC");
    println!("cargo::rerun-if-env-changed=JAX_MHC_CUDA_ARCHITECTURES");
    let out_dir = PathBuf::from(env::var_os("OUT_DIR").expect("cargo sets it"));
    let list = architectures().and_then(|architectures| {
        let compiler = if architectures.is_empty() {
            Err("JAX_MHC_CUDA_ARCHITECTURES is none".into())
        } else {
            nvrtc::find()
        };
        match compiler {
            Ok(path) => compile_all(&path, &architectures, &out_dir),
            Err(reason) => {
                println!("cargo::warning=no CUDA kernels: {reason}");
                Ok(list(None, &[], ""))
            }
        }
    });
    match list {
        Ok(list) => fs::write(out_dir.join("cubins.rs"), list).expect("OUT_DIR can be written"),
        Err(errors) => {
            for line in errors.lines() {
                println!("cargo::error={line}");
            }
        }
    }
}

/// One file for one size, dtype and architecture.
struct Unit {
    file: &'static File,
    size: &'static Size,
    dtype: &'static str,
    architecture: &'static str,
}

/// The architectures named in JAX_MHC_CUDA_ARCHITECTURES, or all; none where it says `none`.
fn architectures() -> Result<Vec<&'static str>, String> {
    let Ok(text) = env::var("JAX_MHC_CUDA_ARCHITECTURES") else {
        return Ok(ARCHITECTURES.to_vec());
    };
    let wanted: Vec<_> = text.split_whitespace().collect();
    if wanted == ["none"] {
        return Ok(Vec::new());
    }
    if wanted.is_empty() || !wanted.iter().all(|name| ARCHITECTURES.contains(name)) {
        let known = ARCHITECTURES.join(" ");
        return Err(format!(
            "JAX_MHC_CUDA_ARCHITECTURES: expected none, or some of {known}, got {text:?}"
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
        for file in FILES {
            let architecture = match file.target {
                Target::Every => Some(architecture),
                Target::Clusters => with_suffix(&CLUSTERS, architecture),
                Target::Hopper => with_suffix(&CLUSTERS[..1], architecture),
            };
            let Some(architecture) = architecture else {
                continue;
            };
            for size in (file.sizes().into_iter()).filter(|size| size.is_exact || is_first) {
                units.extend(file.dtypes.iter().map(|dtype| Unit {
                    file,
                    size,
                    dtype,
                    architecture,
                }));
            }
        }
    }
    units
}

/// The text of cubins.rs, or all errors.
fn compile_all(
    path: &Path,
    architectures: &[&'static str],
    out_dir: &Path,
) -> Result<String, String> {
    let nvrtc = &Nvrtc::load(path)?;
    let version = nvrtc.version()?;
    let cache = cache(out_dir);
    fs::create_dir_all(&cache).map_err(|error| format!("{}: {error}", cache.display()))?;
    let units = units(architectures);
    let (next, num_done) = (AtomicUsize::new(0), Mutex::new(0));
    let work = || -> Vec<(usize, Result<Compiled, String>)> {
        let mut done = Vec::new();
        loop {
            let index = next.fetch_add(1, Ordering::Relaxed);
            let Some(unit) = units.get(index) else {
                return done;
            };
            done.push((index, unit.compile(nvrtc, &version, &cache)));
            // Cargo shows nothing of a build that succeeds: hatch_build.py reads this file meanwhile. A build
            // without it is the same build.
            let mut num_done = num_done.lock().expect("no panic in a thread");
            *num_done += 1;
            let _ = write(
                &cache.join("progress"),
                format!("{num_done} of {}", units.len()).as_bytes(),
            );
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
            size,
            dtype,
            architecture,
        } = units[index];
        match result {
            Ok(Compiled { path, spills }) => {
                for spill in &spills {
                    println!("cargo::warning={spill} ({architecture})");
                }
                let (file, size) = (file.stem(), size.name);
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
        Ok(list(Some(&version), architectures, &images))
    } else {
        Err(errors)
    }
}

/// The folder of compiled code, which is the same in every profile and for every target: it lies beside their
/// folders.
fn cache(out_dir: &Path) -> PathBuf {
    // <target folder>/[<target>/]<profile>/build/<package>/out
    let folder = out_dir.ancestors().nth(4).unwrap_or(out_dir);
    let target = env::var("TARGET").expect("cargo sets it");
    match folder.parent() {
        Some(parent) if folder.ends_with(&target) => parent.join("cuda"),
        _ => folder.join("cuda"),
    }
}

fn list(compiler: Option<&str>, architectures: &[&str], images: &str) -> String {
    format!(
        "const COMPILER: Option<&str> = {compiler:?};\n\
         const ARCHITECTURES: &[&str] = &{architectures:?};\n\
         static IMAGES: &[Image] = &[\n{images}];\n"
    )
}

/// A compiled unit.
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
            size: Size { name: size, .. },
            dtype,
            architecture,
        } = self;
        let name = format!("{}.cu", file.path);
        let header = generated::header(file, self.size);
        let sources = with_includes(&name, &mut Vec::new())?;
        let options = [
            "--std=c++17".to_owned(),
            format!("--gpu-architecture={architecture}"),
            "-Idevice".to_owned(),
            format!("-DSTREAM={dtype}"),
            format!("-DSUFFIX=_{size}_{dtype}"),
            "--ptxas-options=-v".to_owned(),
        ];
        let mut hasher = DefaultHasher::new();
        (&sources, &header, &options, version).hash(&mut hasher);
        let stem = format!(
            "{}_{size}_{dtype}_{architecture}_{:016x}",
            file.stem(),
            hasher.finish()
        );
        let (path, log_path) = (cache.join(&stem), cache.join(format!("{stem}.log")));
        let in_unit = |text: String| format!("{name} ({size}, {dtype}, {architecture}): {text}\n");
        let is_ptx = architecture.starts_with("compute_");
        if !path.exists() {
            let (code, log) = nvrtc
                .compile(&sources[0], &name, &header, &options, is_ptx)
                .map_err(in_unit)?;
            write(&log_path, log.as_bytes())
                .and_then(|()| write(&path, &compress_to_vec(&code, 9)))
                .map_err(|error| in_unit(error.to_string()))?;
        }
        let log = fs::read_to_string(&log_path).map_err(|error| in_unit(error.to_string()))?;
        let spills = if self.size.is_exact && !is_ptx {
            spills(&log).map_err(in_unit)?
        } else {
            Vec::new()
        };
        Ok(Compiled { path, spills })
    }
}

/// Writes a file at once, so that whoever reads it meanwhile does not see a part.
fn write(path: &Path, contents: &[u8]) -> std::io::Result<()> {
    let partial = path.with_extension(format!("{}.partial", std::process::id()));
    fs::write(&partial, contents)?;
    fs::rename(&partial, path)
}

/// The text of a file of kernels/device, and of what it includes.
fn with_includes(name: &str, seen: &mut Vec<String>) -> Result<Vec<String>, String> {
    if seen.iter().any(|other| other == name) {
        return Ok(Vec::new());
    }
    seen.push(name.to_owned());
    let text = fs::read_to_string(Path::new("device").join(name))
        .map_err(|error| format!("kernels/device/{name}: {error}\n"))?;
    let mut texts = vec![text.clone()];
    for line in text.lines() {
        let included = line.strip_prefix("#include \"");
        let included = included.map(|name| name.trim_end_matches('"'));
        if let Some(name) = included.filter(|name| *name != nvrtc::HEADER) {
            texts.extend(with_includes(name, seen)?);
        }
    }
    Ok(texts)
}

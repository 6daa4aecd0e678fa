//! The compiled kernels, and which of them fits a GPU.

use miniz_oxide::inflate::decompress_to_vec;

use super::kernel::Kernel;
use super::tuning::CHANNELS;
use crate::contract::view::DType;

include!(concat!(env!("OUT_DIR"), "/cubins.rs"));

/// The oldest GPU: the kernels use its instructions.
const OLDEST_CAPABILITY: (u32, u32) = (8, 0);

/// The kernel for clusters that tells how many of them a GPU runs at once.
pub fn probe() -> Kernel {
    Kernel::of("pre_fwd_one_pass", &CHANNELS[0], DType::Bf16)
}

/// A file of kernels, compiled for a size, a dtype and an architecture.
pub struct Image {
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
    /// The code itself.
    pub fn decompress(&self) -> Vec<u8> {
        decompress_to_vec(self.code).expect("the build compressed it")
    }

    /// Whether the image's kernels run in clusters of blocks.
    pub fn has_clusters(&self) -> bool {
        self.architecture.ends_with(['a', 'f'])
    }
}

impl std::fmt::Display for Image {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self {
            file,
            size,
            dtype,
            architecture,
            ..
        } = self;
        write!(f, "{file} ({size}, {dtype}, {architecture})")
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
/// the same major version first, the latest first. With the suffix `a` it runs on that very chip alone.
fn fitness(architecture: &str, (major, minor): (u32, u32)) -> Option<(bool, u32)> {
    let (kind, number) = architecture.split_once('_')?;
    let number: u32 = number.trim_end_matches(['a', 'f']).parse().ok()?;
    let of = (number / 10, number % 10);
    let runs = match kind {
        "sm" if architecture.ends_with('a') => of == (major, minor),
        "sm" => of.0 == major && of.1 <= minor,
        _ => of <= (major, minor),
    };
    runs.then_some((kind == "sm", number))
}

/// The best image of a kernel for a GPU of this capability, and its index.
pub fn image(kernel: &Kernel, capability: (u32, u32)) -> Option<(usize, &'static Image)> {
    let dtype = kernel.dtype.short_name();
    let images = IMAGES.iter().enumerate().filter(|(_, image)| {
        (image.file, image.size, image.dtype) == (kernel.file, kernel.size, dtype)
    });
    let ranked =
        images.filter_map(|(index, image)| Some((fitness(image.architecture, capability)?, index)));
    ranked.max().map(|(_, index)| (index, &IMAGES[index]))
}

/// The reason in a build without a compiler.
pub const NO_KERNELS: &str = "this build of jax-mhc has no CUDA kernels; reinstall it on Linux with \
     JAX_MHC_CUDA_ARCHITECTURES unset: pip install brings their compiler";

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

/// Whether the code of a kernel for a GPU of this capability has its symbol.
#[cfg(test)]
pub fn has_symbol(kernel: &Kernel, capability: (u32, u32)) -> bool {
    let (_, image) = image(kernel, capability).expect("an image for every kernel");
    let (code, symbol) = (image.decompress(), kernel.symbol().into_bytes());
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
    use crate::gpu::tuning::{FILES, Target};

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
        let runs = |name, capability| fitness(name, capability).is_some();
        assert!(runs("sm_90a", (9, 0)) && !runs("sm_90a", (9, 1)) && !runs("sm_90a", (10, 0)));
        assert!(runs("sm_100f", (10, 0)) && runs("sm_100f", (10, 3)) && !runs("sm_100f", (11, 0)));
        assert!(check_capability((7, 5)).unwrap_err().contains("7.5"));
    }

    #[test]
    fn every_architecture_has_every_kernel() {
        if !cfg!(target_os = "linux") {
            assert!(build().is_none());
            return;
        }
        let build = build().expect("NVRTC to build with");
        for architecture in build.architectures {
            let (_, number) = architecture.split_once('_').unwrap();
            let number: u32 = number.parse().unwrap();
            let has_clusters = matches!(*architecture, "sm_90" | "sm_100");
            for file in FILES {
                let is_for = match file.target {
                    Target::Every => true,
                    Target::Clusters => has_clusters,
                    Target::Hopper => *architecture == "sm_90",
                };
                for row in file.kernels.iter().filter(|_| is_for) {
                    let dtypes = DType::ALL.iter();
                    let dtypes: Vec<_> = dtypes
                        .filter(|dtype| file.dtypes.contains(&dtype.short_name()))
                        .collect();
                    assert_eq!(dtypes.len(), file.dtypes.len());
                    for size in row.sizes {
                        for dtype in &dtypes {
                            let kernel = Kernel::of(row.function, size, **dtype);
                            let capability = (number / 10, number % 10);
                            assert!(has_symbol(&kernel, capability), "{kernel:?} {architecture}");
                        }
                    }
                }
            }
        }
        assert!(image(&probe(), (12, 0)).is_none());
    }

    #[test]
    fn main_kernels_keep_to_their_registers() {
        let spills: Vec<_> = IMAGES.iter().flat_map(|image| image.spills).collect();
        assert!(spills.is_empty(), "{spills:#?}");
    }
}

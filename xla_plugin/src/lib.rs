//! The functions that the shared library exports: one describes everything that Python needs to register
//! the handlers, and three report on CUDA.

use std::collections::BTreeMap;
use std::ffi::{CStr, CString, c_char};
use std::panic::catch_unwind;
use std::sync::LazyLock;

use jax_mhc_ffi::{Entry, handler_address, retired_handler_address};
use jax_mhc_kernels::{Call, Config, DType, Group, TARGET_VERSION, cpu, gpu, limits};
use serde::{Deserialize, Serialize};

use log::Log;

mod log;

/// A handler, as `jax.ffi.register_ffi_target` takes it. Traits are not listed: XLA asks the
/// handler itself.
#[derive(Serialize)]
struct Handler {
    name: String,
    platform: &'static str,
    #[serde(flatten)]
    addresses: Addresses,
}

/// Addresses of a handler: one function on a CPU, one for each stage on a GPU.
#[derive(Serialize)]
#[serde(untagged)]
enum Addresses {
    Cpu { address: usize },
    Cuda { initialize: usize, execute: usize },
}

#[derive(Serialize)]
struct Description {
    name: &'static str,
    version: &'static str,
    /// Commit of the sources; None where the library was not built in a git checkout.
    commit: Option<&'static str>,
    target_version: u32,
    ffi_api_version: String,
    architecture: &'static str,
    instruction_set: &'static str,
    /// Whether the library checks itself, for overflow too: a build for tests.
    debug_assertions: bool,
    /// Build of the CUDA kernels; None where the library has none.
    cuda: Option<gpu::Build>,
    log: Log,
    handlers: Vec<Handler>,
    /// Handlers of names that older versions of the table had: each is an error that says what to do.
    retired: Vec<Handler>,
    /// Dtypes of streams that there are kernels for, by platform.
    dtypes: Dtypes,
    /// Bounds of sizes and settings.
    limits: Limits,
    /// Sentences that say when a call lacks the values of a group, by its name.
    groups: BTreeMap<&'static str, &'static str>,
    /// The table of calls.
    calls: Vec<jax_mhc_kernels::Description>,
}

#[derive(Serialize)]
struct Limits {
    streams: usize,
    permuted_streams: usize,
    sinkhorn_iters: usize,
}

#[derive(Serialize)]
struct Dtypes {
    cpu: Vec<&'static str>,
    cuda: Vec<&'static str>,
}

/// Ops of earlier versions of the table. In version 2 post_pre was called seam.
const RETIRED: [(u32, [&str; 6]); 3] = [
    (2, ["pre", "post", "seam", "sinkhorn", "head", "collapse"]),
    (
        3,
        ["pre", "post", "post_pre", "sinkhorn", "head", "collapse"],
    ),
    (
        4,
        ["pre", "post", "post_pre", "sinkhorn", "head", "collapse"],
    ),
];

fn retired() -> Vec<Handler> {
    let address = retired_handler_address();
    let mut handlers = vec![];
    for (version, ops) in RETIRED {
        for op in ops {
            for direction in ["fwd", "bwd"] {
                handlers.extend(["cpu", "CUDA"].map(|platform| Handler {
                    name: format!("jax_mhc_{op}_{direction}_v{version}"),
                    platform,
                    addresses: Addresses::Cpu { address },
                }));
            }
        }
    }
    handlers
}

fn describe(log: Log) -> Description {
    let name = |op: Call| format!("jax_mhc_{}_v{TARGET_VERSION}", op.name());
    let cpu = Call::ALL.into_iter().map(|op| Handler {
        name: name(op),
        platform: "cpu",
        addresses: Addresses::Cpu {
            address: handler_address(Entry::Cpu, op),
        },
    });
    let cuda_ops = gpu::build().map_or(&[][..], |_| &Call::ALL);
    let cuda = cuda_ops.iter().map(|&op| Handler {
        name: name(op),
        platform: "CUDA",
        addresses: Addresses::Cuda {
            initialize: handler_address(Entry::CudaInitialize, op),
            execute: handler_address(Entry::CudaExecute, op),
        },
    });
    let (major, minor) = jax_mhc_ffi::api_version();
    Description {
        name: "jax-mhc",
        version: env!("CARGO_PKG_VERSION"),
        commit: option_env!("JAX_MHC_COMMIT"),
        target_version: TARGET_VERSION,
        ffi_api_version: format!("{major}.{minor}"),
        architecture: std::env::consts::ARCH,
        instruction_set: cpu::instruction_set(),
        debug_assertions: cfg!(debug_assertions),
        cuda: gpu::build(),
        log,
        handlers: cpu.chain(cuda).collect(),
        retired: retired(),
        dtypes: Dtypes {
            cpu: DType::ALL.map(DType::name).to_vec(),
            cuda: gpu::DTYPES.map(DType::name).to_vec(),
        },
        limits: Limits {
            streams: limits::MAX_STREAMS,
            permuted_streams: limits::MAX_PERMUTED,
            sinkhorn_iters: limits::MAX_SINKHORN_ITERS,
        },
        groups: Group::ALL
            .map(|group| (group.name(), group.meaning()))
            .into(),
        calls: Call::ALL.into_iter().map(Call::describe).collect(),
    }
}

/// The library's description of itself with its table of handlers: JSON, in memory that is never
/// freed. The first call starts the log. Null where the description cannot be made.
#[unsafe(no_mangle)]
pub extern "C" fn jax_mhc_describe() -> *const c_char {
    static DESCRIPTION: LazyLock<Option<CString>> = LazyLock::new(|| {
        let description = describe(log::start());
        let Description {
            version,
            commit,
            instruction_set,
            ..
        } = description;
        tracing::info!(
            target: "jax_mhc",
            version,
            commit,
            instruction_set,
            cuda_kernels = description.cuda.as_ref().map_or("none".into(), |build| {
                format!("{} by {}", build.architectures.join(" "), build.compiler)
            }),
            "the shared library is loaded"
        );
        CString::new(serde_json::to_string(&description).ok()?).ok()
    });
    let describe = || {
        DESCRIPTION
            .as_ref()
            .map_or(std::ptr::null(), |text| text.as_ptr())
    };
    catch_unwind(describe).unwrap_or(std::ptr::null())
}

/// The state of CUDA on this machine: JSON, in memory that is never freed. The first call asks the
/// driver, and the others give the same answer. Null where there is no answer.
#[unsafe(no_mangle)]
pub extern "C" fn jax_mhc_cuda_status() -> *const c_char {
    static STATUS: LazyLock<Option<CString>> =
        LazyLock::new(|| CString::new(serde_json::to_string(&gpu::status()).ok()?).ok());
    let status = || {
        STATUS
            .as_ref()
            .map_or(std::ptr::null(), |text| text.as_ptr())
    };
    catch_unwind(status).unwrap_or(std::ptr::null())
}

/// The float32 numbers that a call needs as its workspace on a GPU: `out[0]` for each token and
/// `out[1]` besides. Needs no GPU. False where there is no such call on a GPU, or none of such sizes.
///
/// # Safety
/// `call` is a text with a final zero, such as `pre_fwd`, and `out` has room for two numbers.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn jax_mhc_workspace(
    call: *const c_char,
    element_bytes: i64,
    streams: i64,
    hidden: i64,
    columns: i64,
    sinkhorn_iters: i64,
    norm_width: i64,
    given: i64,
    out: *mut i64,
) -> bool {
    // SAFETY: promised by the caller.
    let call = unsafe { CStr::from_ptr(call) };
    let workspace = || -> Option<[i64; 2]> {
        if !(0..=1).contains(&given) {
            return None;
        }
        let count = |number: i64| usize::try_from(number).ok();
        let problem = gpu::Problem {
            kind: Call::ALL
                .into_iter()
                .find(|op| op.name().as_bytes() == call.to_bytes())?,
            dtype: match element_bytes {
                2 => DType::Bf16,
                4 => DType::F32,
                _ => return None,
            },
            n: count(streams)?,
            c: count(hidden)?,
            columns: count(columns)?,
            sinkhorn_iters: count(sinkhorn_iters)?,
            norm_width: count(norm_width)?,
            given: given == 1,
        };
        let workspace = problem.workspace()?;
        let number = |count: usize| i64::try_from(count).ok();
        Some([number(workspace.per_token)?, number(workspace.fixed)?])
    };
    let Ok(Some(numbers)) = catch_unwind(workspace) else {
        return false;
    };
    // SAFETY: promised by the caller.
    unsafe { out.cast::<[i64; 2]>().write(numbers) };
    true
}

/// A call whose plan is asked for.
#[derive(Deserialize)]
struct Asked {
    call: String,
    dtype: String,
    tokens: usize,
    streams: usize,
    hidden: usize,
    constraint: String,
    sinkhorn_iters: usize,
    dynamic: bool,
    norm: bool,
    given: bool,
    /// Compute capability of the GPU.
    capability: (u32, u32),
}

/// The plan of a call, or why there is none.
fn answer(asked: &str) -> Result<gpu::DescribedPlan, String> {
    let asked: Asked = serde_json::from_str(asked).map_err(|error| error.to_string())?;
    let config = Config {
        constraint: asked.constraint.parse()?,
        sinkhorn_iters: asked.sinkhorn_iters,
        dynamic: asked.dynamic,
        norm: asked.norm,
        given: asked.given,
        deferred: true,
        ..Config::default()
    };
    let call = Call::ALL
        .into_iter()
        .find(|call| call.name() == asked.call)
        .ok_or_else(|| format!("there is no call {:?}", asked.call))?;
    let dtype = DType::ALL
        .into_iter()
        .find(|dtype| dtype.name() == asked.dtype)
        .ok_or_else(|| format!("there is no dtype {:?}", asked.dtype))?;
    let sizes = [asked.tokens, asked.streams, asked.hidden];
    gpu::describe_plan(call, dtype, sizes, &config, asked.capability)
}

/// Writes the plan of a call on a GPU, or the reason why there is none: JSON with a final zero. `asked` is
/// JSON, too. Needs no GPU. Returns the bytes that the answer takes, more than `room` where it was not
/// written, and 0 where there is none.
///
/// # Safety
/// `asked` is a text with a final zero, and `out` has room for `room` bytes.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn jax_mhc_plan(
    asked: *const c_char,
    out: *mut c_char,
    room: usize,
) -> usize {
    // SAFETY: promised by the caller.
    let asked = unsafe { CStr::from_ptr(asked) };
    let answer = || -> Option<CString> {
        let answer = match asked.to_str().map_err(|error| error.to_string()) {
            Ok(asked) => answer(asked),
            Err(reason) => Err(reason),
        };
        let text = match answer {
            Ok(plan) => serde_json::to_string(&plan),
            Err(reason) => serde_json::to_string(&BTreeMap::from([("error", reason)])),
        };
        CString::new(text.ok()?).ok()
    };
    let Ok(Some(answer)) = catch_unwind(answer) else {
        return 0;
    };
    let bytes = answer.as_bytes_with_nul();
    if bytes.len() <= room {
        // SAFETY: promised by the caller.
        unsafe { out.copy_from_nonoverlapping(bytes.as_ptr().cast(), bytes.len()) };
    }
    bytes.len()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_group_of_the_table_is_described() {
        let description = serde_json::to_value(describe(log::start())).unwrap();
        let groups = description["groups"].as_object().unwrap();
        let mut found = std::collections::BTreeSet::new();
        for call in description["calls"].as_array().unwrap() {
            let values = ["operands", "results"].map(|role| call[role].as_array().unwrap());
            let attributes = call["attributes"].as_array().unwrap();
            let values = values.into_iter().flatten();
            for group in values.filter_map(|value| value["group"].as_str()) {
                let names = |attribute: &serde_json::Value| attribute["name"] == group;
                assert!(attributes.iter().any(names), "{call}");
                found.insert(group.to_owned());
            }
        }
        assert!(found.iter().eq(groups.keys()), "{found:?} {groups:?}");
    }

    #[test]
    fn plans_and_reasons_are_told() {
        let tell = |asked: &str, room: usize| {
            let (asked, mut out) = (CString::new(asked).unwrap(), vec![b'x' as c_char; room]);
            // SAFETY: `out` has the length told.
            let len = unsafe { jax_mhc_plan(asked.as_ptr(), out.as_mut_ptr(), room) };
            let bytes: Vec<u8> = out.iter().map(|byte| *byte as u8).collect();
            (len, bytes)
        };
        let asked = serde_json::json!({
            "call": "pre_fwd", "dtype": "bfloat16", "tokens": 8192, "streams": 4, "hidden": 4096,
            "constraint": "birkhoff", "sinkhorn_iters": 20, "dynamic": true, "norm": false,
            "given": false, "capability": [9, 0],
        });
        let (len, bytes) = tell(&asked.to_string(), 4096);
        let told: serde_json::Value = serde_json::from_slice(&bytes[..len - 1]).unwrap();
        assert_eq!((bytes[len - 1], bytes[len]), (0, b'x'));
        if gpu::build().is_some() {
            let kernel = told["kernels"][0].as_str().unwrap();
            assert!(kernel.starts_with("mhc_pre_fwd"), "{told}");
        }
        let (needed, bytes) = tell(&asked.to_string(), len - 1);
        assert_eq!(needed, len);
        assert!(bytes.iter().all(|byte| *byte == b'x'));
        for (field, wrong) in [
            ("call", serde_json::json!("no_call")),
            ("dtype", serde_json::json!("int8")),
            ("constraint", serde_json::json!("no_constraint")),
            ("streams", serde_json::json!(-1)),
            ("streams", serde_json::json!(17)),
            ("hidden", serde_json::json!(0)),
            ("sinkhorn_iters", serde_json::json!(1_u64 << 40)),
            ("capability", serde_json::json!([7, 0])),
        ] {
            let mut asked = asked.clone();
            asked[field] = wrong;
            let (len, bytes) = tell(&asked.to_string(), 4096);
            let told: serde_json::Value = serde_json::from_slice(&bytes[..len - 1]).unwrap();
            assert!(told["error"].is_string(), "{field}: {told}");
        }
    }

    #[test]
    fn only_possible_sizes_have_a_workspace() {
        let workspace = |call: &CStr, [bytes, n, c, columns, iters, norm, given]: [i64; 7]| {
            let mut out = [-1; 2];
            // SAFETY: `out` has room for two numbers.
            let is_known = unsafe {
                let out = out.as_mut_ptr();
                jax_mhc_workspace(call.as_ptr(), bytes, n, c, columns, iters, norm, given, out)
            };
            assert!(is_known || out == [-1; 2]);
            is_known.then_some(out)
        };
        let possible = [2, 4, 2560, 24, 20, 2560, 0];
        let [per_token, fixed] = workspace(c"pre_bwd", possible).unwrap();
        assert!(per_token > 0 && fixed > 0);
        assert_eq!(workspace(c"post_fwd", [4, 16, 1, 0, 0, 0, 0]), Some([0, 0]));
        assert_eq!(workspace(c"no_call", possible), None);
        assert!(workspace(c"post_pre_bwd", [2, 4, 2560, 24, 20, 0, 1]).is_some());
        assert_eq!(
            workspace(c"post_pre_bwd", [2, 4, 2560, 24, 20, 2560, 1]),
            None
        );
        for at in 0..possible.len() {
            for absurd in [-1, i64::MIN, i64::MAX, 1 << 31, 1 << 62] {
                let mut sizes = possible;
                sizes[at] = absurd;
                for op in Call::ALL {
                    let call = CString::new(op.name()).unwrap();
                    assert_eq!(workspace(&call, sizes), None, "{op:?} {sizes:?}");
                }
            }
        }
    }
}

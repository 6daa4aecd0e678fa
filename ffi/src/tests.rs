//! Frames that no XLA makes today: kinds and types of values without a name.

use std::ffi::{CStr, c_char, c_void};
use std::mem::size_of;
use std::ptr::{from_ref, null};

use super::*;

/// The structs of XLA's c_api.h, as far as a refused call reads them. Each begins with its size.
#[repr(C)]
struct Values {
    struct_size: usize,
    extension: *const c_void,
    num: i64,
    kinds: *const i32,
    values: *const *const c_void,
}

#[repr(C)]
struct Attributes {
    struct_size: usize,
    extension: *const c_void,
    num: i64,
    kinds: *const i32,
    names: *const *const Text,
    values: *const *const c_void,
}

#[repr(C)]
struct Frame {
    struct_size: usize,
    extension: *const c_void,
    api: *const Api,
    context: *const c_void,
    stage: i32,
    args: Values,
    rets: Values,
    attributes: Attributes,
    future: *const c_void,
}

#[repr(C)]
struct Api {
    struct_size: usize,
    extension: *const c_void,
    version: [usize; 3],
    internal: *const c_void,
    create_error: extern "C" fn(&CreateError) -> *mut Refusal,
    others: [*const c_void; 17],
}

#[repr(C)]
struct CreateError {
    struct_size: usize,
    extension: *const c_void,
    message: *const c_char,
    code: i32,
}

#[repr(C)]
struct Buffer {
    struct_size: usize,
    extension: *const c_void,
    dtype: i32,
    data: *const c_void,
    rank: i64,
    dims: *const i64,
}

#[repr(C)]
struct Text {
    start: *const u8,
    len: usize,
}

impl Text {
    fn new(text: &'static str) -> Self {
        let (start, len) = (text.as_ptr(), text.len());
        Self { start, len }
    }
}

/// A scalar, which ends before the last field, or an array.
#[repr(C)]
struct Typed {
    dtype: i32,
    value_or_len: *const c_void,
    value: *const c_void,
}

const INVALID_ARGUMENT: i32 = 3;
const EXECUTE: i32 = 3;
const BUFFER: i32 = 1;
const ARRAY: i32 = 1;
const DICTIONARY: i32 = 2;
const SCALAR: i32 = 3;
const STRING: i32 = 4;
const F32: i32 = 11;
const F64: i32 = 12;

/// The answer of a handler.
#[derive(Debug)]
struct Refusal {
    code: i32,
    message: String,
}

extern "C" fn create_error(args: &CreateError) -> *mut Refusal {
    // SAFETY: the header hands over a text with a final zero.
    let message = unsafe { CStr::from_ptr(args.message) };
    let message = message.to_str().unwrap().to_owned();
    let code = args.code;
    Box::into_raw(Box::new(Refusal { code, message }))
}

/// The parts of a frame that differ from test to test.
struct Contents {
    stage: i32,
    args: Vec<(i32, *const c_void)>,
    rets: Vec<(i32, *const c_void)>,
    /// Attributes in the order of their names.
    attributes: Vec<(Text, i32, *const c_void)>,
}

impl Default for Contents {
    fn default() -> Self {
        Self {
            stage: EXECUTE,
            args: Vec::new(),
            rets: Vec::new(),
            attributes: Vec::new(),
        }
    }
}

/// The refusal of a frame by the handler of sinkhorn_fwd on the CPU.
fn refusal(contents: &Contents) -> String {
    refusal_by(handler_address(Entry::Cpu, Call::SinkhornFwd), contents)
}

/// The refusal of a frame by the handler at an address.
fn refusal_by(address: usize, contents: &Contents) -> String {
    let api = Api {
        struct_size: size_of::<Api>(),
        extension: null(),
        version: [24, 0, 1 << 32],
        internal: null(),
        create_error,
        others: [null(); 17],
    };
    let unzip =
        |values: &[(i32, *const c_void)]| -> (Vec<_>, Vec<_>) { values.iter().copied().unzip() };
    let values = |(kinds, values): &(Vec<i32>, Vec<*const c_void>)| Values {
        struct_size: size_of::<Values>(),
        extension: null(),
        num: kinds.len() as i64,
        kinds: kinds.as_ptr(),
        values: values.as_ptr(),
    };
    let attributes = &contents.attributes;
    let names: Vec<*const Text> = attributes.iter().map(|(name, ..)| from_ref(name)).collect();
    let kinds: Vec<i32> = attributes.iter().map(|(_, kind, _)| *kind).collect();
    let attribute_values: Vec<_> = attributes.iter().map(|(.., value)| *value).collect();
    let (args, rets) = (unzip(&contents.args), unzip(&contents.rets));
    let frame = Frame {
        // The future came later.
        struct_size: std::mem::offset_of!(Frame, future),
        extension: null(),
        api: &raw const api,
        context: null(),
        stage: contents.stage,
        args: values(&args),
        rets: values(&rets),
        attributes: Attributes {
            struct_size: size_of::<Attributes>(),
            extension: null(),
            num: names.len() as i64,
            kinds: kinds.as_ptr(),
            names: names.as_ptr(),
            values: attribute_values.as_ptr(),
        },
        future: null(),
    };
    // SAFETY: the type of a handler; the frame has the layout of c_api.h and outlives the call, and a
    // refusal is what `create_error` made.
    let refusal = unsafe {
        let handler: extern "C" fn(&Frame) -> *mut Refusal = std::mem::transmute(address);
        let refusal = handler(&frame);
        assert!(!refusal.is_null(), "the frame was accepted");
        *Box::from_raw(refusal)
    };
    assert_eq!(refusal.code, INVALID_ARGUMENT, "{}", refusal.message);
    refusal.message
}

/// The refusal of one attribute by the same handler.
fn refused_attribute(name: &'static str, kind: i32, value: *const c_void) -> String {
    // The attributes that are read before it.
    let birkhoff = Text::new("birkhoff");
    let iters = Typed {
        dtype: 5,
        value_or_len: from_ref(&20_i64).cast(),
        value: null(),
    };
    let mut attributes = vec![(Text::new(name), kind, value)];
    if name != "constraint" {
        let constraint = from_ref(&birkhoff).cast();
        attributes.insert(0, (Text::new("constraint"), STRING, constraint));
        let iters = from_ref(&iters).cast();
        attributes.push((Text::new("sinkhorn_iters"), SCALAR, iters));
    }
    attributes.sort_by_key(|(name, ..)| {
        // SAFETY: a text of this program.
        unsafe { std::slice::from_raw_parts(name.start, name.len) }
    });
    refusal(&Contents {
        attributes,
        ..Contents::default()
    })
}

/// Codes without a name, and their neighbours.
const CODES: [i32; 9] = [-1, 13, 14, 34, 63, 64, 99, i32::MAX, i32::MIN];

#[test]
fn attributes_of_any_code_are_refused_by_name() {
    for (name, expected) in [("constraint", "a string"), ("sinkhorn_eps", "F64")] {
        let starts = format!("sinkhorn_fwd: attribute `{name}`: expected {expected}, got ");
        let got = |kind, value: &Typed| {
            let message = refused_attribute(name, kind, from_ref(value).cast());
            message.strip_prefix(&starts).expect(&message).to_owned()
        };
        let mut typed = Typed {
            dtype: F32,
            value_or_len: null(),
            value: null(),
        };
        assert_eq!(got(SCALAR, &typed), "F32");
        assert_eq!(got(ARRAY, &typed), "an array of F32");
        assert_eq!(got(DICTIONARY, &typed), "a dictionary");
        for code in CODES {
            typed.dtype = code;
            assert_eq!(got(SCALAR, &typed), format!("type {code}"));
            assert_eq!(got(ARRAY, &typed), format!("an array of type {code}"));
        }
        for kind in [0, 5, -1, i32::MAX] {
            assert_eq!(got(kind, &typed), format!("an attribute of kind {kind}"));
        }
    }
    let text = from_ref(&Text::new("1")).cast();
    let message = refused_attribute("sinkhorn_eps", STRING, text);
    assert!(message.ends_with("expected F64, got a string"), "{message}");
}

#[test]
fn every_type_with_a_name_is_named() {
    for code in (0..=F64).chain(15..=33).filter(|code| *code != F64) {
        let typed = Typed {
            dtype: code,
            value_or_len: null(),
            value: null(),
        };
        let message = refused_attribute("sinkhorn_eps", SCALAR, from_ref(&typed).cast());
        let (_, got) = message.split_once("got ").unwrap();
        assert!(!got.is_empty() && !got.starts_with("type "), "{message}");
    }
}

#[test]
fn buffers_of_any_code_are_refused_by_name() {
    let mut buffer = Buffer {
        struct_size: size_of::<Buffer>(),
        extension: null(),
        dtype: F32,
        data: null(),
        rank: 0,
        dims: null(),
    };
    for (role, is_arg) in [("operand", true), ("result", false)] {
        let refused = |kind, buffer: &Buffer| {
            let value = vec![(kind, from_ref(buffer).cast())];
            let (args, rets) = if is_arg {
                (value, vec![])
            } else {
                (vec![], value)
            };
            refusal(&Contents {
                args,
                rets,
                ..Contents::default()
            })
        };
        for kind in [0, 2, -1, i32::MAX] {
            let expected = format!("expected a buffer, got a value of kind {kind}");
            let message = refused(kind, &buffer);
            assert_eq!(message, format!("sinkhorn_fwd: {role} 0: {expected}"));
        }
        for code in CODES {
            buffer.dtype = code;
            let message = refused(BUFFER, &buffer);
            assert!(message.ends_with(&format!("got type {code}")), "{message}");
        }
        (buffer.dtype, buffer.rank) = (F32, -1);
        let message = refused(BUFFER, &buffer);
        assert!(
            message.ends_with("a rank of 0 or more, got -1"),
            "{message}"
        );
        buffer.rank = 0;
    }
}

#[test]
fn stages_of_any_code_are_refused() {
    for stage in [-1, 4, i32::MAX] {
        let message = refusal(&Contents {
            stage,
            ..Contents::default()
        });
        assert_eq!(message, format!("expected a known stage, got {stage}"));
    }
}

#[test]
fn products_of_dimensions_do_not_wrap() {
    let (mut memory, dims) = ([0.0_f32; 16], [1_i64, 4, 4]);
    let mut view = |dims| View {
        data: memory.as_mut_ptr().cast(),
        dims,
        dtype: DType::F32,
    };
    for [a, b] in [
        [1 << 62, 1 << 62],
        [1 << 32, 1 << 32],
        [1 << 59, 1],
        [i64::MAX, -1],
    ] {
        let (large, small) = ([a, b, 4, 4], view(&dims));
        let large = View {
            dims: &large,
            ..small
        };
        assert_eq!(large.num_bytes(), None);
        assert!(span(&large).is_empty());
        assert!(refuse_overlap(Call::SinkhornFwd, &[small], &[large]).is_ok());
        // SAFETY: refused.
        let call = |args: &[View], rets: &[View]| unsafe {
            let pool = &jax_mhc_kernels::cpu::Serial;
            cpu::run(Call::SinkhornFwd, args, rets, &Config::default(), pool)
        };
        assert!(matches!(call(&[large], &[large]), Err(Error::Refused(_))));
        assert!(matches!(call(&[small], &[large]), Err(Error::Refused(_))));
    }
    let high = View {
        data: std::ptr::without_provenance_mut(usize::MAX - 3),
        ..view(&dims)
    };
    assert!(span(&high).is_empty());
}

#[test]
fn every_op_has_handlers_of_its_own() {
    let addresses: std::collections::HashSet<usize> =
        [Entry::Cpu, Entry::CudaInitialize, Entry::CudaExecute]
            .into_iter()
            .flat_map(|entry| Call::ALL.map(|op| handler_address(entry, op)))
            .collect();
    assert_eq!(addresses.len(), 3 * Call::ALL.len());
}

#[test]
fn retired_calls_are_refused_whatever_they_hold() {
    let expected = format!(
        "jax_mhc: program: expected calls of version {TARGET_VERSION}, got those of an earlier version; "
    );
    let iters = Typed {
        dtype: 5,
        value_or_len: from_ref(&20_i64).cast(),
        value: null(),
    };
    let filled = Contents {
        attributes: vec![(Text::new("sinkhorn_iters"), SCALAR, from_ref(&iters).cast())],
        ..Contents::default()
    };
    for contents in [Contents::default(), filled] {
        let message = refusal_by(retired_handler_address(), &contents);
        assert!(message.starts_with(&expected), "{message}");
        assert!(message.contains("again"), "{message}");
    }
    for entry in [Entry::Cpu, Entry::CudaInitialize, Entry::CudaExecute] {
        let addresses = Call::ALL.map(|call| handler_address(entry, call));
        assert!(!addresses.contains(&retired_handler_address()));
    }
}

#[test]
fn a_panic_becomes_an_internal_error() {
    let panics: [fn() -> Result<(), Error>; 2] = [|| panic!("row {}", 7), || panic!("row 7")];
    for run in panics {
        let outcome = outcome(Call::PreFwd, run);
        assert!(outcome.code == bridge::Code::Internal);
        assert_eq!(outcome.message, "pre_fwd: panicked: row 7");
    }
}

#[test]
fn the_oldest_ffi_is_used() {
    assert_eq!(api_version(), (0, 1));
}

#[test]
fn a_result_must_not_lie_on_another_buffer() {
    let mut memory = [0f32; 8];
    let mut view = |offset: usize, dims| View {
        data: memory[offset..].as_mut_ptr().cast(),
        dims,
        dtype: DType::F32,
    };
    let (low, high, middle) = (view(0, &[4]), view(4, &[2, 2]), view(3, &[2]));
    assert!(refuse_overlap(Call::PostFwd, &[low], &[high]).is_ok());
    assert!(refuse_overlap(Call::PostFwd, &[low], &[middle]).is_err());
    assert!(refuse_overlap(Call::PostFwd, &[], &[low, middle]).is_err());
    assert!(refuse_overlap(Call::PostFwd, &[low], &[view(1, &[0])]).is_ok());
    // The first result of pre_bwd may be its last operand, and nothing else.
    assert!(refuse_overlap(Call::PreBwd, &[high, low], &[low]).is_ok());
    assert!(refuse_overlap(Call::PreBwd, &[low, high], &[low]).is_err());
    assert!(refuse_overlap(Call::PreBwd, &[high, low], &[middle]).is_err());
}

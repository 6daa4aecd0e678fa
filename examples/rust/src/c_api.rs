//! PJRT's C API, as far as this program calls it.
//!
//! The definitions are those of `pjrt_c_api.h`, `pjrt_c_api_ffi_extension.h` and
//! `pjrt_c_api_gpu_extension.h` of XLA (<https://github.com/openxla/xla>, `xla/pjrt/c`). Structs of one
//! major version grow at their ends alone, and a plugin refuses one that is smaller than its own.

use std::ffi::{c_char, c_int, c_void};
use std::ptr;

/// A function of the API: takes its arguments in one struct and writes what it returns there.
pub type Function<A> = Option<unsafe extern "C" fn(*mut A) -> *mut Error>;

/// A function of the API that cannot fail.
pub type Infallible<A> = Option<unsafe extern "C" fn(*mut A)>;

/// A function that this program does not call.
pub type Unused = *const c_void;

/// Types whose inside only the plugin knows.
macro_rules! opaque {
    ($($name:ident)*) => {$(
        #[doc = concat!("`PJRT_", stringify!($name), "`.")]
        #[repr(C)]
        pub struct $name([u8; 0]);
    )*};
}

opaque! { Buffer Client Device DeviceDescription Error Event Executable LoadedExecutable }

/// First fields of every struct that is handed over.
#[repr(C)]
pub struct Head {
    /// Size of the whole struct.
    pub struct_size: usize,
    /// List of extensions; null in arguments.
    pub extension_start: *const Extension,
}

/// Structs that begin with their size. Fields that are not named are zero.
macro_rules! sized_structs {
    ($($name:ident { $($field:ident: $type:ty),* $(,)? })*) => {$(
        #[doc = concat!("`PJRT_", stringify!($name), "`, or its `_Args`.")]
        #[repr(C)]
        #[allow(missing_docs, reason = "the names are those of XLA's header")]
        pub struct $name {
            pub head: Head,
            $(pub $field: $type,)*
        }

        impl Default for $name {
            fn default() -> Self {
                Self {
                    head: Head { struct_size: size_of::<Self>(), extension_start: ptr::null() },
                    $($field: Default::default(),)*
                }
            }
        }
    )*};
}

sized_structs! {
    ErrorDestroy { error: *mut Error }
    ErrorMessage { error: *const Error, message: *const c_char, message_size: usize }
    PluginInitialize {}
    EventAwait { event: *mut Event }
    EventDestroy { event: *mut Event }
    ClientCreate {
        create_options: *const c_void,
        num_options: usize,
        kv_get_callback: Unused,
        kv_get_user_arg: *const c_void,
        kv_put_callback: Unused,
        kv_put_user_arg: *const c_void,
        client: *mut Client,
        kv_try_get_callback: Unused,
        kv_try_get_user_arg: *const c_void,
    }
    ClientDestroy { client: *mut Client }
    ClientPlatformName {
        client: *mut Client,
        platform_name: *const c_char,
        platform_name_size: usize,
    }
    ClientAddressableDevices {
        client: *mut Client,
        addressable_devices: *const *mut Device,
        num_addressable_devices: usize,
    }
    DeviceGetDescription { device: *mut Device, device_description: *mut DeviceDescription }
    DeviceDescriptionKind {
        device_description: *mut DeviceDescription,
        device_kind: *const c_char,
        device_kind_size: usize,
    }
    Program {
        code: *const c_char,
        code_size: usize,
        format: *const c_char,
        format_size: usize,
    }
    ClientCompile {
        client: *mut Client,
        program: *const Program,
        compile_options: *const c_char,
        compile_options_size: usize,
        executable: *mut LoadedExecutable,
    }
    BufferFromHostBuffer {
        client: *mut Client,
        data: *const c_void,
        r#type: c_int,
        dims: *const i64,
        num_dims: usize,
        byte_strides: *const i64,
        num_byte_strides: usize,
        host_buffer_semantics: c_int,
        device: *mut Device,
        memory: *mut c_void,
        device_layout: *mut c_void,
        done_with_host_buffer: *mut Event,
        buffer: *mut Buffer,
    }
    LoadedExecutableDestroy { executable: *mut LoadedExecutable }
    LoadedExecutableGetExecutable {
        loaded_executable: *mut LoadedExecutable,
        executable: *mut Executable,
    }
    ExecutableDestroy { executable: *mut Executable }
    ExecutableNumOutputs { executable: *mut Executable, num_outputs: usize }
    // Fields: 12 in version 0.81 and 16 in 0.114, with room for more; this program sets none.
    ExecuteOptions { unset: [usize; 30] }
    LoadedExecutableExecute {
        executable: *mut LoadedExecutable,
        options: *mut ExecuteOptions,
        argument_lists: *const *const *mut Buffer,
        num_devices: usize,
        num_args: usize,
        output_lists: *const *mut *mut Buffer,
        device_complete_events: *mut *mut Event,
        execute_device: *mut Device,
    }
    BufferDestroy { buffer: *mut Buffer }
    BufferElementType { buffer: *mut Buffer, r#type: c_int }
    BufferDimensions { buffer: *mut Buffer, dims: *const i64, num_dims: usize }
    BufferToHostBuffer {
        src: *mut Buffer,
        host_layout: *mut c_void,
        dst: *mut c_void,
        dst_size: usize,
        event: *mut Event,
    }
}

/// `PJRT_Buffer_Type_F32`.
pub const F32: c_int = 11;

/// `PJRT_HostBufferSemantics_kImmutableOnlyDuringCall`: the plugin copies the data before it returns.
pub const IMMUTABLE_ONLY_DURING_CALL: c_int = 0;

/// `PJRT_Api_Version`.
#[repr(C)]
#[derive(Debug)]
pub struct Version {
    struct_size: usize,
    extension_start: *const c_void,
    /// Number that rises when structs change otherwise than at their ends.
    pub major: c_int,
    /// Number that rises when structs grow.
    pub minor: c_int,
}

/// `PJRT_Api` up to the last function that is called here.
#[repr(C)]
#[allow(missing_docs, reason = "the names are those of XLA's header")]
pub struct Api {
    pub head: Head,
    pub version: Version,

    pub error_destroy: Infallible<ErrorDestroy>,
    pub error_message: Infallible<ErrorMessage>,
    error_get_code: Unused,

    pub plugin_initialize: Function<PluginInitialize>,
    plugin_attributes: Unused,

    pub event_destroy: Function<EventDestroy>,
    event_is_ready: Unused,
    event_error: Unused,
    pub event_await: Function<EventAwait>,
    event_on_ready: Unused,

    pub client_create: Function<ClientCreate>,
    pub client_destroy: Function<ClientDestroy>,
    pub client_platform_name: Function<ClientPlatformName>,
    client_process_index: Unused,
    client_platform_version: Unused,
    client_devices: Unused,
    pub client_addressable_devices: Function<ClientAddressableDevices>,
    client_lookup_device: Unused,
    client_lookup_addressable_device: Unused,
    client_addressable_memories: Unused,
    pub client_compile: Function<ClientCompile>,
    client_default_device_assignment: Unused,
    pub client_buffer_from_host_buffer: Function<BufferFromHostBuffer>,

    device_description_id: Unused,
    device_description_process_index: Unused,
    device_description_attributes: Unused,
    pub device_description_kind: Function<DeviceDescriptionKind>,
    device_description_debug_string: Unused,
    device_description_to_string: Unused,

    pub device_get_description: Function<DeviceGetDescription>,
    /// Functions from `PJRT_Device_IsAddressable` to `PJRT_Device_MemoryStats`.
    device: [Unused; 5],

    /// Functions from `PJRT_Memory_Id` to `PJRT_Memory_AddressableByDevices`.
    memory: [Unused; 5],

    pub executable_destroy: Function<ExecutableDestroy>,
    executable_name: Unused,
    executable_num_replicas: Unused,
    executable_num_partitions: Unused,
    pub executable_num_outputs: Function<ExecutableNumOutputs>,
    executable_size_of_generated_code_in_bytes: Unused,
    executable_get_cost_analysis: Unused,
    executable_output_memory_kinds: Unused,
    executable_optimized_program: Unused,
    executable_serialize: Unused,

    pub loaded_executable_destroy: Function<LoadedExecutableDestroy>,
    pub loaded_executable_get_executable: Function<LoadedExecutableGetExecutable>,
    loaded_executable_addressable_devices: Unused,
    loaded_executable_delete: Unused,
    loaded_executable_is_deleted: Unused,
    pub loaded_executable_execute: Function<LoadedExecutableExecute>,
    executable_deserialize_and_load: Unused,
    loaded_executable_fingerprint: Unused,

    pub buffer_destroy: Function<BufferDestroy>,
    pub buffer_element_type: Function<BufferElementType>,
    pub buffer_dimensions: Function<BufferDimensions>,
    buffer_unpadded_dimensions: Unused,
    buffer_dynamic_dimension_indices: Unused,
    buffer_get_memory_layout: Unused,
    buffer_on_device_size_in_bytes: Unused,
    buffer_device: Unused,
    buffer_memory: Unused,
    buffer_delete: Unused,
    buffer_is_deleted: Unused,
    buffer_copy_to_device: Unused,
    pub buffer_to_host_buffer: Function<BufferToHostBuffer>,
}

/// `PJRT_Extension_Base`: first fields of every extension.
#[repr(C)]
pub struct Extension {
    /// Size of the whole struct.
    pub struct_size: usize,
    /// Number of the struct's type.
    pub kind: c_int,
    /// Next extension of the list, or null.
    pub next: *const Self,
}

/// An extension of the API, by the number that its struct begins with.
///
/// # Safety
/// The struct is what plugins have under this number.
pub unsafe trait Kind {
    /// `PJRT_Extension_Type` of the struct.
    const KIND: c_int;
    /// Purpose of the extension, for errors.
    const PURPOSE: &'static str;
}

/// `PJRT_Gpu_Custom_Call`.
#[repr(C)]
pub struct GpuCustomCall {
    base: Extension,
    /// Registers the handlers of a call, one for each stage.
    pub custom_call: Function<GpuRegisterCustomCall>,
}

// SAFETY: as XLA's header has it.
unsafe impl Kind for GpuCustomCall {
    const KIND: c_int = 0;
    const PURPOSE: &'static str = "custom calls on GPUs";
}

/// `PJRT_Gpu_Register_Custom_Call_Args`, without a pointer to extensions.
#[repr(C)]
pub struct GpuRegisterCustomCall {
    /// Size of the struct, that of version 2. The traits of version 3 are those that handlers tell themselves.
    pub struct_size: usize,
    /// Name of the call.
    pub function_name: *const c_char,
    /// Length of that name.
    pub function_name_size: usize,
    /// 1: XLA's FFI.
    pub api_version: c_int,
    /// Handler of a stage, or null.
    pub handler_instantiate: *const c_void,
    /// Handler of a stage, or null.
    pub handler_prepare: *const c_void,
    /// Handler of a stage, or null.
    pub handler_initialize: *const c_void,
    /// Handler of the last stage.
    pub handler_execute: *const c_void,
}

/// `PJRT_FFI_Extension`.
#[repr(C)]
pub struct Ffi {
    base: Extension,
    type_register: Unused,
    user_data_add: Unused,
    /// Registers the handler of a call that has one stage.
    pub register_handler: Function<FfiRegisterHandler>,
}

// SAFETY: as XLA's header has it.
unsafe impl Kind for Ffi {
    const KIND: c_int = 5;
    const PURPOSE: &'static str = "XLA's FFI";
}

/// `PJRT_FFI_Register_Handler_Args`, without a pointer to extensions.
#[repr(C)]
pub struct FfiRegisterHandler {
    /// Size of the struct.
    pub struct_size: usize,
    /// Name of the call.
    pub target_name: *const c_char,
    /// Length of that name.
    pub target_name_size: usize,
    /// Handler of the stage.
    pub handler: *const c_void,
    /// Name of a platform.
    pub platform_name: *const c_char,
    /// Length of that name.
    pub platform_name_size: usize,
    /// Traits besides those that the handler tells itself.
    pub traits: u32,
    /// Zero, where the struct would have padding.
    pub padding: u32,
}

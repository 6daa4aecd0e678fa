//! PJRT's C API in safe Rust: a plugin, its client, programs and buffers on its first device.

use std::error::Error;
use std::ffi::{c_char, c_void};
use std::path::Path;
use std::{ptr, slice};

use libloading::Library;

use crate::c_api::{self as c, Api, Function};

/// A tensor of float32 numbers in the memory of the process.
#[derive(Debug)]
pub struct Tensor {
    /// Size of each dimension.
    pub dims: Vec<i64>,
    /// Numbers, the last dimension the fastest.
    pub numbers: Vec<f32>,
}

/// Minor version of the oldest C API that this program knows: that of XLA in November 2025.
const OLDEST_MINOR: i32 = 81;

/// `CompileOptionsProto { executable_build_options { num_replicas: 1, num_partitions: 1 } }`, serialised.
const ONE_DEVICE: &[u8] = &[0x1a, 4, 0x20, 1, 0x28, 1];

/// Loads a shared library until the process ends: plugins start threads, and XLA keeps handlers.
///
/// # Errors
/// The loader's own.
///
/// # Safety
/// The library may be loaded at any time.
pub unsafe fn open(path: &Path) -> Result<&'static Library, String> {
    // SAFETY: promised by the caller.
    match unsafe { Library::new(path) } {
        Ok(library) => Ok(Box::leak(Box::new(library))),
        Err(error) => {
            let loader = error.source().map_or(String::new(), ToString::to_string);
            Err(format!("cannot be loaded: {loader}"))
        }
    }
}

/// A PJRT plugin, loaded until the process ends.
#[derive(Clone, Copy)]
pub struct Plugin {
    api: &'static Api,
}

impl Plugin {
    /// Loads and initialises the plugin in a shared library.
    ///
    /// # Errors
    /// The library cannot be loaded, is no plugin, or is one of another version.
    ///
    /// # Safety
    /// The library keeps to the rules of PJRT's C API.
    pub unsafe fn load(path: &Path) -> Result<Self, String> {
        let fail = |reason: String| format!("plugin {}: {reason}", path.display());
        // SAFETY: promised by the caller.
        let library = unsafe { open(path) }.map_err(fail)?;
        // SAFETY: promised by the caller.
        let get = unsafe { library.get::<unsafe extern "C" fn() -> *const Api>(c"GetPjrtApi") };
        let Ok(get) = get else {
            return Err(fail(
                "expected a PJRT plugin, got a library without the function GetPjrtApi".into(),
            ));
        };
        // SAFETY: promised by the caller. Older tables are smaller than `Api`, and are not read beyond the version.
        let version = unsafe { &(*get()).version };
        if version.major != 0 || version.minor < OLDEST_MINOR {
            return Err(fail(format!(
                "expected version 0.{OLDEST_MINOR} or a later 0.x of PJRT's C API, got {}.{}; install another one",
                version.major, version.minor
            )));
        }
        // SAFETY: the table has the fields of `Api` since that version, and lives as long as the library.
        let api = unsafe { &*get() };
        let plugin = Self { api };
        plugin
            .call(plugin.api.plugin_initialize, &mut Default::default())
            .map_err(|reason| fail(format!("cannot be initialised: {reason}")))?;
        Ok(plugin)
    }

    /// Version of the plugin's C API.
    pub fn version(self) -> String {
        format!("{}.{}", self.api.version.major, self.api.version.minor)
    }

    /// Registers the handler of a call for a platform, which has one stage.
    ///
    /// # Errors
    /// The plugin has no FFI, or refuses the handler.
    ///
    /// # Safety
    /// `execute` is a handler of XLA's FFI.
    pub unsafe fn register(
        self,
        name: &str,
        platform: &str,
        execute: *const c_void,
    ) -> Result<(), String> {
        let mut args = c::FfiRegisterHandler {
            struct_size: size_of::<c::FfiRegisterHandler>(),
            target_name: name.as_ptr().cast(),
            target_name_size: name.len(),
            handler: execute,
            platform_name: platform.as_ptr().cast(),
            platform_name_size: platform.len(),
            traits: 0,
            padding: 0,
        };
        self.call(self.extension::<c::Ffi>()?.register_handler, &mut args)
    }

    /// Registers the handlers of a call on GPUs, which has a stage before its execution or none.
    ///
    /// # Errors
    /// The plugin is not for GPUs, or refuses the handlers.
    ///
    /// # Safety
    /// `initialize` is a handler of XLA's FFI or null, and `execute` is one.
    pub unsafe fn register_on_gpus(
        self,
        name: &str,
        initialize: *const c_void,
        execute: *const c_void,
    ) -> Result<(), String> {
        let mut args = c::GpuRegisterCustomCall {
            struct_size: size_of::<c::GpuRegisterCustomCall>(),
            function_name: name.as_ptr().cast(),
            function_name_size: name.len(),
            api_version: 1,
            handler_instantiate: ptr::null(),
            handler_prepare: ptr::null(),
            handler_initialize: initialize,
            handler_execute: execute,
        };
        self.call(self.extension::<c::GpuCustomCall>()?.custom_call, &mut args)
    }

    /// Connects to the devices of this machine.
    ///
    /// # Errors
    /// There are none, or they cannot be used.
    pub fn client(self) -> Result<Client, String> {
        let mut args = c::ClientCreate::default();
        self.call(self.api.client_create, &mut args)?;
        let mut client = Client {
            plugin: self,
            raw: args.client,
            device: ptr::null_mut(),
        };
        let mut args = c::ClientAddressableDevices {
            client: client.raw,
            ..Default::default()
        };
        self.call(self.api.client_addressable_devices, &mut args)?;
        // SAFETY: the plugin lists as many devices as it says.
        let devices = unsafe { list(args.addressable_devices, args.num_addressable_devices) };
        client.device = *devices.first().ok_or("the plugin has no device")?;
        Ok(client)
    }

    /// The extension of a kind.
    fn extension<E: c::Kind>(self) -> Result<&'static E, String> {
        let mut next = self.api.head.extension_start;
        // SAFETY: extensions form a list that ends with null, and live as long as the plugin.
        while let Some(extension) = unsafe { next.as_ref() } {
            if extension.kind == E::KIND && extension.struct_size >= size_of::<E>() {
                // SAFETY: `Kind` promises this type, and the struct is large enough.
                return Ok(unsafe { &*next.cast() });
            }
            next = extension.next;
        }
        Err(format!(
            "expected PJRT's extension for {}, got a plugin without it",
            E::PURPOSE
        ))
    }

    /// Calls a function of the API.
    fn call<A>(self, function: Function<A>, args: &mut A) -> Result<(), String> {
        let function = function.ok_or("the plugin lacks a function of PJRT's C API")?;
        // SAFETY: the function is that of the API for these arguments; callers give them pointers that live.
        let error = unsafe { function(args) };
        if error.is_null() {
            return Ok(());
        }
        let mut message = c::ErrorMessage {
            error,
            ..Default::default()
        };
        let mut destroy = c::ErrorDestroy {
            error,
            ..Default::default()
        };
        let text = if let Some(tell) = self.api.error_message {
            // SAFETY: `error` lives until it is destroyed below.
            unsafe {
                tell(&mut message);
                text(message.message, message.message_size)
            }
        } else {
            String::new()
        };
        if let Some(function) = self.api.error_destroy {
            // SAFETY: the error is not used any more.
            unsafe { function(&mut destroy) };
        }
        // XLA's messages have several lines, some of them empty.
        Err(text
            .split('\n')
            .filter(|line| !line.is_empty())
            .collect::<Vec<_>>()
            .join("; "))
    }

    /// Waits for an event, and destroys it.
    fn wait(self, event: *mut c::Event) -> Result<(), String> {
        let mut args = c::EventAwait {
            event,
            ..Default::default()
        };
        let outcome = self.call(self.api.event_await, &mut args);
        let mut args = c::EventDestroy {
            event,
            ..Default::default()
        };
        outcome.and(self.call(self.api.event_destroy, &mut args))
    }
}

/// The text of a string that the plugin owns.
///
/// # Safety
/// `start` has `length` bytes.
unsafe fn text(start: *const c_char, length: usize) -> String {
    // SAFETY: promised by the caller.
    String::from_utf8_lossy(unsafe { list(start.cast(), length) }).into_owned()
}

/// A list that the plugin owns; it may be null where it is empty.
///
/// # Safety
/// `start` has `length` elements, which live as long as the result.
unsafe fn list<'a, T>(start: *const T, length: usize) -> &'a [T] {
    if length == 0 {
        return &[];
    }
    // SAFETY: promised by the caller.
    unsafe { slice::from_raw_parts(start, length) }
}

/// A connection to the devices of this machine.
pub struct Client {
    plugin: Plugin,
    raw: *mut c::Client,
    device: *mut c::Device,
}

impl Client {
    /// Name of the platform, such as `cpu` or `cuda`.
    ///
    /// # Errors
    /// The plugin does not tell it.
    pub fn platform(&self) -> Result<String, String> {
        let mut args = c::ClientPlatformName {
            client: self.raw,
            ..Default::default()
        };
        (self.plugin).call(self.plugin.api.client_platform_name, &mut args)?;
        // SAFETY: the name lives as long as the client.
        Ok(unsafe { text(args.platform_name, args.platform_name_size) })
    }

    /// Kind of the device that everything runs on.
    ///
    /// # Errors
    /// The plugin does not tell it.
    pub fn device(&self) -> Result<String, String> {
        let mut args = c::DeviceGetDescription {
            device: self.device,
            ..Default::default()
        };
        (self.plugin).call(self.plugin.api.device_get_description, &mut args)?;
        let mut args = c::DeviceDescriptionKind {
            device_description: args.device_description,
            ..Default::default()
        };
        (self.plugin).call(self.plugin.api.device_description_kind, &mut args)?;
        // SAFETY: the text lives as long as the client.
        Ok(unsafe { text(args.device_kind, args.device_kind_size) })
    }

    /// Compiles a program in MLIR, text or bytecode, for one device.
    ///
    /// # Errors
    /// XLA's own.
    pub fn compile(&self, code: &[u8]) -> Result<Program<'_>, String> {
        let format = "mlir";
        let program = c::Program {
            code: code.as_ptr().cast(),
            code_size: code.len(),
            format: format.as_ptr().cast(),
            format_size: format.len(),
            ..Default::default()
        };
        let mut args = c::ClientCompile {
            client: self.raw,
            program: &program,
            compile_options: ONE_DEVICE.as_ptr().cast(),
            compile_options_size: ONE_DEVICE.len(),
            ..Default::default()
        };
        (self.plugin).call(self.plugin.api.client_compile, &mut args)?;
        let mut program = Program {
            client: self,
            raw: args.executable,
            num_results: 0,
        };
        program.num_results = program.count_results()?;
        Ok(program)
    }

    /// Copies a tensor to the device.
    ///
    /// # Errors
    /// There is not enough memory, for example.
    ///
    /// # Panics
    /// The tensor has not as many numbers as its dimensions say.
    pub fn upload(&self, tensor: &Tensor) -> Result<Buffer<'_>, String> {
        let size: i64 = tensor.dims.iter().product();
        assert_eq!(usize::try_from(size), Ok(tensor.numbers.len()));
        let mut args = c::BufferFromHostBuffer {
            client: self.raw,
            data: tensor.numbers.as_ptr().cast(),
            r#type: c::F32,
            dims: tensor.dims.as_ptr(),
            num_dims: tensor.dims.len(),
            host_buffer_semantics: c::IMMUTABLE_ONLY_DURING_CALL,
            device: self.device,
            ..Default::default()
        };
        (self.plugin).call(self.plugin.api.client_buffer_from_host_buffer, &mut args)?;
        let buffer = Buffer {
            client: self,
            raw: args.buffer,
        };
        self.plugin.wait(args.done_with_host_buffer)?;
        Ok(buffer)
    }
}

impl Drop for Client {
    fn drop(&mut self) {
        let mut args = c::ClientDestroy {
            client: self.raw,
            ..Default::default()
        };
        // Errors have nobody left to be told.
        let _ = (self.plugin).call(self.plugin.api.client_destroy, &mut args);
    }
}

/// A compiled program.
pub struct Program<'a> {
    client: &'a Client,
    raw: *mut c::LoadedExecutable,
    num_results: usize,
}

impl<'a> Program<'a> {
    /// Number of results.
    pub fn num_results(&self) -> usize {
        self.num_results
    }

    fn count_results(&self) -> Result<usize, String> {
        let plugin = self.client.plugin;
        let mut args = c::LoadedExecutableGetExecutable {
            loaded_executable: self.raw,
            ..Default::default()
        };
        plugin.call(plugin.api.loaded_executable_get_executable, &mut args)?;
        let executable = args.executable;
        let mut args = c::ExecutableNumOutputs {
            executable,
            ..Default::default()
        };
        let outcome = plugin.call(plugin.api.executable_num_outputs, &mut args);
        let mut destroy = c::ExecutableDestroy {
            executable,
            ..Default::default()
        };
        plugin.call(plugin.api.executable_destroy, &mut destroy)?;
        outcome.map(|()| args.num_outputs)
    }

    /// Runs the program, and waits for its end.
    ///
    /// # Errors
    /// The errors of the handlers that the program calls, and XLA's own.
    pub fn run(&self, arguments: &[Buffer<'a>]) -> Result<Vec<Buffer<'a>>, String> {
        let plugin = self.client.plugin;
        let mut options = c::ExecuteOptions::default();
        // Lists of one device each.
        let arguments: Vec<_> = arguments.iter().map(|buffer| buffer.raw).collect();
        let argument_lists = [arguments.as_ptr()];
        let mut results = vec![ptr::null_mut(); self.num_results];
        let result_lists = [results.as_mut_ptr()];
        let mut done = [ptr::null_mut()];
        let mut args = c::LoadedExecutableExecute {
            executable: self.raw,
            options: &mut options,
            argument_lists: argument_lists.as_ptr(),
            num_devices: 1,
            num_args: arguments.len(),
            output_lists: result_lists.as_ptr(),
            device_complete_events: done.as_mut_ptr(),
            ..Default::default()
        };
        plugin.call(plugin.api.loaded_executable_execute, &mut args)?;
        let own = |raw| Buffer {
            client: self.client,
            raw,
        };
        let results: Vec<_> = results.into_iter().map(own).collect();
        plugin.wait(done[0])?;
        Ok(results)
    }
}

impl Drop for Program<'_> {
    fn drop(&mut self) {
        let mut args = c::LoadedExecutableDestroy {
            executable: self.raw,
            ..Default::default()
        };
        let plugin = self.client.plugin;
        // Errors have nobody left to be told.
        let _ = plugin.call(plugin.api.loaded_executable_destroy, &mut args);
    }
}

/// A tensor on the device.
pub struct Buffer<'a> {
    client: &'a Client,
    raw: *mut c::Buffer,
}

impl Buffer<'_> {
    /// Copies the tensor to the memory of the process.
    ///
    /// # Errors
    /// The buffer is not of float32, or what computes it failed.
    pub fn download(&self) -> Result<Tensor, String> {
        let plugin = self.client.plugin;
        let mut args = c::BufferElementType {
            buffer: self.raw,
            ..Default::default()
        };
        plugin.call(plugin.api.buffer_element_type, &mut args)?;
        if args.r#type != c::F32 {
            return Err(format!(
                "expected a buffer of float32, PJRT's type {}, got type {}",
                c::F32,
                args.r#type
            ));
        }
        let mut args = c::BufferDimensions {
            buffer: self.raw,
            ..Default::default()
        };
        plugin.call(plugin.api.buffer_dimensions, &mut args)?;
        // SAFETY: the plugin lists as many dimensions as it says, and they are copied at once.
        let dims = unsafe { list(args.dims, args.num_dims) }.to_vec();
        let size: i64 = dims.iter().product();
        let mut numbers = vec![0.0; usize::try_from(size).map_err(|error| error.to_string())?];
        let mut args = c::BufferToHostBuffer {
            src: self.raw,
            dst: numbers.as_mut_ptr().cast(),
            dst_size: size_of_val(numbers.as_slice()),
            ..Default::default()
        };
        plugin.call(plugin.api.buffer_to_host_buffer, &mut args)?;
        plugin.wait(args.event)?;
        Ok(Tensor { dims, numbers })
    }
}

impl Drop for Buffer<'_> {
    fn drop(&mut self) {
        let mut args = c::BufferDestroy {
            buffer: self.raw,
            ..Default::default()
        };
        let plugin = self.client.plugin;
        // Errors have nobody left to be told.
        let _ = plugin.call(plugin.api.buffer_destroy, &mut args);
    }
}

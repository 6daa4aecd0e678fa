//! Compiles the C++ half against XLA's FFI header alone.

fn main() {
    println!("cargo::rerun-if-env-changed=XLA_FFI_INCLUDE_DIR");
    println!("cargo::rerun-if-changed=src/frame.cc");
    println!("cargo::rerun-if-changed=src/frame.h");
    let Some(include_dir) = std::env::var_os("XLA_FFI_INCLUDE_DIR") else {
        println!(
            "cargo::error=XLA_FFI_INCLUDE_DIR is not set: point it at the folder `jaxlib/include` of \
             the wheel of jaxlib 0.8.0, as `make test` and `make fuzz` do"
        );
        return;
    };
    cc::Build::new()
        .cpp(true)
        .std("c++17")
        .file("src/frame.cc")
        .flag("-isystem")
        .flag(include_dir)
        .warnings(true)
        .extra_warnings(true)
        .compile("jax_mhc_frame");
    // A library under AddressSanitizer takes the sanitizer's functions from the program that loads it.
    println!("cargo::rustc-link-arg-bins=-rdynamic");
}

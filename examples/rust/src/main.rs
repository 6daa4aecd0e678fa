//! Runs a program that was exported from JAX, with jax-mhc's kernels and without Python, and compares its
//! results with those of JAX.

mod c_api;
mod exported;
mod handlers;
mod pjrt;

use std::path::PathBuf;
use std::process::ExitCode;

use lexopt::prelude::*;

use pjrt::{Plugin, Tensor};

const HELP: &str = "\
Runs a program that examples/rust/export.py wrote, and compares its results with those of JAX.

jax-mhc-run --plugin PATH --library PATH FOLDER

  --plugin PATH    a PJRT plugin, such as xla_cuda_plugin.so of jax-cuda13-pjrt
  --library PATH   libjax_mhc_xla.so of jax-mhc
  FOLDER           what export.py wrote

Ends with 0 where the results are those of JAX, with 1 where they are others, with 2 where it could not run.";

/// Difference of results that is rounding, as a part of the largest number of a result.
const TOLERANCE: f32 = 1e-5;

/// On a GPU XLA executes some programs once, and from then on replays what it recorded.
const RUNS: usize = 3;

struct Options {
    plugin: PathBuf,
    library: PathBuf,
    folder: PathBuf,
}

/// Reads the command line; ends the process where it asks for help.
fn parse() -> Result<Options, lexopt::Error> {
    let (mut plugin, mut library, mut folder) = (None, None, None);
    let mut parser = lexopt::Parser::from_env();
    while let Some(argument) = parser.next()? {
        match argument {
            Long("plugin") => plugin = Some(parser.value()?.into()),
            Long("library") => library = Some(parser.value()?.into()),
            Long("help") | Short('h') => {
                println!("{HELP}");
                std::process::exit(0);
            }
            Value(value) if folder.is_none() => folder = Some(value.into()),
            _ => return Err(argument.unexpected()),
        }
    }
    Ok(Options {
        plugin: plugin.ok_or("--plugin is missing; see --help")?,
        library: library.ok_or("--library is missing; see --help")?,
        folder: folder.ok_or("FOLDER is missing; see --help")?,
    })
}

/// The largest difference of two tensors of one shape, as a part of the largest number expected.
fn difference(got: &Tensor, expected: &Tensor) -> f32 {
    let most = |numbers: &mut dyn Iterator<Item = f32>| {
        // A NaN anywhere is the result; `f32::max` would drop it.
        numbers.fold(0.0, |most: f32, number| {
            if number > most || number.is_nan() {
                number
            } else {
                most
            }
        })
    };
    let pairs = got.numbers.iter().zip(&expected.numbers);
    let apart = most(&mut pairs.map(|(got, expected)| (got - expected).abs()));
    if apart == 0.0 {
        return 0.0;
    }
    apart / most(&mut expected.numbers.iter().map(|number| number.abs()))
}

/// Runs everything; false where a result is not that of JAX.
fn run(options: &Options) -> Result<bool, String> {
    let exported = exported::read(&options.folder)?;
    let platform = &exported.platform;
    // SAFETY: the user names a plugin and the library of jax-mhc; both are checked as far as can be.
    let (plugin, library) = unsafe {
        (
            Plugin::load(&options.plugin)?,
            handlers::load(&options.library)?,
        )
    };
    let in_plugin = |reason| format!("plugin {}: {reason}", options.plugin.display());
    let in_program = |reason| format!("program {}: {reason}", options.folder.display());
    let num = library.count(platform);
    if num == 0 {
        return Err(format!(
            "library {}: expected handlers for {platform}, got a build without any",
            options.library.display()
        ));
    }
    library.register(plugin, platform).map_err(in_plugin)?;
    println!(
        "registered the handlers of {num} calls for {platform}: jax-mhc {}, PJRT {}",
        library.version,
        plugin.version()
    );

    let client = plugin.client().map_err(in_plugin)?;
    let found = client.platform()?;
    if found != *platform {
        return Err(in_plugin(format!(
            "expected one for {platform}, which the program was exported for, got one for {found}"
        )));
    }
    println!("device: {}", client.device()?);
    let program = client.compile(&exported.code).map_err(|reason| {
        let version = &library.version;
        in_program(format!(
            "{reason}; export it again with jax-mhc {version}, that of the library"
        ))
    })?;
    if program.num_results() != exported.results.len() {
        return Err(in_program(format!(
            "expected the {} results of values.json, got {}",
            exported.results.len(),
            program.num_results()
        )));
    }
    let arguments = (exported.arguments.iter())
        .map(|(_, tensor)| client.upload(tensor))
        .collect::<Result<Vec<_>, _>>()?;

    let mut is_right = true;
    for run in 1..=RUNS {
        let results = program.run(&arguments).map_err(in_program)?;
        for (result, (name, expected)) in results.iter().zip(&exported.results) {
            let got = result.download().map_err(in_program)?;
            if got.dims != expected.dims {
                return Err(in_program(format!(
                    "{name}: expected dimensions {:?}, got {:?}",
                    expected.dims, got.dims
                )));
            }
            let difference = difference(&got, expected);
            // A NaN is in no order, and so not close.
            let is_close = difference <= TOLERANCE;
            is_right &= is_close;
            if run == 1 || !is_close {
                println!(
                    "run {run}, {name} {:?}: difference {difference:.1e}",
                    got.dims
                );
            }
        }
    }
    println!(
        "{} in {RUNS} runs, where a difference up to {TOLERANCE:.0e} of the largest number is rounding",
        if is_right {
            "the results are those of JAX"
        } else {
            "results are NOT those of JAX"
        }
    );
    Ok(is_right)
}

fn main() -> ExitCode {
    match parse()
        .map_err(|error| error.to_string())
        .and_then(|options| run(&options))
    {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("jax-mhc-run: {error}");
            ExitCode::from(2)
        }
    }
}

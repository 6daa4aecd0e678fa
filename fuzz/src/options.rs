//! The command line.

use std::path::PathBuf;

use lexopt::prelude::*;

const HELP: &str = "\
Hands made-up call frames to the handlers of jax-mhc's shared library and checks what becomes of them.

  --library PATH   the shared library [the one beside this program]
  --frames N       how many frames [100000]
  --seed N         the first frame's seed; the next ones follow [1]
  --jobs N         processes [1]
  --seconds N      end after so long, whatever is left
  --record PATH    write what came out as JSON
  --verbose        print every frame before it is called

Ends with 0 where nothing was found, with 1 where something was, with 2 where it could not run.";

/// Options of the command line.
#[derive(Debug, Clone)]
pub struct Options {
    /// The shared library.
    pub library: PathBuf,
    /// Number of frames.
    pub frames: u64,
    /// Seed of the first.
    pub seed: u64,
    /// Processes.
    pub jobs: u64,
    /// When to end.
    pub seconds: Option<f64>,
    /// Path of the record.
    pub record: Option<PathBuf>,
    /// Whether frames are printed.
    pub verbose: bool,
    /// File that a worker shares with the process that started it; None in that process.
    pub board: Option<PathBuf>,
}

/// Reads the command line; ends the process where it asks for help.
///
/// # Errors
/// An option that is unknown.
pub fn parse() -> Result<Options, String> {
    let beside = std::env::current_exe()
        .map_err(|error| error.to_string())?
        .with_file_name("libjax_mhc_xla.so");
    let mut options = Options {
        library: beside,
        frames: 100_000,
        seed: 1,
        jobs: 1,
        seconds: None,
        record: None,
        verbose: false,
        board: None,
    };
    let mut parser = lexopt::Parser::from_env();
    let mut read = || -> Result<(), lexopt::Error> {
        while let Some(argument) = parser.next()? {
            match argument {
                Long("library") => options.library = parser.value()?.into(),
                Long("frames") => options.frames = parser.value()?.parse()?,
                Long("seed") => options.seed = parser.value()?.parse()?,
                Long("jobs") => options.jobs = parser.value()?.parse()?,
                Long("seconds") => options.seconds = Some(parser.value()?.parse()?),
                Long("record") => options.record = Some(parser.value()?.into()),
                Long("verbose") => options.verbose = true,
                Long("board") => options.board = Some(parser.value()?.into()),
                Long("help") | Short('h') => {
                    println!("{HELP}");
                    std::process::exit(0);
                }
                other => return Err(other.unexpected()),
            }
        }
        Ok(())
    };
    read().map_err(|error| format!("{error}; --help lists the options"))?;
    if options.jobs == 0 || options.frames == 0 {
        return Err("--jobs, --frames: expected 1 or more, got 0".into());
    }
    Ok(options)
}

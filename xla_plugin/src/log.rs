//! The log: what the library does, on standard error, from the level in `JAX_MHC_LOG` on (docs/logging.md).

use std::ffi::OsStr;
use std::io::{self, Write};
use std::str::FromStr;

use serde::Serialize;
use tracing_subscriber::filter::LevelFilter;

/// The variable that sets the level.
const VARIABLE: &str = "JAX_MHC_LOG";

/// The state of the log, as the library describes it.
#[derive(Debug, Serialize)]
pub struct Log {
    /// Lowest level that is logged.
    level: String,
    /// Error of the variable's value, if it has one.
    error: Option<String>,
}

/// Starts the log, in which nothing is written by default. A wrong level is a warning in it.
pub fn start() -> Log {
    let (level, error) = level(std::env::var_os(VARIABLE).as_deref());
    if level != LevelFilter::OFF {
        let subscriber = tracing_subscriber::fmt()
            .with_max_level(level)
            .with_ansi(false)
            .with_writer(|| StandardError)
            .log_internal_errors(false)
            .finish();
        // This copy of tracing is the library's own, and its only subscriber this one.
        let _ = tracing::subscriber::set_global_default(subscriber);
    }
    if let Some(error) = &error {
        tracing::warn!(target: "jax_mhc", "{error}");
    }
    let level = level.to_string();
    Log { level, error }
}

/// The level that a value of the variable asks for, and what is wrong with it.
fn level(value: Option<&OsStr>) -> (LevelFilter, Option<String>) {
    let value = value.unwrap_or_default();
    if value.is_empty() {
        return (LevelFilter::OFF, None);
    }
    match value.to_str().map(LevelFilter::from_str) {
        Some(Ok(level)) => (level, None),
        _ => {
            let error = format!(
                "{VARIABLE}: expected off, error, warn, info, debug or trace, got {value:?}; errors and \
                 warnings alone are logged"
            );
            (LevelFilter::WARN, Some(error))
        }
    }
}

/// Standard error, which may be closed, full or a pipe that nobody reads: what becomes of a line is no
/// matter for the call that it tells of.
struct StandardError;

impl Write for StandardError {
    fn write(&mut self, text: &[u8]) -> io::Result<usize> {
        let _ = io::stderr().write_all(text);
        Ok(text.len())
    }
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn levels_have_names() {
        for (value, expected) in [
            ("", LevelFilter::OFF),
            ("off", LevelFilter::OFF),
            ("error", LevelFilter::ERROR),
            ("warn", LevelFilter::WARN),
            ("info", LevelFilter::INFO),
            ("debug", LevelFilter::DEBUG),
            ("TRACE", LevelFilter::TRACE),
        ] {
            assert_eq!(level(Some(value.as_ref())), (expected, None));
        }
        assert_eq!(level(None), (LevelFilter::OFF, None));
    }

    #[test]
    fn what_is_no_level_is_told() {
        for value in ["loud", "debug ", "6", "info,jax=debug"] {
            let (level, error) = level(Some(value.as_ref()));
            assert_eq!(level, LevelFilter::WARN);
            let error = error.unwrap();
            let expected = format!("debug or trace, got {value:?}; errors and warnings");
            assert!(error.starts_with("JAX_MHC_LOG: expected off, "), "{error}");
            assert!(error.contains(&expected), "{error}");
        }
    }

    #[cfg(unix)]
    #[test]
    fn bytes_that_are_no_text_are_told() {
        use std::os::unix::ffi::OsStrExt;
        let (level, error) = level(Some(OsStr::from_bytes(b"\xff\xfe")));
        assert_eq!(level, LevelFilter::WARN);
        assert!(error.unwrap().contains(r#"got "\xFF\xFE""#));
    }
}

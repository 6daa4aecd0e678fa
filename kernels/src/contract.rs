//! The contract between the library and those who call it: the table of calls, the settings, their bounds,
//! and the check of a call. Nothing here depends on a device.

pub mod check;
pub mod config;
pub mod layout;
pub mod limits;
pub mod table;
pub mod view;

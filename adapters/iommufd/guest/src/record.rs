//! stub
pub(crate) fn run(_: std::fs::File) -> crate::Outcome { Ok(()) }

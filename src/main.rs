//! The `portpool` program.

fn main() {}

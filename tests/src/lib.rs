//! The lab, the end-to-end tests and the benchmarks. May depend on every Ringside crate.

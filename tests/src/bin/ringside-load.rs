//! `ringside-load`: puts a vhost-user block back-end under load, and measures it.

use std::process::ExitCode;

fn main() -> ExitCode {
    ringside_tests::bench::load::main()
}

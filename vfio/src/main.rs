//! `ringside-vfio`: reads the command line, carries it out, says what failed.
#![forbid(unsafe_code)]

use std::error::Error;
use std::io::{self, BufWriter, ErrorKind, Write};
use std::process::ExitCode;

use clap::Parser;
use ringside_vfio::cli::{Cli, CliError, run};

/// Something failed. Wrong usage ends with clap's 2.
const FAILURE: u8 = 1;

fn main() -> ExitCode {
    let cli = Cli::parse();
    let mut out = BufWriter::new(io::stdout().lock());
    let result = run(&cli, &mut out, &mut io::stderr().lock())
        .and_then(|()| out.flush().map_err(CliError::Output));
    match result {
        Ok(()) => ExitCode::SUCCESS,
        // Whoever reads the list has seen enough of it.
        Err(CliError::Output(error)) if error.kind() == ErrorKind::BrokenPipe => ExitCode::SUCCESS,
        Err(error) => {
            let mut message = error.to_string();
            let mut source = error.source();
            while let Some(cause) = source {
                message.push_str(": ");
                message.push_str(&cause.to_string());
                source = cause.source();
            }
            eprintln!("ringside-vfio: {message}");
            ExitCode::from(FAILURE)
        }
    }
}

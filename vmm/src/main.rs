//! `ringside-vmm`: reads the configuration, runs the machine, ends with its exit status.

use std::io::IsTerminal;
use std::path::Path;
use std::process::ExitCode;

use clap::Parser;
use ringside_control::Chain;
use ringside_vmm::config::{Cli, Config, FileOptions};
use ringside_vmm::exit::ExitReason;
use ringside_vmm::machine;
use tracing_subscriber::EnvFilter;

/// Something failed at run time.
const FAILURE: u8 = 1;
/// Wrong usage; clap's own errors end with the same status.
const USAGE: u8 = 2;

fn main() -> ExitCode {
    let cli = Cli::parse();
    let file = match cli.config.as_deref().map(read_file).transpose() {
        Ok(file) => file.unwrap_or_default(),
        Err((status, message)) => return fail(status, &message),
    };
    let config = match Config::new(cli, file) {
        Ok(config) => config,
        Err(error) => return fail(USAGE, &error.to_string()),
    };
    let Ok(filter) = EnvFilter::try_new(&config.log_level) else {
        let message = format!(
            "--log-level `{}` is not a level or a filter",
            config.log_level
        );
        return fail(USAGE, &message);
    };
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(std::io::stderr().is_terminal())
        .init();

    match machine::run(&config) {
        Ok(reason) => {
            match &reason {
                ExitReason::PowerOff | ExitReason::Requested(_) | ExitReason::Reset(_) => {
                    tracing::info!("{reason}");
                }
                ExitReason::Panic | ExitReason::Crash(_) | ExitReason::Failure(_) => {
                    eprintln!("ringside-vmm: {reason}");
                }
            }
            ExitCode::from(reason.status())
        }
        Err(error) => fail(FAILURE, &Chain(&error).to_string()),
    }
}

fn read_file(path: &Path) -> Result<FileOptions, (u8, String)> {
    let text = std::fs::read_to_string(path).map_err(|e| {
        (
            FAILURE,
            format!("cannot read the configuration {}: {e}", path.display()),
        )
    })?;
    text.parse()
        .map_err(|e| (USAGE, format!("{}: {e}", path.display())))
}

fn fail(status: u8, message: &str) -> ExitCode {
    eprintln!("ringside-vmm: {message}");
    ExitCode::from(status)
}

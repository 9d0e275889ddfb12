//! `ringside-vfio check`.

use std::io::Write;
use std::str::FromStr;

use clap::Args;
use thiserror::Error;

use super::CliError;
use crate::address::PciAddress;
use crate::check;
use crate::host::Host;
use crate::report;

pub(super) const CHECK_HELP: &str = "\
Each line is a finding: ok; warn, if a guest can have the device with a flaw or on a condition;
fail, if it cannot. Below it stands how to mend it. The exit status is 1 if there is a fail.

Run it as the user that the guest is to run as: permissions and limits are those of this
process.

Example:
  ringside-vfio check 01:10.0 --memory 16G

JSON is one object with `address`, `usable` and the list `findings`, each with a `code` that
does not change, `level`, `message` and, if there is something to mend, `remedy`.";

/// Options of `check`.
#[derive(Debug, Args)]
pub struct CheckOptions {
    /// The device.
    pub address: PciAddress,

    /// The guest's memory, all of which is locked: bytes, or with K, M, G or T.
    #[arg(long, value_name = "SIZE")]
    pub memory: Option<Size>,

    /// Prints JSON in place of text.
    #[arg(long)]
    pub json: bool,
}

/// A number of bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Size(pub u64);

/// The text is no number of bytes.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[error("`{0}` is not a size, such as 512M or 16G")]
pub struct BadSize(String);

impl FromStr for Size {
    type Err = BadSize;

    fn from_str(text: &str) -> Result<Self, BadSize> {
        let parse = || {
            let unit = text.trim_start_matches(|c: char| c.is_ascii_digit());
            let factor = match unit {
                "" => 1,
                "K" | "k" => 1 << 10,
                "M" | "m" => 1 << 20,
                "G" | "g" => 1 << 30,
                "T" | "t" => 1 << 40,
                _ => return None,
            };
            text.strip_suffix(unit)?
                .parse::<u64>()
                .ok()?
                .checked_mul(factor)
        };
        parse().map(Self).ok_or_else(|| BadSize(text.to_owned()))
    }
}

pub(super) fn check(
    host: &Host,
    options: &CheckOptions,
    out: &mut impl Write,
) -> Result<(), CliError> {
    let memory = options.memory.map(|size| size.0);
    let checked = check::check(host, options.address, memory)?;
    let printed = if options.json {
        report::answer(out, &checked)
    } else {
        checked.findings.iter().try_for_each(|finding| {
            writeln!(
                out,
                "{:4}  {}: {}",
                finding.level.name(),
                finding.code,
                finding.message
            )?;
            match &finding.remedy {
                Some(remedy) => writeln!(out, "      {remedy}"),
                None => Ok(()),
            }
        })
    };
    printed.map_err(CliError::Output)?;
    if checked.usable {
        Ok(())
    } else {
        Err(CliError::Unusable(options.address))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes() {
        for (text, size) in [
            ("4096", 4096),
            ("512M", 512 << 20),
            ("2g", 2 << 30),
            ("1T", 1 << 40),
        ] {
            assert_eq!(text.parse(), Ok(Size(size)));
        }
        for text in ["", "G", "1.5G", "-1", "1GiB", "16777216T", "1 G"] {
            assert!(text.parse::<Size>().is_err(), "{text}");
        }
    }
}

//! Which Debian mirror to use: the one this machine's apt uses.

use std::process::Command;
use std::time::Duration;

use crate::command;
use crate::error::{LabError, Result};

/// The mirror given by the user, or that of apt's own configuration (of either format).
///
/// # Errors
/// Fails if apt knows no Debian mirror.
pub(super) fn find(given: Option<&str>) -> Result<String> {
    if let Some(url) = given {
        return Ok(url.trim_end_matches('/').to_owned());
    }
    let mut indextargets = Command::new("apt-get");
    indextargets.args([
        "indextargets",
        "--format",
        "$(REPO_URI) $(RELEASE)",
        "Created-By: Packages",
    ]);
    let targets = command::run(&mut indextargets, Duration::from_secs(30)).unwrap_or_default();
    choose(&targets).ok_or_else(|| {
        LabError::Setup(
            "the configuration of apt names no Debian mirror; \
             give one with --mirror URL (the directory that has dists/trixie)"
                .into(),
        )
    })
}

/// The archive of Debian proper among lines of `URI RELEASE`: neither the security archive nor other vendors'.
fn choose(targets: &str) -> Option<String> {
    targets
        .lines()
        .filter_map(|line| line.split_whitespace().next())
        .map(|uri| uri.trim_end_matches('/'))
        .find(|uri| uri.rsplit('/').next() == Some("debian"))
        .map(str::to_owned)
}

/// Options for mmdebstrap that carry over apt's proxy, which it does not take from the machine by itself.
#[must_use]
pub(super) fn proxy_options() -> Vec<String> {
    ["http", "https"]
        .iter()
        .filter_map(|scheme| {
            let name = format!("Acquire::{scheme}::Proxy");
            let mut dump = Command::new("apt-config");
            dump.args(["dump", "--no-empty", "--format", "%v", &name]);
            let value = command::run(&mut dump, Duration::from_secs(10)).ok()?;
            let value = value.trim();
            (!value.is_empty()).then(|| format!("--aptopt={name} \"{value}\""))
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn debian_is_chosen_among_other_archives() {
        let targets = "https://vendor.example/apt/ stable\n\
                       http://mirror.example/debian-security/ trixie-security\n\
                       http://mirror.example/some/path/debian/ trixie\n";
        assert_eq!(
            choose(targets).as_deref(),
            Some("http://mirror.example/some/path/debian")
        );
    }

    #[test]
    fn no_debian_is_no_choice() {
        assert_eq!(choose("http://mirror.example/ubuntu/ noble\n"), None);
        assert_eq!(choose(""), None);
    }
}

//! Finds out whether this machine's own KVM boots Linux, by booting one.

use std::fs;
use std::path::Path;
use std::time::Duration;

use nix::unistd::geteuid;
use serde::{Deserialize, Serialize};

use crate::command;
use crate::error::Result;
use crate::harness::{Guest, Vmm};
use crate::setup::Systems;
use crate::site::Site;
use crate::suite;

/// Longer than the limits of all that a probe does.
const PROBE_LIMIT: Duration = Duration::from_secs(120);

/// What a probe found; good until the machine boots again.
#[derive(Debug, Serialize, Deserialize)]
struct Finding {
    boot_id: String,
    /// Why it does not work, or nothing if it does.
    obstacle: Option<String>,
}

/// Why guests cannot run on this machine's own KVM; `None` if they can. A real KVM answers in a second or two; what a probe
/// found before holds unless it is to be tried `afresh`.
///
/// # Errors
/// Fails only if the probe itself cannot be done.
pub fn host_obstacle(systems: &Systems, site: &Site, afresh: bool) -> Result<Option<String>> {
    if let Err(error) = fs::File::options().read(true).write(true).open("/dev/kvm") {
        return Ok(Some(format!("/dev/kvm cannot be opened: {error}")));
    }
    if !geteuid().is_root() {
        return Ok(Some(
            "creating TAPs and network namespaces here needs root".into(),
        ));
    }
    let boot_id = fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default();
    let remembered = systems.path().join("host-kvm.json");
    if !afresh
        && let Some(finding) = remember(&remembered)
        && finding.boot_id == boot_id
    {
        // The machine may have been too busy for the probe, and may not be so now.
        return Ok(finding.obstacle.map(|obstacle| {
            format!(
                "{obstacle} (found earlier; --where host tries again, and so does this after `cargo lab clean`)"
            )
        }));
    }
    eprintln!("lab: trying whether this machine's own KVM boots Linux");
    let obstacle = try_in_process(site)?;
    let finding = Finding { boot_id, obstacle };
    if let Ok(text) = serde_json::to_string(&finding) {
        // If it cannot be remembered it is probed again.
        let _ = fs::write(&remembered, text);
    }
    Ok(finding.obstacle)
}

fn remember(path: &Path) -> Option<Finding> {
    serde_json::from_str(&fs::read_to_string(path).ok()?).ok()
}

/// Boots a guest in a process of its own, in namespaces as those of a test; the reason if that fails.
fn try_in_process(site: &Site) -> Result<Option<String>> {
    let mut probe = suite::isolated(site, &site.scratch, &["run-probe"])?;
    Ok(match command::output(&mut probe, PROBE_LIMIT) {
        Ok(output) if output.status.success() => None,
        Ok(output) => Some(
            format!("{}{}", output.stdout, output.stderr)
                .trim()
                .to_owned(),
        ),
        Err(error) => Some(error.to_string()),
    })
}

/// Boots a guest without a disk under stock QEMU; the reason if that fails.
pub fn boot(site: &Site) -> Option<String> {
    let limit = Duration::from_secs(15);
    let guest = Guest::on(Vmm::Qemu11)
        .diskless()
        .boot_limit(limit)
        .boot(site);
    let text = match guest.map(Guest::shut_down) {
        Ok(Ok(_)) => return None,
        Ok(Err(error)) | Err(error) => error.to_string(),
    };
    // The registers that QEMU dumps below the first line interest nobody here.
    let first = text.lines().next().unwrap_or_default();
    let first = first.split("; the last").next().unwrap_or_default();
    let reason = text
        .lines()
        .find(|line| line.contains("KVM"))
        .unwrap_or_default();
    Some(
        format!("a Linux guest did not boot: {first} {}", reason.trim())
            .trim_end()
            .to_owned(),
    )
}

//! What the kernel says about a program that has confined itself.

#![allow(
    dead_code, // each test program uses its own part
    unreachable_pub,
    clippy::unwrap_used,
    clippy::panic,
    clippy::indexing_slicing
)] // test support: a panic is how it fails

use std::fs;
use std::path::{Path, PathBuf};
use std::thread::sleep;
use std::time::{Duration, Instant};

/// How long threads may take to begin.
const PATIENCE: Duration = Duration::from_secs(10);

/// CAP_SETPCAP and CAP_SYS_ADMIN, as bits of a set (linux/capability.h).
const SETPCAP: u64 = 1 << 8;
const SYS_ADMIN: u64 = 1 << 21;

/// The value of a line of /proc/PID/task/TID/status, if the kernel has it.
pub fn field(status: &str, name: &str) -> Option<String> {
    let line = status.lines().find_map(|l| l.strip_prefix(name))?;
    Some(line.strip_prefix(':')?.trim().to_owned())
}

/// A set of capabilities.
fn capabilities(status: &str, set: &str) -> u64 {
    u64::from_str_radix(&field(status, set).unwrap(), 16).unwrap()
}

/// The directory and the status of each thread; some may end meanwhile.
fn threads(process: u32) -> Vec<(PathBuf, String)> {
    let tasks = fs::read_dir(format!("/proc/{process}/task")).unwrap();
    let status = |path: &Path| fs::read_to_string(path.join("status")).ok();
    tasks
        .map(|task| task.unwrap().path())
        .filter_map(|path| status(&path).map(|status| (path, status)))
        .collect()
}

/// Checks each thread of a program, and all of it. `kept`: the capabilities that it keeps, if it has them. `skip` is told what
/// cannot be checked.
pub fn is_confined(process: u32, kept: u64, skip: impl Fn(&str)) {
    let own = capabilities(&fs::read_to_string("/proc/self/status").unwrap(), "CapEff");
    let kept = kept & own;
    let namespaces =
        |of: &Path| ["ipc", "uts", "net"].map(|name| fs::read_link(of.join("ns").join(name)).ok());
    let threads = threads(process);
    assert!(threads.len() > 1);
    for (path, status) in threads {
        let name = field(&status, "Name").unwrap();
        let is = |line| field(&status, line).unwrap();
        assert_eq!(is("NoNewPrivs"), "1", "{name}");
        assert_eq!(is("Seccomp"), "2", "{name}");
        let set = |set| capabilities(&status, set);
        assert_eq!(["CapInh", "CapAmb"].map(set), [0; 2], "{name}");
        assert_eq!(["CapPrm", "CapEff"].map(set), [kept; 2], "{name}");
        if own & SETPCAP != 0 {
            assert_eq!(set("CapBnd"), kept, "{name}");
        }
        if own & SYS_ADMIN != 0 {
            let (own, other) = (
                namespaces(Path::new("/proc/thread-self")),
                namespaces(&path),
            );
            for (own, other) in own.into_iter().zip(other) {
                assert!(own.is_some() && own != other, "{name}: {own:?}");
            }
        }
    }
    if own & SYS_ADMIN == 0 {
        skip("namespaces take CAP_SYS_ADMIN");
    }
    let limits = fs::read_to_string(format!("/proc/{process}/limits")).unwrap();
    let core = limits.lines().find(|l| l.starts_with("Max core file size"));
    let core: Vec<&str> = core.unwrap().split_whitespace().collect();
    assert_eq!(core[4..6], ["0", "0"]);
}

/// Checks that these threads, by their names, and no others have given up more system calls than the control thread.
pub fn are_narrowed(process: u32, names: &[&str], skip: impl Fn(&str)) {
    let filters = |status: &str| field(status, "Seccomp_filters")?.parse::<u64>().ok();
    let control = fs::read_to_string(format!("/proc/{process}/status")).unwrap();
    let Some(of_control) = filters(&control) else {
        return skip("the number of filters takes Linux 5.10");
    };
    assert!(of_control > 0);
    let mut wanted = names.to_vec();
    wanted.sort_unstable();
    let start = Instant::now();
    loop {
        // They do so when they begin, which nobody waits for.
        let mut narrowed: Vec<String> = threads(process)
            .iter()
            .filter(|(_, status)| filters(status).unwrap() > of_control)
            .map(|(_, status)| field(status, "Name").unwrap())
            // The kernel's own, which have what the thread has that they work for.
            .filter(|name| !["iou-", "kvm-"].iter().any(|own| name.starts_with(own)))
            .collect();
        narrowed.sort_unstable();
        if narrowed == wanted {
            return;
        }
        assert!(start.elapsed() < PATIENCE, "{narrowed:?}, not {wanted:?}");
        sleep(Duration::from_millis(5));
    }
}

/// Checks that all mappings of a memfd of this name, of which there are some, are left out of dumps (proc_pid_smaps(5), VmFlags).
pub fn is_in_no_dump(process: u32, memfd: &str, skip: impl Fn(&str)) {
    // The process is not dumpable: nobody but root looks into it.
    let maps = match fs::read_to_string(format!("/proc/{process}/smaps")) {
        Ok(maps) => maps,
        Err(error) => return skip(&format!("its mappings cannot be read: {error}")),
    };
    let name = format!("/memfd:{memfd} ");
    let (mut found, mut wanted) = (0, false);
    for line in maps.lines() {
        if let Some(flags) = line.strip_prefix("VmFlags:") {
            let left_out = flags.split(' ').any(|flag| flag == "dd");
            assert!(!wanted || left_out, "{memfd}: {flags}");
            found += usize::from(wanted);
            wanted = false;
        } else if line.contains(&name) {
            wanted = true;
        }
    }
    assert!(found > 0, "no mapping of {memfd}");
}

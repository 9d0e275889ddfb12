//! Removing directories of the lab's, and nothing that is merely mounted in them.

use std::ffi::OsString;
use std::fs;
use std::io;
use std::os::unix::ffi::OsStringExt;
use std::path::{Path, PathBuf};

use crate::command;
use crate::error::{Doing, LabError, Result};

/// Mounts as this process sees them (Linux, Documentation/filesystems/proc.rst, 3.5).
const MOUNTS: &str = "/proc/self/mountinfo";

/// Removes a directory and all in it, or what is there in place of it.
///
/// # Errors
/// As [`refuse_mounts`]; fails if something cannot be removed.
pub fn remove_tree(path: &Path) -> Result<()> {
    refuse_mounts(path)?;
    let removed = match fs::symlink_metadata(path) {
        Ok(metadata) if !metadata.is_dir() => fs::remove_file(path),
        _ => fs::remove_dir_all(path),
    };
    match removed {
        Ok(()) => Ok(()),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(error) => Err(error).doing(|| format!("remove {}", path.display())),
    }
}

/// Refuses to have a directory removed while something is mounted at or below it: what is there is not the lab's.
///
/// # Errors
/// Fails, with what to do, if there is a mount, or if that cannot be found out.
pub(super) fn refuse_mounts(path: &Path) -> Result<()> {
    // Of a link, only the link would be removed.
    match fs::symlink_metadata(path) {
        Ok(metadata) if metadata.is_dir() => {}
        Ok(_) => return Ok(()),
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(error).doing(|| format!("find {}", path.display())),
    }
    // The kernel names mounts without links.
    let real = fs::canonicalize(path).doing(|| format!("find {}", path.display()))?;
    let table = fs::read(MOUNTS).doing(|| format!("read {MOUNTS}"))?;
    let mounts = mounts_in(&table, &real);
    if mounts.is_empty() {
        return Ok(());
    }
    // The last one may be mounted on the first.
    let points = mounts.iter().rev();
    let points = points.map(|point| command::quoted(&point.display().to_string()));
    let points = points.collect::<Vec<_>>().join(" ");
    Err(LabError::Setup(format!(
        "{} is not removed, because what is mounted in it would be emptied; run `umount {points}`, then this again",
        path.display()
    )))
}

/// The mount points at or below a directory, in the order in which they were mounted.
fn mounts_in(table: &[u8], directory: &Path) -> Vec<PathBuf> {
    table
        .split(|&byte| byte == b'\n')
        .filter_map(|line| line.split(|&byte| byte == b' ').nth(4))
        .map(|point| PathBuf::from(OsString::from_vec(unescaped(point))))
        .filter(|point| point.starts_with(directory))
        .collect()
}

/// With the characters that the kernel writes as a backslash and three octal digits.
fn unescaped(text: &[u8]) -> Vec<u8> {
    let mut plain = Vec::with_capacity(text.len());
    let mut rest = text;
    while let Some((&byte, after)) = rest.split_first() {
        let digits = after
            .get(..3)
            .and_then(|digits| str::from_utf8(digits).ok());
        let code = digits.and_then(|digits| u8::from_str_radix(digits, 8).ok());
        match code {
            Some(code) if byte == b'\\' => {
                plain.push(code);
                rest = after.get(3..).unwrap_or_default();
            }
            _ => {
                plain.push(byte);
                rest = after;
            }
        }
    }
    plain
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mounts_at_and_below_a_directory_are_found() {
        let table = b"22 1 0:20 / / rw - ext4 /dev/vda rw\n\
            23 22 0:21 / /lab/root rw,nosuid shared:5 - tmpfs tmpfs rw\n\
            24 23 0:22 / /lab/root/a\\040b\\134\\303\\244 rw - proc proc rw\n\
            25 22 0:23 / /lab/rootless rw - proc proc rw\n";
        let below = |path: &str| mounts_in(table, Path::new(path));
        let odd = PathBuf::from("/lab/root/a b\\\u{e4}");
        assert_eq!(below("/lab/root"), [PathBuf::from("/lab/root"), odd]);
        assert_eq!(below("/lab/root/a"), [] as [PathBuf; 0]);
        assert_eq!(below("/lab").len(), 3);
    }

    #[test]
    fn what_is_mounted_stays() {
        // This process cannot mount anything, but a root that is a mount is always there.
        let error = refuse_mounts(Path::new("/proc")).unwrap_err().to_string();
        assert!(
            error.contains("run `umount '") && error.contains("'/proc'"),
            "{error}"
        );
        let directory = tempfile::tempdir().unwrap();
        let link = directory.path().join("link");
        std::os::unix::fs::symlink("/proc", &link).unwrap();
        remove_tree(&link).unwrap();
        assert!(!link.is_symlink() && Path::new("/proc/self").exists());
    }

    #[test]
    fn trees_and_files_are_removed() {
        let directory = tempfile::tempdir().unwrap();
        let tree = directory.path().join("tree");
        fs::create_dir_all(tree.join("of/several")).unwrap();
        remove_tree(&tree).unwrap();
        assert!(!tree.exists());
        fs::write(&tree, "").unwrap();
        remove_tree(&tree).unwrap();
        assert!(!tree.exists());
        remove_tree(&tree).unwrap();
    }
}

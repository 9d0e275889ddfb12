//! Names of vendors, devices and classes, from the PCI id database if it is installed.
//!
//! The database is the text file `pci.ids`: vendors at the start of a line, devices one tab in,
//! subsystems two; classes follow in the same manner behind a `C`.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use crate::host::{Host, HostError};

/// Where distributions put the database, most common first.
const PLACES: [&str; 4] = [
    "usr/share/misc/pci.ids",
    "usr/share/hwdata/pci.ids",
    "var/lib/pciutils/pci.ids",
    "usr/share/pci.ids",
];

/// Names by number. Empty when no database is installed.
#[derive(Debug, Default)]
pub struct PciIds {
    vendors: HashMap<u16, String>,
    devices: HashMap<(u16, u16), String>,
    /// By base class and subclass.
    classes: HashMap<(u8, u8), String>,
}

/// What the lines one tab in belong to.
enum Block {
    None,
    Vendor(u16),
    Class(u8),
}

/// Splits `1af4  Red Hat, Inc.` into number and name, if the number has exactly `digits` digits.
fn entry(line: &str, digits: usize) -> Option<(u16, &str)> {
    let (number, name) = line.split_at_checked(digits)?;
    let name = name.strip_prefix("  ")?.trim();
    Some((u16::from_str_radix(number, 16).ok()?, name))
}

impl PciIds {
    /// Reads the database where distributions put it; without one, names stay unknown.
    ///
    /// # Errors
    /// [`HostError::Read`] if it is there and cannot be read.
    pub fn installed(host: &Host) -> Result<Self, HostError> {
        for place in PLACES {
            if let Some(bytes) = host.bytes(place)? {
                return Ok(Self::parse(&String::from_utf8_lossy(&bytes)));
            }
        }
        Ok(Self::default())
    }

    /// Reads the database from a given file.
    ///
    /// # Errors
    /// [`HostError::Read`] if it cannot be read.
    pub fn from_file(path: &Path) -> Result<Self, HostError> {
        let bytes = std::fs::read(path).map_err(|source| HostError::Read {
            path: PathBuf::from(path),
            source,
        })?;
        Ok(Self::parse(&String::from_utf8_lossy(&bytes)))
    }

    /// Reads the text of the database; lines it does not understand are skipped.
    #[must_use]
    pub fn parse(text: &str) -> Self {
        let mut ids = Self::default();
        let mut block = Block::None;
        for line in text.lines() {
            if line.starts_with('#') || line.starts_with("\t\t") || line.trim().is_empty() {
                continue;
            }
            if let Some(line) = line.strip_prefix('\t') {
                match block {
                    Block::Vendor(vendor) => {
                        if let Some((device, name)) = entry(line, 4) {
                            ids.devices.insert((vendor, device), name.to_owned());
                        }
                    }
                    Block::Class(base) => {
                        if let Some((Ok(sub), name)) =
                            entry(line, 2).map(|(n, s)| (u8::try_from(n), s))
                        {
                            ids.classes.insert((base, sub), name.to_owned());
                        }
                    }
                    Block::None => {}
                }
            } else if let Some(line) = line.strip_prefix("C ") {
                let base = entry(line, 2).and_then(|(n, _)| u8::try_from(n).ok());
                block = base.map_or(Block::None, Block::Class);
            } else if let Some((vendor, name)) = entry(line, 4) {
                ids.vendors.insert(vendor, name.to_owned());
                block = Block::Vendor(vendor);
            } else {
                block = Block::None;
            }
        }
        ids
    }

    /// Name of a vendor.
    #[must_use]
    pub fn vendor(&self, vendor: u16) -> Option<&str> {
        self.vendors.get(&vendor).map(String::as_str)
    }

    /// Name of a device.
    #[must_use]
    pub fn device(&self, vendor: u16, device: u16) -> Option<&str> {
        self.devices.get(&(vendor, device)).map(String::as_str)
    }

    /// Name of a class code, by base class and subclass.
    #[must_use]
    pub fn class(&self, class: u32) -> Option<&str> {
        let [_, base, sub, _] = class.to_be_bytes();
        self.classes.get(&(base, sub)).map(String::as_str)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEXT: &str = "# comment\n\n8086  Intel Corporation\n\t10c9  82576 Gigabit Network Connection\n\
        \t\t8086 a03c  Adapter\n\t10ca  82576 Virtual Function\nnonsense\n\t10cb  Belongs to nobody\n\
        ffff  Illegal Vendor ID\n\nC 02  Network controller\n\t00  Ethernet controller\n\
        \t\t01  Some interface\nC zz  Bad\n\t00  Bad\n";

    #[test]
    fn names_are_found() {
        let ids = PciIds::parse(TEXT);
        assert_eq!(ids.vendor(0x8086), Some("Intel Corporation"));
        assert_eq!(ids.device(0x8086, 0x10ca), Some("82576 Virtual Function"));
        assert_eq!(ids.class(0x02_0000), Some("Ethernet controller"));
        assert_eq!(ids.vendor(0xffff), Some("Illegal Vendor ID"));
    }

    #[test]
    fn other_lines_are_skipped() {
        let ids = PciIds::parse(TEXT);
        assert_eq!(ids.device(0x8086, 0x10cb), None);
        assert_eq!(ids.device(0xffff, 0x10cb), None);
        assert_eq!(
            (ids.vendors.len(), ids.devices.len(), ids.classes.len()),
            (2, 2, 1)
        );
        let none = PciIds::parse("");
        assert_eq!(
            (none.vendor(1), none.device(1, 1), none.class(1)),
            (None, None, None)
        );
    }
}

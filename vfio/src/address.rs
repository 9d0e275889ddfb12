//! The address of a PCI function as sysfs writes it: `domain:bus:device.function`.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Deserializer, Serialize, Serializer};
use thiserror::Error;

/// Domain, bus, device and function of a PCI function.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PciAddress {
    /// PCI segment. Above 65535 for domains that Linux makes up, such as those behind Intel VMD.
    domain: u32,
    bus: u8,
    /// 0 to 31.
    device: u8,
    /// 0 to 7.
    function: u8,
}

/// `{0}` is not a PCI address; write it as 0000:01:10.0, or 01:10.0 in domain 0.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[error("`{0}` is not a PCI address; write it as 0000:01:10.0, or 01:10.0 in domain 0")]
pub struct BadAddress(pub String);

/// Parses hexadecimal digits only: no sign, not more than `digits`, and at least one.
fn hex(text: &str, digits: usize) -> Option<u32> {
    let plain = (1..=digits).contains(&text.len()) && text.bytes().all(|b| b.is_ascii_hexdigit());
    if plain {
        u32::from_str_radix(text, 16).ok()
    } else {
        None
    }
}

fn parse(text: &str) -> Option<PciAddress> {
    let (front, function) = text.split_once('.')?;
    let (front, device) = front.rsplit_once(':')?;
    let (domain, bus) = front.split_once(':').unwrap_or(("0", front));
    let device = u8::try_from(hex(device, 2)?).ok().filter(|d| *d < 32)?;
    let function = u8::try_from(hex(function, 1)?).ok().filter(|f| *f < 8)?;
    let bus = u8::try_from(hex(bus, 2)?).ok()?;
    Some(PciAddress {
        domain: hex(domain, 8)?,
        bus,
        device,
        function,
    })
}

impl PciAddress {
    /// Whether both functions are on one bus.
    #[must_use]
    pub fn shares_bus(&self, other: &Self) -> bool {
        (self.domain, self.bus) == (other.domain, other.bus)
    }
}

impl FromStr for PciAddress {
    type Err = BadAddress;

    fn from_str(text: &str) -> Result<Self, BadAddress> {
        parse(text).ok_or_else(|| BadAddress(text.to_owned()))
    }
}

impl fmt::Display for PciAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            domain,
            bus,
            device,
            function,
        } = self;
        write!(f, "{domain:04x}:{bus:02x}:{device:02x}.{function}")
    }
}

impl Serialize for PciAddress {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for PciAddress {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        text.parse().map_err(serde::de::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_read_and_written() {
        for text in ["0000:01:10.0", "ffff:ff:1f.7", "10000:e1:00.0"] {
            assert_eq!(text.parse::<PciAddress>().unwrap().to_string(), text);
        }
        assert_eq!(
            "01:10.0".parse::<PciAddress>().unwrap().to_string(),
            "0000:01:10.0"
        );
        assert_eq!(
            "1:2.3".parse::<PciAddress>().unwrap().to_string(),
            "0000:01:02.3"
        );
    }

    #[test]
    fn other_text_is_refused() {
        for text in [
            "",
            "01",
            "01:10",
            "0000:01:10",
            "01:20.0",
            "01:10.8",
            "01:10.00",
            "0000:100:10.0",
            "+1:10.0",
            "0000:01:10.0 ",
            "x:01:10.0",
            "1:0000:01:10.0",
            ":10.0",
            "01:.0",
            "01:10.",
            "123456789:01:10.0",
        ] {
            assert_eq!(text.parse::<PciAddress>(), Err(BadAddress(text.to_owned())));
        }
    }

    #[test]
    fn functions_of_one_bus_are_told_from_others() {
        let address = |text: &str| text.parse::<PciAddress>().unwrap();
        let function = address("0000:01:10.0");
        assert!(function.shares_bus(&address("0000:01:00.3")));
        assert!(!function.shares_bus(&address("0000:02:10.0")));
        assert!(!function.shares_bus(&address("0001:01:10.0")));
    }

    #[test]
    fn addresses_sort_by_domain_then_bus() {
        let mut list: Vec<PciAddress> = ["10000:00:00.0", "0000:02:00.0", "0000:01:10.0"]
            .iter()
            .map(|text| text.parse().unwrap())
            .collect();
        list.sort();
        let list: Vec<String> = list.iter().map(ToString::to_string).collect();
        assert_eq!(list, ["0000:01:10.0", "0000:02:00.0", "10000:00:00.0"]);
    }
}

//! A kernel played in a directory: it does to the tree what Linux does to sysfs when an attribute is written.

use std::fs;
use std::io::{self, Error, ErrorKind};
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use nix::errno::Errno;
use ringside_vfio::address::PciAddress;
use ringside_vfio::host::Host;
use ringside_vfio::kernel::Kernel;
use ringside_vfio::network::{Links, Setting, VfSettings};
use ringside_vfio::nvme::admin::{Admin, AdminError, Command, Data};
use ringside_vfio::token::TokenError;
use uuid::Uuid;

use super::controller::FakeController;

/// What goes wrong, and at which change, counted from 0.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Trouble {
    Nothing,
    /// This change fails.
    Fail(usize),
    /// The process is killed before this change: it and all after it do not happen.
    KillBefore(usize),
    /// The process is killed after this change.
    KillAfter(usize),
}

#[derive(Debug)]
pub(crate) struct FakeKernel {
    root: PathBuf,
    trouble: Trouble,
    /// Settings of the virtual functions of the interface with number 7.
    pub(crate) functions: Arc<Mutex<Vec<VfSettings>>>,
    /// Settings that its driver refuses, and with which error.
    pub(crate) refused: Arc<Mutex<Vec<(&'static str, Errno)>>>,
    /// The controller at /dev/nvme0.
    pub(crate) controller: Arc<Mutex<FakeController>>,
    /// Changes asked for, in order.
    pub(crate) log: Mutex<Vec<String>>,
}

/// Where sysfs lists devices and drivers.
const DEVICES: &str = "sys/bus/pci/devices";
const DRIVERS: &str = "sys/bus/pci/drivers";

fn errno(errno: Errno) -> Error {
    Error::from_raw_os_error(errno as i32)
}

impl FakeKernel {
    pub(crate) fn new(root: &Path, trouble: Trouble) -> Self {
        Self {
            root: root.to_owned(),
            trouble,
            functions: Arc::default(),
            refused: Arc::default(),
            controller: Arc::default(),
            log: Mutex::new(Vec::new()),
        }
    }

    fn change(&self, what: String, act: impl FnOnce() -> io::Result<()>) -> io::Result<()> {
        let number = {
            let mut log = self.log.lock().unwrap();
            log.push(what);
            log.len() - 1
        };
        match self.trouble {
            Trouble::Fail(at) if number == at => Err(errno(Errno::EIO)),
            Trouble::KillBefore(at) if number >= at => Err(errno(Errno::EINTR)),
            Trouble::KillAfter(at) if number > at => Err(errno(Errno::EINTR)),
            _ => act(),
        }
    }

    fn device(&self, address: &str) -> PathBuf {
        self.root.join(DEVICES).join(address)
    }

    fn text(path: impl AsRef<Path>) -> String {
        let text = fs::read_to_string(path).unwrap_or_default();
        text.trim().replace("(null)", "")
    }

    /// The device gets the driver that its override names, or else the one that is made for it.
    fn probe(&self, address: &str) -> io::Result<()> {
        let device = self.device(address);
        if !device.exists() {
            return Err(errno(Errno::ENODEV));
        }
        if device.join("driver").exists() {
            return Ok(());
        }
        let chosen = Self::text(device.join("driver_override"));
        let switch = device.join("physfn/sriov_drivers_autoprobe");
        if chosen.is_empty() && switch.exists() && Self::text(switch) == "0" {
            return Ok(());
        }
        let driver = match chosen.as_str() {
            "" => Self::text(device.join("made_for")),
            name => name.to_owned(),
        };
        let place = self.root.join(DRIVERS).join(&driver);
        let refuses = Self::text(place.join("refuses"));
        if driver.is_empty() || !place.exists() || refuses.contains(address) {
            return Ok(());
        }
        symlink(&place, device.join("driver"))
    }

    fn set_number(&self, pf: &Path, text: &str) -> io::Result<()> {
        let now: usize = Self::text(pf.join("sriov_numvfs")).parse().unwrap();
        let number: usize = text.trim().parse().unwrap();
        if !pf.join("driver").exists() {
            return Err(errno(Errno::ENOENT));
        }
        if number > 0 && now > 0 {
            return Err(errno(Errno::EBUSY));
        }
        for index in 0..now {
            let link = pf.join(format!("virtfn{index}"));
            fs::remove_dir_all(fs::canonicalize(&link)?)?;
            fs::remove_file(link)?;
        }
        // Some drivers make fewer than they are asked for.
        let limit = Self::text(pf.join("makes_only")).parse().unwrap_or(number);
        let made = number.min(limit);
        fs::write(pf.join("sriov_numvfs"), format!("{made}\n"))?;
        for index in 0..made {
            let address = format!("0000:01:10.{}", index * 2);
            let device = self.device(&address);
            let group = self
                .root
                .join(format!("sys/kernel/iommu_groups/{}", 20 + index));
            fs::create_dir_all(&device)?;
            fs::create_dir_all(group.join("devices"))?;
            for (name, text) in [
                ("vendor", "0x8086"),
                ("device", "0x10ca"),
                ("class", "0x020000"),
                ("driver_override", "(null)"),
                ("made_for", "igbvf"),
                ("modalias", "pci:v00008086d000010CA"),
            ] {
                fs::write(device.join(name), format!("{text}\n"))?;
            }
            symlink(pf, device.join("physfn"))?;
            symlink(&device, pf.join(format!("virtfn{index}")))?;
            symlink(&group, device.join("iommu_group"))?;
            let member = group.join("devices").join(&address);
            if !member.exists() {
                let _ = fs::remove_file(&member);
                symlink(&device, member)?;
            }
            self.probe(&address)?;
        }
        Ok(())
    }

    fn attribute(&self, path: &Path, text: &str) -> io::Result<()> {
        if !path.exists() && !path.ends_with("unbind") && !path.ends_with("drivers_probe") {
            return Err(Error::from(ErrorKind::NotFound));
        }
        let parent = path.parent().unwrap();
        match path.file_name().unwrap().to_str().unwrap() {
            "drivers_probe" => self.probe(text),
            "unbind" => fs::remove_file(self.device(text).join("driver")),
            "sriov_numvfs" => self.set_number(parent, text),
            "driver_override" if text == "\n" => fs::write(path, "(null)\n"),
            _ => fs::write(path, text),
        }
    }
}

impl Kernel for FakeKernel {
    fn write(&self, path: &Path, text: &str) -> io::Result<()> {
        let name = path.strip_prefix(&self.root).unwrap().display();
        self.change(format!("{name} < {}", text.trim_end()), || {
            self.attribute(path, text)
        })
    }

    fn replace(&self, path: &Path, text: &str) -> io::Result<()> {
        let name = path.file_name().unwrap().display();
        self.change(format!("record {name}"), || fs::write(path, text))
    }

    fn remove(&self, path: &Path) -> io::Result<()> {
        let name = path.file_name().unwrap().display();
        self.change(format!("forget {name}"), || fs::remove_file(path))
    }

    fn load(&self, root: &Path, module: &str) -> io::Result<()> {
        self.change(format!("load {module}"), || {
            if root.join("lib/modules").join(module).exists() {
                fs::create_dir_all(root.join(DRIVERS).join(module))
            } else {
                Err(Error::other(format!("Module {module} not found")))
            }
        })
    }

    fn set_vf_token(&self, _: &Host, pf: PciAddress, token: &Uuid) -> Result<(), TokenError> {
        self.change(format!("token {pf} {token}"), || Ok(()))
            .map_err(TokenError::Name)
    }

    fn links(&self, _: &Path) -> io::Result<Box<dyn Links>> {
        Ok(Box::new(FakeLinks {
            functions: Arc::clone(&self.functions),
            refused: Arc::clone(&self.refused),
        }))
    }

    fn nvme(&self, path: &Path) -> io::Result<Box<dyn Admin>> {
        if !path.exists() {
            return Err(Error::from(ErrorKind::NotFound));
        }
        Ok(Box::new(FakeAdmin(Arc::clone(&self.controller))))
    }
}

struct FakeLinks {
    functions: Arc<Mutex<Vec<VfSettings>>>,
    refused: Arc<Mutex<Vec<(&'static str, Errno)>>>,
}

impl Links for FakeLinks {
    fn settings(&mut self, interface: u32) -> io::Result<Vec<(u16, VfSettings)>> {
        if interface != 7 {
            return Err(errno(Errno::ENODEV));
        }
        Ok((0..).zip(self.functions.lock().unwrap().clone()).collect())
    }

    fn set(&mut self, interface: u32, vf: u16, setting: &Setting) -> io::Result<()> {
        assert_eq!(interface, 7);
        let refused = self.refused.lock().unwrap();
        if let Some((_, error)) = refused.iter().find(|(name, _)| *name == setting.name()) {
            return Err(errno(*error));
        }
        let mut functions = self.functions.lock().unwrap();
        let function = &mut functions[usize::from(vf)];
        match *setting {
            Setting::Mac(mac) => function.mac = Some(mac),
            Setting::Vlan(vlan) => function.vlan = Some(vlan),
            Setting::Rate { min, max } => {
                (function.min_rate, function.max_rate) = (Some(min), Some(max));
            }
            Setting::Trust(on) => function.trust = Some(on),
            Setting::SpoofCheck(on) => function.spoofchk = Some(on),
            Setting::LinkState(state) => function.link_state = Some(state),
        }
        Ok(())
    }
}

struct FakeAdmin(Arc<Mutex<FakeController>>);

impl Admin for FakeAdmin {
    fn submit(&mut self, command: &Command, data: Data<'_>) -> Result<u32, AdminError> {
        self.0.lock().unwrap().submit(command, data)
    }
}

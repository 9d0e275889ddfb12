//! Made-up machines: one directory each, laid out like sysfs, and a kernel that reacts to what is written there.
// Each test program uses its part of this.
#![allow(dead_code)]

pub(crate) mod controller;
pub(crate) mod kernel;
pub(crate) mod run;

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use serde_json::Value;
use tempfile::TempDir;

pub(crate) const IDS: &str = "8086  Intel Corporation\n\t10c9  82576 Gigabit Network Connection\n\
    \t10ca  82576 Virtual Function\n1b36  Red Hat, Inc.\nC 06  Bridge\n\t04  PCI bridge\n";

/// A directory that looks like a host's root.
pub(crate) struct Machine(TempDir);

impl Machine {
    pub(crate) fn without_sysfs() -> Self {
        // In memory if possible: some tests make hundreds of machines.
        let memory = Path::new("/dev/shm");
        let directory = if memory.is_dir() {
            tempfile::tempdir_in(memory)
        } else {
            tempfile::tempdir()
        };
        Self(directory.unwrap())
    }

    /// A machine with a PCI bus that has nothing on it.
    pub(crate) fn new() -> Self {
        let machine = Self::without_sysfs();
        fs::create_dir_all(machine.path("sys/bus/pci/devices")).unwrap();
        machine
    }

    pub(crate) fn root(&self) -> &Path {
        self.0.path()
    }

    pub(crate) fn path(&self, path: &str) -> PathBuf {
        self.0.path().join(path)
    }

    pub(crate) fn put(&self, path: &str, text: &str) {
        fs::create_dir_all(self.path(path).parent().unwrap()).unwrap();
        fs::write(self.path(path), text).unwrap();
    }

    pub(crate) fn link(&self, path: &str, target: &str) {
        fs::create_dir_all(self.path(path).parent().unwrap()).unwrap();
        let _ = fs::remove_file(self.path(path));
        symlink(target, self.path(path)).unwrap();
    }

    pub(crate) fn attribute(&self, device: &str, name: &str, text: &str) {
        self.put(&format!("sys/bus/pci/devices/{device}/{name}"), text);
    }

    pub(crate) fn device(&self, device: &str, id: &str, class: &str) {
        let (vendor, model) = id.split_once(':').unwrap();
        self.attribute(device, "vendor", &format!("0x{vendor}\n"));
        self.attribute(device, "device", &format!("0x{model}\n"));
        self.attribute(device, "subsystem_vendor", "0x8086\n");
        self.attribute(device, "subsystem_device", "0xa03c\n");
        self.attribute(device, "class", &format!("0x{class}\n"));
        self.attribute(device, "numa_node", "-1\n");
    }

    pub(crate) fn driver(&self, device: &str, driver: &str) {
        let link = format!("sys/bus/pci/devices/{device}/driver");
        self.link(&link, &format!("../../drivers/{driver}"));
    }

    pub(crate) fn driver_exists(&self, driver: &str) {
        fs::create_dir_all(self.path(&format!("sys/bus/pci/drivers/{driver}"))).unwrap();
    }

    pub(crate) fn group(&self, device: &str, group: u32) {
        let link = format!("sys/bus/pci/devices/{device}/iommu_group");
        self.link(&link, &format!("../../../kernel/iommu_groups/{group}"));
        self.link(
            &format!("sys/kernel/iommu_groups/{group}/devices/{device}"),
            &format!("../../../../devices/pci0000:00/{device}"),
        );
        self.put(&format!("sys/kernel/iommu_groups/{group}/type"), "DMA-FQ\n");
    }

    /// A network card behind a root port, with two of its seven virtual functions enabled.
    pub(crate) fn with_nic() -> Self {
        let machine = Self::new();
        machine.put("usr/share/misc/pci.ids", IDS);
        machine.device("0000:00:03.0", "1b36:000c", "060400");
        machine.driver("0000:00:03.0", "pcieport");
        machine.group("0000:00:03.0", 3);
        machine.device("0000:01:00.0", "8086:10c9", "020000");
        machine.driver("0000:01:00.0", "igb");
        machine.group("0000:01:00.0", 4);
        machine.attribute("0000:01:00.0", "sriov_totalvfs", "7\n");
        machine.attribute("0000:01:00.0", "sriov_numvfs", "2\n");
        machine.attribute("0000:01:00.0", "reset_method", "flr bus\n");
        machine.attribute("0000:01:00.0", "numa_node", "1\n");
        machine.attribute("0000:01:00.0", "net/eth0/address", "52:54:00:12:34:56\n");
        for (index, vf) in ["0000:01:10.0", "0000:01:10.2"].into_iter().enumerate() {
            machine.device(vf, "8086:10ca", "020000");
            machine.group(vf, 5 + u32::try_from(index).unwrap());
            machine.attribute(vf, "reset_method", "flr\n");
            machine.link(
                &format!("sys/bus/pci/devices/{vf}/physfn"),
                "../0000:01:00.0",
            );
            machine.link(
                &format!("sys/bus/pci/devices/0000:01:00.0/virtfn{index}"),
                &format!("../{vf}"),
            );
        }
        machine.driver("0000:01:10.0", "vfio-pci");
        machine
    }

    pub(crate) fn run(&self, args: &[&str]) -> Output {
        self.command(&[&["list"], args].concat())
    }

    /// What the program says to any command.
    pub(crate) fn command(&self, args: &[&str]) -> Output {
        let mut command = Command::new(env!("CARGO_BIN_EXE_ringside-vfio"));
        command.arg("--root").arg(self.0.path()).args(args);
        command.stdin(Stdio::null()).output().unwrap()
    }

    pub(crate) fn table(&self, args: &[&str]) -> Vec<String> {
        let output = self.run(args);
        assert!(output.status.success(), "{output:?}");
        assert!(output.stderr.is_empty(), "{output:?}");
        String::from_utf8(output.stdout)
            .unwrap()
            .lines()
            .map(str::to_owned)
            .collect()
    }

    pub(crate) fn json(&self, args: &[&str]) -> Vec<Value> {
        let output = self.run(&[args, &["--json"]].concat());
        assert!(output.status.success(), "{output:?}");
        let answer: Value = serde_json::from_slice(&output.stdout).unwrap();
        answer["devices"].as_array().unwrap().clone()
    }

    pub(crate) fn failure(&self, args: &[&str]) -> String {
        let output = self.run(args);
        assert_eq!(output.status.code(), Some(1), "{output:?}");
        assert!(output.stdout.is_empty());
        String::from_utf8(output.stderr).unwrap()
    }

    /// The obstacles' codes of one device.
    pub(crate) fn obstacles(&self, device: &str) -> Vec<String> {
        let device = &self.json(&[device])[0];
        let obstacles = device["viability"]["obstacles"].as_array().unwrap();
        assert_eq!(device["viability"]["viable"], obstacles.is_empty());
        obstacles
            .iter()
            .map(|o| o["code"].as_str().unwrap().to_owned())
            .collect()
    }
}

//! `ringside-vfio list` on made-up machines: one directory each, laid out like sysfs.
// Helpers of tests: a panic is the way to fail.
#![allow(clippy::unwrap_used, clippy::indexing_slicing, clippy::panic)]

mod machine;

use std::fs;
use std::process::{Command, Stdio};

use machine::{IDS, Machine};
use serde_json::Value;

#[test]
fn table_of_a_card_with_virtual_functions() {
    let table = Machine::with_nic().table(&[]);
    let columns: Vec<Vec<&str>> = table
        .iter()
        .map(|line| {
            line.split("  ")
                .map(str::trim)
                .filter(|cell| !cell.is_empty())
                .collect()
        })
        .collect();
    assert_eq!(
        columns,
        [
            vec![
                "ADDRESS",
                "SR-IOV",
                "DEVICE",
                "DRIVER",
                "GROUP",
                "NUMA",
                "RESET",
                "ASSIGNABLE"
            ],
            vec![
                "0000:01:00.0",
                "PF 2/7 VFs",
                "Intel Corporation 82576 Gigabit Network Connection [8086:10c9]",
                "igb (eth0)",
                "4",
                "1",
                "flr,bus",
                "no: has 2 virtual functions enabled: assign those, or disable them"
            ],
            vec![
                "0000:01:10.0",
                "VF 0 of 0000:01:00.0",
                "Intel Corporation 82576 Virtual Function [8086:10ca]",
                "vfio-pci",
                "5",
                "-",
                "flr",
                "yes"
            ],
            vec![
                "0000:01:10.2",
                "VF 1 of 0000:01:00.0",
                "Intel Corporation 82576 Virtual Function [8086:10ca]",
                "-",
                "6",
                "-",
                "flr",
                "yes, once bound to vfio-pci"
            ],
        ]
    );
    // Columns begin below their headings.
    let reset = table[0].find("RESET").unwrap();
    assert!(
        table
            .iter()
            .skip(1)
            .all(|line| line[reset..].starts_with("flr"))
    );
}

#[test]
fn json_holds_everything() {
    let devices = Machine::with_nic().json(&[]);
    assert_eq!(devices.len(), 3);
    let pf = &devices[0];
    assert_eq!(pf["address"], "0000:01:00.0");
    assert_eq!(
        (&pf["kind"], &pf["vfs_total"], &pf["vfs_enabled"]),
        (&"pf".into(), &7.into(), &2.into())
    );
    assert_eq!(
        pf["vfs"],
        serde_json::json!(["0000:01:10.0", "0000:01:10.2"])
    );
    assert_eq!(
        (&pf["vendor"], &pf["class"]),
        (&"0x8086".into(), &"0x020000".into())
    );
    assert_eq!(
        (&pf["numa_node"], &pf["interfaces"][0]),
        (&1.into(), &"eth0".into())
    );
    assert_eq!(
        pf["reset"],
        serde_json::json!({"possible": true, "methods": ["flr", "bus"]})
    );
    assert_eq!(
        pf["viability"]["obstacles"],
        serde_json::json!([{"code": "vfs-enabled", "count": 2}])
    );
    let vf = &devices[1];
    assert_eq!(
        (&vf["kind"], &vf["pf"], &vf["index"]),
        (&"vf".into(), &"0000:01:00.0".into(), &0.into())
    );
    assert_eq!(vf["numa_node"], Value::Null);
    assert_eq!(
        vf["iommu_group"],
        serde_json::json!({"id": 5, "type": "DMA-FQ", "no_iommu": false, "members": ["0000:01:10.0"]})
    );
    assert_eq!(
        vf["viability"],
        serde_json::json!({"viable": true, "bound": true, "obstacles": []})
    );
}

#[test]
fn devices_are_selected() {
    let machine = Machine::with_nic();
    assert_eq!(machine.table(&["--all"]).len(), 5);
    let table = machine.table(&["01:10.2", "0000:00:03.0"]);
    assert!(table[1].starts_with("0000:01:10.2") && table[2].starts_with("0000:00:03.0"));
    assert!(
        table[2].contains("Red Hat, Inc. PCI bridge [1b36:000c]"),
        "{}",
        table[2]
    );
    assert!(table[2].ends_with("no: is a bridge"), "{}", table[2]);
    let error = machine.failure(&["0000:02:00.0"]);
    assert!(error.contains("no PCI device 0000:02:00.0"), "{error}");
    let usage = machine.run(&["nonsense"]);
    assert_eq!(usage.status.code(), Some(2));
    assert!(String::from_utf8_lossy(&usage.stderr).contains("`nonsense` is not a PCI address"));
    assert_eq!(machine.run(&["--all", "01:10.2"]).status.code(), Some(2));
}

#[test]
fn names_without_a_database() {
    let machine = Machine::with_nic();
    fs::remove_file(machine.path("usr/share/misc/pci.ids")).unwrap();
    assert!(machine.table(&[])[1].contains("  [8086:10c9]  "));
    assert_eq!(machine.json(&[])[0]["vendor_name"], Value::Null);
    machine.put("usr/share/hwdata/pci.ids", IDS);
    assert!(machine.table(&[])[1].contains("Intel Corporation"));
    machine.put("own.ids", "8086  Somebody\n");
    let own = machine.path("own.ids");
    assert!(
        machine.table(&["--pci-ids", own.to_str().unwrap()])[1].contains("  Somebody [8086:10c9]")
    );
    let error = machine.failure(&["--pci-ids", "/nonexistent/pci.ids"]);
    assert!(
        error.contains("cannot read /nonexistent/pci.ids"),
        "{error}"
    );
}

#[test]
fn no_iommu() {
    let machine = Machine::with_nic();
    fs::remove_file(machine.path("sys/bus/pci/devices/0000:01:10.2/iommu_group")).unwrap();
    assert_eq!(machine.obstacles("01:10.2"), ["no-iommu"]);
    let table = machine.table(&["01:10.2"]);
    assert!(
        table[1].contains("no: has no IOMMU group: switch the IOMMU on"),
        "{}",
        table[1]
    );
    // VFIO's own groups without an IOMMU do not count.
    machine.put("sys/kernel/iommu_groups/5/name", "vfio-noiommu\n");
    assert_eq!(machine.obstacles("01:10.0"), ["unconfined"]);
}

#[test]
fn group_that_is_not_viable_names_the_culprits() {
    let machine = Machine::with_nic();
    for (device, driver) in [
        ("0000:02:00.0", Some("nvme")),
        ("0000:02:00.1", Some("xhci_hcd")),
        ("0000:02:00.2", Some("vfio-pci")),
        ("0000:02:00.3", Some("mlx5_vfio_pci")),
        ("0000:02:00.4", Some("pci-stub")),
        ("0000:02:00.5", Some("pcieport")),
        ("0000:02:00.6", None),
    ] {
        machine.device(device, "8086:1234", "010802");
        machine.group(device, 9);
        if let Some(driver) = driver {
            machine.driver(device, driver);
        }
    }
    // A device that is not PCI in the same group is not ours to judge.
    machine.link(
        "sys/kernel/iommu_groups/9/devices/fe200000.dma",
        "../../../../devices/platform",
    );
    let device = &machine.json(&["02:00.6"])[0];
    assert_eq!(
        device["iommu_group"]["members"].as_array().unwrap().len(),
        7
    );
    assert_eq!(
        device["viability"]["obstacles"],
        serde_json::json!([
            {"code": "group-member", "member": "0000:02:00.0", "driver": "nvme"},
            {"code": "group-member", "member": "0000:02:00.1", "driver": "xhci_hcd"},
        ])
    );
    // A device's own driver is no obstacle: binding to vfio-pci replaces it.
    let device = &machine.json(&["02:00.0"])[0];
    assert_eq!(
        device["viability"]["obstacles"].as_array().unwrap().len(),
        1
    );
    assert_eq!(device["viability"]["bound"], false);
    let table = machine.table(&["02:00.6"]);
    assert!(
        table[1].contains("9 with 0000:02:00.0, 0000:02:00.1, "),
        "{}",
        table[1]
    );
    assert!(
        table[1].contains("shares its IOMMU group with 0000:02:00.0, driven by nvme"),
        "{}",
        table[1]
    );
}

#[test]
fn physical_function_under_vfio() {
    let machine = Machine::with_nic();
    machine.driver("0000:01:00.0", "vfio-pci");
    assert!(machine.obstacles("01:00.0").is_empty());
    machine.driver("0000:01:00.0", "igb");
    machine.attribute("0000:01:00.0", "sriov_numvfs", "0\n");
    assert!(machine.obstacles("01:00.0").is_empty());
    assert!(machine.table(&["01:00.0"])[1].contains("PF 0/7 VFs"));
}

#[test]
fn reset_as_old_kernels_tell_it() {
    let machine = Machine::with_nic();
    fs::remove_file(machine.path("sys/bus/pci/devices/0000:01:10.0/reset_method")).unwrap();
    assert_eq!(
        machine.json(&["01:10.0"])[0]["reset"],
        serde_json::json!({"possible": false, "methods": []})
    );
    machine.attribute("0000:01:10.0", "reset", "");
    assert_eq!(
        machine.json(&["01:10.0"])[0]["reset"],
        serde_json::json!({"possible": true, "methods": []})
    );
    // A device without any method has an empty file.
    machine.attribute("0000:01:10.2", "reset_method", "\n");
    assert_eq!(machine.json(&["01:10.2"])[0]["reset"]["possible"], false);
}

#[test]
fn optional_attributes_may_be_missing() {
    let machine = Machine::new();
    for (name, text) in [
        ("vendor", "0x1af4"),
        ("device", "0x1041"),
        ("class", "0x020000"),
    ] {
        machine.attribute("0000:00:01.0", name, text);
    }
    let device = &machine.json(&["--all"])[0];
    assert_eq!(
        (&device["kind"], &device["driver"]),
        (&"other".into(), &Value::Null)
    );
    assert_eq!(device["subsystem_vendor"], "0x0000");
    assert_eq!(machine.obstacles("00:01.0"), ["no-iommu"]);
    let table = machine.table(&["--all"]);
    assert!(
        table[1].starts_with("0000:00:01.0  -       [1af4:1041]  -"),
        "{}",
        table[1]
    );
}

#[test]
fn device_that_vanishes_is_left_out() {
    let machine = Machine::with_nic();
    fs::remove_file(machine.path("sys/bus/pci/devices/0000:01:10.0/vendor")).unwrap();
    assert_eq!(machine.json(&["--all"]).len(), 3);
}

#[test]
fn virtual_function_whose_parent_does_not_list_it() {
    let machine = Machine::with_nic();
    fs::remove_file(machine.path("sys/bus/pci/devices/0000:01:00.0/virtfn1")).unwrap();
    assert_eq!(machine.json(&["01:10.2"])[0]["index"], Value::Null);
    assert!(machine.table(&["01:10.2"])[1].contains("VF of 0000:01:00.0"));
}

#[test]
fn attributes_that_make_no_sense() {
    for (name, text) in [
        ("vendor", "0x12345"),
        ("vendor", "-1"),
        ("class", "bridge"),
        ("numa_node", ""),
        ("sriov_totalvfs", "70000"),
    ] {
        let machine = Machine::with_nic();
        machine.attribute("0000:01:00.0", name, text);
        let error = machine.failure(&[]);
        assert!(
            error.contains(&format!("0000:01:00.0/{name} holds `{text}`, which is not")),
            "{error}"
        );
    }
    let machine = Machine::with_nic();
    machine.link("sys/bus/pci/devices/0000:01:10.0/physfn", "../somewhere");
    assert!(
        machine
            .failure(&[])
            .contains("physfn holds `somewhere`, which is not a PCI address")
    );
    let machine = Machine::with_nic();
    machine.link("sys/bus/pci/devices/0000:01:10.0/iommu_group", "../x");
    assert!(
        machine
            .failure(&[])
            .contains("which is not the number of an IOMMU group")
    );
    let machine = Machine::with_nic();
    fs::write(
        machine.path("sys/bus/pci/devices/0000:01:10.0/vendor"),
        [0xff, 0xfe],
    )
    .unwrap();
    assert!(machine.failure(&[]).contains("which is not text"));
    let machine = Machine::with_nic();
    fs::create_dir(machine.path("sys/bus/pci/devices/nonsense")).unwrap();
    assert!(
        machine
            .failure(&[])
            .contains("holds `nonsense`, which is not a PCI address")
    );
}

#[test]
fn unreadable_attribute() {
    let machine = Machine::with_nic();
    let class = machine.path("sys/bus/pci/devices/0000:01:10.0/class");
    fs::remove_file(&class).unwrap();
    // A directory cannot be read as a file, whoever asks.
    fs::create_dir(&class).unwrap();
    let error = machine.failure(&[]);
    assert!(
        error.contains("the PCI devices cannot be read: cannot read ") && error.contains("/class"),
        "{error}"
    );
}

#[test]
fn machines_without_devices() {
    let machine = Machine::new();
    let output = machine.run(&[]);
    assert!(output.status.success() && output.stdout.is_empty());
    let hint = String::from_utf8(output.stderr).unwrap();
    assert!(
        hint.contains("no PCI device with SR-IOV; `--all` lists the others too"),
        "{hint}"
    );
    assert_eq!(machine.json(&[]).len(), 0);
    let nothing = Machine::without_sysfs();
    let error = nothing.failure(&[]);
    assert!(
        error.contains("sys/bus/pci/devices does not exist; is sysfs mounted"),
        "{error}"
    );
}

#[test]
fn reader_that_has_seen_enough() {
    let machine = Machine::with_nic();
    let mut command = Command::new(env!("CARGO_BIN_EXE_ringside-vfio"));
    command
        .arg("--root")
        .arg(machine.root())
        .args(["list", "--all"]);
    let mut child = command
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    drop(child.stdout.take());
    let output = child.wait_with_output().unwrap();
    assert!(
        output.status.success() && output.stderr.is_empty(),
        "{output:?}"
    );
}

#[test]
fn help_teaches() {
    let machine = Machine::new();
    let help = String::from_utf8(machine.run(&["--help"]).stdout).unwrap();
    for part in [
        "ASSIGNABLE",
        "--json",
        "[ADDRESS]...",
        "viability.obstacles",
    ] {
        assert!(help.contains(part), "{part} in {help}");
    }
}

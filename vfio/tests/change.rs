//! `bind`, `unbind`, `create` and `destroy` on made-up machines whose kernel is played, and fails or stops at any change.
// Helpers of tests: a panic is the way to fail.
#![allow(clippy::unwrap_used, clippy::indexing_slicing, clippy::panic)]

mod machine;

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::thread;
use std::time::Duration;

use clap::Parser;
use machine::Machine;
use machine::kernel::{FakeKernel, Trouble};
use machine::run::{DISK, PF, machine, run, run_in};
use nix::fcntl::{Flock, FlockArg};
use ringside_vfio::cli::Cli;
use serde_json::Value;

/// Who has which device, and the switches of SR-IOV.
fn snapshot(machine: &Machine) -> BTreeMap<String, String> {
    let mut all = BTreeMap::new();
    for entry in fs::read_dir(machine.path("sys/bus/pci/devices")).unwrap() {
        let path = entry.unwrap().path();
        let device = path.file_name().unwrap().to_str().unwrap().to_owned();
        let driver = fs::read_link(path.join("driver")).map_or_else(
            |_| "-".to_owned(),
            |link| link.file_name().unwrap().to_str().unwrap().to_owned(),
        );
        all.insert(format!("{device} driver"), driver);
        for name in ["driver_override", "sriov_numvfs", "sriov_drivers_autoprobe"] {
            if let Ok(text) = fs::read_to_string(path.join(name)) {
                all.insert(format!("{device} {name}"), text.trim().to_owned());
            }
        }
    }
    all
}

/// The records there are, without the inodes in them.
fn records(machine: &Machine) -> BTreeMap<String, Value> {
    let mut all = BTreeMap::new();
    let Ok(entries) = fs::read_dir(machine.path("run/ringside-vfio")) else {
        return all;
    };
    for entry in entries {
        let path = entry.unwrap().path();
        if path.extension().is_some_and(|kind| kind == "json") {
            let mut record: Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
            record.as_object_mut().unwrap().remove("inode");
            let name = path.file_stem().unwrap().to_str().unwrap().to_owned();
            all.insert(name, record);
        }
    }
    all
}

/// Runs a command with trouble at each of its changes. A failure leaves the machine as it was; whatever a kill
/// leaves, running the command again completes it, and `back` undoes it.
#[track_caller]
fn withstands_trouble(prepare: impl Fn() -> Machine, line: &str, back: &str) {
    let clean = prepare();
    let before = (snapshot(&clean), records(&clean));
    let changes = run(&clean, line).well().changes;
    let after = (snapshot(&clean), records(&clean));
    assert_ne!(before, after);
    run(&clean, back).well();
    let undone = (snapshot(&clean), records(&clean));
    for at in 0..changes.len() {
        let at_what = format!("{line}, at {}: {changes:#?}", changes[at]);
        let failed = prepare();
        let done = run_in(&failed, line, Trouble::Fail(at));
        if changes[at].starts_with("load pci:") {
            // The driver may be there without its module being loaded.
            done.well();
        } else if line.starts_with("unbind") && changes[at].starts_with("forget") {
            // The devices are back, and the next run knows it.
            done.badly();
            assert_eq!(snapshot(&failed), after.0, "{at_what}");
        } else {
            done.badly();
            assert_eq!((snapshot(&failed), records(&failed)), before, "{at_what}");
        }
        run(&failed, line).well();
        assert_eq!((snapshot(&failed), records(&failed)), after, "{at_what}");
        for kill in [Trouble::KillBefore(at), Trouble::KillAfter(at)] {
            let killed = prepare();
            run_in(&killed, line, kill);
            run(&killed, line).well();
            assert_eq!(
                (snapshot(&killed), records(&killed)),
                after,
                "{kill:?} {at_what}"
            );
            let killed = prepare();
            run_in(&killed, line, kill);
            run(&killed, back).well();
            assert_eq!(
                (snapshot(&killed), records(&killed)),
                undone,
                "{kill:?}, then {back}; {at_what}"
            );
        }
    }
}

#[test]
fn bind_and_unbind() {
    let machine = machine();
    let before = snapshot(&machine);
    let done = run(&machine, "bind 02:00.0").well();
    assert_eq!(
        done.out,
        "ADDRESS       GROUP  DRIVER\n0000:02:00.0  9      vfio-pci\n"
    );
    assert_eq!(
        done.changes,
        [
            "load vfio-pci",
            "record 0000:02:00.0.json",
            "sys/bus/pci/devices/0000:02:00.0/driver_override < vfio-pci",
            "sys/bus/pci/devices/0000:02:00.0/driver/unbind < 0000:02:00.0",
            "sys/bus/pci/drivers_probe < 0000:02:00.0",
        ]
    );
    assert_eq!(
        records(&machine)[DISK],
        serde_json::json!({"pf": null, "autoprobe": null,
            "binding": {"driver": "nvme", "driver_override": null}})
    );
    let again = run(&machine, "bind 02:00.0").well();
    assert!(again.changes.is_empty(), "{:?}", again.changes);
    assert!(
        again
            .out
            .starts_with("0000:02:00.0 was bound to vfio-pci already\n"),
        "{}",
        again.out
    );
    let json = run(&machine, "bind --json 02:00.0 02:00.0").well().json();
    assert_eq!(
        json,
        serde_json::json!({"devices": [
            {"address": DISK, "group": 9, "driver": "vfio-pci", "changed": false}]})
    );
    let done = run(&machine, "unbind 02:00.0").well();
    assert!(
        done.out.ends_with("0000:02:00.0  9      nvme\n"),
        "{}",
        done.out
    );
    assert_eq!(snapshot(&machine), before);
    assert!(records(&machine).is_empty());
    let again = run(&machine, "unbind 02:00.0").well();
    assert!(again.changes.is_empty());
    assert!(
        again
            .out
            .starts_with("0000:02:00.0 was not bound to vfio-pci\n")
    );
}

#[test]
fn bind_withstands_trouble() {
    withstands_trouble(machine, "bind 02:00.0 01:00.0", "unbind 01:00.0 02:00.0");
    // An override that somebody else set comes back.
    let with_override = || {
        let machine = machine();
        machine.attribute(DISK, "driver_override", "nvme\n");
        machine
    };
    withstands_trouble(with_override, "bind 02:00.0", "unbind 02:00.0");
    // So does a device without a driver.
    let without_driver = || {
        let machine = machine();
        fs::remove_file(machine.path(&format!("sys/bus/pci/devices/{DISK}/driver"))).unwrap();
        machine
    };
    withstands_trouble(without_driver, "bind 02:00.0", "unbind 02:00.0");
}

#[test]
fn unbind_withstands_trouble() {
    let bound = || {
        let machine = machine();
        run(&machine, "bind 02:00.0 01:00.0").well();
        machine
    };
    withstands_trouble(bound, "unbind 02:00.0 01:00.0", "bind 02:00.0 01:00.0");
}

#[test]
fn create_withstands_trouble() {
    withstands_trouble(machine, "create 01:00.0 3", "destroy 01:00.0");
    withstands_trouble(machine, "create 01:00.0 2 --driver none", "destroy 01:00.0");
    let without_probe = || {
        let machine = machine();
        machine.attribute(PF, "sriov_drivers_autoprobe", "0\n");
        machine
    };
    withstands_trouble(without_probe, "create 01:00.0 2", "destroy 01:00.0");
}

#[test]
fn create_hands_over_withstands_trouble() {
    let unbound = || {
        let machine = machine();
        run(&machine, "create 01:00.0 2 --driver none").well();
        machine
    };
    withstands_trouble(
        unbound,
        "create 01:00.0 2",
        "create 01:00.0 2 --driver none",
    );
    withstands_trouble(
        unbound,
        "create 01:00.0 2 --driver host",
        "create 01:00.0 2 --driver none",
    );
    // The switch that is off is needed for a while, and off again in the end.
    let switched_off = || {
        let machine = unbound();
        machine.attribute(PF, "sriov_drivers_autoprobe", "0\n");
        machine
    };
    withstands_trouble(
        switched_off,
        "create 01:00.0 2 --driver host",
        "create 01:00.0 2 --driver none",
    );
}

#[test]
fn destroy_withstands_trouble() {
    let prepare = || {
        let machine = machine();
        run(&machine, "create 01:00.0 2 --driver host").well();
        // One of them is on loan to vfio-pci.
        run(&machine, "bind 01:10.2").well();
        assert_eq!(records(&machine)["0000:01:10.2"]["pf"], PF);
        machine
    };
    let clean = prepare();
    let changes = run(&clean, "destroy 01:00.0").well().changes;
    let after = snapshot(&clean);
    assert_eq!(after, snapshot(&machine()));
    assert!(records(&clean).is_empty());
    for at in 0..changes.len() {
        for trouble in [
            Trouble::Fail(at),
            Trouble::KillBefore(at),
            Trouble::KillAfter(at),
        ] {
            let machine = prepare();
            run_in(&machine, "destroy 01:00.0", trouble);
            run(&machine, "destroy 01:00.0").well();
            assert_eq!(snapshot(&machine), after, "{trouble:?} {changes:#?}");
            assert!(records(&machine).is_empty(), "{trouble:?} {changes:#?}");
        }
    }
}

/// A virtual function that is gone leaves a record; the one that comes to its address is another.
#[test]
fn record_of_a_device_that_is_gone() {
    let machine = machine();
    run(&machine, "create 01:00.0 1 --driver host").well();
    run(&machine, "bind 01:10.0").well();
    assert_eq!(
        records(&machine)["0000:01:10.0"]["binding"]["driver"],
        "igbvf"
    );
    // Somebody removes it by hand. Something takes its inode, so that the new one gets another.
    let kernel = FakeKernel::new(machine.root(), Trouble::Nothing);
    let numvfs = machine.path(&format!("sys/bus/pci/devices/{PF}/sriov_numvfs"));
    let write = |text| ringside_vfio::kernel::Kernel::write(&kernel, &numvfs, text).unwrap();
    write("0");
    machine.put("taken/inode", "");
    run(&machine, "create 01:00.0 1 --driver none").well();
    run(&machine, "bind 01:10.0").well();
    assert_eq!(
        records(&machine)["0000:01:10.0"]["binding"]["driver"],
        Value::Null
    );
    run(&machine, "unbind 01:10.0").well();
    assert_eq!(snapshot(&machine)["0000:01:10.0 driver"], "-");
    // What is left of past ones goes when the functions are removed.
    run(&machine, "bind 01:10.0").well();
    write("0");
    assert_eq!(records(&machine).len(), 1);
    let done = run(&machine, "destroy 01:00.0").well();
    assert_eq!(done.out, "0000:01:00.0 has no virtual functions\n");
    assert!(records(&machine).is_empty());
}

#[test]
fn damaged_record() {
    let machine = machine();
    machine.put("run/ringside-vfio/0000:02:00.0.json", "{");
    let error = run(&machine, "bind 02:00.0").badly();
    assert!(error.contains("0000:02:00.0.json is damaged"), "{error}");
    assert!(error.contains("remove the file"), "{error}");
}

#[test]
fn create_and_destroy() {
    let machine = machine();
    let done = run(&machine, "create 01:00.0 2").well();
    assert_eq!(
        done.changes,
        [
            "load vfio-pci",
            "record 0000:01:00.0.json",
            "sys/bus/pci/devices/0000:01:00.0/sriov_drivers_autoprobe < 0",
            "sys/bus/pci/devices/0000:01:00.0/sriov_numvfs < 2",
            "sys/bus/pci/devices/0000:01:10.0/driver_override < vfio-pci",
            "sys/bus/pci/drivers_probe < 0000:01:10.0",
            "sys/bus/pci/devices/0000:01:10.2/driver_override < vfio-pci",
            "sys/bus/pci/drivers_probe < 0000:01:10.2",
            "sys/bus/pci/devices/0000:01:00.0/sriov_drivers_autoprobe < 1",
            "forget 0000:01:00.0.json",
        ]
    );
    assert_eq!(
        done.out,
        "ADDRESS       GROUP  DRIVER\n0000:01:10.0  20     vfio-pci\n0000:01:10.2  21     vfio-pci\n"
    );
    assert!(records(&machine).is_empty());
    // Again, and with one function missing its driver.
    assert!(run(&machine, "create 01:00.0 2").well().changes.is_empty());
    fs::remove_file(machine.path("sys/bus/pci/devices/0000:01:10.2/driver")).unwrap();
    let mended = run(&machine, "create 01:00.0 2 --json").well();
    assert_eq!(mended.changes, ["sys/bus/pci/drivers_probe < 0000:01:10.2"]);
    assert_eq!(
        mended.json(),
        serde_json::json!({"devices": [
            {"address": "0000:01:10.0", "group": 20, "driver": "vfio-pci", "changed": false},
            {"address": "0000:01:10.2", "group": 21, "driver": "vfio-pci", "changed": true}]})
    );
    let done = run(&machine, "destroy 01:00.0 --json").well();
    assert_eq!(
        done.json(),
        serde_json::json!({"devices": ["0000:01:10.0", "0000:01:10.2"]})
    );
    assert_eq!(snapshot(&machine)["0000:01:00.0 sriov_numvfs"], "0");
}

#[test]
fn create_for_the_host_or_for_nobody() {
    let machine = machine();
    run(&machine, "create 01:00.0 2 --driver none").well();
    let now = snapshot(&machine);
    assert_eq!(now["0000:01:10.0 driver"], "-");
    assert_eq!(now["0000:01:10.0 driver_override"], "(null)");
    run(&machine, "create 01:00.0 2 --driver host").well();
    assert_eq!(snapshot(&machine)["0000:01:10.2 driver"], "igbvf");
    run(&machine, "destroy 01:00.0").well();
    // Without the switch for probing, of a kernel before 4.12.
    fs::remove_file(machine.path(&format!("sys/bus/pci/devices/{PF}/sriov_drivers_autoprobe")))
        .unwrap();
    run(&machine, "create 01:00.0 1 --driver host").well();
    assert_eq!(snapshot(&machine)["0000:01:10.0 driver"], "igbvf");
    run(&machine, "destroy 01:00.0").well();
    // No driver of the host wants them.
    fs::remove_dir(machine.path("sys/bus/pci/drivers/igbvf")).unwrap();
    let done = run(&machine, "create 01:00.0 1 --driver host").well();
    assert!(
        done.remarks
            .contains("no driver of the host took 0000:01:10.0"),
        "{}",
        done.remarks
    );
}

#[test]
fn create_refuses() {
    let refusal = |prepare: &dyn Fn(&Machine), line: &str| {
        let machine = machine();
        prepare(&machine);
        let before = (snapshot(&machine), records(&machine));
        let error = run(&machine, line).badly();
        assert_eq!((snapshot(&machine), records(&machine)), before, "{error}");
        error
    };
    let nothing = |_: &Machine| {};
    let error = refusal(&nothing, "create 01:00.0 8");
    assert_eq!(error, "0000:01:00.0 can have 7 virtual functions, not 8");
    let error = refusal(&nothing, "create 02:00.0 1");
    assert!(
        error.contains("0000:02:00.0 has no SR-IOV capability"),
        "{error}"
    );
    let error = refusal(&nothing, "create 05:00.0 1");
    assert!(
        error.contains("there is no PCI device 0000:05:00.0"),
        "{error}"
    );
    let error = refusal(&nothing, "create 01:00.0 1 --driver nonsense");
    assert_eq!(
        error,
        "there is no driver nonsense, and loading a module of this name failed: Module nonsense not found"
    );
    let no_driver = |machine: &Machine| {
        fs::remove_file(machine.path(&format!("sys/bus/pci/devices/{PF}/driver"))).unwrap();
    };
    let error = refusal(&no_driver, "create 01:00.0 1");
    assert!(error.contains("0000:01:00.0 has no driver"), "{error}");
    let no_iommu = |machine: &Machine| {
        fs::remove_file(machine.path(&format!("sys/bus/pci/devices/{PF}/iommu_group"))).unwrap();
    };
    let error = refusal(&no_iommu, "create 01:00.0 1");
    assert!(error.contains("0000:01:00.0 has no IOMMU group"), "{error}");
    let fewer = |machine: &Machine| machine.attribute(PF, "makes_only", "1");
    let error = refusal(&fewer, "create 01:00.0 2");
    assert!(
        error.contains("has 1 virtual functions after its driver was asked for 2"),
        "{error}"
    );
    let refuses = |machine: &Machine| {
        machine.put("sys/bus/pci/drivers/vfio-pci/refuses", "0000:01:10.2");
    };
    let error = refusal(&refuses, "create 01:00.0 3");
    assert!(
        error.contains("vfio-pci did not take 0000:01:10.2; the kernel's log says why"),
        "{error}"
    );
    let error = refusal(
        &nothing,
        "create 01:00.0 1 --vf-token 00000000-0000-0000-0000-000000000001",
    );
    assert!(
        error.contains("0000:01:00.0 is bound to igb: a VF token"),
        "{error}"
    );

    let machine = machine();
    run(&machine, "create 01:00.0 2").well();
    let error = run(&machine, "create 01:00.0 3").badly();
    assert!(
        error.contains("has 2 virtual functions") && error.contains("destroy 0000:01:00.0"),
        "{error}"
    );
    for command in ["create 01:10.0 1", "destroy 01:10.0"] {
        let error = run(&machine, command).badly();
        assert_eq!(
            error,
            "0000:01:10.0 is a virtual function; name its physical function 0000:01:00.0"
        );
    }
    fs::remove_file(machine.path(&format!("sys/bus/pci/devices/{PF}/driver"))).unwrap();
    let error = run(&machine, "destroy 01:00.0").badly();
    assert!(error.contains("0000:01:00.0 has no driver"), "{error}");
}

#[test]
fn create_on_a_physical_function_under_vfio() {
    let machine = machine();
    run(&machine, "bind 01:00.0").well();
    let error = run(&machine, "create 01:00.0 1").badly();
    assert!(error.contains("enable_sriov"), "{error}");
    machine.put("sys/module/vfio_pci/parameters/enable_sriov", "Y\n");
    let token = "83d8f4f2-509f-482f-ac1e-e6f2b1cbc6d8";
    let done = run(&machine, &format!("create 01:00.0 1 --vf-token {token}")).well();
    assert_eq!(done.changes[0], format!("token 0000:01:00.0 {token}"));
    assert!(
        done.out.ends_with(&format!("VF token: {token}\n")),
        "{}",
        done.out
    );
    // It is set anew only by whoever asks for it.
    let again = run(&machine, "create 01:00.0 1 --json").well();
    assert_eq!(again.json().get("vf_token"), None);
    // The physical function does not go back while it has virtual ones.
    let error = run(&machine, "unbind 01:00.0").badly();
    assert!(error.contains("destroy 0000:01:00.0` first"), "{error}");
    run(&machine, "destroy 01:00.0").well();
    let random = run(&machine, "create 01:00.0 1 --json").well().json();
    let random = random["vf_token"].as_str().unwrap();
    assert_eq!(random.len(), 36);
    assert_ne!(random, token);
    run(&machine, "destroy 01:00.0").well();
    run(&machine, "unbind 01:00.0").well();
    assert_eq!(snapshot(&machine)["0000:01:00.0 driver"], "igb");
}

#[test]
fn bind_refuses() {
    let machine = machine();
    let error = run(&machine, "bind 00:03.0").badly();
    assert_eq!(
        error,
        "0000:00:03.0 is a bridge: bind the devices behind it"
    );
    fs::remove_file(machine.path(&format!("sys/bus/pci/devices/{DISK}/iommu_group"))).unwrap();
    let error = run(&machine, "bind 02:00.0").badly();
    assert!(error.contains("0000:02:00.0 has no IOMMU group"), "{error}");
    machine.put(
        "sys/module/vfio/parameters/enable_unsafe_noiommu_mode",
        "Y\n",
    );
    run(&machine, "bind 02:00.0").well();
    run(&machine, "create 01:00.0 2").well();
    let error = run(&machine, "bind 01:00.0 --force").badly();
    assert!(
        error.contains("0000:01:00.0 has 2 virtual functions enabled"),
        "{error}"
    );
    // One that is refused keeps the others from being bound.
    run(&machine, "unbind 01:10.0 02:00.0").well();
    let before = snapshot(&machine);
    run(&machine, "bind 02:00.0 00:03.0").badly();
    assert_eq!(snapshot(&machine), before);
}

#[test]
fn driver_that_is_gone() {
    let machine = machine();
    run(&machine, "bind 02:00.0").well();
    fs::remove_dir(machine.path("sys/bus/pci/drivers/nvme")).unwrap();
    let done = run(&machine, "unbind 02:00.0").well();
    assert!(
        done.remarks
            .contains("0000:02:00.0: its former driver is gone (there is no driver nvme"),
        "{}",
        done.remarks
    );
    let now = snapshot(&machine);
    assert_eq!(now["0000:02:00.0 driver"], "-");
    assert_eq!(now["0000:02:00.0 driver_override"], "(null)");
    assert!(records(&machine).is_empty());
}

#[test]
fn bound_by_another_program() {
    let machine = machine();
    machine.driver_exists("vfio-pci");
    machine.driver(DISK, "vfio-pci");
    let done = run(&machine, "bind 02:00.0").well();
    assert!(done.changes.is_empty());
    let done = run(&machine, "unbind 02:00.0").well();
    assert!(done.remarks.contains("is not recorded"), "{}", done.remarks);
    assert_eq!(snapshot(&machine)["0000:02:00.0 driver"], "nvme");
}

#[test]
fn device_in_use() {
    let machine = machine();
    run(&machine, "create 01:00.0 2").well();
    machine.link("proc/77/fd/5", "/dev/vfio/21");
    machine.link("proc/78/fd/6", "/dev/vfio/2");
    machine.link("proc/self/fd/1", "/dev/vfio/21");
    let error = run(&machine, "unbind 01:10.2").badly();
    assert_eq!(
        error,
        "0000:01:10.2 is in use by process 77: end that first"
    );
    for command in [
        "destroy 01:00.0",
        "create 01:00.0 2 --driver none",
        "bind 01:10.2 --driver igbvf",
    ] {
        let error = run(&machine, command).badly();
        assert!(
            error.contains("0000:01:10.2 is in use by process 77") && error.contains("--force"),
            "{error}"
        );
    }
    run(&machine, "unbind 01:10.0").well();
    // By the device's own file, in a process with another root directory.
    machine.put("sys/bus/pci/devices/0000:01:10.2/vfio-dev/vfio3/dev", "");
    machine.link("proc/77/fd/5", "/srv/x/dev/vfio/devices/vfio3");
    let error = run(&machine, "destroy 01:00.0").badly();
    assert!(error.contains("in use by process 77"), "{error}");
    run(&machine, "destroy 01:00.0 --force").well();
}

/// Paths in a machine, and what the links there point to or the files there hold.
type Entries<'a> = &'a [(&'a str, String)];

#[test]
fn device_that_the_host_needs() {
    const ROOT: &str = "21 1 254:0 / / rw - ext4 /dev/mapper/vg-root rw\n";
    let disk = "../../devices/pci0000:00/0000:00:03.0/0000:02:00.0/nvme/nvme0/nvme0n1";
    let part = format!("{disk}/nvme0n1p2");
    let card = "../../devices/pci0000:00/0000:00:03.0/0000:02:00.0/net/eth9";
    let routes = "Iface Destination Gateway Flags RefCnt Use Metric Mask MTU Window IRTT\n";
    let cases: &[(Entries, Entries, &str)] = &[
        // A partition, by its number.
        (
            &[
                ("sys/dev/block/259:2", part.clone()),
                ("sys/class/block/nvme0n1p2", part.clone()),
                ("sys/class/block/nvme0n1", disk.to_owned()),
            ],
            &[(
                "proc/self/mountinfo",
                "21 1 259:2 / /var\\040x rw - ext4 /dev/root rw\n".to_owned(),
            )],
            "the file system mounted at /var x (nvme0n1p2)",
        ),
        // LVM on md on a partition.
        (
            &[
                (
                    "sys/dev/block/254:0",
                    "../../devices/virtual/block/dm-0".to_owned(),
                ),
                (
                    "sys/class/block/dm-0",
                    "../../devices/virtual/block/dm-0".to_owned(),
                ),
                (
                    "sys/devices/virtual/block/dm-0/slaves/md0",
                    "../../md0".to_owned(),
                ),
                (
                    "sys/class/block/md0",
                    "../../devices/virtual/block/md0".to_owned(),
                ),
                (
                    "sys/devices/virtual/block/md0/slaves/nvme0n1p2",
                    "../x".to_owned(),
                ),
                ("sys/class/block/nvme0n1p2", part.clone()),
            ],
            &[("proc/self/mountinfo", ROOT.to_owned())],
            "the file system mounted at / (dm-0)",
        ),
        // A disk with several possible paths, of which one is through this controller.
        (
            &[
                (
                    "sys/dev/block/259:0",
                    "../../devices/virtual/nvme-subsystem/nvme-subsys0/nvme0n1".to_owned(),
                ),
                (
                    "sys/class/block/nvme0n1",
                    "../../devices/virtual/nvme-subsystem/nvme-subsys0/nvme0n1".to_owned(),
                ),
                (
                    "sys/class/block/nvme0c1n1",
                    "../../devices/pci0000:00/0000:02:00.0/nvme/nvme1/nvme0c1n1".to_owned(),
                ),
                // Another namespace, through the other device.
                (
                    "sys/class/block/nvme0c0n2",
                    "../../devices/pci0000:00/0000:01:00.0/nvme/nvme0/nvme0c0n2".to_owned(),
                ),
                (
                    "sys/class/nvme-subsystem/nvme-subsys0/nvme0",
                    "../../../pci0000:00/0000:01:00.0/nvme/nvme0".to_owned(),
                ),
            ],
            &[(
                "proc/self/mountinfo",
                "21 1 259:0 / / rw - ext4 /dev/nvme0n1 rw\n".to_owned(),
            )],
            "the file system mounted at / (nvme0n1)",
        ),
        // The same on a kernel that does not show the paths.
        (
            &[
                (
                    "sys/dev/block/259:0",
                    "../../devices/virtual/nvme-subsystem/nvme-subsys0/nvme0n1".to_owned(),
                ),
                (
                    "sys/class/block/nvme0n1",
                    "../../devices/virtual/nvme-subsystem/nvme-subsys0/nvme0n1".to_owned(),
                ),
                (
                    "sys/class/nvme-subsystem/nvme-subsys0/nvme0",
                    "../../../pci0000:00/0000:02:00.0/nvme/nvme0".to_owned(),
                ),
            ],
            &[(
                "proc/self/mountinfo",
                "21 1 259:0 / / rw shared:1 - ext4 /dev/nvme0n1 rw\n".to_owned(),
            )],
            "the file system mounted at / (nvme0n1)",
        ),
        // btrfs has a number of its own.
        (
            &[
                ("dev/mapper/vg-root", "../nvme0n1p2".to_owned()),
                ("sys/class/block/nvme0n1p2", part.clone()),
            ],
            &[(
                "proc/self/mountinfo",
                "21 1 0:31 / / rw - btrfs /dev/mapper/vg-root rw\n".to_owned(),
            )],
            "the file system mounted at / (nvme0n1p2)",
        ),
        (
            &[
                ("sys/fs/btrfs/uuid/devices/nvme0n1p2", "../x".to_owned()),
                ("sys/class/block/nvme0n1p2", part.clone()),
            ],
            &[],
            "a btrfs file system (nvme0n1p2)",
        ),
        (
            &[("sys/class/block/nvme0n1p2", part.clone())],
            &[(
                "proc/swaps",
                "Filename Type Size Used Priority\n/dev/nvme0n1p2 partition 1 0 -2\n".to_owned(),
            )],
            "swap space (nvme0n1p2)",
        ),
        (
            &[("sys/class/net/eth9", card.to_owned())],
            &[(
                "proc/net/route",
                format!("{routes}eth9 00000000 0202000A 0003 0 0 0 00000000 0 0 0\n"),
            )],
            "the default route (eth9)",
        ),
        // IPv6, through a VLAN on a bond.
        (
            &[
                (
                    "sys/class/net/vlan5",
                    "../../devices/virtual/net/vlan5".to_owned(),
                ),
                (
                    "sys/devices/virtual/net/vlan5/lower_bond0",
                    "../bond0".to_owned(),
                ),
                (
                    "sys/class/net/bond0",
                    "../../devices/virtual/net/bond0".to_owned(),
                ),
                (
                    "sys/devices/virtual/net/bond0/lower_eth9",
                    "../x".to_owned(),
                ),
                ("sys/class/net/eth9", card.to_owned()),
            ],
            &[(
                "proc/net/ipv6_route",
                format!(
                    "{0} 00 {0} 00 fe80{1} 00000400 00000001 00000000 00000003 vlan5\n",
                    "0".repeat(32),
                    "1".repeat(28)
                ),
            )],
            "the default route (vlan5)",
        ),
    ];
    for (links, files, what) in cases {
        let machine = machine();
        for place in ["sys/devices/virtual/net/x", "sys/devices/virtual/block/x"] {
            machine.put(place, "");
        }
        for (path, target) in *links {
            machine.link(path, target);
        }
        for (path, text) in *files {
            machine.put(path, text);
        }
        let before = snapshot(&machine);
        let error = run(&machine, "bind 02:00.0").badly();
        assert_eq!(
            error,
            format!("0000:02:00.0 carries {what}; --force goes on anyway")
        );
        assert_eq!(snapshot(&machine), before);
        // The other device is not concerned, unless it shares the group.
        run(&machine, "bind 01:00.0").well();
        run(&machine, "unbind 01:00.0").well();
        machine.group(PF, 9);
        let error = run(&machine, "bind 01:00.0").badly();
        assert_eq!(
            error,
            format!(
                "0000:01:00.0 shares its IOMMU group with 0000:02:00.0, which carries {what}; --force goes on anyway"
            )
        );
        run(&machine, "bind 02:00.0 --force").well();
    }
}

#[test]
fn routes_that_do_not_count() {
    let machine = machine();
    machine.link(
        "sys/class/net/eth9",
        "../../devices/pci0000:00/0000:02:00.0/net/eth9",
    );
    machine.put(
        "proc/net/route",
        "Iface Destination Gateway Flags RefCnt Use Metric Mask\n\
         eth9 0002000A 00000000 0001 0 0 0 00FFFFFF 0 0 0\n\
         eth9 00000000 00000000 0201 0 0 0 00000000 0 0 0\n",
    );
    let zero = "0".repeat(32);
    machine.put(
        "proc/net/ipv6_route",
        &format!("{zero} 00 {zero} 00 {zero} ffffffff 00000001 00000000 00200200 eth9\n"),
    );
    run(&machine, "bind 02:00.0").well();
}

#[test]
fn names_of_drivers() {
    for name in ["", "-r", "../x", "a b", "vfio/pci"] {
        let words = ["ringside-vfio", "bind", "02:00.0", "--driver", name];
        assert!(Cli::try_parse_from(words).is_err(), "{name}");
    }
    assert!(Cli::try_parse_from(["ringside-vfio", "create", "01:00.0", "0"]).is_err());
}

#[test]
fn one_run_at_a_time() {
    let machine = machine();
    run(&machine, "unbind 02:00.0").well();
    let file = File::open(machine.path("run/ringside-vfio/lock")).unwrap();
    let lock = Flock::lock(file, FlockArg::LockExclusive).unwrap();
    thread::scope(|scope| {
        let waiting = scope.spawn(|| run(&machine, "bind 02:00.0"));
        thread::sleep(Duration::from_millis(100));
        assert!(!waiting.is_finished());
        assert_eq!(snapshot(&machine)["0000:02:00.0 driver"], "nvme");
        drop(lock);
        let done = waiting.join().unwrap().well();
        assert_eq!(
            done.remarks,
            "ringside-vfio: waiting for another ringside-vfio\n"
        );
    });
    assert_eq!(snapshot(&machine)["0000:02:00.0 driver"], "vfio-pci");
}

/// The program itself, on a tree behind which there is no kernel.
#[test]
fn exit_statuses() {
    let machine = machine();
    let status = |args: &[&str]| {
        let output = machine.command(args);
        let text = String::from_utf8_lossy(&output.stderr).into_owned();
        (output.status.code().unwrap(), text)
    };
    assert_eq!(status(&["destroy", "01:00.0"]), (0, String::new()));
    assert_eq!(status(&["unbind", "02:00.0"]), (0, String::new()));
    let (code, text) = status(&["bind", "02:00.0"]);
    assert_eq!(code, 1);
    assert!(
        text.starts_with("ringside-vfio: there is no driver vfio-pci, and loading a module"),
        "{text}"
    );
    // What is written to drivers_probe here has no effect.
    machine.driver_exists("vfio-pci");
    machine.put("sys/bus/pci/drivers_probe", "");
    fs::remove_file(machine.path(&format!("sys/bus/pci/devices/{PF}/driver"))).unwrap();
    let (code, text) = status(&["bind", "01:00.0"]);
    assert_eq!(code, 1);
    assert!(
        text.contains("vfio-pci did not take 0000:01:00.0; the kernel's log"),
        "{text}"
    );
    assert!(records(&machine).is_empty());
    assert_eq!(snapshot(&machine)["0000:01:00.0 driver_override"], "");
    let (code, text) = status(&["set", "01:00.0", "0", "--rate", "1"]);
    assert_eq!(code, 1, "{text}");
    let (code, text) = status(&["check", "02:00.0"]);
    assert_eq!(
        (code, text.contains("cannot be given to a guest")),
        (1, true)
    );
    for usage in [
        &["create", "01:00.0"][..],
        &["bind"],
        &["set", "01:00.0", "0"],
        &["nvme", "01:00.0", "0"],
        &["check", "x"],
    ] {
        assert_eq!(status(usage).0, 2, "{usage:?}");
    }
}

#[test]
fn help_teaches() {
    let machine = Machine::new();
    for (command, parts) in [
        (
            "create",
            &[
                "--vf-token <UUID>",
                "[default: vfio-pci]",
                "VF token",
                "Examples:",
                "`devices`",
            ][..],
        ),
        ("destroy", &["--force", "swap space", "`devices`"]),
        (
            "bind",
            &["[default: vfio-pci]", "Examples:", "LVM", "`changed`"],
        ),
        ("unbind", &["driver_override", "`changed`"]),
        (
            "check",
            &["--memory <SIZE>", "exit status is 1", "`findings`"],
        ),
        (
            "set",
            &["--vlan <ID[:QOS]>", "enable", "Examples:", "`attempts`"],
        ),
        (
            "nvme",
            &[
                "--interrupts <N>",
                "admin queue",
                "Examples:",
                "`secondaries`",
            ],
        ),
    ] {
        let output = machine.command(&[command, "--help"]);
        assert!(output.status.success());
        let help = String::from_utf8(output.stdout).unwrap();
        let words: Vec<_> = help.split_whitespace().collect();
        let text = words.join(" ");
        for part in parts {
            assert!(text.contains(part), "{part} in {help}");
        }
    }
}

/// The kernel refuses the undoing as well: what to do is said, and the record is kept for it.
#[test]
fn undoing_that_fails() {
    let machine = machine();
    machine.driver_exists("vfio-pci");
    for driver in ["vfio-pci", "nvme"] {
        machine.put(
            &format!("sys/bus/pci/drivers/{driver}/refuses"),
            "0000:02:00.0",
        );
    }
    let done = run(&machine, "bind 02:00.0");
    assert!(
        done.remarks.contains(
            "0000:02:00.0 could not be put back, run `ringside-vfio unbind 0000:02:00.0`"
        ),
        "{}",
        done.remarks
    );
    assert!(done.badly().contains("vfio-pci did not take 0000:02:00.0"));
    assert_eq!(
        records(&machine)["0000:02:00.0"]["binding"]["driver"],
        "nvme"
    );
    fs::remove_file(machine.path("sys/bus/pci/drivers/nvme/refuses")).unwrap();
    run(&machine, "unbind 02:00.0").well();
    assert_eq!(snapshot(&machine)["0000:02:00.0 driver"], "nvme");
    assert_eq!(snapshot(&machine)["0000:02:00.0 driver_override"], "(null)");
    assert!(records(&machine).is_empty());
}

//! `set`, and the settings in `list`, with a driver that is played.
// Helpers of tests: a panic is the way to fail.
#![allow(clippy::unwrap_used, clippy::indexing_slicing, clippy::panic)]

mod machine;

use std::sync::Arc;

use clap::Parser;
use machine::Machine;
use machine::kernel::{FakeKernel, Trouble};
use machine::run::{PF, machine, run, run_under};
use nix::errno::Errno;
use ringside_vfio::cli::Cli;
use ringside_vfio::network::VfSettings;
use serde_json::json;

/// The machine with two virtual functions bound to vfio-pci, and its kernel.
fn card() -> (Machine, Arc<FakeKernel>) {
    let machine = machine();
    run(&machine, "create 01:00.0 2").well();
    machine.attribute(PF, "net/eth0/ifindex", "7\n");
    machine.put("sys/class/net/eth0/ifindex", "7\n");
    let kernel = FakeKernel::new(machine.root(), Trouble::Nothing);
    *kernel.functions.lock().unwrap() = vec![VfSettings::default(); 2];
    (machine, Arc::new(kernel))
}

#[test]
fn all_settings() {
    let (machine, kernel) = card();
    let line = "set 01:00.0 01:10.2 --mac 52:54:00:00:00:0A --vlan 100:3 --rate 1000 --min-rate 10 \
                --trust on --spoofchk off --link-state enable";
    let done = run_under(&machine, line, &kernel).well();
    assert_eq!(
        done.out,
        "mac: done\nvlan: done\nrate: done\ntrust: done\nspoofchk: done\nlink-state: done\n"
    );
    assert_eq!(
        done.remarks,
        "ringside-vfio: 0000:01:10.2 is bound to vfio-pci: it takes its new address at its next reset, \
         such as at the next start of its guest\n"
    );
    let list = run_under(&machine, "list --json", &kernel).well().json();
    let settings = |device: usize| list["devices"][device].get("settings").cloned();
    assert_eq!(settings(0), None);
    assert_eq!(settings(1).unwrap()["mac"], json!(null));
    assert_eq!(
        settings(2).unwrap(),
        json!({"mac": "52:54:00:00:00:0a", "vlan": {"id": 100, "qos": 3}, "min_rate": 10,
            "max_rate": 1000, "trust": true, "spoofchk": false, "link_state": "enable"})
    );
    // A rate that is not given stays.
    let done = run_under(&machine, "set 01:00.0 1 --rate 0 --json", &kernel).well();
    assert!(done.remarks.is_empty());
    let answer = done.json();
    assert_eq!(
        (&answer["address"], &answer["index"], &answer["interface"]),
        (&"0000:01:10.2".into(), &1.into(), &"eth0".into())
    );
    assert_eq!(
        answer["attempts"],
        json!([{"setting": "rate", "error": null}])
    );
    assert_eq!(answer["settings"]["max_rate"], 0);
    assert_eq!(answer["settings"]["min_rate"], 10);
}

#[test]
fn refusals_are_told_one_by_one() {
    let (machine, kernel) = card();
    *kernel.refused.lock().unwrap() = vec![
        ("trust", Errno::EOPNOTSUPP),
        ("vlan", Errno::EINVAL),
        ("spoofchk", Errno::EPERM),
    ];
    let line = "set 01:00.0 0 --vlan 5 --trust on --spoofchk on --link-state disable";
    let done = run_under(&machine, line, &kernel);
    assert_eq!(
        done.out,
        "vlan: igb refused: Invalid argument (os error 22)\ntrust: igb cannot do this\n\
         spoofchk: this needs root\nlink-state: done\n"
    );
    assert_eq!(
        done.badly(),
        "0000:01:10.0 did not get: vlan, trust, spoofchk"
    );
}

#[test]
fn what_has_no_settings() {
    let (machine, kernel) = card();
    for (line, message) in [
        (
            "set 01:00.0 2 --vlan 1",
            "0000:01:00.0 has no virtual function 2: it has 2",
        ),
        (
            "set 01:00.0 02:00.0 --vlan 1",
            "0000:01:00.0 has no virtual function 0000:02:00.0: it has 2",
        ),
        (
            "set 02:00.0 0 --vlan 1",
            "0000:02:00.0 is not a physical function",
        ),
        (
            "set 09:00.0 0 --vlan 1",
            "there is no PCI device 0000:09:00.0",
        ),
    ] {
        let error = run_under(&machine, line, &kernel).badly();
        assert!(error.contains(message), "{error}");
    }
    kernel.functions.lock().unwrap().clear();
    let error = run_under(&machine, "set 01:00.0 0 --vlan 1", &kernel).badly();
    assert!(
        error.contains("the driver of eth0 has no settings"),
        "{error}"
    );
    machine.put("sys/class/net/eth0/ifindex", "8\n");
    let error = run_under(&machine, "set 01:00.0 0 --vlan 1", &kernel).badly();
    assert!(
        error.contains("cannot read the settings of the virtual functions of eth0"),
        "{error}"
    );
    // A list does without them.
    let list = run_under(&machine, "list --json", &kernel).well().json();
    assert_eq!(list["devices"][1].get("settings"), None);
    std::fs::remove_dir_all(machine.path(&format!("sys/bus/pci/devices/{PF}/net"))).unwrap();
    let error = run_under(&machine, "set 01:00.0 0 --vlan 1", &kernel).badly();
    assert_eq!(
        error,
        "0000:01:00.0 has no network interface (igb), and only the driver of one can set this"
    );
}

#[test]
fn values_are_checked() {
    for arguments in [
        "--mac 53:54:00:00:00:01",
        "--mac 52:54:00:00:00",
        "--mac 52:54:00:00:00:01:02",
        "--mac 52:54:00:00:00:+1",
        "--vlan 4095",
        "--vlan 1:8",
        "--vlan 1:",
        "--rate -1",
        "--trust maybe",
        "--link-state up",
        "--json",
    ] {
        let words = ["ringside-vfio", "set", "01:00.0", "0"].into_iter();
        assert!(
            Cli::try_parse_from(words.chain(arguments.split(' '))).is_err(),
            "{arguments}"
        );
    }
    assert!(Cli::try_parse_from(["ringside-vfio", "set", "01:00.0", "x", "--rate", "1"]).is_err());
}

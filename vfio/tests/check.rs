//! `check` on made-up machines.
// Helpers of tests: a panic is the way to fail.
#![allow(clippy::unwrap_used, clippy::indexing_slicing, clippy::panic)]

mod machine;

use std::collections::BTreeMap;
use std::fs;

use machine::Machine;
use machine::run::{PF, machine, run};
use serde_json::Value;

const LIMITS: &str = "Limit                     Soft Limit           Hard Limit           Units\n\
     Max locked memory         8388608              8388608              bytes\n";

/// A machine on which a guest can have 01:10.0.
fn ready() -> Machine {
    let machine = machine();
    run(&machine, "create 01:00.0 1").well();
    machine.attribute("0000:01:10.0", "reset_method", "flr\n");
    machine.put("dev/vfio/vfio", "");
    machine.put("dev/vfio/20", "");
    machine.put(
        "proc/interrupts",
        "  8:  1  0  IR-IO-APIC  8-edge  rtc0\n 30:  0  0  IR-PCI-MSIX-0000:01:00.0  0-edge  eth0\n",
    );
    machine.put("proc/self/status", "Name: x\nCapEff:\t0000000000000000\n");
    machine.put("proc/self/limits", LIMITS);
    machine.put(
        "sys/module/vfio_iommu_type1/parameters/dma_entry_limit",
        "65535\n",
    );
    machine.put(
        "sys/module/vfio_iommu_type1/parameters/allow_unsafe_interrupts",
        "N\n",
    );
    machine
}

/// Level and message of each finding; whether all is well agrees with them.
#[track_caller]
fn findings(machine: &Machine, arguments: &str) -> BTreeMap<String, (String, String)> {
    let done = run(machine, &format!("check --json {arguments}"));
    let answer: Value = serde_json::from_str(&done.out).unwrap();
    let list = answer["findings"].as_array().unwrap();
    let failed = list.iter().any(|finding| finding["level"] == "fail");
    assert_eq!(answer["usable"], !failed);
    assert_eq!(done.error.is_some(), failed);
    let text = |finding: &Value, name: &str| finding[name].as_str().unwrap().to_owned();
    list.iter()
        .map(|finding| {
            // What is not well can be mended.
            assert_eq!(finding["level"] == "ok", finding.get("remedy").is_none());
            (
                text(finding, "code"),
                (text(finding, "level"), text(finding, "message")),
            )
        })
        .collect()
}

#[track_caller]
fn finds(machine: &Machine, arguments: &str, code: &str, level: &str, message: &str) {
    let findings = findings(machine, arguments);
    let (found, text) = findings
        .get(code)
        .unwrap_or_else(|| panic!("no {code}: {findings:?}"));
    assert_eq!(found, level, "{text}");
    assert!(text.contains(message), "{text}");
}

#[test]
fn device_that_is_ready() {
    let machine = ready();
    let done = run(&machine, "check 01:10.0 --memory 8M").well();
    assert_eq!(
        done.out,
        "ok    iommu: an IOMMU translates its DMA (group 20)\n\
         ok    interrupt-remapping: the IOMMU remaps interrupts\n\
         ok    modules: the VFIO modules are loaded\n\
         ok    group: nothing of the host's is in its IOMMU group\n\
         ok    driver: bound to vfio-pci\n\
         ok    permission: this user may open /dev/vfio/20\n\
         ok    locked-memory: this user may lock 8 MiB, enough for the guest's 8 MiB\n\
         ok    dma-entry-limit: a container can have 65535 DMA mappings\n\
         ok    reset: it can be reset: flr\n\
         ok    in-use: no process has it\n\
         ok    host-needs-it: it carries no mounted file system, swap space or default route\n"
    );
    let done = run(&machine, "check 01:10.0 --memory 1G");
    assert!(
        done.out.contains(
            "fail  locked-memory: this user may lock 8 MiB, and the guest's 1 GiB have to be\n      raise the limit"
        ),
        "{}",
        done.out
    );
    assert_eq!(
        done.badly(),
        "0000:01:10.0 cannot be given to a guest as it is"
    );
    assert!(
        run(&machine, "check 09:00.0")
            .badly()
            .contains("no PCI device")
    );
}

#[test]
fn each_flaw_is_found() {
    let change = |change: &dyn Fn(&Machine)| {
        let machine = ready();
        change(&machine);
        machine
    };
    let vf = "sys/bus/pci/devices/0000:01:10.0";
    let remove = |path: &str| change(&|machine| fs::remove_file(machine.path(path)).unwrap());
    let put = |path: &str, text: &str| change(&|machine| machine.put(path, text));

    let machine = remove(&format!("{vf}/iommu_group"));
    finds(&machine, "01:10.0", "iommu", "fail", "no IOMMU");
    let machine = put("sys/kernel/iommu_groups/20/name", "vfio-noiommu\n");
    finds(
        &machine,
        "01:10.0",
        "iommu",
        "fail",
        "all of the host's memory",
    );

    let machine = put("proc/interrupts", "  8:  1  0  IO-APIC  8-edge  rtc0\n");
    finds(
        &machine,
        "01:10.0",
        "interrupt-remapping",
        "fail",
        "VFIO refuses",
    );
    machine.put(
        "sys/module/vfio_iommu_type1/parameters/allow_unsafe_interrupts",
        "Y\n",
    );
    finds(
        &machine,
        "01:10.0",
        "interrupt-remapping",
        "warn",
        "any interrupt",
    );
    let machine = put("proc/interrupts", " 30:  0  0  PCI-MSI 512-edge  eth0\n");
    finds(
        &machine,
        "01:10.0",
        "interrupt-remapping",
        "fail",
        "not remapped",
    );
    let machine = put("proc/interrupts", "  8:  1  0  GICv3  8  timer\n");
    assert!(!findings(&machine, "01:10.0").contains_key("interrupt-remapping"));

    let machine = remove("dev/vfio/vfio");
    finds(&machine, "01:10.0", "modules", "fail", "vfio_iommu_type1");

    let machine = remove(&format!("{vf}/driver"));
    finds(&machine, "01:10.0", "driver", "fail", "bound to no driver");

    let machine = ready();
    machine.group("0000:02:00.0", 20);
    finds(
        &machine,
        "01:10.0",
        "group",
        "fail",
        "0000:02:00.0, driven by nvme",
    );
    finds(
        &machine,
        "01:00.0",
        "kind",
        "fail",
        "1 virtual functions enabled",
    );
    finds(&machine, "00:03.0", "kind", "fail", "is a bridge");

    let machine = ready();
    machine.put(
        "proc/self/limits",
        "Max locked memory  unlimited  unlimited  bytes\n",
    );
    finds(
        &machine,
        "01:10.0 --memory 1T",
        "locked-memory",
        "ok",
        "any amount",
    );
    machine.put("proc/self/limits", LIMITS);
    finds(&machine, "01:10.0", "locked-memory", "warn", "no larger");
    machine.put("proc/self/status", "CapEff:\t0000000000004000\n");
    finds(
        &machine,
        "01:10.0 --memory 1T",
        "locked-memory",
        "ok",
        "CAP_IPC_LOCK",
    );
    let machine = put("proc/self/limits", "");
    finds(&machine, "01:10.0", "locked-memory", "warn", "not known");

    let machine = put(
        "sys/module/vfio_iommu_type1/parameters/dma_entry_limit",
        "16\n",
    );
    finds(
        &machine,
        "01:10.0",
        "dma-entry-limit",
        "warn",
        "16 DMA mappings",
    );

    let machine = put(&format!("{vf}/reset_method"), "\n");
    finds(&machine, "01:10.0", "reset", "warn", "cannot reset it");

    let machine = ready();
    machine.link("proc/5/fd/7", "/dev/vfio/20");
    finds(&machine, "01:10.0", "in-use", "fail", "process 5 has it");

    let machine = ready();
    machine.put(
        "proc/net/route",
        "Iface\neth0 00000000 01 0003 0 0 0 00000000\n",
    );
    machine.link(
        "sys/class/net/eth0",
        "../../devices/pci0000:00/0000:01:10.0/net/eth0",
    );
    finds(
        &machine,
        "01:10.0",
        "host-needs-it",
        "fail",
        "the default route (eth0)",
    );

    let machine = ready();
    assert!(!findings(&machine, "01:10.0").contains_key("vf-token"));
    machine.driver(PF, "vfio-pci");
    finds(
        &machine,
        "01:10.0",
        "vf-token",
        "warn",
        "0000:01:00.0 is bound to vfio-pci",
    );
}

#[test]
fn permission() {
    let machine = ready();
    // Nobody may write to a directory as to a file, but a link to nowhere keeps even root out.
    fs::remove_file(machine.path("dev/vfio/20")).unwrap();
    assert!(!findings(&machine, "01:10.0").contains_key("permission"));
    machine.link("dev/vfio/20", "nowhere");
    finds(
        &machine,
        "01:10.0",
        "permission",
        "fail",
        "may not open /dev/vfio/20",
    );
}

//! `nvme` with a controller that is played.
// Helpers of tests: a panic is the way to fail.
#![allow(clippy::unwrap_used, clippy::indexing_slicing, clippy::panic)]

mod machine;

use std::sync::Arc;

use clap::Parser;
use machine::Machine;
use machine::controller::{FakeController, FakeSecondary};
use machine::kernel::{FakeKernel, Trouble};
use machine::run::{PF, machine, run_under};
use ringside_vfio::cli::Cli;
use serde_json::json;

/// A controller with two virtual functions, of three that it could have.
fn controller() -> (Machine, Arc<FakeKernel>) {
    let machine = machine();
    machine.attribute(PF, "nvme/nvme0/cntlid", "0\n");
    machine.put("dev/nvme0", "");
    let kernel = Arc::new(FakeKernel::new(machine.root(), Trouble::Nothing));
    *kernel.controller.lock().unwrap() = FakeController::new(3, 6);
    run_under(&machine, "create 01:00.0 2 --driver none", &kernel).well();
    (machine, kernel)
}

fn online(queues: u16, interrupts: u16) -> FakeSecondary {
    FakeSecondary {
        online: true,
        queues,
        interrupts,
    }
}

#[test]
fn list() {
    let (machine, kernel) = controller();
    kernel.controller.lock().unwrap().secondaries[1] = online(2, 1);
    let done = run_under(&machine, "nvme 01:00.0", &kernel).well();
    assert_eq!(
        done.out,
        "nvme0: primary controller 0\n\
         \x20           FLEXIBLE  ASSIGNED  OWN  MOST\n\
         queues      6         2         2    5\n\
         interrupts  6         0         2    5\n\
         CONTROLLER  VF  STATE    QUEUES  INTERRUPTS\n\
         1           0   offline  0       0\n\
         2           1   online   2       1\n\
         3           2   offline  0       0\n"
    );
    let json = run_under(&machine, "nvme 01:00.0 --json", &kernel)
        .well()
        .json();
    assert_eq!(
        (&json["address"], &json["controller"]),
        (&PF.into(), &"nvme0".into())
    );
    assert_eq!(
        json["primary"]["queues"],
        json!({"flexible": 6, "assigned": 2, "primary_flexible": 0, "primary_private": 2,
            "most": 5, "granularity": 0})
    );
    assert_eq!(
        json["secondaries"][1],
        json!({"id": 2, "primary": 0, "online": true, "vf": 2, "queues": 2, "interrupts": 1})
    );
    assert!(kernel.controller.lock().unwrap().log.is_empty());
}

#[test]
fn assign() {
    let (machine, kernel) = controller();
    let line = "nvme 01:00.0 01:10.2 --queues 3 --interrupts 2 --attach 7";
    let done = run_under(&machine, line, &kernel).well();
    assert_eq!(
        done.out,
        "CONTROLLER  VF  STATE   QUEUES  INTERRUPTS\n2           1   online  3       2\n"
    );
    {
        let controller = kernel.controller.lock().unwrap();
        assert_eq!(
            controller.log,
            [
                (0x1c, 0x0002_0007),
                (0x1c, 0x0002_0008),
                (0x1c, 0x0002_0108),
                (0x1c, 0x0002_0009),
                (0x15, 0)
            ]
        );
        assert_eq!(controller.attached, [(7, 2)]);
    }
    // Again: it is attached already.
    let again = run_under(&machine, &format!("{line} --json"), &kernel).well();
    assert_eq!(again.json()["online"], true);
}

#[test]
fn failure_is_undone() {
    for former in [FakeSecondary::default(), online(2, 1)] {
        for at in 0..5 {
            let (machine, kernel) = controller();
            {
                let mut controller = kernel.controller.lock().unwrap();
                controller.secondaries[0] = former;
                controller.fails = Some(at);
            }
            let line = "nvme 01:00.0 0 --queues 3 --interrupts 3 --attach 1";
            let error = run_under(&machine, line, &kernel).badly();
            assert!(
                error.contains("failed for secondary controller 1 of nvme0: internal error"),
                "{error}"
            );
            let controller = kernel.controller.lock().unwrap();
            assert_eq!(controller.secondaries[0], former, "{at}");
        }
    }
    let (machine, kernel) = controller();
    {
        let mut controller = kernel.controller.lock().unwrap();
        controller.secondaries[1] = online(2, 5);
        controller.secondaries[0] = online(2, 1);
    }
    let error = run_under(
        &machine,
        "nvme 01:00.0 0 --queues 2 --interrupts 2",
        &kernel,
    )
    .badly();
    assert_eq!(
        error,
        "assigning 2 interrupts failed for secondary controller 1 of nvme0: so many resources are not free (status 0x121)"
    );
    assert_eq!(
        kernel.controller.lock().unwrap().secondaries[0],
        online(2, 1)
    );
    // Fewer than asked for is a failure as well.
    {
        let mut controller = kernel.controller.lock().unwrap();
        controller.stingy = true;
        controller.secondaries[0] = FakeSecondary::default();
    }
    let error = run_under(
        &machine,
        "nvme 01:00.0 0 --queues 4 --interrupts 1",
        &kernel,
    )
    .badly();
    assert_eq!(
        error,
        "nvme0 gave its secondary controller 1 2 queues, not 4"
    );
}

#[test]
fn refusals() {
    let (machine, kernel) = controller();
    for (line, message) in [
        (
            "nvme 02:00.0",
            "0000:02:00.0 is not an NVMe controller of the host (its driver is nvme)",
        ),
        (
            "nvme 01:00.0 0 --queues 6 --interrupts 1",
            "a secondary controller of nvme0 can have 5 queues, not 6",
        ),
        (
            "nvme 01:00.0 2 --queues 2 --interrupts 1",
            "no virtual function 2: it has 2",
        ),
    ] {
        let error = run_under(&machine, line, &kernel).badly();
        assert!(error.contains(message), "{error}");
    }
    machine.link("proc/9/fd/3", "/dev/vfio/20");
    let line = "nvme 01:00.0 0 --queues 2 --interrupts 1";
    let error = run_under(&machine, line, &kernel).badly();
    assert!(
        error.contains("0000:01:10.0 is in use by process 9"),
        "{error}"
    );
    run_under(&machine, &format!("{line} --force"), &kernel).well();
    kernel.controller.lock().unwrap().secondaries.truncate(1);
    let error = run_under(
        &machine,
        "nvme 01:00.0 1 --queues 2 --interrupts 1",
        &kernel,
    )
    .badly();
    assert_eq!(
        error,
        "nvme0 has no secondary controller for virtual function 1"
    );
    std::fs::remove_file(machine.path("dev/nvme0")).unwrap();
    let error = run_under(&machine, "nvme 01:00.0", &kernel).badly();
    assert!(error.contains("cannot open /dev/nvme0"), "{error}");
    for arguments in [
        "0",
        "0 --queues 2",
        "--queues 2",
        "0 --queues 1 --interrupts 1",
    ] {
        let words = ["ringside-vfio", "nvme", "01:00.0"].into_iter();
        assert!(
            Cli::try_parse_from(words.chain(arguments.split(' '))).is_err(),
            "{arguments}"
        );
    }
}

//! `ringside-net`: serves a network interface to a virtual machine over vhost-user.

use std::process::ExitCode;

use clap::{Arg, Parser};
use ringside_backends::net::{
    ArgsError, Net, NetArgs, Switch, SwitchArgs, SwitchError, finish_captures, start_passt,
};
use ringside_backends::shell::{self, Parts, Program, ShellArgs};

const PROGRAM: Program = Program {
    name: "ringside-net",
    kind: "net",
    features: &[],
    hangup: "do nothing",
};

// Lines of 78 characters at most: wrapped commands cannot be copied.
const EXAMPLES: &str = "Examples:
  Create a TAP interface, give the host's end an address, and serve one virtual
  machine after the other:
    ringside-net --socket-path /run/vm1-net.sock --tap vm1 \\
      --tap-ip 192.168.90.1/24

  Four queue pairs, on a TAP interface made beforehand for a user without
  privileges:
    ip tuntap add dev vm1 mode tap user alice vnet_hdr multi_queue
    ip link set vm1 up
    ringside-net --socket-path /run/vm1-net.sock --tap vm1 --queue-pairs 4 \\
      --mac 52:54:00:12:34:56

  A switch of two guests in a VLAN of their own, joined to a TAP interface:
    ringside-net --port socket=/run/vm1.sock,vlan=7 \\
      --port socket=/run/vm2.sock,vlan=7 --uplink tap:up0,vlan=7

  Upgrade it under running guests, which notice nothing but a pause:
    ringside-net --socket-path /run/vm1-net.sock --tap vm1 \\
      --control-socket /run/vm1-net.ctl ...
    ringside-net (the same) --take-over /run/vm1-net.ctl

  Attach it to ringside-vmm:
    ringside-vmm --kernel vmlinuz --net socket=/run/vm1-net.sock ...

  Attach it to QEMU, whose guest memory must be shared:
    qemu-system-x86_64 -m 1G -machine q35,memory-backend=mem \\
      -object memory-backend-memfd,id=mem,size=1G,share=on \\
      -chardev socket,id=c0,path=/run/vm1-net.sock \\
      -netdev vhost-user,id=n0,chardev=c0,queues=4 \\
      -device virtio-net-pci,netdev=n0,mq=on,mac=52:54:00:12:34:56 ...

  Attach it to cloud-hypervisor:
    cloud-hypervisor --memory size=1G,shared=on --net \\
      vhost_user=true,socket=/run/vm1-net.sock,num_queues=8 ...
";

/// Serves a network interface to a virtual machine over vhost-user, on a TAP interface of the host or another link.
///
/// The virtual machine monitor connects to a Unix socket and shares its guest's memory; packets then go from the
/// guest's virtqueues to the TAP interface and back without being copied, many of them with one system call, segments of
/// up to 64 KiB included. Behind passt and AF_XDP (--link) each packet is copied once.
///
/// With --port it serves several virtual machines and is the switch between them.
#[derive(Parser)]
#[command(mut_arg("socket_path", unless_a_switch), mut_arg("tap", |tap| unless_a_switch(tap)))]
#[command(mut_args(no_part_of_a_switch))]
#[command(name = PROGRAM.name, version, after_help = PROGRAM.after_help(), after_long_help = format!("{EXAMPLES}\n{}", PROGRAM.after_help()))]
struct Cli {
    #[command(flatten)]
    net: NetArgs,
    #[command(flatten)]
    switch: SwitchArgs,
    #[command(flatten)]
    shell: ShellArgs,
}

/// A switch's ports have sockets of their own, and links are its uplinks.
fn unless_a_switch(arg: Arg) -> Arg {
    arg.required_unless_present("port").conflicts_with("port")
}

/// Options of one card, or of its one front-end. A port has some of them as keys.
const OF_A_CARD: [&str; 13] = [
    "client",
    "exit_on_disconnect",
    "fd",
    "hash_report",
    "limit",
    "link",
    "mac",
    "pcap",
    "pcap_snap",
    "queue_pairs",
    "rss",
    "standby",
    "tap_fd",
];

fn no_part_of_a_switch(arg: Arg) -> Arg {
    if OF_A_CARD.contains(&arg.get_id().as_str()) {
        arg.conflicts_with("port")
    } else {
        arg
    }
}

/// What the command line asks for.
enum Served {
    /// One network card.
    Card(Box<Net>),
    /// A switch, whose threads begin when signals are taken care of.
    Switch(Box<(NetArgs, SwitchArgs, Option<Parts>)>),
}

fn open(cli: Cli) -> (Result<Served, SwitchError>, ShellArgs) {
    let Cli {
        net,
        switch,
        mut shell,
    } = cli;
    let served = if switch.port.is_empty() {
        let parts = shell.meet_predecessor(&PROGRAM).map_err(ArgsError::from);
        let card = parts.and_then(|parts| net.open_as(parts));
        card.map(|card| Served::Card(Box::new(card)))
            .map_err(SwitchError::from)
    } else {
        Switch::check(&net, &switch).and_then(|()| {
            let parts = shell.meet_ports(&PROGRAM).map_err(ArgsError::from)?;
            Ok(Served::Switch(Box::new((net, switch, parts))))
        })
    };
    (served, shell)
}

fn main() -> ExitCode {
    if let Some(code) = start_passt(std::env::args_os()) {
        return code;
    }
    shell::main_with(&PROGRAM, open, |program, served, shell| {
        let ended = match served {
            Served::Card(card) => shell::run(program, *card, shell),
            Served::Switch(switch) => {
                let (net, switch, parts) = *switch;
                let hub = || Switch::new(&net, &switch, parts);
                shell::run_ports(program, hub, &switch.port, shell)
            }
        };
        finish_captures();
        ended
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn what_is_of_a_card_is_refused_beside_a_port() {
        let command = Cli::command();
        let ids: Vec<&str> = command
            .get_arguments()
            .map(|arg| arg.get_id().as_str())
            .collect();
        for id in OF_A_CARD.iter().chain(&["socket_path", "tap"]) {
            assert!(ids.contains(id), "there is no option {id}");
            let of_card = command.get_arguments().find(|arg| arg.get_id() == id);
            let conflicts = of_card.map(|arg| command.get_arg_conflicts_with(arg));
            let ports = conflicts
                .into_iter()
                .flatten()
                .filter(|arg| arg.get_id() == "port");
            assert_eq!(ports.count(), 1, "{id}");
        }
    }
}

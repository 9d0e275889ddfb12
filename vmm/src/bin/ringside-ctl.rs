//! `ringside-ctl`: asks a machine that runs, through its control socket.
#![forbid(unsafe_code)]

use std::io::{self, BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Parser, Subcommand};
use ringside_vmm::config::keys_and_values;
use serde_json::{Map, Value, json};

const AFTER_HELP: &str = "\
Exit status: 0 when the request was granted, 1 when it was not, 2 when the command line is wrong.

Examples, for `ringside-vmm --api-socket /run/vm.sock`:
  ringside-ctl --socket /run/vm.sock device-add 0000:01:10.0
  ringside-ctl --socket /run/vm.sock device-add 0000:01:10.2,id=nic
  ringside-ctl --socket /run/vm.sock device-list
  ringside-ctl --socket /run/vm.sock device-remove nic
  ringside-ctl --socket /run/vm.sock device-remove nic --force    the guest did not let go of it
  ringside-ctl --socket /run/vm.sock memory-add 512M

The protocol is one JSON object in each line, both ways:
  {\"id\": 1, \"command\": \"device-add\", \"arguments\": {\"host\": \"0000:01:10.0\"}}
  {\"id\": 1, \"result\": {\"id\": \"0000:01:10.0\"}}
  {\"id\": 2, \"error\": {\"code\": \"conflict\", \"message\": \"...\"}}";

/// Sends one request to a ringside-vmm with --api-socket, and shows the answer.
#[derive(Debug, Parser)]
#[command(name = "ringside-ctl", version, max_term_width = 100, after_help = AFTER_HELP)]
struct Cli {
    /// The machine's control socket.
    #[arg(long, value_name = "PATH")]
    socket: PathBuf,

    /// Prints the answer as JSON.
    #[arg(long)]
    json: bool,

    /// What to ask for.
    #[command(subcommand)]
    request: Request,
}

#[derive(Debug, Subcommand)]
enum Request {
    /// Shows what the machine is and does.
    Status,
    /// Lists its devices.
    DeviceList,
    /// Plugs in a PCI function of the host that is bound to vfio-pci.
    DeviceAdd {
        /// As for ringside-vmm --vfio: the address alone, or keys host=, id=, vf-token=.
        #[arg(value_name = "ADDRESS | KEY=VALUE,...", value_parser = arguments)]
        device: Arguments,
    },
    /// Asks the guest to let go of a function; it leaves when the guest has done so. `device-list` shows whether it has.
    DeviceRemove {
        /// Its id.
        id: String,
        /// Takes it away, as if it was torn out of its slot, without asking the guest.
        #[arg(long)]
        force: bool,
    },
    /// Adds to the guest's memory, up to ringside-vmm --memory max=SIZE.
    MemoryAdd {
        /// By how much, in multiples of 128M, such as 512M.
        size: String,
    },
    /// Ends the machine, as a power cut would for the guest.
    PowerOff,
}

/// A command's arguments.
type Arguments = Map<String, Value>;

fn arguments(text: &str) -> Result<Arguments, String> {
    let mut arguments = Arguments::new();
    for (key, value) in keys_and_values(text, "host")? {
        if arguments.contains_key(&key) {
            return Err(format!("`{key}` is there twice"));
        }
        arguments.insert(key, value.into());
    }
    Ok(arguments)
}

impl Request {
    fn to_json(&self) -> Value {
        match self {
            Self::Status => json!({"command": "status"}),
            Self::DeviceList => json!({"command": "device-list"}),
            Self::DeviceAdd { device } => json!({"command": "device-add", "arguments": device}),
            Self::DeviceRemove { id, force } => {
                json!({"command": "device-remove", "arguments": {"id": id, "force": force}})
            }
            Self::MemoryAdd { size } => {
                json!({"command": "memory-add", "arguments": {"size": size}})
            }
            Self::PowerOff => json!({"command": "power-off"}),
        }
    }
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    let answer = match ask(&cli) {
        Ok(answer) => answer,
        Err(error) => {
            eprintln!(
                "ringside-ctl: no answer at {}: {error}; does a ringside-vmm listen there (--api-socket)?",
                cli.socket.display()
            );
            return ExitCode::FAILURE;
        }
    };
    if let Some(error) = answer.get("error") {
        let message = error.get("message").and_then(Value::as_str);
        eprintln!(
            "ringside-ctl: {}",
            message.unwrap_or("the request was refused")
        );
        return ExitCode::FAILURE;
    }
    let result = answer.get("result").unwrap_or(&Value::Null);
    let text = if cli.json {
        format!("{result:#}\n")
    } else {
        table(result)
    };
    match io::stdout().write_all(text.as_bytes()) {
        Ok(()) => ExitCode::SUCCESS,
        // Whoever reads it has seen enough.
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("ringside-ctl: cannot write the answer: {error}");
            ExitCode::FAILURE
        }
    }
}

fn ask(cli: &Cli) -> io::Result<Value> {
    let mut stream = UnixStream::connect(&cli.socket)?;
    stream.write_all(format!("{}\n", cli.request.to_json()).as_bytes())?;
    let mut line = String::new();
    BufReader::new(stream).read_line(&mut line)?;
    if line.is_empty() {
        return Err(io::ErrorKind::UnexpectedEof.into());
    }
    Ok(serde_json::from_str(&line)?)
}

/// For people: a line for each device, or for each value.
fn table(result: &Value) -> String {
    let line = |object: &Map<String, Value>, between: &str| {
        let pairs = object.iter().map(|(key, value)| match value {
            Value::String(text) => format!("{key}={text}"),
            other => format!("{key}={other}"),
        });
        pairs.collect::<Vec<_>>().join(between)
    };
    let Value::Object(object) = result else {
        return String::new();
    };
    let mut text = match object.get("devices") {
        Some(Value::Array(devices)) => devices
            .iter()
            .filter_map(Value::as_object)
            .map(|device| line(device, " "))
            .collect::<Vec<_>>()
            .join("\n"),
        _ => line(object, "\n"),
    };
    if !text.is_empty() {
        text.push('\n');
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_device_is_written_as_on_the_vmms_command_line() {
        let read = |text: &str| arguments(text).map(Value::from);
        assert_eq!(
            read("01:10.0,id=a,,b"),
            Ok(json!({"host": "01:10.0", "id": "a,b"}))
        );
        assert_eq!(read("host=01:10.0"), Ok(json!({"host": "01:10.0"})));
        for wrong in ["", "01:10.0,nic", "01:10.0,host=01:10.2"] {
            assert!(arguments(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn answers_are_shown_to_people() {
        let list = json!({"devices": [{"id": "a", "leaving": false}, {"socket": "/b"}]});
        assert_eq!(table(&list), "id=a leaving=false\nsocket=/b\n");
        assert_eq!(table(&json!({"cpus": 2})), "cpus=2\n");
        assert_eq!(table(&json!({})), "");
    }
}

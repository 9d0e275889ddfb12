//! What can be asked of a machine that runs, on its control socket (`ringside_control`).

use ringside_control::Size;
use serde::Deserialize;

use crate::config::VfioOptions;
use crate::snapshot::transport::Address;

/// What can be asked for.
#[derive(Clone, Debug, Deserialize, PartialEq, Eq)]
#[serde(
    tag = "command",
    content = "arguments",
    rename_all = "kebab-case",
    rename_all_fields = "kebab-case",
    deny_unknown_fields
)]
pub enum Command {
    /// What the machine is and does.
    Status,
    /// The devices that came with options, or by request.
    DeviceList,
    /// Plugs a function of the host in; the keys of `--vfio`.
    DeviceAdd(VfioOptions),
    /// Asks the guest to let go of a function, or takes it away.
    DeviceRemove {
        /// Its id.
        id: String,
        /// The guest is not asked: for one that does not answer.
        #[serde(default)]
        force: bool,
    },
    /// Adds to the guest's memory.
    MemoryAdd {
        /// By how much.
        size: Size,
    },
    /// Writes all that the machine is into the folder of `--snapshots`.
    Snapshot {
        /// The file's name there.
        name: String,
        /// The machine ends when it is written.
        #[serde(default)]
        stop: bool,
    },
    /// Moves the guest to another VMM while it runs.
    Migrate {
        /// Where that one waits, one of `--migrate-to`.
        to: Address,
    },
    /// Holds the guest's processors.
    Pause,
    /// Lets them go on.
    Resume,
    /// Ends the machine in order.
    PowerOff,
}

#[cfg(test)]
mod tests {
    use super::*;

    fn command(line: &str) -> Result<Command, String> {
        serde_json::from_str(line).map_err(|e| e.to_string())
    }

    #[test]
    fn commands_are_read_with_their_arguments() {
        assert_eq!(command(r#"{"command":"status"}"#), Ok(Command::Status));
        let line = r#"{"command":"device-add","arguments":{"host":"1:0.0","id":"a"}}"#;
        assert!(
            matches!(command(line), Ok(Command::DeviceAdd(options)) if options.clone().resolve().id == "a")
        );
        let removal = |force| {
            Ok(Command::DeviceRemove {
                id: "a".into(),
                force,
            })
        };
        let line = r#"{"command":"device-remove","arguments":{"id":"a"}}"#;
        assert_eq!(command(line), removal(false));
        let line = r#"{"command":"device-remove","arguments":{"id":"a","force":true}}"#;
        assert_eq!(command(line), removal(true));
        let line = r#"{"command":"snapshot","arguments":{"name":"a"}}"#;
        let snapshot = Command::Snapshot {
            name: "a".into(),
            stop: false,
        };
        assert_eq!(command(line), Ok(snapshot));
        let line = r#"{"command":"migrate","arguments":{"to":"unix:/a"}}"#;
        let to = Address::Unix("/a".into());
        assert_eq!(command(line), Ok(Command::Migrate { to }));
        assert_eq!(command(r#"{"command":"power-off"}"#), Ok(Command::PowerOff));
        let size = Size(512 << 20);
        for text in [r#""512M""#, "536870912"] {
            let line = format!(r#"{{"command":"memory-add","arguments":{{"size":{text}}}}}"#);
            assert_eq!(command(&line), Ok(Command::MemoryAdd { size }));
        }
    }

    #[test]
    fn what_is_no_command_is_refused() {
        for (line, message) in [
            ("{}", "missing field `command`"),
            (r#"{"command":"fly"}"#, "unknown variant `fly`"),
            (
                r#"{"command":"status","more":1}"#,
                "string \"more\", expected",
            ),
            (r#"{"command":"device-remove"}"#, "missing field"),
            (
                r#"{"command":"memory-add","arguments":{"size":"lots"}}"#,
                "`lots` is not a size",
            ),
            (
                r#"{"command":"device-add","arguments":{"host":"nic"}}"#,
                "not a PCI address",
            ),
        ] {
            let text = command(line).unwrap_err();
            assert!(text.contains(message), "{line}: {text}");
        }
    }
}

//! Admin commands as bytes: what is asked of an NVMe controller, and what its answers mean. No I/O.
//!
//! Sections are those of the NVM Express Base Specification, revision 2.0; the commands came with NVM Express 1.3
//! (there 5.15, 5.19, 5.22 and 8.5).

use std::{fmt, io};

use serde::Serialize;
use thiserror::Error;

/// Opcodes of admin commands (5, figure "Opcodes for Admin Commands").
const OPCODE_IDENTIFY: u8 = 0x06;
const OPCODE_NAMESPACE_ATTACHMENT: u8 = 0x15;
const OPCODE_VIRTUALIZATION_MANAGEMENT: u8 = 0x1c;

/// What Identify is to tell (5.17, Controller or Namespace Structure).
const CNS_PRIMARY_CAPABILITIES: u32 = 0x14;
const CNS_SECONDARY_LIST: u32 = 0x15;

/// Length of all of Identify's answers, and of a Controller List.
pub const DATA_LENGTH: usize = 4096;
/// One entry of the Secondary Controller List, and where the first is.
const SECONDARY_LENGTH: usize = 32;

/// What a secondary controller is to do, or to be given (Virtualization Management, Action).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Action {
    /// Go offline: only then can its resources change.
    Offline,
    /// Have so many resources of one kind.
    Assign {
        /// Which kind.
        resource: Resource,
        /// How many.
        count: u16,
    },
    /// Go online.
    Online,
}

/// A kind of resources that move between controllers (8.26).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Resource {
    /// Virtual queues: a submission and a completion queue each, the admin queues among them.
    Queues,
    /// Virtual interrupts.
    Interrupts,
}

impl fmt::Display for Resource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Queues => "queues",
            Self::Interrupts => "interrupts",
        })
    }
}

/// An admin command without its data.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Command {
    /// Opcode.
    pub opcode: u8,
    /// Namespace.
    pub nsid: u32,
    /// Command dwords 10 and 11.
    pub cdw10: u32,
    /// See `cdw10`.
    pub cdw11: u32,
}

/// The data of a command.
#[derive(Debug)]
pub enum Data<'a> {
    /// None.
    Nothing,
    /// The controller writes it.
    In(&'a mut [u8; DATA_LENGTH]),
    /// The controller reads it.
    Out(&'a [u8; DATA_LENGTH]),
}

/// A command that failed.
#[derive(Debug, Error)]
pub enum AdminError {
    /// The controller refused it.
    #[error("{}", meaning(*.0))]
    Status(u16),
    /// It did not get to the controller.
    #[error("the kernel did not pass the command on")]
    Io(#[from] io::Error),
}

/// A namespace is attached already: status code type 1, status code 18h (5.22).
const STATUS_ALREADY_ATTACHED: u16 = 0x118;

impl AdminError {
    /// A namespace is attached already, as it was to be.
    #[must_use]
    pub fn is_already_attached(&self) -> bool {
        matches!(self, Self::Status(status) if code(*status) == STATUS_ALREADY_ATTACHED)
    }
}

/// Status code type and status code, without "more" and "do not retry" (3.3.3.2.1).
fn code(status: u16) -> u16 {
    status & 0x7ff
}

/// What a status says (3.3.3.2.1, and the status values of the commands here).
fn meaning(status: u16) -> String {
    let text = match code(status) {
        0x001 => "the controller does not know the command",
        0x002 => "the controller finds a field invalid",
        0x006 => "internal error of the controller",
        0x00b => "there is no such namespace",
        0x118 => "the namespace is attached already",
        0x119 => "the namespace is private to another controller",
        0x11c => "the list of controllers is invalid",
        0x11f => "the controller's id is invalid",
        0x120 => {
            "not possible in the secondary controller's state: it changes resources while it is offline, and goes \
             online with at least two queues and one interrupt, while its virtual function is enabled"
        }
        0x121 => "so many resources are not free",
        0x122 => "the resource's id is invalid",
        0x127 => "no more namespaces can be attached",
        code => return format!("status {code:#x}"),
    };
    format!("{text} (status {:#x})", code(status))
}

/// What passes admin commands to a controller.
pub trait Admin {
    /// Carries out one command; gives dword 0 of its completion.
    ///
    /// # Errors
    /// [`AdminError`], if it fails.
    fn submit(&mut self, command: &Command, data: Data<'_>) -> Result<u32, AdminError>;
}

/// Asks for the capabilities of a primary controller (5.17, CNS 14h).
#[must_use]
pub fn identify_primary(controller: u16) -> Command {
    Command {
        opcode: OPCODE_IDENTIFY,
        cdw10: CNS_PRIMARY_CAPABILITIES | u32::from(controller) << 16,
        ..Command::default()
    }
}

/// Asks for the secondary controllers whose ids are at least `first` (5.17, CNS 15h).
#[must_use]
pub fn identify_secondaries(first: u16) -> Command {
    Command {
        opcode: OPCODE_IDENTIFY,
        cdw10: CNS_SECONDARY_LIST | u32::from(first) << 16,
        ..Command::default()
    }
}

/// Changes a secondary controller (Virtualization Management; the order of actions is in 8.26).
#[must_use]
pub fn manage(controller: u16, action: Action) -> Command {
    let (act, resource, count) = match action {
        Action::Offline => (0x7, 0, 0),
        Action::Assign {
            resource: Resource::Queues,
            count,
        } => (0x8, 0, count),
        Action::Assign {
            resource: Resource::Interrupts,
            count,
        } => (0x8, 1, count),
        Action::Online => (0x9, 0, 0),
    };
    Command {
        opcode: OPCODE_VIRTUALIZATION_MANAGEMENT,
        cdw10: act | resource << 8 | u32::from(controller) << 16,
        cdw11: count.into(),
        ..Command::default()
    }
}

/// Attaches a namespace to a controller; the data is the list of controllers (Namespace Attachment, select 0h).
#[must_use]
pub fn attach(namespace: u32, controller: u16) -> (Command, [u8; DATA_LENGTH]) {
    let mut list = [0; DATA_LENGTH];
    // One id, and the id.
    for (byte, value) in list
        .iter_mut()
        .zip([1, 0].into_iter().chain(controller.to_le_bytes()))
    {
        *byte = value;
    }
    let command = Command {
        opcode: OPCODE_NAMESPACE_ATTACHMENT,
        nsid: namespace,
        ..Command::default()
    };
    (command, list)
}

/// One kind of a primary controller's resources. Flexible ones move between controllers.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct Capacity {
    /// Flexible ones there are in all.
    pub flexible: u32,
    /// Flexible ones that secondary controllers have.
    pub assigned: u32,
    /// Flexible ones that the primary controller keeps.
    pub primary_flexible: u16,
    /// Others that the primary controller has.
    pub primary_private: u16,
    /// Most that a secondary controller can have.
    pub most: u16,
    /// They are given out in multiples of this.
    pub granularity: u16,
}

/// What a primary controller says about itself (5.17, Primary Controller Capabilities).
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct PrimaryCapabilities {
    /// Its id.
    pub id: u16,
    /// Queues, if it has flexible ones.
    pub queues: Option<Capacity>,
    /// Interrupts, if it has flexible ones.
    pub interrupts: Option<Capacity>,
}

/// A secondary controller (5.17, Secondary Controller List).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct Secondary {
    /// Its id.
    pub id: u16,
    /// Its primary controller's.
    pub primary: u16,
    /// It is online.
    pub online: bool,
    /// The virtual function that it is, counted from 1; 0 if it is none.
    pub vf: u16,
    /// Queues assigned to it.
    pub queues: u16,
    /// Interrupts assigned to it.
    pub interrupts: u16,
}

/// Little-endian numbers in an answer; what is beyond its end is zero, as what is reserved.
struct Fields<'a>(&'a [u8]);

impl Fields<'_> {
    fn byte(&self, at: usize) -> u8 {
        self.0.get(at).copied().unwrap_or(0)
    }

    fn word(&self, at: usize) -> u16 {
        u16::from_le_bytes([self.byte(at), self.byte(at + 1)])
    }

    fn long(&self, at: usize) -> u32 {
        u32::from(self.word(at)) | u32::from(self.word(at + 2)) << 16
    }

    /// Both kinds of resources are told in the same manner.
    fn capacity(&self, at: usize) -> Capacity {
        Capacity {
            flexible: self.long(at),
            assigned: self.long(at + 4),
            primary_flexible: self.word(at + 8),
            primary_private: self.word(at + 10),
            most: self.word(at + 12),
            granularity: self.word(at + 14),
        }
    }
}

/// Reads the answer to [`identify_primary`].
#[must_use]
pub fn parse_primary(data: &[u8; DATA_LENGTH]) -> PrimaryCapabilities {
    let fields = Fields(data);
    // CRT: bit 0 queues, bit 1 interrupts.
    let types = fields.byte(4);
    PrimaryCapabilities {
        id: fields.word(0),
        queues: (types & 1 != 0).then(|| fields.capacity(32)),
        interrupts: (types & 2 != 0).then(|| fields.capacity(64)),
    }
}

/// Reads the answer to [`identify_secondaries`].
#[must_use]
pub fn parse_secondaries(data: &[u8; DATA_LENGTH]) -> Vec<Secondary> {
    let count = usize::from(Fields(data).byte(0));
    let (_, entries) = data.split_at(SECONDARY_LENGTH);
    let entry = |entry: &[u8]| {
        let fields = Fields(entry);
        Secondary {
            id: fields.word(0),
            primary: fields.word(2),
            online: fields.byte(4) & 1 != 0,
            vf: fields.word(8),
            queues: fields.word(10),
            interrupts: fields.word(12),
        }
    };
    entries
        .chunks_exact(SECONDARY_LENGTH)
        .take(count)
        .map(entry)
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn commands() {
        assert_eq!(
            identify_primary(3),
            Command {
                opcode: 0x06,
                nsid: 0,
                cdw10: 0x0003_0014,
                cdw11: 0
            }
        );
        assert_eq!(identify_secondaries(0x102).cdw10, 0x0102_0015);
        let assign = |resource| Action::Assign { resource, count: 5 };
        for (action, cdw10, cdw11) in [
            (Action::Offline, 0x0001_0007, 0),
            (assign(Resource::Queues), 0x0001_0008, 5),
            (assign(Resource::Interrupts), 0x0001_0108, 5),
            (Action::Online, 0x0001_0009, 0),
        ] {
            let command = manage(1, action);
            assert_eq!(
                (command.opcode, command.cdw10, command.cdw11),
                (0x1c, cdw10, cdw11)
            );
        }
        let (command, list) = attach(7, 0x0201);
        assert_eq!((command.opcode, command.nsid, command.cdw10), (0x15, 7, 0));
        assert_eq!(list[..6], [1, 0, 1, 2, 0, 0]);
    }

    #[test]
    fn answers() {
        let mut data = [0; DATA_LENGTH];
        data[0] = 9;
        data[4] = 1;
        data[32..48].copy_from_slice(&[4, 0, 1, 0, 2, 0, 0, 0, 1, 0, 7, 0, 3, 0, 2, 0]);
        let primary = parse_primary(&data);
        assert_eq!((primary.id, primary.interrupts), (9, None));
        assert_eq!(
            primary.queues.unwrap(),
            Capacity {
                flexible: 0x1_0004,
                assigned: 2,
                primary_flexible: 1,
                primary_private: 7,
                most: 3,
                granularity: 2,
            }
        );
        data = [0; DATA_LENGTH];
        data[0] = 2;
        data[32..46].copy_from_slice(&[1, 0, 9, 0, 1, 0, 0, 0, 1, 0, 2, 0, 3, 0]);
        data[64..78].copy_from_slice(&[2, 0, 9, 0, 0, 0, 0, 0, 2, 0, 0, 0, 0, 0]);
        let list = parse_secondaries(&data);
        assert_eq!(
            list[0],
            Secondary {
                id: 1,
                primary: 9,
                online: true,
                vf: 1,
                queues: 2,
                interrupts: 3
            }
        );
        assert_eq!((list.len(), list[1].online, list[1].vf), (2, false, 2));
        // There is room for 127, whatever the controller claims.
        data[0] = 255;
        assert_eq!(parse_secondaries(&data).len(), 127);
    }

    #[test]
    fn statuses() {
        // With "do not retry".
        let attached = AdminError::Status(0x4118);
        assert!(attached.is_already_attached());
        assert!(!AdminError::Status(0x4119).is_already_attached());
        assert_eq!(
            AdminError::Status(0x4121).to_string(),
            "so many resources are not free (status 0x121)"
        );
        assert_eq!(AdminError::Status(0x0007).to_string(), "status 0x7");
    }
}

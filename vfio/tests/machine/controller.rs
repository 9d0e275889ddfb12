//! An NVMe controller played: it gives out flexible resources as the specification says.

use ringside_vfio::nvme::admin::{AdminError, Command, Data};

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct FakeSecondary {
    pub(crate) online: bool,
    pub(crate) queues: u16,
    pub(crate) interrupts: u16,
}

#[derive(Debug, Default)]
pub(crate) struct FakeController {
    /// Secondary controller n has id n + 1, and is virtual function n.
    pub(crate) secondaries: Vec<FakeSecondary>,
    /// Flexible queues and interrupts in all.
    pub(crate) flexible: u16,
    /// Attached namespaces: namespace, controller.
    pub(crate) attached: Vec<(u32, u16)>,
    /// Opcode and dword 10 of every command that changes something.
    pub(crate) log: Vec<(u8, u32)>,
    /// The changing command, counted from 0, that fails.
    pub(crate) fails: Option<usize>,
    /// It gives fewer queues than it is asked for.
    pub(crate) stingy: bool,
}

const INVALID_STATE: AdminError = AdminError::Status(0x4120);

impl FakeController {
    pub(crate) fn new(count: usize, flexible: u16) -> Self {
        Self {
            secondaries: vec![FakeSecondary::default(); count],
            flexible,
            ..Self::default()
        }
    }

    pub(crate) fn submit(&mut self, command: &Command, data: Data<'_>) -> Result<u32, AdminError> {
        let [low, action_type, ..] = command.cdw10.to_le_bytes();
        let controller = command.cdw10 >> 16;
        if command.opcode == 0x06 {
            let Data::In(data) = data else {
                panic!("Identify without data")
            };
            match low {
                0x14 => self.primary(data),
                0x15 => self.list(controller, data),
                _ => return Err(AdminError::Status(0x4002)),
            }
            return Ok(0);
        }
        self.log.push((command.opcode, command.cdw10));
        if self.fails == Some(self.log.len() - 1) {
            return Err(AdminError::Status(0x0006));
        }
        if command.opcode == 0x15 {
            let Data::Out(list) = data else {
                panic!("attachment without data")
            };
            assert_eq!(list[..2], [1, 0]);
            let entry = (command.nsid, u16::from_le_bytes([list[2], list[3]]));
            if self.attached.contains(&entry) {
                return Err(AdminError::Status(0x4118));
            }
            self.attached.push(entry);
            return Ok(0);
        }
        assert_eq!(command.opcode, 0x1c);
        let index = controller.checked_sub(1).unwrap() as usize;
        let used: u16 = self
            .secondaries
            .iter()
            .enumerate()
            .filter(|(other, _)| *other != index)
            .map(|(_, one)| {
                if action_type == 0 {
                    one.queues
                } else {
                    one.interrupts
                }
            })
            .sum();
        let one = &mut self.secondaries[index];
        match low {
            7 => one.online = false,
            8 => {
                let count = u16::try_from(command.cdw11).unwrap();
                if one.online {
                    return Err(INVALID_STATE);
                }
                if used + count > self.flexible {
                    return Err(AdminError::Status(0x4121));
                }
                let given = if self.stingy { count / 2 } else { count };
                let field = if action_type == 0 {
                    &mut one.queues
                } else {
                    &mut one.interrupts
                };
                *field = given;
                return Ok(given.into());
            }
            9 if one.queues >= 2 && one.interrupts >= 1 => one.online = true,
            _ => return Err(INVALID_STATE),
        }
        Ok(0)
    }

    fn primary(&self, data: &mut [u8]) {
        let flexible = self.flexible.to_le_bytes();
        data[4] = 3;
        for at in [32, 64] {
            data[at..at + 2].copy_from_slice(&flexible);
            // Two private ones; a secondary controller can have five.
            data[at + 10] = 2;
            data[at + 12] = 5;
        }
        let assigned: u16 = self.secondaries.iter().map(|one| one.queues).sum();
        data[36..38].copy_from_slice(&assigned.to_le_bytes());
    }

    /// Gives two at a time, as if there were no room for more.
    fn list(&self, first: u32, data: &mut [u8]) {
        let entries = (1_u16..).zip(&self.secondaries);
        let entries = entries.filter(|(id, _)| u32::from(*id) >= first).take(2);
        let mut count = 0;
        for ((id, one), entry) in entries.zip(data[32..].chunks_mut(32)) {
            entry[..2].copy_from_slice(&id.to_le_bytes());
            entry[4] = one.online.into();
            entry[8..10].copy_from_slice(&id.to_le_bytes());
            entry[10..12].copy_from_slice(&one.queues.to_le_bytes());
            entry[12..14].copy_from_slice(&one.interrupts.to_le_bytes());
            count += 1;
        }
        data[0] = count;
    }
}

//! Snapshots, as files that anyone may have made, or from another VMM that is none.

use ringside_vmm::pci::FunctionKind;
use ringside_vmm::snapshot::Incoming;
use ringside_vmm::snapshot::stream::{Kind, Writer};
use vm_memory::{GuestAddress, GuestMemoryMmap};

use crate::input::Input;
use crate::pci;

/// RAM of the guest.
const RAM: usize = 1 << 20;

/// The first byte says what the rest is: the bytes of a file; sections, which get the right checksums; or the state of a device
/// as JSON, but for its configuration space, ended by a zero byte, and what its guest does then.
pub(crate) fn snapshot(bytes: &[u8]) {
    let mut input = Input::new(bytes);
    match input.below(3) {
        0 => read(input.rest()),
        1 => read(&sections(&mut input)),
        _ => {
            let json: Vec<u8> = std::iter::from_fn(|| Some(input.u8()))
                .take_while(|byte| *byte != 0)
                .collect();
            if let Ok(kind) = serde_json::from_slice::<FunctionKind>(&json) {
                pci::goes_on(kind, &mut input);
            }
        }
    }
}

fn sections(input: &mut Input<'_>) -> Vec<u8> {
    let mut writer = Writer::new(Vec::new()).unwrap();
    while !input.is_empty() {
        let kinds = [Kind::Description, Kind::Memory, Kind::State, Kind::End];
        let kind = kinds[usize::from(input.below(4))];
        let length = input.u16().into();
        // Too long a body is not written.
        let _ = writer.section(kind, &[input.take(length)]);
    }
    writer.finish().unwrap()
}

fn read(bytes: &[u8]) {
    let memory = GuestMemoryMmap::<()>::from_ranges(&[(GuestAddress(0), RAM)]).unwrap();
    let Ok(mut incoming) = Incoming::new(bytes) else {
        return;
    };
    // It is checked as it is read; what becomes of it needs KVM.
    let _ = incoming.read(&memory);
}

//! What a guest takes along to another machine, out of a file or from a peer that may say anything: sections of a snapshot.

use ringside_vmm::snapshot::stream::{Kind, Writer};
use ringside_vmm::snapshot::{Description, DeviceDescription, Incoming, Machine};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use crate::input::Input;
use crate::pci;

/// Guest memory: two regions of this size, the second of which begins at twice of it.
const REGION: usize = 0x8000;

pub(crate) fn snapshot(bytes: &[u8]) {
    let mut input = Input::new(bytes);
    match input.below(4) {
        0 => drop(read(input.rest())),
        1 => sections(&mut input),
        2 => pci::moved_virtio(&mut input),
        _ => pci::moved_port(&mut input),
    }
}

/// Reads a snapshot as a machine does, up to its processors. Gives the memory, if all of it is in order.
fn read(file: &[u8]) -> Option<GuestMemoryMmap> {
    let ours = Machine {
        cpus: 2,
        memory: 1 << 30,
        memory_max: 1 << 30,
        ports: 2,
        devices: vec![2],
    };
    let mut incoming = Incoming::new(file).ok()?;
    if incoming.description.check(&ours).is_ok() {
        let device = DeviceDescription {
            device_type: 2,
            features: 1 << 32,
            queues: vec![256],
        };
        for theirs in &incoming.description.devices {
            let _ = theirs.served_by(device.clone(), "/socket".as_ref());
        }
    }
    let regions = [0, 2 * REGION].map(|start| (GuestAddress(start as u64), REGION));
    let memory = GuestMemoryMmap::from_ranges(&regions).unwrap();
    incoming.read(&memory).is_ok().then_some(memory)
}

/// Sections with their checksums, most of them in order. What memory they bring has to be there afterwards.
fn sections(input: &mut Input<'_>) {
    let description = Description {
        program: String::new(),
        cpus: input.below(4),
        memory: 1 << 30,
        memory_max: 1 << 30,
        pieces: vec![input.u64(); usize::from(input.below(3))],
        ports: input.below(4).into(),
        devices: vec![
            DeviceDescription {
                device_type: input.below(4).into(),
                features: input.u64(),
                queues: vec![input.u16(); usize::from(input.below(3))],
            };
            usize::from(input.below(3))
        ],
        cpuid: Vec::new(),
        tsc_deadline: false,
    };
    let mut writer = Writer::new(Vec::new()).unwrap();
    let description = serde_json::to_vec(&description).unwrap();
    writer.section(Kind::Description, &[&description]).unwrap();
    let mut expected = vec![0; 3 * REGION];
    let mut inside = true;
    while input.bool() {
        let address = match input.below(4) {
            0 => input.u64(),
            1 => REGION as u64 - 20 + u64::from(input.below(40)),
            _ => u64::from(input.u16()) + 2 * REGION as u64 * u64::from(input.bool()),
        };
        let length = input.u8().into();
        let pages = input.take(length);
        let body: [&[u8]; 2] = [&address.to_le_bytes(), pages];
        writer.section(Kind::Memory, &body).unwrap();
        let end = address.checked_add(pages.len() as u64);
        let region = |start: usize| {
            let (start, last) = (start as u64, (start + REGION) as u64);
            address >= start && end.is_some_and(|end| end <= last)
        };
        if !pages.is_empty() && !region(0) && !region(2 * REGION) {
            inside = false;
            break;
        }
        if !pages.is_empty() {
            let at = address as usize;
            expected[at..at + pages.len()].copy_from_slice(pages);
        }
    }
    let state = input.rest();
    writer.section(Kind::State, &[state]).unwrap();
    let file = writer.finish().unwrap();
    let Some(memory) = read(&file) else { return };
    assert!(inside, "memory was taken that the guest does not have");
    for start in [0, 2 * REGION] {
        let mut found = vec![0; REGION];
        let at = GuestAddress(start as u64);
        memory.read_slice(&mut found, at).unwrap();
        assert!(found == expected[start..start + REGION]);
    }
}

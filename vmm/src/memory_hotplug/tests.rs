//! Growing with fakes in place of devices and KVM.

use std::sync::mpsc;

use super::*;
use crate::bus::BusDevice;
use crate::memory::{GuestRam, PageSize};
use vm_memory::GuestAddress;
use vmm_sys_util::eventfd::EFD_NONBLOCK;

const BLOCK: u64 = layout::MEMORY_BLOCK;
const START: u64 = layout::HIGH_RAM_START;

/// What happened, in order, to all that listen or play KVM.
type Log = Arc<Mutex<Vec<String>>>;

fn taken(log: &Log) -> Vec<String> {
    std::mem::take(&mut log.lock().unwrap())
}

fn describe(memory: &GuestMemoryMmap) -> String {
    let ranges: Vec<String> = memory
        .iter()
        .map(|r| format!("{:#x}+{:#x}", r.start_addr().0, r.len()))
        .collect();
    ranges.join(",")
}

struct Device {
    name: &'static str,
    refuses: Mutex<bool>,
    log: Log,
}

impl Device {
    fn new(name: &'static str, log: &Log) -> Arc<Self> {
        Arc::new(Self {
            name,
            refuses: Mutex::new(false),
            log: Arc::clone(log),
        })
    }

    fn note(&self, text: String) {
        self.log
            .lock()
            .unwrap()
            .push(format!("{} {text}", self.name));
    }
}

impl MemoryListener for Device {
    fn name(&self) -> String {
        self.name.into()
    }
    fn add(
        self: Arc<Self>,
        piece: &GuestMemoryMmap,
        whole: &GuestMemoryMmap,
    ) -> Result<(), Box<dyn StdError + Send + Sync>> {
        self.note(format!(
            "add {} of {}",
            describe(piece),
            whole.num_regions()
        ));
        if *self.refuses.lock().unwrap() {
            return Err("no".into());
        }
        Ok(())
    }
    fn withdraw(self: Arc<Self>, piece: &GuestMemoryMmap, whole: &GuestMemoryMmap) {
        self.note(format!(
            "withdraw {} of {}",
            describe(piece),
            whole.num_regions()
        ));
    }
}

struct Kvm {
    refuses: Mutex<bool>,
    log: Log,
}

impl RamSlots for Kvm {
    fn add_ram(&self, memory: &GuestMemoryMmap) -> Result<(), kvm::Error> {
        self.log
            .lock()
            .unwrap()
            .push(format!("kvm {}", describe(memory)));
        if *self.refuses.lock().unwrap() {
            return Err(kvm::Error::Lacks("room"));
        }
        Ok(())
    }
}

struct Machine {
    memory: Arc<GrowingMemory>,
    kvm: Arc<Kvm>,
    interrupt: EventFd,
    log: Log,
}

fn options() -> Options {
    Options {
        size: Size(memory::MIN_SIZE),
        pages: PageSize::Normal,
        prefault: false,
    }
}

/// A guest that can grow by so many blocks.
fn machine(blocks: u64) -> Machine {
    let log = Log::default();
    let kvm = Arc::new(Kvm {
        refuses: Mutex::new(false),
        log: Arc::clone(&log),
    });
    let ram = GuestRam::new(options()).unwrap().memory().clone();
    let max = Size(memory::MIN_SIZE + blocks * BLOCK);
    let plan = Plan::new(options(), &ram, max, 40).unwrap();
    let interrupt = EventFd::new(EFD_NONBLOCK).unwrap();
    let theirs = interrupt.try_clone().unwrap();
    let slots = Arc::clone(&kvm) as _;
    Machine {
        memory: Arc::new(GrowingMemory::new(ram, plan, slots, theirs)),
        kvm,
        interrupt,
        log,
    }
}

impl Machine {
    fn listen(&self, device: &Arc<Device>) {
        let listener: Arc<dyn MemoryListener> = Arc::clone(device) as _;
        let has = self.memory.current();
        self.memory.register(&listener, &has).unwrap();
    }

    /// Address and length of a piece, as the guest reads them.
    fn registers(&self, index: u64) -> (u64, u64) {
        let registers = self.memory.registers();
        let read = |offset| {
            let mut data = [0; 8];
            registers
                .lock()
                .unwrap()
                .read(16 * index + offset, &mut data);
            u64::from_le_bytes(data)
        };
        (read(0), read(8))
    }

    /// Nothing came of it, as far as the guest and later devices can tell.
    fn is_unchanged(&self) {
        assert_eq!(self.memory.current().num_regions(), 1);
        assert_eq!(self.registers(0), (0, 0));
        assert!(self.interrupt.read().is_err());
    }
}

#[test]
fn devices_have_memory_before_kvm_and_kvm_before_the_guest() {
    let machine = machine(4);
    let (a, b) = (
        Device::new("a", &machine.log),
        Device::new("b", &machine.log),
    );
    machine.listen(&a);
    machine.listen(&b);
    let growth = machine.memory.grow(BLOCK).unwrap();
    let added = Range {
        start: START,
        size: BLOCK,
    };
    assert_eq!(
        (growth.added, growth.total),
        (added, Size(memory::MIN_SIZE + BLOCK))
    );
    assert_eq!(
        taken(&machine.log),
        [
            "a add 0x100000000+0x8000000 of 2",
            "b add 0x100000000+0x8000000 of 2",
            "kvm 0x100000000+0x8000000",
        ]
    );
    assert_eq!(machine.registers(0), (START, BLOCK));
    assert_eq!(machine.registers(1), (0, 0));
    assert_eq!(machine.interrupt.read().unwrap(), 1);
    assert_eq!(machine.memory.current().num_regions(), 2);

    // The next one goes behind it; who has gone is not asked.
    drop(a);
    machine.memory.grow(2 * BLOCK).unwrap();
    assert_eq!(
        taken(&machine.log),
        [
            "b add 0x108000000+0x10000000 of 3",
            "kvm 0x108000000+0x10000000",
        ]
    );
    assert_eq!(machine.registers(1), (START + BLOCK, 2 * BLOCK));
    assert_eq!(machine.interrupt.read().unwrap(), 1);
}

#[test]
fn the_guest_is_told_last() {
    /// Looks at what the guest sees when it is asked.
    struct Witness(Arc<GrowingMemory>, mpsc::Sender<Vec<u8>>);
    impl RamSlots for Witness {
        fn add_ram(&self, _: &GuestMemoryMmap) -> Result<(), kvm::Error> {
            let mut seen = vec![0xff; 16];
            self.0.registers().lock().unwrap().read(0, &mut seen);
            self.1.send(seen).unwrap();
            Ok(())
        }
    }
    let machine = machine(1);
    let (send, seen) = mpsc::channel();
    let witness = Arc::new(Witness(Arc::clone(&machine.memory), send));
    // The same registers, with a KVM that looks at them.
    let watched = GrowingMemory {
        plan: machine.memory.plan,
        slots: witness,
        registers: machine.memory.registers(),
        interrupt: machine.interrupt.try_clone().unwrap(),
        state: Mutex::new(State {
            whole: machine.memory.current(),
            pieces: Vec::new(),
            listeners: Vec::new(),
        }),
    };
    watched.grow(BLOCK).unwrap();
    assert_eq!(seen.recv().unwrap(), [0; 16]);
    assert_eq!(machine.registers(0), (START, BLOCK));
}

#[test]
fn what_one_refuses_is_taken_back_from_those_before() {
    let machine = machine(4);
    let devices = ["a", "b", "c", "d"].map(|name| Device::new(name, &machine.log));
    devices.iter().for_each(|device| machine.listen(device));
    *devices[2].refuses.lock().unwrap() = true;
    let error = machine.memory.grow(BLOCK).unwrap_err();
    assert!(error.to_string().starts_with("c cannot use more memory"));
    assert_eq!(error.source().unwrap().to_string(), "no");
    let piece = "0x100000000+0x8000000";
    assert_eq!(
        taken(&machine.log),
        [
            format!("a add {piece} of 2"),
            format!("b add {piece} of 2"),
            format!("c add {piece} of 2"),
            format!("b withdraw {piece} of 1"),
            format!("a withdraw {piece} of 1"),
        ]
    );
    machine.is_unchanged();
    // Nothing is used up.
    *devices[2].refuses.lock().unwrap() = false;
    assert_eq!(machine.memory.grow(4 * BLOCK).unwrap().added.start, START);
}

#[test]
fn what_kvm_refuses_is_taken_back_from_all() {
    let machine = machine(4);
    let (a, b) = (
        Device::new("a", &machine.log),
        Device::new("b", &machine.log),
    );
    machine.listen(&a);
    machine.listen(&b);
    *machine.kvm.refuses.lock().unwrap() = true;
    let error = machine.memory.grow(BLOCK).unwrap_err();
    assert!(matches!(error, Error::Kvm(_)), "{error}");
    let log = taken(&machine.log);
    assert!(log[2].starts_with("kvm"), "{log:?}");
    assert!(log[3].starts_with("b withdraw") && log[4].starts_with("a withdraw"));
    machine.is_unchanged();
}

#[test]
fn who_comes_late_is_told_of_what_it_does_not_know() {
    let machine = machine(4);
    let before = machine.memory.current();
    machine.memory.grow(BLOCK).unwrap();
    let between = machine.memory.current();
    machine.memory.grow(BLOCK).unwrap();
    taken(&machine.log);
    let device = Device::new("late", &machine.log);
    let listener: Arc<dyn MemoryListener> = Arc::clone(&device) as _;
    machine.memory.register(&listener, &before).unwrap();
    machine.memory.register(&listener, &between).unwrap();
    machine.listen(&device);
    assert_eq!(
        taken(&machine.log),
        [
            "late add 0x100000000+0x8000000 of 3",
            "late add 0x108000000+0x8000000 of 3",
            "late add 0x108000000+0x8000000 of 3",
        ]
    );
    *device.refuses.lock().unwrap() = true;
    let refused = machine.memory.register(&listener, &before);
    assert!(matches!(refused, Err(Error::Refused { .. })));
}

#[test]
fn sizes_that_are_not_possible_are_refused_before_anybody_hears_of_it() {
    let machine = machine(2);
    let device = Device::new("a", &machine.log);
    machine.listen(&device);
    for (bytes, message) in [
        (0, "cannot grow by 0 bytes: give a multiple of 128 MiB"),
        (BLOCK / 2, "give a multiple of 128 MiB"),
        (BLOCK + 4096, "give a multiple of 128 MiB"),
        (3 * BLOCK, "256 MiB are left"),
        (u64::MAX - u64::MAX % BLOCK, "256 MiB are left"),
    ] {
        let error = machine.memory.grow(bytes).unwrap_err().to_string();
        assert!(error.contains(message), "{bytes:#x}: {error}");
    }
    machine.memory.grow(BLOCK).unwrap();
    let error = machine.memory.grow(2 * BLOCK).unwrap_err().to_string();
    assert!(error.contains("128 MiB are left"), "{error}");
    machine.memory.grow(BLOCK).unwrap();
    let error = machine.memory.grow(BLOCK).unwrap_err().to_string();
    assert!(error.contains("0 bytes are left"), "{error}");
    assert_eq!(taken(&machine.log).len(), 4);
    assert!(matches!(
        self::machine(0).memory.grow(BLOCK),
        Err(Error::Fixed)
    ));
}

#[test]
fn no_more_pieces_than_a_back_end_takes() {
    let machine = machine(100);
    for _ in 0..7 {
        machine.memory.grow(BLOCK).unwrap();
    }
    assert_eq!(machine.memory.current().num_regions(), MAX_REGIONS);
    let error = machine.memory.grow(BLOCK).unwrap_err();
    assert!(matches!(error, Error::Pieces { pieces: 7 }));
    assert!(error.to_string().contains("at most 8 regions"), "{error}");
}

#[test]
fn a_plan_has_room_for_what_is_asked_and_no_more() {
    let file = |start, size| (GuestAddress(start), size, None);
    let two = GuestMemoryMmap::from_ranges_with_files([
        file(0, 1 << 20),
        file(layout::HIGH_RAM_START, 1 << 20),
    ])
    .unwrap();
    let size = |blocks| Size(memory::MIN_SIZE + blocks * BLOCK);
    let plan = |max, bits| Plan::new(options(), &two, max, bits);
    let large = plan(size(100), 40).unwrap();
    assert_eq!((large.pieces, large.range.start), (6, 5 << 30));
    assert_eq!(large.devices().unwrap().pieces, 6);
    assert_eq!(plan(size(2), 40).unwrap().pieces, 2);
    assert_eq!(plan(size(0), 40).unwrap().devices(), None);
    // 36 bits are 64 GiB, of which 5 are below.
    plan(size(59 * 8), 36).unwrap();
    let error = plan(size(59 * 8 + 1), 36).unwrap_err().to_string();
    assert!(error.contains("36 bits"), "{error}");
    let huge = Options {
        pages: PageSize::Huge1G,
        ..options()
    };
    let plan = Plan::new(huge, &two, size(16), 40).unwrap();
    assert_eq!(plan.pieces, 2);
    assert_eq!(unit(huge), 1 << 30);
}

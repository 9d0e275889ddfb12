//! Puts kernel, initial RAM disk, command line and the boot protocol's structures into guest RAM.
//!
//! Two protocols: Linux's 64-bit one (a bzImage, or an ELF file without a PVH note) and PVH (an ELF
//! file with one). Both start the first processor as [`Entry`] says.

use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};

use linux_loader::loader::bootparam::{boot_e820_entry, boot_params, setup_header};
use linux_loader::loader::elf::PvhBootCapability;
use linux_loader::loader::elf::start_info::{
    hvm_memmap_table_entry, hvm_modlist_entry, hvm_start_info,
};
use linux_loader::loader::{BzImage, Elf, KernelLoader};
use vm_memory::{ByteValued, Bytes, GuestAddress, GuestMemoryMmap};

use crate::layout::{self, Range, boot};

/// Why the guest has nothing to boot.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A file that cannot be opened or read.
    #[error("cannot read the {what} {path}")]
    Read {
        /// "kernel" or "initial RAM disk".
        what: &'static str,
        /// The file.
        path: PathBuf,
        /// The system's reason.
        #[source]
        source: io::Error,
    },
    /// Neither magic number is there.
    #[error("{path} is not a kernel: it is neither a bzImage nor an ELF file")]
    NotAKernel {
        /// The file.
        path: PathBuf,
    },
    /// A bzImage without the entry that we use.
    #[error("the kernel {path} has no 64-bit entry (boot protocol 2.12 or later, x86-64)")]
    TooOld {
        /// The file.
        path: PathBuf,
    },
    /// A kernel that would not have room to unpack or start.
    #[error(
        "the kernel {path} needs guest memory up to {end:#x}, but it ends at {limit:#x}: give the \
         guest more memory"
    )]
    KernelTooLarge {
        /// The file.
        path: PathBuf,
        /// First address after what the kernel needs.
        end: u64,
        /// End of the RAM below 4 GiB.
        limit: u64,
    },
    /// An ELF file that is no kernel for this machine.
    #[error("{path} is not a kernel: it is an ELF file {what}")]
    WrongElf {
        /// The file.
        path: PathBuf,
        /// What is wrong about it.
        what: &'static str,
    },
    /// A damaged file, or one too large for guest memory.
    #[error("cannot load the kernel {path}: it is damaged, or guest memory is too small for it")]
    Load {
        /// The file.
        path: PathBuf,
        /// The loader's reason.
        #[source]
        source: linux_loader::loader::Error,
    },
    /// No room above the kernel.
    #[error(
        "the initial RAM disk {path} of {size} bytes does not fit into guest memory beside the \
         kernel: give the guest more memory"
    )]
    InitramfsTooLarge {
        /// The file.
        path: PathBuf,
        /// Its size in bytes.
        size: u64,
    },
    /// A command line that the kernel cannot take.
    #[error("the kernel's command line is {length} bytes long; it takes at most {limit}")]
    CmdlineTooLong {
        /// Length in bytes.
        length: usize,
        /// The kernel's limit.
        limit: usize,
    },
    /// A command line with a zero byte.
    #[error("the kernel's command line contains a zero byte")]
    CmdlineZero,
    /// Guest RAM is not where it should be.
    #[error("cannot write the boot structures into guest memory")]
    Write(#[from] vm_memory::GuestMemoryError),
}

/// How the first processor starts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Entry {
    /// Linux's 64-bit boot protocol: long mode, the first 4 GiB mapped one to one, RSI has the
    /// zero page's address.
    Linux64 {
        /// Where to start.
        address: u64,
        /// The zero page's address.
        zero_page: u64,
    },
    /// PVH: 32-bit protected mode without paging, EBX has the address of `hvm_start_info`.
    Pvh {
        /// Where to start.
        address: u64,
        /// The address of `hvm_start_info`.
        start_info: u64,
    },
}

/// What to boot.
#[derive(Clone, Copy, Debug)]
pub struct Images<'a> {
    /// The kernel's file.
    pub kernel: &'a Path,
    /// The initial RAM disk's file.
    pub initramfs: Option<&'a Path>,
    /// The kernel's command line.
    pub cmdline: &'a str,
}

/// Magic of an ELF file.
const ELF_MAGIC: [u8; 4] = *b"\x7fELF";
/// Offset of a bzImage's "HdrS" (Linux x86 boot protocol).
const HDRS_OFFSET: u64 = 0x202;
/// Boot protocol 2.12 brought `xloadflags`.
const PROTOCOL_2_12: u16 = 0x020c;
/// `xloadflags`: there is a 64-bit entry point.
const XLF_KERNEL_64: u16 = 1;
/// Where the 64-bit entry point is in the loaded kernel.
const ENTRY_64: u64 = 0x200;
/// `type_of_loader`: none of those that have a number.
const LOADER_UNDEFINED: u8 = 0xff;
/// `hdr.boot_flag` and `hdr.header` for a kernel without a header of its own.
const BOOT_FLAG: u16 = 0xaa55;
const HDRS: u32 = 0x5372_6448;
/// Where the RAM disk may end if the kernel does not say: 32-bit kernels' old limit.
const INITRD_LIMIT: u64 = 0x7fff_ffff;
/// Command line limit of a kernel that does not say (x86's COMMAND_LINE_SIZE).
const DEFAULT_CMDLINE_LIMIT: usize = 2047;
const PAGE: u64 = 4096;

/// Types of memory in an E820 map.
const E820_RAM: u32 = 1;
const E820_RESERVED: u32 = 2;

/// `hvm_start_info.magic`.
const PVH_MAGIC: u32 = 0x336e_c578;

/// Loads everything. `ram` are RAM's ranges, the one below the hole first.
pub fn load(
    memory: &GuestMemoryMmap,
    ram: &[Range],
    images: &Images<'_>,
    rsdp: GuestAddress,
) -> Result<Entry, Error> {
    let low_end = ram.first().map_or(0, Range::end);
    let path = images.kernel;
    let read_error = |source| Error::Read {
        what: "kernel",
        path: path.to_owned(),
        source,
    };
    let load_error = |source| Error::Load {
        path: path.to_owned(),
        source,
    };
    let mut file = File::open(path).map_err(read_error)?;
    let start = Some(GuestAddress(boot::HIGH_START));

    match kind(&file).map_err(read_error)? {
        Kind::Unknown => Err(Error::NotAKernel {
            path: path.to_owned(),
        }),
        Kind::BzImage => {
            let loaded = BzImage::load(memory, None, &mut file, start).map_err(load_error)?;
            let mut header = loaded.setup_header.unwrap_or_default();
            if header.version < PROTOCOL_2_12 || header.xloadflags & XLF_KERNEL_64 == 0 {
                return Err(Error::TooOld {
                    path: path.to_owned(),
                });
            }
            let limit = usize::try_from(header.cmdline_size).unwrap_or(usize::MAX);
            let cmdline = write_cmdline(memory, images.cmdline, limit)?;
            let kernel_end = unpacked_end(loaded.kernel_load.0, &header).max(loaded.kernel_end);
            check_kernel_end(path, kernel_end, low_end)?;
            let initrd_limit = low_end.min(u64::from(header.initrd_addr_max).saturating_add(1));
            let initrd = load_initramfs(memory, images, kernel_end, initrd_limit)?;
            header.type_of_loader = LOADER_UNDEFINED;
            let entry = loaded.kernel_load.0 + ENTRY_64;
            write_zero_page(memory, header, cmdline, initrd, ram, rsdp)?;
            Ok(Entry::Linux64 {
                address: entry,
                zero_page: boot::ZERO_PAGE,
            })
        }
        Kind::Elf => {
            let virtual_addresses = check_elf(&file, path)?;
            let loaded = Elf::load(memory, None, &mut file, None).map_err(load_error)?;
            check_kernel_end(path, loaded.kernel_end, low_end)?;
            let cmdline = write_cmdline(memory, images.cmdline, DEFAULT_CMDLINE_LIMIT)?;
            let limit = low_end.min(INITRD_LIMIT + 1);
            let initrd = load_initramfs(memory, images, loaded.kernel_end, limit)?;
            match loaded.pvh_boot_cap {
                PvhBootCapability::PvhEntryPresent(address) => {
                    write_start_info(memory, cmdline, initrd, ram, rsdp)?;
                    Ok(Entry::Pvh {
                        address: address.0,
                        start_info: boot::PVH_INFO,
                    })
                }
                _ if !virtual_addresses => {
                    let what = "without a PVH entry, and not linked as Linux is";
                    Err(Error::WrongElf {
                        path: path.to_owned(),
                        what,
                    })
                }
                _ => {
                    let header = setup_header {
                        boot_flag: BOOT_FLAG,
                        header: HDRS,
                        type_of_loader: LOADER_UNDEFINED,
                        kernel_alignment: 0x20_0000,
                        ..Default::default()
                    };
                    write_zero_page(memory, header, cmdline, initrd, ram, rsdp)?;
                    let address = loaded.kernel_load.0;
                    Ok(Entry::Linux64 {
                        address,
                        zero_page: boot::ZERO_PAGE,
                    })
                }
            }
        }
    }
}

/// End of the memory that a bzImage needs until it reads its memory map. It unpacks itself at the
/// first aligned address from where it is loaded, but not below its preferred one ("init_size" in
/// the Linux x86 boot protocol).
fn unpacked_end(load: u64, header: &setup_header) -> u64 {
    let preferred = header.pref_address;
    let start = if header.relocatable_kernel != 0 {
        let alignment = u64::from(header.kernel_alignment).max(1);
        load.max(preferred)
            .checked_next_multiple_of(alignment)
            .unwrap_or(u64::MAX)
    } else {
        preferred
    };
    start.saturating_add(header.init_size.into())
}

fn check_kernel_end(path: &Path, end: u64, limit: u64) -> Result<(), Error> {
    if end > limit {
        return Err(Error::KernelTooLarge {
            path: path.to_owned(),
            end,
            limit,
        });
    }
    Ok(())
}

/// Checks what the loader does not: that the file is an executable for x86-64, and that its
/// segments stay away from the boot structures below 1 MiB. Returns whether it is linked to run in
/// the upper half of the address space, as Linux is and no program.
fn check_elf(file: &File, path: &Path) -> Result<bool, Error> {
    const CLASS_64: u8 = 2;
    const EXECUTABLE: u16 = 2;
    const X86_64: u16 = 62;
    const HEADER: usize = 64;
    const SEGMENT: usize = 56;
    const LOAD: u32 = 1;

    let wrong = |what| Error::WrongElf {
        path: path.to_owned(),
        what,
    };
    let read = |offset, bytes: &mut [u8]| {
        use std::os::unix::fs::FileExt;
        file.read_exact_at(bytes, offset)
            .map_err(|_| wrong("that is cut short"))
    };
    let mut header = [0; HEADER];
    read(0, &mut header)?;
    if header.get(4) != Some(&CLASS_64) || field(&header, 18, 2) != u64::from(X86_64) {
        return Err(wrong("for another processor"));
    }
    if field(&header, 16, 2) != u64::from(EXECUTABLE) {
        return Err(wrong("of another kind"));
    }
    let (table, count) = (field(&header, 32, 8), field(&header, 56, 2));
    let mut upper_half = false;
    for i in 0..count {
        let mut segment = [0; SEGMENT];
        let offset = table
            .checked_add(i * SEGMENT as u64)
            .ok_or_else(|| wrong("of nonsense"))?;
        read(offset, &mut segment)?;
        let (virtual_address, physical) = (field(&segment, 16, 8), field(&segment, 24, 8));
        if field(&segment, 0, 4) == u64::from(LOAD) && field(&segment, 40, 8) != 0 {
            if physical < boot::HIGH_START {
                return Err(wrong("with a segment below 1 MiB"));
            }
            upper_half |= virtual_address >> 63 != 0;
        }
    }
    Ok(upper_half)
}

/// A little-endian field of a header; 0 if it is not there.
fn field(bytes: &[u8], offset: usize, size: usize) -> u64 {
    let field = bytes.get(offset..offset + size).unwrap_or_default();
    field
        .iter()
        .rev()
        .fold(0, |value, byte| value << 8 | u64::from(*byte))
}

enum Kind {
    BzImage,
    Elf,
    Unknown,
}

fn kind(file: &File) -> io::Result<Kind> {
    use std::os::unix::fs::FileExt;
    let mut magic = [0; 4];
    let mut has = |offset, expected: [u8; 4]| match file.read_exact_at(&mut magic, offset) {
        Ok(()) => Ok(magic == expected),
        Err(e) if e.kind() == io::ErrorKind::UnexpectedEof => Ok(false),
        Err(e) => Err(e),
    };
    if has(0, ELF_MAGIC)? {
        return Ok(Kind::Elf);
    }
    Ok(if has(HDRS_OFFSET, *b"HdrS")? {
        Kind::BzImage
    } else {
        Kind::Unknown
    })
}

fn write_cmdline(memory: &GuestMemoryMmap, text: &str, limit: usize) -> Result<u32, Error> {
    // 0 in the header of a kernel that does not say.
    let limit = if limit == 0 {
        DEFAULT_CMDLINE_LIMIT
    } else {
        limit
    };
    let limit = limit.min(boot::CMDLINE_MAX - 1);
    if text.len() > limit {
        return Err(Error::CmdlineTooLong {
            length: text.len(),
            limit,
        });
    }
    if text.contains('\0') {
        return Err(Error::CmdlineZero);
    }
    memory.write_slice(text.as_bytes(), GuestAddress(boot::CMDLINE))?;
    memory.write_obj(0u8, GuestAddress(boot::CMDLINE + text.len() as u64))?;
    Ok(u32::try_from(boot::CMDLINE).unwrap_or(0))
}

/// Loads the RAM disk as high as it may be; returns its range.
fn load_initramfs(
    memory: &GuestMemoryMmap,
    images: &Images<'_>,
    kernel_end: u64,
    limit: u64,
) -> Result<Option<Range>, Error> {
    let Some(path) = images.initramfs else {
        return Ok(None);
    };
    let read_error = |source| Error::Read {
        what: "initial RAM disk",
        path: path.to_owned(),
        source,
    };
    let mut file = File::open(path).map_err(read_error)?;
    let size = file.metadata().map_err(read_error)?.len();
    let too_large = || Error::InitramfsTooLarge {
        path: path.to_owned(),
        size,
    };
    let start = limit.checked_sub(size).ok_or_else(too_large)? / PAGE * PAGE;
    if start < kernel_end {
        return Err(too_large());
    }
    let length = usize::try_from(size).map_err(|_| too_large())?;
    // Exactly what `metadata` said: a file that shrinks meanwhile is an error.
    memory
        .read_exact_volatile_from(GuestAddress(start), &mut file, length)
        .map_err(|e| read_error(io::Error::other(e)))?;
    Ok(Some(Range { start, size }))
}

/// The memory map: RAM, and what is not RAM although it looks like a hole in it.
fn memory_map(ram: &[Range]) -> Vec<(Range, u32)> {
    let mut map = vec![
        (
            Range {
                start: 0,
                size: boot::LOW_END,
            },
            E820_RAM,
        ),
        // Where a BIOS keeps its data area; nothing is there, but kernels look.
        (
            Range {
                start: boot::LOW_END,
                size: 0xa_0000 - boot::LOW_END,
            },
            E820_RESERVED,
        ),
        (
            Range {
                start: boot::ACPI,
                size: boot::ACPI_END - boot::ACPI,
            },
            E820_RESERVED,
        ),
    ];
    for range in ram {
        let start = range.start.max(boot::HIGH_START);
        map.push((
            Range {
                start,
                size: range.end().saturating_sub(start),
            },
            E820_RAM,
        ));
    }
    map.push((
        Range {
            start: layout::ECAM_START,
            size: layout::ECAM_SIZE,
        },
        E820_RESERVED,
    ));
    map.sort_by_key(|(range, _)| range.start);
    map
}

fn write_zero_page(
    memory: &GuestMemoryMmap,
    mut header: setup_header,
    cmdline: u32,
    initrd: Option<Range>,
    ram: &[Range],
    rsdp: GuestAddress,
) -> Result<(), Error> {
    let mut params = boot_params::default();
    header.cmd_line_ptr = cmdline;
    if let Some(initrd) = initrd {
        // Both are below 4 GiB: `load_initramfs` was given a limit there.
        header.ramdisk_image = u32::try_from(initrd.start).unwrap_or(0);
        header.ramdisk_size = u32::try_from(initrd.size).unwrap_or(0);
    }
    params.hdr = header;
    params.acpi_rsdp_addr = rsdp.0;
    let map = memory_map(ram);
    for (entry, (range, type_)) in params.e820_table.iter_mut().zip(&map) {
        *entry = boot_e820_entry {
            addr: range.start,
            size: range.size,
            r#type: *type_,
        };
    }
    params.e820_entries = u8::try_from(map.len()).unwrap_or(u8::MAX);
    memory.write_obj(params, GuestAddress(boot::ZERO_PAGE))?;
    Ok(())
}

/// Module list entry and memory map follow `hvm_start_info` in the same page.
fn write_start_info(
    memory: &GuestMemoryMmap,
    cmdline: u32,
    initrd: Option<Range>,
    ram: &[Range],
    rsdp: GuestAddress,
) -> Result<(), Error> {
    let mut next = boot::PVH_INFO + size_of::<hvm_start_info>() as u64;
    let mut put = |bytes: &[u8]| {
        let at = next;
        next += bytes.len() as u64;
        memory.write_slice(bytes, GuestAddress(at)).map(|()| at)
    };
    let mut info = hvm_start_info {
        magic: PVH_MAGIC,
        // Version 1 brought the memory map.
        version: 1,
        cmdline_paddr: cmdline.into(),
        rsdp_paddr: rsdp.0,
        ..Default::default()
    };
    if let Some(initrd) = initrd {
        let module = hvm_modlist_entry {
            paddr: initrd.start,
            size: initrd.size,
            ..Default::default()
        };
        info.modlist_paddr = put(module.as_slice())?;
        info.nr_modules = 1;
    }
    let map = memory_map(ram);
    for (i, (range, type_)) in map.iter().enumerate() {
        let entry = hvm_memmap_table_entry {
            addr: range.start,
            size: range.size,
            type_: *type_,
            reserved: 0,
        };
        let at = put(entry.as_slice())?;
        if i == 0 {
            info.memmap_paddr = at;
        }
    }
    info.memmap_entries = u32::try_from(map.len()).unwrap_or(0);
    memory.write_obj(info, GuestAddress(boot::PVH_INFO))?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    const RSDP: GuestAddress = GuestAddress(0xe_0000);

    fn ram(size: u64) -> (GuestMemoryMmap, Vec<Range>) {
        let memory =
            GuestMemoryMmap::from_ranges(&[(GuestAddress(0), usize::try_from(size).unwrap())]);
        (memory.unwrap(), layout::ram_ranges(size))
    }

    fn file(bytes: &[u8]) -> tempfile::NamedTempFile {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        file.write_all(bytes).unwrap();
        file
    }

    /// A bzImage with one setup sector, whose 32-bit part is `code`.
    fn bzimage(version: u16, code: &[u8]) -> Vec<u8> {
        let header = setup_header {
            setup_sects: 1,
            boot_flag: BOOT_FLAG,
            header: HDRS,
            version,
            loadflags: 1,
            code32_start: 0x10_0000,
            xloadflags: XLF_KERNEL_64,
            cmdline_size: 64,
            initrd_addr_max: 0x7fff_ffff,
            init_size: 0x10_0000,
            ..Default::default()
        };
        let mut image = vec![0; 1024];
        image[0x1f1..0x1f1 + header.as_slice().len()].copy_from_slice(header.as_slice());
        image.extend_from_slice(code);
        image
    }

    /// An ELF file with one segment at 2 MiB, linked to the upper half like Linux, and, if `pvh`, a
    /// note with the entry's address.
    fn elf(pvh: bool, code: &[u8]) -> Vec<u8> {
        let mut image = Vec::new();
        image.extend_from_slice(b"\x7fELF\x02\x01\x01");
        image.resize(16, 0);
        for half in [2u16, 62] {
            image.extend_from_slice(&half.to_le_bytes());
        }
        image.extend_from_slice(&1u32.to_le_bytes());
        for word in [0x20_0000u64, 64, 0] {
            image.extend_from_slice(&word.to_le_bytes());
        }
        image.extend_from_slice(&0u32.to_le_bytes());
        for half in [64u16, 56, 2, 0, 0, 0] {
            image.extend_from_slice(&half.to_le_bytes());
        }
        let note = [
            4u32,
            4,
            if pvh { 18 } else { 1 },
            u32::from_le_bytes(*b"Xen\0"),
            0x20_0000,
        ];
        let segment = |image: &mut Vec<u8>, kind: u32, offset: u64, address: u64, size: u64| {
            for word in [kind, 5] {
                image.extend_from_slice(&word.to_le_bytes());
            }
            let upper_half = 0xffff_ffff_8000_0000 | address;
            for word in [offset, upper_half, address, size, size, 4] {
                image.extend_from_slice(&word.to_le_bytes());
            }
        };
        segment(&mut image, 4, 176, 0, 20);
        segment(&mut image, 1, 196, 0x20_0000, code.len() as u64);
        for word in note {
            image.extend_from_slice(&word.to_le_bytes());
        }
        image.extend_from_slice(code);
        image
    }

    fn patched(at: usize, value: u8) -> Vec<u8> {
        let mut image = elf(true, b"code");
        image[at] = value;
        image
    }

    fn images<'a>(
        kernel: &'a tempfile::NamedTempFile,
        initramfs: Option<&'a tempfile::NamedTempFile>,
    ) -> Images<'a> {
        Images {
            kernel: kernel.path(),
            initramfs: initramfs.map(|f| f.path()),
            cmdline: "console=ttyS0",
        }
    }

    #[test]
    fn a_bzimage_is_loaded_with_its_zero_page() {
        let (memory, ram) = ram(64 << 20);
        let (kernel, initrd) = (file(&bzimage(PROTOCOL_2_12, b"code")), file(&[7; 5000]));
        let entry = load(&memory, &ram, &images(&kernel, Some(&initrd)), RSDP).unwrap();
        let expected = Entry::Linux64 {
            address: 0x10_0200,
            zero_page: boot::ZERO_PAGE,
        };
        assert_eq!(entry, expected);
        let code: [u8; 4] = memory.read_obj(GuestAddress(0x10_0000)).unwrap();
        assert_eq!(&code, b"code");
        let params: boot_params = memory.read_obj(GuestAddress(boot::ZERO_PAGE)).unwrap();
        let (image, size) = (params.hdr.ramdisk_image, params.hdr.ramdisk_size);
        assert_eq!((image, size), ((64 << 20) - 8192, 5000));
        let last: u8 = memory
            .read_obj(GuestAddress(u64::from(image) + 4999))
            .unwrap();
        assert_eq!(last, 7);
        let rsdp = params.acpi_rsdp_addr;
        assert_eq!(rsdp, RSDP.0);
        let mut line = [0xff; 14];
        memory
            .read_slice(&mut line, GuestAddress(params.hdr.cmd_line_ptr.into()))
            .unwrap();
        assert_eq!(&line, b"console=ttyS0\0");
    }

    #[test]
    fn elf_files_boot_by_pvh_or_as_linux() {
        let (memory, ram) = ram(64 << 20);
        let (kernel, initrd) = (file(&elf(true, b"code")), file(&[7; 10]));
        let entry = load(&memory, &ram, &images(&kernel, Some(&initrd)), RSDP).unwrap();
        assert_eq!(
            entry,
            Entry::Pvh {
                address: 0x20_0000,
                start_info: boot::PVH_INFO
            }
        );
        let info: hvm_start_info = memory.read_obj(GuestAddress(boot::PVH_INFO)).unwrap();
        assert_eq!(
            (info.magic, info.nr_modules, info.rsdp_paddr),
            (PVH_MAGIC, 1, RSDP.0)
        );
        let module: hvm_modlist_entry = memory.read_obj(GuestAddress(info.modlist_paddr)).unwrap();
        assert_eq!((module.paddr, module.size), ((64 << 20) - 4096, 10));
        let first: hvm_memmap_table_entry =
            memory.read_obj(GuestAddress(info.memmap_paddr)).unwrap();
        assert_eq!(
            (first.addr, first.size, first.type_),
            (0, boot::LOW_END, E820_RAM)
        );

        let kernel = file(&elf(false, b"code"));
        let entry = load(&memory, &ram, &images(&kernel, None), RSDP).unwrap();
        assert_eq!(
            entry,
            Entry::Linux64 {
                address: 0x20_0000,
                zero_page: boot::ZERO_PAGE
            }
        );
    }

    #[test]
    fn the_memory_map_is_sorted_and_does_not_overlap() {
        for size in [64 << 20, 3 << 30, 6u64 << 30] {
            let map = memory_map(&layout::ram_ranges(size));
            for pair in map.windows(2) {
                assert!(pair[0].0.end() <= pair[1].0.start, "{pair:x?}");
            }
            let total: u64 = map
                .iter()
                .filter(|(_, t)| *t == E820_RAM)
                .map(|(r, _)| r.size)
                .sum();
            assert_eq!(total, size - (1 << 20) + boot::LOW_END);
        }
    }

    #[test]
    fn what_is_not_a_kernel_is_refused() {
        let (memory, ram) = ram(64 << 20);
        let dir = tempfile::tempdir().unwrap();
        let missing = dir.path().join("vmlinuz");
        let images_of = |kernel| Images {
            kernel,
            initramfs: None,
            cmdline: "",
        };
        let result = load(&memory, &ram, &images_of(&missing), RSDP);
        assert!(matches!(result, Err(Error::Read { .. })));
        let result = load(&memory, &ram, &images_of(dir.path()), RSDP);
        assert!(matches!(result, Err(Error::Read { .. })));
        for (bytes, expected) in [
            (Vec::new(), "not a kernel"),
            (b"#!/bin/sh\n".to_vec(), "not a kernel"),
            (vec![0; 4096], "not a kernel"),
            (bzimage(0x0206, b""), "no 64-bit entry"),
            (b"\x7fELF".to_vec(), "cut short"),
            (elf(true, b"code")[..100].to_vec(), "cut short"),
            (elf(true, b"code")[..198].to_vec(), "damaged"),
            (patched(18, 183), "another processor"),
            (patched(4, 1), "another processor"),
            (patched(16, 3), "another kind"),
            // The second segment's physical address: 0 instead of 2 MiB.
            (patched(64 + 56 + 24 + 2, 0), "below 1 MiB"),
            (std::fs::read("/proc/self/exe").unwrap(), "not a kernel"),
        ] {
            let kernel = file(&bytes);
            let error = load(&memory, &ram, &images(&kernel, None), RSDP).unwrap_err();
            assert!(error.to_string().contains(expected), "{error}");
        }
    }

    #[test]
    fn a_program_is_not_a_kernel() {
        let (memory, ram) = ram(64 << 20);
        let mut image = elf(false, b"code");
        for segment in [64, 64 + 56] {
            image[segment + 16 + 7] = 0;
        }
        let kernel = file(&image);
        let error = load(&memory, &ram, &images(&kernel, None), RSDP).unwrap_err();
        assert!(
            error.to_string().contains("not linked as Linux is"),
            "{error}"
        );
    }

    #[test]
    fn a_kernel_unpacks_itself_at_its_preferred_address() {
        let header = |relocatable_kernel, kernel_alignment, pref_address| setup_header {
            relocatable_kernel,
            kernel_alignment,
            pref_address,
            init_size: 0x1000,
            ..Default::default()
        };
        for (header, end) in [
            (header(1, 0x20_0000, 0x100_0000), 0x100_1000),
            (header(1, 0x20_0000, 0), 0x20_1000),
            (header(0, 0, 0x100_0000), 0x100_1000),
            (header(1, 0, u64::MAX), u64::MAX),
        ] {
            assert_eq!(unpacked_end(0x10_0000, &header), end);
        }
    }

    proptest::proptest! {
        #[test]
        fn damaged_kernels_never_panic(
            is_elf: bool,
            length in 0usize..1100,
            changes in proptest::collection::vec((0usize..1100, proptest::num::u8::ANY), 0..12),
        ) {
            let (memory, ram) = ram(16 << 20);
            let mut image = if is_elf { elf(true, b"code") } else { bzimage(0x020f, b"code") };
            // The interesting half of a bzImage is its header.
            let start = if is_elf { 0 } else { 0x1f1 };
            for (at, value) in changes {
                let at = start + at % 128;
                if let Some(byte) = image.get_mut(at) {
                    *byte = value;
                }
            }
            image.truncate(length);
            let kernel = file(&image);
            let _ = load(&memory, &ram, &images(&kernel, None), RSDP);
        }
    }

    #[test]
    fn what_does_not_fit_is_refused() {
        let (memory, ram) = ram(16 << 20);
        let kernel = file(&bzimage(PROTOCOL_2_12, b"code"));
        let initrd = tempfile::NamedTempFile::new().unwrap();
        for size in [15 << 20, 1 << 40] {
            initrd.as_file().set_len(size).unwrap();
            let error = load(&memory, &ram, &images(&kernel, Some(&initrd)), RSDP).unwrap_err();
            assert!(matches!(error, Error::InitramfsTooLarge { .. }), "{error}");
        }
        let long = "x".repeat(65);
        let error = load(
            &memory,
            &ram,
            &Images {
                cmdline: &long,
                ..images(&kernel, None)
            },
            RSDP,
        );
        assert!(matches!(
            error,
            Err(Error::CmdlineTooLong {
                length: 65,
                limit: 64
            })
        ));
        let error = load(
            &memory,
            &ram,
            &Images {
                cmdline: "a\0b",
                ..images(&kernel, None)
            },
            RSDP,
        );
        assert!(matches!(error, Err(Error::CmdlineZero)));
        let mut image = bzimage(PROTOCOL_2_12, b"code");
        // `init_size`, the last field but one.
        image[0x260..0x264].copy_from_slice(&(64u32 << 20).to_le_bytes());
        let kernel = file(&image);
        let error = load(&memory, &ram, &images(&kernel, None), RSDP).unwrap_err();
        assert!(matches!(error, Error::KernelTooLarge { .. }), "{error}");
        let kernel = file(&bzimage(PROTOCOL_2_12, &vec![0; 17 << 20]));
        let error = load(&memory, &ram, &images(&kernel, None), RSDP).unwrap_err();
        assert!(matches!(error, Error::Load { .. }), "{error}");
    }
}

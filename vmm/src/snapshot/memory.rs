//! Guest memory in a snapshot: runs of pages that are not empty.

use std::io::{Read, Write};
use std::os::unix::fs::FileExt;

use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion};

use super::Error;
use super::dirty::{self, Pages};
use super::stream::{Kind, MEMORY_CHUNK, Reader, Writer};

/// Bytes in a page.
const PAGE: usize = 4096;

/// Writes all of `memory`; returns how many bytes of it were not empty. Pages are read from their files, as a page that the
/// guest has never touched would take room if it was read where it is mapped.
///
/// # Errors
/// [`Error::Memory`], [`Error::Write`]
pub fn write<W: Write>(memory: &GuestMemoryMmap, out: &mut Writer<W>) -> Result<u64, Error> {
    let mut buffer = vec![0; MEMORY_CHUNK];
    let mut written = 0u64;
    for region in memory.iter() {
        let Some(backing) = region.file_offset() else {
            return Err(Error::Memory(std::io::ErrorKind::Unsupported.into()));
        };
        let (mut offset, mut address) = (backing.start(), region.start_addr().0);
        let mut left = region.len();
        while left > 0 {
            let size = usize::try_from(left).map_or(MEMORY_CHUNK, |left| left.min(MEMORY_CHUNK));
            let chunk = buffer.get_mut(..size).unwrap_or_default();
            let read = backing.file().read_exact_at(chunk, offset);
            read.map_err(Error::Memory)?;
            for (at, run) in runs(chunk) {
                let start = address.saturating_add(at);
                out.section(Kind::Memory, &[&start.to_le_bytes(), run])?;
                written = written.saturating_add(length(run));
            }
            let size = length(chunk);
            (offset, address, left) = (offset + size, address + size, left - size);
        }
    }
    Ok(written)
}

/// The runs of pages in a chunk of memory that are not empty, each with its offset.
fn runs(chunk: &[u8]) -> impl Iterator<Item = (u64, &[u8])> {
    let mut at = 0;
    let pages = move || -> Option<(u64, &[u8])> {
        let rest = chunk.get(at..)?;
        let empty = |page: &&[u8]| page.iter().all(|byte| *byte == 0);
        let skipped = rest.chunks(PAGE).take_while(empty).count() * PAGE;
        let rest = rest.get(skipped..)?;
        let size = rest.chunks(PAGE).take_while(|page| !empty(page)).count() * PAGE;
        let start = at + skipped;
        let run = rest
            .get(..size.min(rest.len()))
            .filter(|run| !run.is_empty())?;
        at = start + run.len();
        Some((u64::try_from(start).ok()?, run))
    };
    std::iter::from_fn(pages)
}

/// Writes these pages, empty or not; returns how many bytes that are.
///
/// # Errors
/// [`Error::Memory`], [`Error::Write`]
pub fn write_pages<W: Write>(
    memory: &GuestMemoryMmap,
    pages: &Pages,
    out: &mut Writer<W>,
) -> Result<u64, Error> {
    let mut buffer = vec![0; MEMORY_CHUNK];
    let most = length(&buffer) / dirty::PAGE;
    let mut written = 0u64;
    for (start, count) in pages.runs(most) {
        let size = usize::try_from(count * dirty::PAGE).unwrap_or(usize::MAX);
        let run = buffer.get_mut(..size).unwrap_or_default();
        // A back-end can note anything: what is no memory is nothing to send.
        let Some(region) = memory.find_region(GuestAddress(start)) else {
            continue;
        };
        let run = match usize::try_from(region.last_addr().0.saturating_sub(start)) {
            Ok(last) if last < size => run.get_mut(..=last).unwrap_or_default(),
            _ => run,
        };
        let read = memory.read_slice(run, GuestAddress(start));
        read.map_err(|error| Error::Memory(std::io::Error::other(error)))?;
        out.section(Kind::Memory, &[&start.to_le_bytes(), run])?;
        written = written.saturating_add(length(run));
    }
    Ok(written)
}

/// Takes sections of memory up to one of another kind, which is returned.
///
/// # Errors
/// [`Error::Place`] for pages where the guest has no memory, and what [`Reader::section`] says.
pub fn read<R: Read>(
    memory: &GuestMemoryMmap,
    input: &mut Reader<R>,
) -> Result<(Kind, Vec<u8>), Error> {
    loop {
        let (kind, body) = input.section()?;
        if kind != Kind::Memory {
            return Ok((kind, body.to_vec()));
        }
        let (address, pages) = body.split_first_chunk().ok_or(Error::Damaged)?;
        let address = u64::from_le_bytes(*address);
        let written = memory.write_slice(pages, GuestAddress(address));
        written.map_err(|_| Error::Place { address })?;
    }
}

fn length(bytes: &[u8]) -> u64 {
    u64::try_from(bytes.len()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::{GuestRam, MIN_SIZE, Options, PageSize};
    use proptest::prelude::*;
    use ringside_control::Size;

    fn ram() -> GuestRam {
        let options = Options {
            size: Size(MIN_SIZE),
            pages: PageSize::Normal,
            prefault: false,
        };
        GuestRam::new(options).unwrap()
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(16))]
        #[test]
        fn memory_arrives_as_it_was(
            values in proptest::collection::vec((0..MIN_SIZE - 8, any::<u64>()), 0..40)
        ) {
            let (from, to) = (ram(), ram());
            for (at, value) in values {
                from.memory().write_obj(value, GuestAddress(at)).unwrap();
            }
            let mut writer = Writer::new(Vec::new()).unwrap();
            write(from.memory(), &mut writer).unwrap();
            let bytes = writer.finish().unwrap();
            let mut reader = Reader::new(bytes.as_slice()).unwrap();
            let (kind, _) = read(to.memory(), &mut reader).unwrap();
            prop_assert_eq!(kind, Kind::End);
            let size = usize::try_from(MIN_SIZE).unwrap();
            let all = [from, to].map(|ram| {
                let mut bytes = vec![0; size];
                ram.memory().read_slice(&mut bytes, GuestAddress(0)).unwrap();
                bytes
            });
            prop_assert!(all[0] == all[1]);
        }

        #[test]
        fn runs_are_the_pages_that_are_not_empty(
            pages in proptest::collection::vec(any::<bool>(), 0..64)
        ) {
            let chunk: Vec<u8> = pages.iter().flat_map(|full| [u8::from(*full); PAGE]).collect();
            let mut seen = vec![false; pages.len()];
            for (at, run) in runs(&chunk) {
                let first = usize::try_from(at).unwrap() / PAGE;
                seen[first..first + run.len() / PAGE].fill(true);
            }
            prop_assert_eq!(seen, pages);
        }
    }

    #[test]
    fn pages_outside_memory_are_refused() {
        let ram = ram();
        for address in [MIN_SIZE, MIN_SIZE - 1, u64::MAX] {
            let mut writer = Writer::new(Vec::new()).unwrap();
            let body: [&[u8]; 2] = [&address.to_le_bytes(), &[1; 4096]];
            writer.section(Kind::Memory, &body).unwrap();
            let bytes = writer.finish().unwrap();
            let mut reader = Reader::new(bytes.as_slice()).unwrap();
            let error = read(ram.memory(), &mut reader);
            assert!(matches!(error, Err(Error::Place { .. })), "{address:#x}");
        }
    }
}

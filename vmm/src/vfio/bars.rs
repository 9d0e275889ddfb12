//! Which parts of a BAR a guest reaches without an exit.
//!
//! KVM maps whole pages. The MSI-X table and the pending bits are emulated, so the pages that they are in are left out; accesses
//! there, and to whatever cannot be mapped, are passed on one by one.

use ringside_vfio::device::Area;

/// KVM's slots are in pages.
pub const PAGE: u64 = 4096;

/// What is left of `areas`, in whole pages, without the pages that `holes` touch.
pub fn without(areas: &[Area], holes: &[Area]) -> Vec<Area> {
    let mut left: Vec<(u64, u64)> = areas
        .iter()
        .map(|area| {
            let end = area.offset.saturating_add(area.size);
            (area.offset.next_multiple_of(PAGE), end - end % PAGE)
        })
        .collect();
    for hole in holes.iter().filter(|hole| hole.size > 0) {
        let start = hole.offset - hole.offset % PAGE;
        let end = hole
            .offset
            .saturating_add(hole.size)
            .checked_next_multiple_of(PAGE)
            .unwrap_or(u64::MAX);
        left = left
            .into_iter()
            .flat_map(|(from, to)| [(from, to.min(start)), (from.max(end), to)])
            .collect();
    }
    left.into_iter()
        .filter(|(from, to)| from < to)
        .map(|(from, to)| Area {
            offset: from,
            size: to - from,
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn area(offset: u64, size: u64) -> Area {
        Area { offset, size }
    }

    #[test]
    fn the_pages_of_the_table_are_left_out() {
        let whole = [area(0, 0x4000)];
        assert_eq!(without(&whole, &[]), [area(0, 0x4000)]);
        assert_eq!(
            without(&whole, &[area(0x2010, 0x30), area(0x3000, 8)]),
            [area(0, 0x2000)]
        );
        assert_eq!(
            without(&whole, &[area(0x1ff0, 0x20)]),
            [area(0, 0x1000), area(0x3000, 0x1000)],
            "a table across two pages takes both"
        );
        assert_eq!(without(&[area(0, 0x1000)], &[area(0x800, 16)]), []);
        assert_eq!(without(&whole, &[area(0x8000, 16)]), whole);
        assert_eq!(without(&whole, &[area(u64::MAX, 16)]), whole);
    }

    #[test]
    fn only_whole_pages_are_left() {
        assert_eq!(
            without(&[area(0x800, 0x2000), area(0x5000, 0x100)], &[]),
            [area(0x1000, 0x1000)]
        );
    }
}

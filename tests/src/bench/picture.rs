//! The ratios as a picture: bars in an SVG file.

use std::fmt::Write;

use super::contender::Family;
use super::outcome::{CellOutcome, Row, Spread};

const NAME_WIDTH: f64 = 215.0;
const BAR_WIDTH: f64 = 460.0;
const BAR_HEIGHT: f64 = 9.0;
const CELL_HEIGHT: f64 = 30.0;
const HEAD_HEIGHT: f64 = 46.0;
const MARGIN: f64 = 14.0;
/// Colours of ours and of qemu-storage-daemon's bars: apart for the colour-blind, too.
const OURS: &str = "#0b6fb8";
const QSD: &str = "#e69f00";

/// One half of the picture.
struct Panel<'a> {
    title: &'static str,
    /// The ratio of a row.
    ratio: fn(&Row) -> Option<Spread>,
    cells: Vec<&'a CellOutcome>,
}

/// Draws the cells that have storage to compare with, then those without, which compare with qemu-storage-daemon.
pub(super) fn draw(cells: &[CellOutcome], where_measured: &str) -> String {
    let of = |stored: bool| {
        cells
            .iter()
            .filter(|cell| cell.raw.is_empty() != stored)
            .collect()
    };
    let panels = [
        Panel {
            title: "Requests per second, to those of the storage itself (fio, io_uring)",
            ratio: |row| row.to_raw,
            cells: of(true),
        },
        Panel {
            title: "Requests per second without storage, to those of qemu-storage-daemon",
            ratio: |row| row.to_qsd,
            cells: of(false),
        },
    ];
    let mut body = String::new();
    let mut y = MARGIN;
    for panel in panels.iter().filter(|panel| !panel.cells.is_empty()) {
        y = panel.draw(&mut body, y);
    }
    let width = NAME_WIDTH + BAR_WIDTH + 2.0 * MARGIN;
    text(&mut body, MARGIN, y + 10.0, "start", where_measured);
    let height = y + 24.0;
    format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {width} {height}\" width=\"{width}\" height=\"{height}\" \
         font-family=\"sans-serif\" font-size=\"11\">\n\
         <rect width=\"100%\" height=\"100%\" fill=\"white\"/>\n{body}</svg>\n"
    )
}

impl Panel<'_> {
    /// Draws from `y` on; gives where it ends.
    fn draw(&self, body: &mut String, y: f64) -> f64 {
        let spreads = self.cells.iter().flat_map(|cell| &cell.rows);
        let most = spreads
            .filter_map(|row| Some((self.ratio)(row)?.max))
            .fold(1.0, f64::max);
        // A whole number of steps, and not more than ten.
        let step = if most > 5.0 {
            (most / 5.0).ceil()
        } else if most > 2.0 {
            0.5
        } else {
            0.25
        };
        let full = (most / step).ceil() * step;
        let x = |ratio: f64| MARGIN + NAME_WIDTH + ratio / full * BAR_WIDTH;
        text(body, MARGIN, y + 12.0, "start", self.title);
        legend(body, y + 28.0);
        let top = y + HEAD_HEIGHT;
        let count = f64::from(u32::try_from(self.cells.len()).unwrap_or(u32::MAX));
        let bottom = top + count * CELL_HEIGHT;
        let mut mark = 0.0;
        while mark <= full + step / 2.0 {
            let at = x(mark);
            line(body, (at, top), (at, bottom), "#ddd");
            text(body, at, top - 4.0, "middle", &format!("{mark}"));
            mark += step;
        }
        line(body, (x(1.0), top), (x(1.0), bottom), "#444");
        for (index, cell) in (0_u32..).zip(&self.cells) {
            let at = top + f64::from(index) * CELL_HEIGHT + 4.0;
            text(
                body,
                MARGIN + NAME_WIDTH - 8.0,
                at + 13.0,
                "end",
                &cell.name,
            );
            let ours = cell.rows.iter().find(|row| row.family == Family::Ringside);
            for (row, colour, below) in [
                (ours, OURS, 0.0),
                (cell.best(Family::Qemu), QSD, BAR_HEIGHT + 2.0),
            ] {
                let Some(spread) = row.and_then(self.ratio) else {
                    continue;
                };
                let _ = writeln!(
                    body,
                    "<rect x=\"{:.1}\" y=\"{:.1}\" width=\"{:.1}\" height=\"{BAR_HEIGHT}\" fill=\"{colour}\"/>",
                    x(0.0),
                    at + below,
                    x(spread.median) - x(0.0)
                );
                // From the least to the most.
                let middle = at + below + BAR_HEIGHT / 2.0;
                line(
                    body,
                    (x(spread.min), middle),
                    (x(spread.max), middle),
                    "#333",
                );
            }
        }
        bottom + 2.0 * MARGIN
    }
}

fn legend(body: &mut String, y: f64) {
    for (x, colour, name) in [
        (MARGIN, OURS, "ringside-blk"),
        (MARGIN + 110.0, QSD, "qemu-storage-daemon, its best"),
    ] {
        let _ = writeln!(
            body,
            "<rect x=\"{x:.1}\" y=\"{:.1}\" width=\"10\" height=\"{BAR_HEIGHT}\" fill=\"{colour}\"/>",
            y - BAR_HEIGHT
        );
        text(body, x + 15.0, y, "start", name);
    }
}

/// Writing to a string cannot fail.
fn text(body: &mut String, x: f64, y: f64, anchor: &str, words: &str) {
    let words = words.replace('&', "&amp;").replace('<', "&lt;");
    let _ = writeln!(
        body,
        "<text x=\"{x:.1}\" y=\"{y:.1}\" text-anchor=\"{anchor}\">{words}</text>"
    );
}

fn line(body: &mut String, from: (f64, f64), to: (f64, f64), colour: &str) {
    let _ = writeln!(
        body,
        "<line x1=\"{:.1}\" y1=\"{:.1}\" x2=\"{:.1}\" y2=\"{:.1}\" stroke=\"{colour}\"/>",
        from.0, from.1, to.0, to.1
    );
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bench::cells;
    use crate::bench::measure::Sample;

    #[test]
    fn bars_are_as_long_as_their_ratios() {
        let sample = |iops| Sample {
            iops,
            p50: 1.0,
            p99: 1.0,
            cpu: None,
            waits: None,
        };
        let row = |family, iops| Row {
            name: "<x>".into(),
            family,
            samples: vec![sample(iops)],
            system_calls: None,
            to_raw: None,
            to_qsd: None,
        };
        let rows = vec![row(Family::Ringside, 90.0), row(Family::Qemu, 45.0)];
        let cell = CellOutcome::new(
            &cells::all(false)[0],
            vec![sample(100.0), sample(80.0)],
            rows,
        );
        let picture = draw(&[cell], "a < b");
        assert!(picture.contains("width=\"460.0\""), "{picture}");
        assert!(picture.contains("width=\"230.0\""), "{picture}");
        assert!(picture.contains("a &lt; b"));
        assert_eq!(picture.matches("<svg").count(), 1);
    }
}

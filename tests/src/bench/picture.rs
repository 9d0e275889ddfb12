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
const LEGEND_WIDTH: f64 = 110.0;
/// Colours of ours and of qemu-storage-daemon's bars: apart for the colour-blind, too.
pub(super) const OURS: &str = "#0b6fb8";
const QSD: &str = "#e69f00";

/// Rows of bars under one title.
pub(super) struct Panel {
    pub(super) title: &'static str,
    /// Whose the bars of each row are, with their colours.
    pub(super) legend: Vec<(&'static str, &'static str)>,
    /// The name of each row, and its bars: as many as there are names in the legend, two at most.
    pub(super) rows: Vec<(String, Vec<Option<Spread>>)>,
}

/// Draws the cells that have storage to compare with, then those without, which compare with qemu-storage-daemon.
pub(super) fn of_disks(cells: &[CellOutcome], where_measured: &str) -> String {
    let rows = |stored: bool, ratio: fn(&Row) -> Option<Spread>| {
        cells
            .iter()
            .filter(|cell| cell.raw.is_empty() != stored)
            .map(|cell| {
                let ours = cell.rows.iter().find(|row| row.family == Family::Ringside);
                let bars = [ours, cell.best(Family::Qemu)].map(|row| row.and_then(ratio));
                (cell.name.clone(), bars.to_vec())
            })
            .collect()
    };
    let legend = || {
        vec![
            ("ringside-blk", OURS),
            ("qemu-storage-daemon, its best", QSD),
        ]
    };
    let panels = [
        Panel {
            title: "Requests per second, to those of the storage itself (fio, io_uring)",
            legend: legend(),
            rows: rows(true, |row| row.to_raw),
        },
        Panel {
            title: "Requests per second without storage, to those of qemu-storage-daemon",
            legend: legend(),
            rows: rows(false, |row| row.to_qsd),
        },
    ];
    draw(&panels, where_measured)
}

/// Draws the panels that have rows, one below the other.
pub(super) fn draw(panels: &[Panel], where_measured: &str) -> String {
    let mut body = String::new();
    let mut y = MARGIN;
    for panel in panels.iter().filter(|panel| !panel.rows.is_empty()) {
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

impl Panel {
    /// Draws from `y` on; gives where it ends.
    fn draw(&self, body: &mut String, y: f64) -> f64 {
        let spreads = self.rows.iter().flat_map(|(_, bars)| bars).flatten();
        let most = spreads.map(|spread| spread.max).fold(1.0, f64::max);
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
        self.draw_legend(body, y + 28.0);
        let top = y + HEAD_HEIGHT;
        let count = f64::from(u32::try_from(self.rows.len()).unwrap_or(u32::MAX));
        let bottom = top + count * CELL_HEIGHT;
        let mut mark = 0.0;
        while mark <= full + step / 2.0 {
            let at = x(mark);
            line(body, (at, top), (at, bottom), "#ddd");
            text(body, at, top - 4.0, "middle", &format!("{mark}"));
            mark += step;
        }
        line(body, (x(1.0), top), (x(1.0), bottom), "#444");
        for (index, (name, bars)) in (0_u32..).zip(&self.rows) {
            let at = top + f64::from(index) * CELL_HEIGHT + 4.0;
            text(body, MARGIN + NAME_WIDTH - 8.0, at + 13.0, "end", name);
            let places = [0.0, BAR_HEIGHT + 2.0];
            for ((spread, (_, colour)), below) in bars.iter().zip(&self.legend).zip(places) {
                let Some(spread) = spread else { continue };
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

    fn draw_legend(&self, body: &mut String, y: f64) {
        let mut x = MARGIN;
        for (name, colour) in &self.legend {
            let _ = writeln!(
                body,
                "<rect x=\"{x:.1}\" y=\"{:.1}\" width=\"10\" height=\"{BAR_HEIGHT}\" fill=\"{colour}\"/>",
                y - BAR_HEIGHT
            );
            text(body, x + 15.0, y, "start", name);
            x += LEGEND_WIDTH;
        }
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
        let picture = of_disks(&[cell], "a < b");
        assert!(picture.contains("width=\"460.0\""), "{picture}");
        assert!(picture.contains("width=\"230.0\""), "{picture}");
        assert!(picture.contains("a &lt; b"));
        assert_eq!(picture.matches("<svg").count(), 1);
    }
}

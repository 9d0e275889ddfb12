//! What the measurements come to: medians, and ratios to the limit of each cell.

use serde::{Deserialize, Serialize};

use super::super::outcome::Spread;
use super::super::picture::{self, OURS, Panel};
use super::cells::Cell;
use super::contender::{ALL, Contender};
use super::measure::Sample;

/// One contender in one cell.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(super) struct Row {
    pub(super) name: String,
    /// One of each round.
    pub(super) samples: Vec<Sample>,
    /// Frames per second, as a share of those of the limit in the same round.
    pub(super) to_limit: Option<Spread>,
}

/// One cell.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(super) struct CellOutcome {
    pub(super) name: String,
    /// Bytes of a frame; 0 for a stream, whose bits are counted.
    pub(super) frame: u32,
    /// Who the ratios refer to.
    pub(super) limit: String,
    pub(super) rows: Vec<Row>,
}

impl Row {
    pub(super) fn new(contender: Contender, samples: Vec<Sample>) -> Self {
        Self {
            name: contender.name().into(),
            samples,
            to_limit: None,
        }
    }

    fn median(&self, of: impl Fn(&Sample) -> Option<f64>) -> Option<f64> {
        Spread::of(self.samples.iter().filter_map(of)).map(|spread| spread.median)
    }
}

impl CellOutcome {
    /// Puts ratios to what was measured.
    pub(super) fn new(cell: &Cell, mut rows: Vec<Row>) -> Self {
        let limit = ALL.iter().rev().find(|contender| contender.serves(cell));
        let limit = limit.map_or("", |contender| contender.name());
        let of_limit = rows
            .iter()
            .find(|row| row.name == limit)
            .map(|row| row.samples.clone())
            .unwrap_or_default();
        for row in &mut rows {
            let pairs = row.samples.iter().zip(&of_limit);
            row.to_limit = Spread::of(pairs.map(|(own, limit)| own.rate / limit.rate));
        }
        Self {
            name: cell.name(),
            frame: cell.frame,
            limit: limit.into(),
            rows,
        }
    }

    /// The cell as lines of a table.
    pub(super) fn table(&self) -> String {
        let mut text = format!(
            "{:<28} {:>9} {:>9} {:>18} {:>9} {:>10} {:>9}\n",
            self.name,
            "Mframes/s",
            "Gbit/s",
            format!("to {}", self.limit),
            "CPU ns",
            "s per Gbit",
            "waits"
        );
        // What is said of a frame says nothing of a stream.
        let of_frame = |number: f64| (self.frame > 0).then_some(number);
        let bits = f64::from(self.frame.saturating_mul(8).max(1));
        for row in &self.rows {
            let rate = row.median(|sample| Some(sample.rate)).unwrap_or_default();
            let cpu = row.median(|sample| sample.cpu);
            let number = |number: Option<f64>, digits: usize| {
                number.map_or("-".into(), |number| format!("{number:.digits$}"))
            };
            let ratio = match row.to_limit {
                Some(Spread { median, min, max }) => format!("{median:.2} ({min:.2}..{max:.2})"),
                None => "-".into(),
            };
            let waits = row.median(|sample| sample.waits);
            text.push_str(&format!(
                "  {:<26} {:>9} {:>9.2} {ratio:>18} {:>9} {:>10} {:>9}\n",
                row.name,
                number(of_frame(rate / 1e6), 3),
                rate * bits / 1e9,
                number(cpu.and_then(of_frame), 0),
                // Nanoseconds for a bit are seconds for 10^9 of them.
                number(cpu.map(|cpu| cpu / bits), 3),
                number(waits.and_then(of_frame), 4),
            ));
        }
        text
    }
}

/// The ratios of ours as a picture.
pub(super) fn picture(cells: &[CellOutcome], where_measured: &str) -> String {
    let rows = |limit: Contender| {
        cells
            .iter()
            .filter(|cell| cell.limit == limit.name())
            .filter_map(|cell| {
                let name = Contender::Ringside.name();
                let ours = cell.rows.iter().find(|row| row.name == name)?;
                Some((cell.name.clone(), vec![ours.to_limit]))
            })
            .collect()
    };
    let legend = || vec![(Contender::Ringside.name(), OURS)];
    let panels = [
        Panel {
            title: "Frames per second, to those of DPDK's vhost ports",
            legend: legend(),
            rows: rows(Contender::Dpdk),
        },
        Panel {
            title: "Frames and TCP to and from a TAP, to those of a loop that does nothing else",
            legend: legend(),
            rows: rows(Contender::Bare),
        },
    ];
    picture::draw(&panels, where_measured)
}

#[cfg(test)]
mod tests {
    use super::super::cells;
    use super::*;

    fn row(contender: Contender, rates: &[f64]) -> Row {
        let sample = |&rate: &f64| Sample {
            rate,
            cpu: Some(512.0),
            waits: None,
        };
        Row::new(contender, rates.iter().map(sample).collect())
    }

    #[test]
    fn ratios_refer_to_the_limit_of_the_same_round() {
        let cell = cells::all()[0];
        let rows = vec![
            row(Contender::Ringside, &[1e6, 4e6, 3e6]),
            row(Contender::Dpdk, &[2e6, 4e6, 2e6]),
        ];
        let outcome = CellOutcome::new(&cell, rows);
        assert_eq!(outcome.limit, "dpdk-vhost");
        let ratio = outcome.rows[0].to_limit.unwrap();
        assert_eq!((ratio.min, ratio.median, ratio.max), (0.5, 1.0, 1.5));
        // 512 ns for 512 bits.
        assert!(outcome.table().contains(" 1.000 "), "{}", outcome.table());
        let picture = picture(&[outcome], "here");
        assert!(picture.contains("DPDK"), "{picture}");
        assert!(!picture.contains("a loop"), "{picture}");
    }
}

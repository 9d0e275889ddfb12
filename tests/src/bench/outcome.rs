//! What the measurements come to: medians, ratios and their spread.

use serde::{Deserialize, Serialize};

use super::cells::Cell;
use super::contender::{Contender, Family};
use super::measure::Sample;

/// Median and extremes of some values.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub(super) struct Spread {
    pub(super) median: f64,
    pub(super) min: f64,
    pub(super) max: f64,
}

impl Spread {
    /// `None` if there are no values.
    pub(super) fn of(values: impl IntoIterator<Item = f64>) -> Option<Self> {
        let mut values: Vec<f64> = values.into_iter().collect();
        values.sort_by(f64::total_cmp);
        let middle = values.len() / 2;
        let upper = *values.get(middle)?;
        let median = if values.len().is_multiple_of(2) {
            (upper + *values.get(middle.checked_sub(1)?)?) / 2.0
        } else {
            upper
        };
        Some(Self {
            median,
            min: *values.first()?,
            max: *values.last()?,
        })
    }
}

/// One back-end in one cell.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(super) struct Row {
    pub(super) name: String,
    pub(super) family: Family,
    /// One of each round.
    pub(super) samples: Vec<Sample>,
    /// System calls of the back-end for each request.
    pub(super) system_calls: Option<f64>,
    /// Requests per second, as a share of those of the storage itself before and after.
    pub(super) to_raw: Option<Spread>,
    /// The same, of those of qemu-storage-daemon at its best settings in the same round.
    pub(super) to_qsd: Option<Spread>,
}

/// One cell.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(super) struct CellOutcome {
    pub(super) name: String,
    pub(super) storage: String,
    /// The storage itself: one sample before each round and one after the last.
    pub(super) raw: Vec<Sample>,
    pub(super) rows: Vec<Row>,
}

impl Row {
    /// What was measured of a back-end, without ratios yet.
    pub(super) fn new(contender: &Contender, samples: Vec<Sample>) -> Self {
        Self {
            name: contender.name.clone(),
            family: contender.family,
            samples,
            system_calls: None,
            to_raw: None,
            to_qsd: None,
        }
    }

    fn median(&self, of: impl Fn(&Sample) -> Option<f64>) -> Option<f64> {
        Spread::of(self.samples.iter().filter_map(of)).map(|spread| spread.median)
    }

    /// Median of the requests per second.
    pub(super) fn iops(&self) -> f64 {
        self.median(|sample| Some(sample.iops)).unwrap_or_default()
    }

    /// Median of the latencies that 1 % of the requests exceed, in nanoseconds.
    pub(super) fn p99(&self) -> Option<f64> {
        self.median(|sample| Some(sample.p99))
    }

    /// Median of the processor time for a request, in nanoseconds.
    pub(super) fn cpu(&self) -> Option<f64> {
        self.median(|sample| sample.cpu)
    }
}

impl CellOutcome {
    /// Puts ratios to what was measured.
    pub(super) fn new(cell: &Cell, raw: Vec<Sample>, mut rows: Vec<Row>) -> Self {
        let qsd = rows
            .iter()
            .filter(|row| row.family == Family::Qemu)
            .max_by(|a, b| a.iops().total_cmp(&b.iops()))
            .map(|row| row.samples.clone());
        for row in &mut rows {
            let own = row.samples.iter().map(|sample| sample.iops);
            let around = raw
                .iter()
                .zip(raw.iter().skip(1))
                .map(|(before, after)| (before.iops + after.iops) / 2.0);
            row.to_raw = Spread::of(own.clone().zip(around).map(|(own, raw)| own / raw));
            row.to_qsd = qsd.as_ref().and_then(|qsd| {
                let qsd = qsd.iter().map(|sample| sample.iops);
                Spread::of(own.zip(qsd).map(|(own, qsd)| own / qsd))
            });
        }
        Self {
            name: cell.name(),
            storage: cell.storage.name().into(),
            raw,
            rows,
        }
    }

    /// The best row of a family.
    pub(super) fn best(&self, family: Family) -> Option<&Row> {
        self.rows
            .iter()
            .filter(|row| row.family == family)
            .max_by(|a, b| a.iops().total_cmp(&b.iops()))
    }

    /// The cell as lines of a table.
    pub(super) fn table(&self) -> String {
        let mut text = format!(
            "{:<26} {:>9} {:>18} {:>18} {:>8} {:>9} {:>8} {:>8} {:>8}\n",
            self.name,
            "requests/s",
            "to raw",
            "to qsd",
            "50 % µs",
            "99 % µs",
            "CPU µs",
            "syscalls",
            "waits"
        );
        if let Some(iops) = Spread::of(self.raw.iter().map(|sample| sample.iops)) {
            let median = |of: fn(&Sample) -> f64| {
                Spread::of(self.raw.iter().map(of)).map(|spread| spread.median)
            };
            text.push_str(&line(
                "raw (fio)",
                iops.median,
                Some(Spread {
                    median: 1.0,
                    min: iops.min / iops.median,
                    max: iops.max / iops.median,
                }),
                None,
                [
                    (median(|sample| sample.p50).map(micros), 1),
                    (median(|sample| sample.p99).map(micros), 1),
                    (None, 2),
                    (None, 2),
                    (None, 2),
                ],
            ));
        }
        for row in &self.rows {
            text.push_str(&line(
                &row.name,
                row.iops(),
                row.to_raw,
                row.to_qsd,
                [
                    (row.median(|sample| Some(micros(sample.p50))), 1),
                    (row.p99().map(micros), 1),
                    (row.cpu().map(micros), 2),
                    (row.system_calls, 2),
                    (row.median(|sample| sample.waits), 2),
                ],
            ));
        }
        text
    }
}

fn micros(nanos: f64) -> f64 {
    nanos / 1e3
}

fn line(
    name: &str,
    iops: f64,
    to_raw: Option<Spread>,
    to_qsd: Option<Spread>,
    numbers: [(Option<f64>, usize); 5],
) -> String {
    let ratio = |spread: Option<Spread>| match spread {
        Some(Spread { median, min, max }) => format!("{median:.2} ({min:.2}..{max:.2})"),
        None => "-".into(),
    };
    let mut text = format!(
        "  {name:<24} {iops:>9.0} {:>18} {:>18}",
        ratio(to_raw),
        ratio(to_qsd)
    );
    for ((number, digits), width) in numbers.into_iter().zip([8, 9, 8, 8, 8]) {
        let number = number.map_or("-".into(), |number| format!("{number:.digits$}"));
        text.push_str(&format!(" {number:>width$}"));
    }
    text.push('\n');
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bench::cells;

    fn sample(iops: f64) -> Sample {
        Sample {
            iops,
            p50: 1000.0,
            p99: 2000.0,
            cpu: Some(500.0),
            waits: None,
        }
    }

    fn row(name: &str, family: Family, iops: &[f64]) -> Row {
        Row {
            name: name.into(),
            family,
            samples: iops.iter().map(|&iops| sample(iops)).collect(),
            system_calls: None,
            to_raw: None,
            to_qsd: None,
        }
    }

    #[test]
    fn medians_of_odd_and_even_counts() {
        let median = |values: &[f64]| Spread::of(values.iter().copied()).map(|s| s.median);
        assert_eq!(median(&[]), None);
        assert_eq!(median(&[3.0, 1.0, 2.0]), Some(2.0));
        assert_eq!(median(&[4.0, 1.0, 2.0, 3.0]), Some(2.5));
    }

    #[test]
    fn ratios_are_taken_within_a_round() {
        let raw = [100.0, 300.0, 100.0].map(sample).to_vec();
        let rows = vec![
            row("a", Family::Ringside, &[100.0, 400.0]),
            row("b", Family::Qemu, &[50.0, 100.0]),
            row("c", Family::Qemu, &[10.0, 20.0]),
        ];
        let cell = cells::all(false)[0];
        let outcome = CellOutcome::new(&cell, raw, rows);
        let ours = outcome.best(Family::Ringside).unwrap();
        let spread = |min, median, max| Some(Spread { median, min, max });
        assert_eq!(ours.to_raw, spread(0.5, 1.25, 2.0));
        assert_eq!(ours.to_qsd, spread(2.0, 3.0, 4.0));
        assert_eq!(outcome.best(Family::Qemu).unwrap().name, "b");
        assert_eq!(outcome.table().lines().count(), 5);
    }
}

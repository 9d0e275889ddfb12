//! A page of metrics in Prometheus's text format, version 0.0.4 (prometheus.io/docs/instrumenting/exposition_formats).

use std::fmt::{Display, Write};

/// What kind of number a metric is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Only grows. Its name ends in `_total`.
    Counter,
    /// Goes up and down.
    Gauge,
    /// Numbers of observations up to bounds, `_bucket`, with their `_sum` and `_count`.
    Histogram,
}

/// The page: metrics one after the other, each with all its samples.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Metrics(String);

/// Labels of a sample, by name.
pub type Labels<'a> = &'a [(&'a str, &'a dyn Display)];

impl Metrics {
    /// Begins a metric: all its samples come next.
    pub fn begin(&mut self, name: &str, kind: Kind, help: &str) {
        let kind = match kind {
            Kind::Counter => "counter",
            Kind::Gauge => "gauge",
            Kind::Histogram => "histogram",
        };
        // Writing to a string does not fail.
        let _ = writeln!(self.0, "# HELP {name} {help}\n# TYPE {name} {kind}");
    }

    /// A sample. A histogram's has the name with its suffix.
    pub fn sample(&mut self, name: &str, labels: Labels<'_>, value: impl Display) {
        self.0.push_str(name);
        let mut before = '{';
        for (label, text) in labels {
            let text = text
                .to_string()
                .replace('\\', "\\\\")
                .replace('"', "\\\"")
                .replace('\n', "\\n");
            let _ = write!(self.0, "{before}{label}=\"{text}\"");
            before = ',';
        }
        if !labels.is_empty() {
            self.0.push('}');
        }
        let _ = writeln!(self.0, " {value}");
    }

    /// A metric that has one sample.
    pub fn single(
        &mut self,
        (name, kind, help): (&str, Kind, &str),
        labels: Labels<'_>,
        value: impl Display,
    ) {
        self.begin(name, kind, help);
        self.sample(name, labels, value);
    }

    /// The page's text.
    #[must_use]
    pub fn into_text(self) -> String {
        self.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn samples_follow_their_metric_and_labels_are_escaped() {
        let mut page = Metrics::default();
        page.begin("a_total", Kind::Counter, "What a does.");
        page.sample("a_total", &[("queue", &0), ("path", &"x\"\\\n")], 7);
        page.sample("a_total", &[("queue", &1), ("path", &"y")], 8);
        page.single(("up", Kind::Gauge, "Whether it is."), &[], 1.5);
        assert_eq!(
            page.into_text(),
            "# HELP a_total What a does.\n# TYPE a_total counter\n\
             a_total{queue=\"0\",path=\"x\\\"\\\\\\n\"} 7\na_total{queue=\"1\",path=\"y\"} 8\n\
             # HELP up Whether it is.\n# TYPE up gauge\nup 1.5\n"
        );
    }
}

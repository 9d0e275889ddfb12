//! A TCP stream between two network namespaces, as the kernels of a guest and of its host would have it: iperf3 on both sides.
//!
//! ```text
//!  other namespace                                          this namespace
//!  iperf3 ── TAP ── ringside-load join ══ virtqueues ══ back-end ── TAP ── iperf3
//!  iperf3 ── TAP ── ringside-load join ─────────────────────────── TAP ── iperf3     the limit
//! ```

use std::time::Duration;

use serde_json::Value;

use super::super::load::{Direction, Usage};
use super::cells::Cell;
use super::contender::{Contender, TCP_ADDRESS, TCP_PEER, TCP_TAP};
use super::measure::{Bench, Sample};
use crate::command::{self, bound};
use crate::error::{LabError, Result};
use crate::harness::{Daemon, Namespace, iperf3_server};

/// The TAP that is the other namespace's interface.
const PEER_TAP: &str = "peer0";
/// What passt tells a guest by DHCP: it leaves no segment to be cut to anybody, and has long frames instead.
const PASST_MTU: &str = "65520";
/// How long the two may take to be joined.
const JOIN_LIMIT: Duration = Duration::from_secs(10);
/// How much longer than it measures iperf3 may take.
const MORE: Duration = Duration::from_secs(30);

impl Bench<'_> {
    /// Measures what one stream carries, as received.
    pub(super) fn tcp(
        &self,
        contender: Contender,
        cell: &Cell,
        direction: Direction,
    ) -> Result<Sample> {
        let namespace = Namespace::alone(self.site, "other-namespace")?;
        let process = self.start(contender, cell)?;
        let mut join = bound(self.site.programs.join("ringside-load"));
        join.args(["join", "--tap", PEER_TAP]);
        // The loop is in the back-end's place.
        let front = self.pair().map(|(front, back)| match process {
            Some(_) => front,
            None => back,
        });
        if let Some(processor) = front {
            join.arg("--cpu").arg(processor.to_string());
        }
        match &process {
            Some(process) => join.arg("--socket-path").arg(&process.socket),
            None => join.args(["--to-tap", TCP_TAP]),
        };
        let mut join = Daemon::start(self.site, "join", join)?;
        let log = join.log_path().to_owned();
        join.wait_until("frames pass", JOIN_LIMIT, || {
            std::fs::read(&log).is_ok_and(|text| text.starts_with(b"joined"))
        })?;
        namespace.take(PEER_TAP)?;
        if contender == Contender::Passt {
            namespace.run_line(&format!("ip link set {PEER_TAP} mtu {PASST_MTU}"))?;
        }
        namespace.run_line(&format!("ip address add {TCP_PEER}/24 dev {PEER_TAP}"))?;
        namespace.run_line(&format!("ip link set {PEER_TAP} up"))?;
        let server = || iperf3_server(self.site, None);
        let mut client = self.site.root_program("usr/bin/iperf3");
        client.args(["--client", TCP_ADDRESS, "--json"]);
        // Whole seconds: it knows no others.
        let seconds = self.seconds.ceil().max(1.0);
        client.arg("--time").arg(seconds.to_string());
        client.args((direction == Direction::Rx).then_some("--reverse"));
        let mut client = namespace.enter(&client);
        let pid = process.as_ref().map_or(join.pid(), |process| process.pid());
        let usage = || Usage::of(pid).map_err(|error| LabError::Setup(error.to_string()));
        let limit = Duration::from_secs_f64(seconds) + MORE;
        let mut measure = || {
            let before = usage()?;
            let text = command::run(&mut client, limit)?;
            let used = usage()?.since(before);
            Ok((text, used))
        };
        let (text, used) = match self.processors.split(1) {
            Some((front, back)) => {
                let _server = self.processors.on(back, server)?;
                self.processors.on(front, measure)?
            }
            None => {
                let _server = server()?;
                measure()?
            }
        };
        let (rate, bits) = received(&text).ok_or(LabError::Protocol {
            from: "iperf3",
            text,
        })?;
        Ok(Sample {
            rate,
            cpu: Some(used.cpu as f64 / bits),
            waits: Some(used.voluntary as f64 / bits),
        })
    }
}

/// Bits per second, and bits, that arrived according to iperf3's JSON.
fn received(text: &str) -> Option<(f64, f64)> {
    let result: Value = serde_json::from_str(text).ok()?;
    let sum = result.pointer("/end/sum_received")?;
    let number = |name| sum.get(name).and_then(Value::as_f64);
    Some((number("bits_per_second")?, number("bytes")? * 8.0)).filter(|(_, bits)| *bits > 0.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_arrived_counts() {
        let text = r#"{"end": {"sum_sent": {"bits_per_second": 9e9, "bytes": 9},
                               "sum_received": {"bits_per_second": 8e9, "bytes": 2}}}"#;
        assert_eq!(received(text), Some((8e9, 16.0)));
        assert_eq!(received(r#"{"error": "unable to connect"}"#), None);
    }
}

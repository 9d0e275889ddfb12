//! Logs of a back-end: to standard error, as text or as one JSON object for each event.

use std::fmt;
use std::io::{self, IsTerminal};
use std::time::{SystemTime, UNIX_EPOCH};

use serde_json::{Map, Value};
use tracing::field::{Field, Visit};
use tracing::{Event, Subscriber};
use tracing_subscriber::EnvFilter;
use tracing_subscriber::filter::LevelFilter;
use tracing_subscriber::fmt::format::Writer;
use tracing_subscriber::fmt::{FmtContext, FormatEvent, FormatFields};
use tracing_subscriber::registry::LookupSpan;

use super::daemon::ShellError;
use super::options::{LogFormat, ShellArgs};

/// Names the filter when `--log-level` does not.
const LOG_ENV: &str = "RINGSIDE_LOG";

/// Starts logging for the whole process. A second call changes nothing.
///
/// # Errors
/// [`ShellError::LogFilter`] if the filter cannot be parsed.
pub(super) fn start(args: &ShellArgs) -> Result<(), ShellError> {
    let filter = args
        .log_level
        .clone()
        .or_else(|| std::env::var(LOG_ENV).ok().filter(|text| !text.is_empty()))
        .unwrap_or_else(|| "info".to_owned());
    // That of the command line was checked already.
    let filter = parse(&filter).map_err(|why| ShellError::LogFilter {
        variable: LOG_ENV,
        filter,
        why,
    })?;
    let builder = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(io::stderr)
        .with_ansi(io::stderr().is_terminal());
    // An error means that a subscriber is set already, by whoever runs this as a library.
    let _ = match args.log_format {
        LogFormat::Text => builder.with_target(false).try_init(),
        LogFormat::Json => builder.event_format(JsonLines).try_init(),
    };
    Ok(())
}

/// Lets pass what [`start`] understands.
pub(super) fn check(filter: &str) -> Result<String, String> {
    parse(filter).map(|_| filter.to_owned())
}

fn parse(filter: &str) -> Result<EnvFilter, String> {
    for directive in filter.split(',') {
        // A lone word that is no level would be taken for the name of a part of the program, and silence all others.
        let part = directive.contains(['=', '[', ':']);
        let nothing = directive.trim().is_empty();
        if nothing || !part && directive.trim().parse::<LevelFilter>().is_err() {
            return Err(format!(
                "{directive:?} is no level: use error, warn, info, debug or trace"
            ));
        }
    }
    EnvFilter::builder()
        .parse(filter)
        .map_err(|error| error.to_string())
}

/// `{"time":…,"level":…,"target":…,"message":…, fields…}`, time in seconds since 1970.
struct JsonLines;

impl<S, N> FormatEvent<S, N> for JsonLines
where
    S: Subscriber + for<'a> LookupSpan<'a>,
    N: for<'a> FormatFields<'a> + 'static,
{
    fn format_event(
        &self,
        _: &FmtContext<'_, S, N>,
        mut writer: Writer<'_>,
        event: &Event<'_>,
    ) -> fmt::Result {
        let mut fields = Fields(Map::new());
        let time = SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .unwrap_or_default();
        let meta = event.metadata();
        fields.0.insert("time".into(), time.as_secs_f64().into());
        fields
            .0
            .insert("level".into(), meta.level().as_str().into());
        fields.0.insert("target".into(), meta.target().into());
        event.record(&mut fields);
        writeln!(writer, "{}", Value::Object(fields.0))
    }
}

struct Fields(Map<String, Value>);

impl Visit for Fields {
    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        self.0
            .insert(field.name().into(), format!("{value:?}").into());
    }

    fn record_str(&mut self, field: &Field, value: &str) {
        self.0.insert(field.name().into(), value.into());
    }

    fn record_i64(&mut self, field: &Field, value: i64) {
        self.0.insert(field.name().into(), value.into());
    }

    fn record_u64(&mut self, field: &Field, value: u64) {
        self.0.insert(field.name().into(), value.into());
    }

    fn record_bool(&mut self, field: &Field, value: bool) {
        self.0.insert(field.name().into(), value.into());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn filters_are_levels_or_name_a_part_of_the_program() {
        for good in [
            "info",
            "WARN",
            "off",
            "3",
            "ringside_backends::shell=debug",
            "warn,ringside_backends::blk=trace",
        ] {
            assert_eq!(check(good).as_deref(), Ok(good));
        }
        for bad in ["", "debg", "info,loud", "a=b=c", "a=loud"] {
            assert!(check(bad).is_err(), "{bad:?}");
        }
    }
}

//! `ringside-net` as a switch of several guests.

use std::time::Duration;

use serde_json::Value;

use super::control::Control;
use super::daemon::{Daemon, fresh_name, is_socket};
use crate::ensure;
use crate::error::{LabError, Result};
use crate::site::Site;

/// How long it may take until its sockets are there, on plain hardware.
const READY_LIMIT: Duration = Duration::from_secs(5);

/// A running switch.
#[derive(Debug)]
pub struct Switch {
    daemon: Daemon,
    control: String,
    /// Besides that.
    arguments: Vec<String>,
}

impl Switch {
    /// Starts it with these ports, by name, each with its options, and with further arguments.
    ///
    /// # Errors
    /// Fails, with the end of its log, if it does not come up.
    pub fn start(site: &Site, ports: &[(&str, &str)], arguments: &[&str]) -> Result<Self> {
        let control = fresh_name(site, "switch", "ctl");
        let ports = ports
            .iter()
            .map(|(name, options)| format!("--port={}", Self::port(name, options)));
        let arguments = arguments.iter().map(ToString::to_string);
        let arguments: Vec<String> = ports.chain(arguments).collect();
        let mut command = site.program("ringside-net");
        command.arg("--control-socket").arg(&control);
        command.args(&arguments);
        let mut daemon = Daemon::start(site, "ringside-net", command)?;
        let path = site.scratch.join(&control);
        daemon.wait_until("its sockets", site.limit(READY_LIMIT), || is_socket(&path))?;
        Ok(Self {
            daemon,
            control,
            arguments,
        })
    }

    /// Starts another one with the same arguments, that is to take the place of this one.
    ///
    /// # Errors
    /// Fails if it cannot be started.
    pub fn successor(&self, site: &Site) -> Result<Self> {
        let mut command = site.program("ringside-net");
        command.arg("--take-over").arg(&self.control);
        command.args(&self.arguments);
        Ok(Self {
            daemon: Daemon::start(site, "ringside-net", command)?,
            control: self.control.clone(),
            arguments: self.arguments.clone(),
        })
    }

    /// Its process, to wait for.
    pub fn daemon(&mut self) -> &mut Daemon {
        &mut self.daemon
    }

    /// A port as the command line has it.
    fn port(name: &str, options: &str) -> String {
        let comma = if options.is_empty() { "" } else { "," };
        format!("socket={name}.sock,name={name}{comma}{options}")
    }

    /// What joins a guest to a port: an argument of ringside-vmm.
    #[must_use]
    pub fn net(name: &str) -> String {
        format!("--net=socket={name}.sock,num-queues=2")
    }

    /// Its process.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.daemon.pid()
    }

    /// Its control socket.
    #[must_use]
    pub fn control<'a>(&self, site: &'a Site) -> Control<'a> {
        Control::new(site, &self.control)
    }

    /// Serves one port more.
    ///
    /// # Errors
    /// Fails if it is refused.
    pub fn add(&self, site: &Site, name: &str, options: &str) -> Result<String> {
        let port = Self::port(name, options);
        self.control(site).ask(&["port-add", &port])
    }

    /// What a port has counted, by the counter's name.
    ///
    /// # Errors
    /// Fails if there is no such port, or no such counter.
    pub fn count(&self, site: &Site, port: &str, counter: &str) -> Result<u64> {
        let stats = self.control(site).ask_json(&["stats"])?;
        let ports = stats.get("ports").and_then(Value::as_array);
        let port = ports.and_then(|ports| {
            ports
                .iter()
                .find(|found| found.get("name").is_some_and(|name| name == port))
        });
        let count = port.and_then(|port| port.get(counter)?.as_u64());
        count.ok_or(LabError::Protocol {
            from: "ringside-net",
            text: stats.to_string(),
        })
    }

    /// Asks it to end, by SIGTERM.
    ///
    /// # Errors
    /// Fails if it does not end promptly, or not with success.
    pub fn stop(mut self, site: &Site) -> Result<()> {
        let status = self.daemon.stop(site)?;
        ensure!(status.success(), "the switch ended with {status}");
        Ok(())
    }
}
